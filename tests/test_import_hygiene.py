"""What importing fastcache needs, what it does not, and whom it leaves alone."""

import shutil
from pathlib import Path

import pytest
from processes import ROOT, copied_package, succeeds
from tiers import thinned

# makes packages look as if they were not installed, to `import` and to importlib.util.find_spec
BLOCK = "import sys; sys.modules.update(dict.fromkeys({names!r}))\n"
OPTIONAL = (
    "triton",
    "diffusers",
    "transformers",
    "accelerate",
    "safetensors",
    "huggingface_hub",
    "matplotlib",
    "typer",
    "rich",
    "tqdm",
    "PIL",
    "kernels",
    "hypothesis",
    "pytest",
    "peft",
)
USE = """
import torch, fastcache
x = torch.ones(1, 2, 4)
stream = fastcache.ResidualStream(x)
stream.add(x)
assert stream.value().eq(2).all()
"""


def test_it_imports_and_runs_with_torch_and_numpy_alone() -> None:
    succeeds(BLOCK.format(names=OPTIONAL) + USE)


@pytest.mark.slow
def test_it_imports_no_optional_package_by_itself() -> None:
    succeeds(f"""
import sys, torch
before = set(sys.modules)
{USE}
imported = {{name.split(".")[0] for name in set(sys.modules) - before}}
unwanted = imported & {set(OPTIONAL)!r}
assert not unwanted, unwanted
""")


@pytest.mark.slow
def test_it_does_not_import_the_parts_that_need_extras() -> None:
    succeeds(
        USE
        + """
import sys
parts = ("workshop.studies", "glyphs", "models", "cli")
unwanted = {"fastcache." + part for part in parts} & set(sys.modules)
assert not unwanted, unwanted
"""
    )


@pytest.mark.slow
def test_importing_it_prints_nothing_and_starts_no_thread() -> None:
    assert (
        succeeds("""
import threading, torch
before = threading.active_count()
import fastcache
assert threading.active_count() == before
""")
        == ""
    )


@pytest.mark.slow
def test_importing_it_changes_no_setting_of_torch() -> None:
    succeeds("""
import torch
def settings():
    state = torch.random.get_rng_state().sum().item()
    precision = torch.get_float32_matmul_precision()
    return torch.get_num_threads(), torch.get_default_dtype(), torch.is_grad_enabled(), precision, state
before = settings()
import fastcache
assert settings() == before
""")


@pytest.mark.slow
def test_the_kernels_folder_is_never_the_package_that_hugging_face_calls_kernels() -> None:
    succeeds("""
import pathlib, kernels
assert kernels.__file__ and "site-packages" in pathlib.Path(kernels.__file__).parts, kernels
import fastcache
import kernels as again
assert again is kernels and hasattr(kernels, "get_kernel")
""")


def test_without_hugging_face_kernels_our_folder_is_at_most_an_empty_namespace() -> None:
    assert not (ROOT / "kernels" / "__init__.py").exists()
    succeeds("""
import sys
sys.path = [entry for entry in sys.path if "site-packages" not in entry]
try:
    import kernels
except ModuleNotFoundError:
    pass
else:
    assert kernels.__file__ is None, kernels
""")


@pytest.mark.parametrize(
    "order",
    thinned([("fastcache", "host"), ("host", "fastcache")], [("host", "fastcache")]),
    ids=["fastcache-first", "host-first"],
)
@pytest.mark.parametrize(
    ("package", "model"), [("transformers", "BertModel"), ("diffusers", "DiTTransformer2DModel")]
)
@pytest.mark.slow
def test_hosts_still_import_from_the_root_of_the_repository(
    package: str, model: str, order: tuple[str, str]
) -> None:
    imports = {"fastcache": "import fastcache", "host": f"from {package} import {model}"}
    succeeds(
        "\n".join(imports[name] for name in order)
        + f"\nassert {model}.__module__.startswith({package!r})\nimport kernels\nassert kernels.__file__"
    )


@pytest.mark.slow
@pytest.mark.skipif(
    not (ROOT / "fastcache" / "kernels").is_symlink(),
    reason="a source distribution holds a copy of kernels/ where the repository has a link",
)
def test_fastcache_kernels_is_a_namespace_package() -> None:
    succeeds("""
import pathlib, fastcache, fastcache.kernels as kernels
assert kernels.__file__ is None and kernels.__name__ == "fastcache.kernels"
place = pathlib.Path(next(iter(kernels.__path__))).resolve()
assert place == (pathlib.Path(fastcache.__file__).resolve().parent.parent / "kernels"), place
""")


@pytest.mark.slow
def test_it_is_found_from_a_copy_as_an_installed_package_would_be(tmp_path: Path) -> None:
    folder = copied_package(tmp_path)
    (folder / "elsewhere").mkdir()
    succeeds(
        f"import sys; sys.path.insert(0, {str(folder)!r})\n{USE}\nimport fastcache.kernels\nassert"
        f" {str(folder)!r} in fastcache.__file__",
        folder / "elsewhere",
    )


@pytest.mark.slow
def test_a_file_that_is_called_fastcache_kernels_can_be_imported_through_the_namespace(
    tmp_path: Path,
) -> None:
    folder = copied_package(tmp_path)
    kernels = folder / "fastcache" / "kernels"
    shutil.rmtree(kernels, ignore_errors=True)
    kernels.mkdir()
    (kernels / "probe.py").write_text("value = 7\n")
    succeeds("import fastcache.kernels.probe as probe; assert probe.value == 7", folder)
