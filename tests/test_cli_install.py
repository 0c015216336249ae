"""Installing: without a compiler, with build isolation, from a source distribution, in an empty folder."""

import os
import shutil
import subprocess
import sys
import tarfile
from pathlib import Path

import pytest
from processes import ROOT, copied_package, run_python, succeeds

SOURCES = (
    "setup.py",
    "pyproject.toml",
    "CMakeLists.txt",
    "MANIFEST.in",
    "LICENSE",
    "README.md",
    "csrc",
    "kernels",
)


@pytest.fixture
def sources(tmp_path: Path) -> Path:
    """The package and what its build needs, with no build in it."""
    folder = copied_package(tmp_path / "sources", compiled=False)
    for name in SOURCES:
        if (ROOT / name).is_dir():
            shutil.copytree(ROOT / name, folder / name, ignore=shutil.ignore_patterns("__pycache__"))
        elif (ROOT / name).exists():
            shutil.copy(ROOT / name, folder / name)
    return folder


def build(folder: Path, **environment: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "setup.py", "build_ext", "--inplace"],
        cwd=folder,
        env=os.environ | environment,
        capture_output=True,
        text=True,
    )


def test_without_a_compiler_the_build_succeeds_and_doctor_says_what_was_skipped(sources: Path) -> None:
    done = build(sources, CXX="no-such-compiler")
    assert done.returncode == 0, done.stderr
    assert "compiled kernels skipped: no C++ compiler was found" in done.stdout
    told = succeeds(
        """
import fastcache, torch
x = torch.ones(1, 2, 4)
assert torch.equal(fastcache.ops.residual_update(x, [x]).x, x + x)
from typer.testing import CliRunner
from fastcache.cli.app import app
print(CliRunner().invoke(app, ["doctor"]).output)
""",
        sources,
    )
    told = " ".join(told.split())
    assert "skipped: no C++ compiler was found" in told and "looked for no-such-compiler" in told
    assert "install the package again" in told


def test_cuda_kernels_that_are_asked_for_are_not_skipped_silently(sources: Path) -> None:
    done = build(sources, CXX="no-such-compiler", FASTCACHE_CUDA="1")
    assert done.returncode == 1 and "FASTCACHE_CUDA=1, but no C++ compiler was found" in done.stderr


def test_a_build_in_isolation_names_isolation_as_the_cause(tmp_path: Path) -> None:
    done = run_python(f"""
import importlib.util, runpy, sys
find = importlib.util.find_spec
importlib.util.find_spec = lambda name, *rest: None if name == "torch" else find(name, *rest)
sys.path.append({str(tmp_path / "pip-build-env-x1" / "overlay")!r})
sys.argv = ["setup.py", "build_ext", "--inplace"]
runpy.run_path("setup.py", run_name="__main__")
""")
    assert done.returncode == 1
    assert "pip builds in an isolated environment" in done.stderr
    assert "Fix: pip install --no-build-isolation ." in done.stderr


def test_an_installed_package_says_how_to_get_the_shipped_models(tmp_path: Path) -> None:
    pytest.importorskip("typer")
    pytest.importorskip("diffusers")
    folder = copied_package(tmp_path / "site")
    (tmp_path / "empty").mkdir()
    code = (
        f"import sys; sys.path.insert(0, {str(folder)!r}); from fastcache.cli.app import app; app(['sample'])"
    )
    done = run_python(code, tmp_path / "empty")
    assert done.returncode == 2 and done.stderr.count("\n") == 1, done.stderr
    assert "set FASTCACHE_WEIGHTS to the folder weights/ of a checkout" in done.stderr


@pytest.mark.skipif(not (ROOT / "weights").is_dir(), reason="the trained models are not here")
def test_a_source_distribution_holds_the_tests_and_what_they_read(tmp_path: Path) -> None:
    folder = tmp_path / "tree"
    shutil.copytree(
        ROOT,
        folder,
        symlinks=True,
        ignore=shutil.ignore_patterns(
            ".git", ".venv", "build", "out", "*.so", "__pycache__", ".*_cache", "*.egg-info"
        ),
    )
    done = subprocess.run(
        [sys.executable, "setup.py", "-q", "sdist", "-d", str(tmp_path / "dist")],
        cwd=folder,
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    with tarfile.open(next((tmp_path / "dist").glob("*.tar.gz"))) as archive:
        names = {name.partition("/")[2] for name in archive.getnames()}
    wanted = {path.relative_to(ROOT).as_posix() for path in (ROOT / "tests").rglob("*.py")}
    wanted |= {"weights/glyph-dit.safetensors", "benchmarks/run.py", "Makefile", "csrc/schema.def"}
    wanted |= {"fastcache/backends/schema.def", "kernels/residual_update.py", "fastcache/__main__.py"}
    assert wanted <= names, wanted - names
    assert not [name for name in names if name.endswith((".so", ".pyc"))]
