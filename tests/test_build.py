"""The build: what the libraries contain, what a wheel ships, and what a failed build says.

Builds happen in a copy of the sources, without optimisation and for one instruction set: fast.
"""

import ctypes
import os
import re
import shutil
import subprocess
import sys
import sysconfig
import venv
import zipfile
from pathlib import Path

import pytest
import torch
from processes import ROOT, succeeds

import fastcache
from fastcache.backends import library

CPU = fastcache.backends.LIBRARIES["cpu"]
FAST = "-DCMAKE_CXX_FLAGS_RELEASE=-O0 -DFASTCACHE_COMPILES_AVX2=OFF -DFASTCACHE_COMPILES_AVX512=OFF"
SOURCES = (
    "setup.py",
    "pyproject.toml",
    "CMakeLists.txt",
    "MANIFEST.in",
    "LICENSE",
    "README.md",
    "csrc",
    "kernels",
    "fastcache",
)
SMOKE = """
import torch, fastcache
x = torch.randn(1, 3, 20)
with fastcache.use_backend("cpp"):
    assert torch.equal(fastcache.ops.residual_update(x, [x]).x, x + x)
print(fastcache.__file__)
"""

compiled = pytest.mark.skipif(not CPU.loaded, reason=f"the compiled CPU kernels are not there: {CPU.reason}")
needs_nm = pytest.mark.skipif(shutil.which("nm") is None, reason="nm (binutils) is not installed")


def run(command: list[str], folder: Path = ROOT, **environment: str) -> str:
    done = subprocess.run(
        [str(part) for part in command],
        cwd=folder,
        env=os.environ | environment,
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, f"{command}\n{done.stdout[-3000:]}\n{done.stderr[-3000:]}"
    return done.stdout


def cmake() -> str:
    return (
        shutil.which("cmake", path=sysconfig.get_path("scripts"))
        or shutil.which("cmake")
        or pytest.skip("cmake is not installed")
    )


def undefined_symbols(path: Path) -> list[str]:
    """Names that a library expects from others, without their version."""
    return [
        line.split()[-1].split("@")[0] for line in run(["nm", "-D", "--undefined-only", path]).splitlines()
    ]


@pytest.fixture(scope="module")
def sources(tmp_path_factory) -> Path:
    """A copy of what a build needs, with no build in it."""
    folder = tmp_path_factory.mktemp("sources")
    for name in SOURCES:
        if (ROOT / name).is_dir():
            shutil.copytree(
                ROOT / name,
                folder / name,
                symlinks=True,
                ignore=shutil.ignore_patterns("*.so", "__pycache__"),
            )
        elif (ROOT / name).exists():
            shutil.copy(ROOT / name, folder / name)
    return folder


# --- what was built -----------------------------------------------------------------------------


@compiled
def test_the_library_names_the_schema_that_it_was_built_from():
    handle = ctypes.CDLL(str(CPU.path))
    handle.fastcache_schema_digest.restype = ctypes.c_char_p
    assert handle.fastcache_schema_digest().decode() == library.schema_digest()


@compiled
def test_the_build_facts_agree_with_the_library():
    build_facts = pytest.importorskip(
        "fastcache._C", reason="fastcache._C was not built: pybind11 was missing"
    ).build()
    assert build_facts["schema_digest"] == library.schema_digest()
    assert library.cpu_capability(CPU) in build_facts["cpu_capabilities"]
    assert build_facts["torch"] and build_facts["compiler"]
    assert build_facts["cuda"] == bool(build_facts["cuda_archs"])


@compiled
@needs_nm
def test_the_library_uses_the_stable_interface_of_pytorch_only():
    names = undefined_symbols(CPU.path)
    assert any(name.startswith("aoti_torch_") for name in names)
    unstable = [
        name for name in names if re.match(r"_ZNK?(2at|3c10|5torch)|_ZT[IVS]N(2at|3c10|5torch)", name)
    ]
    assert not unstable


@compiled
@needs_nm
def test_the_library_exports_its_own_functions_only():
    names = {line.split()[-1] for line in run(["nm", "-D", "--defined-only", CPU.path]).splitlines()}
    exported = {
        name
        for name in names
        if not name.startswith(("_edata", "_end", "__bss_start", "_init", "_fini", "_ZNSt", "_ZSt", "_ZZNSt"))
    }
    assert exported == {
        "fastcache_schema_digest",
        "fastcache_cpu_capability",
        "fastcache_cpu_capability_error",
    }


@compiled
def test_the_library_contains_no_path_of_the_machine_that_built_it():
    content = CPU.path.read_bytes()
    assert str(ROOT).encode() not in content
    assert str(Path(torch.__file__).parent).encode() not in content


@needs_nm
@pytest.mark.parametrize("capability", ["avx512", "avx2"])
@pytest.mark.slow
def test_kernels_share_no_inline_function_with_other_instruction_sets(capability, tmp_path):
    if not re.match("x86_64|AMD64", os.uname().machine):
        pytest.skip("only x86-64 has several instruction sets here")
    march = {"avx512": "x86-64-v4", "avx2": "x86-64-v3"}[capability]
    compiler = shutil.which(os.environ.get("CXX", "c++")) or pytest.skip("no C++ compiler")
    source, compiled_file = ROOT / "csrc" / "cpu" / f"isa_{capability}.cpp", tmp_path / "kernels.o"
    run(
        [
            compiler,
            "-std=c++20",
            "-O0",
            f"-march={march}",
            "-w",
            f"-I{ROOT / 'csrc'}",
            f"-I{ROOT / 'csrc' / 'include'}",
            "-c",
            source,
            "-o",
            compiled_file,
        ]
    )
    shared = [line for line in run(["nm", "-C", compiled_file]).splitlines() if re.search(r" [WVu] ", line)]
    assert not shared, "the linker may merge these with copies for another instruction set"


# --- building ------------------------------------------------------------------------------------


@pytest.mark.slow
def test_a_wheel_holds_the_package_and_its_libraries_and_works_where_it_is_unpacked(sources, tmp_path):
    run(
        [
            sys.executable,
            "-m",
            "pip",
            "wheel",
            "--no-build-isolation",
            "--no-deps",
            "--no-index",
            "-w",
            tmp_path,
            sources,
        ],
        CMAKE_ARGS=FAST,
        FASTCACHE_CUDA="0",
    )
    wheel = next(tmp_path.glob("fastcache_dit-*.whl"))
    with zipfile.ZipFile(wheel) as archive:
        names = archive.namelist()
        archive.extractall(tmp_path / "unpacked")
        assert archive.read("fastcache/backends/schema.def") == (ROOT / "csrc" / "schema.def").read_bytes()
    assert "fastcache/lib/libfastcache_cpu.so" in names
    assert "fastcache/py.typed" in names  # type checkers of those who install it read our annotations
    kernels = {f"fastcache/kernels/{path.name}" for path in (ROOT / "kernels").glob("*.py")}
    assert kernels <= set(names)
    assert {name.split("/")[0] for name in names if ".dist-info/" not in name} == {"fastcache"}
    assert Path(succeeds(SMOKE, folder=tmp_path / "unpacked").strip()).is_relative_to(tmp_path)


@pytest.mark.slow
def test_the_source_tree_works_after_an_in_place_build(sources):
    run([sys.executable, "setup.py", "build_ext", "--inplace"], sources, CMAKE_ARGS=FAST, FASTCACHE_CUDA="0")
    assert Path(succeeds(SMOKE, folder=sources).strip()).is_relative_to(sources)


@pytest.mark.full
def test_an_editable_install_works_from_anywhere(sources, tmp_path):
    environment = tmp_path / "environment"
    venv.create(environment, symlinks=True, with_pip=False)
    python = environment / "bin" / "python"
    inner = Path(run([python, "-c", "import sysconfig; print(sysconfig.get_path('purelib'))"]).strip())
    (inner / "outer.pth").write_text(sysconfig.get_path("purelib"))  # torch and the build tools
    run(
        [python, "-m", "pip", "install", "--no-build-isolation", "--no-deps", "--no-index", "-e", sources],
        CMAKE_ARGS=FAST,
        FASTCACHE_CUDA="0",
    )
    assert Path(run([python, "-c", SMOKE], tmp_path).strip()).is_relative_to(sources)


def test_a_build_without_torch_says_what_to_do():
    code = """
import importlib.util, runpy, sys
find = importlib.util.find_spec
importlib.util.find_spec = lambda name, *rest: None if name == "torch" else find(name, *rest)
sys.argv = ["setup.py", "build_ext", "--inplace"]
runpy.run_path("setup.py", run_name="__main__")
"""
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 1
    assert "torch is not installed in the build environment" in done.stderr
    assert "pip install --no-build-isolation ." in done.stderr


@pytest.mark.parametrize("value", ["yes", "2"])
@pytest.mark.slow
def test_an_unknown_value_of_fastcache_cuda_is_refused(value, tmp_path):
    done = subprocess.run(
        [
            cmake(),
            "-S",
            ROOT,
            "-B",
            tmp_path,
            f"-DPython_EXECUTABLE={sys.executable}",
            f"-DFASTCACHE_CUDA={value}",
        ],
        capture_output=True,
        text=True,
    )
    assert done.returncode != 0
    assert f"FASTCACHE_CUDA: expected 1, 0 or auto, got {value}" in done.stderr


@pytest.mark.slow
def test_the_build_says_what_it_skipped_and_why(tmp_path):
    told = run(
        [cmake(), "-S", ROOT, "-B", tmp_path, f"-DPython_EXECUTABLE={sys.executable}", "-DFASTCACHE_CUDA=0"]
    )
    assert "skipped the CUDA kernels: FASTCACHE_CUDA=0" in told
    assert f"torch {torch.__version__}" in told
