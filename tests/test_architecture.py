"""The layers of ARCHITECTURE.md: each imports only from those below it."""

import ast
from pathlib import Path

import pytest

import fastcache

ROOT = Path(fastcache.__file__).parent
# from the bottom up; a name stands for a module or a package
LAYERS = (
    {"errors", "extras", "kernels"},
    {"backends"},
    {"ops"},
    {"plan"},
    {"stream"},
    {"policies"},
    {"hosts"},
    {"engine"},
    {"calibration"},
    {"compat"},
    {"models"},
    {"workshop"},
    {"schedule", "glyphs"},
    {"cli"},
)


def layer_of(name: str) -> int:
    found = [level for level, names in enumerate(LAYERS) if name in names]
    assert found, f"{name} has no layer: add it to ARCHITECTURE.md and to this test"
    return found[0]


def modules() -> list[Path]:
    return [
        path
        for path in sorted(ROOT.rglob("*.py"))
        if path.relative_to(ROOT).parts[0] != "kernels" and path != ROOT / "__init__.py"
    ]


@pytest.mark.parametrize("path", modules(), ids=lambda path: str(path.relative_to(ROOT)))
def test_a_module_imports_only_from_layers_below(path: Path) -> None:
    own = path.relative_to(ROOT).parts[0].removesuffix(".py")
    for node in ast.walk(ast.parse(path.read_text())):
        if (
            not isinstance(node, ast.ImportFrom)
            or node.module is None
            or not node.module.startswith("fastcache")
        ):
            continue
        parts = node.module.split(".")
        used = (
            [parts[1]]
            if len(parts) > 1
            else [
                alias.name
                for alias in node.names
                if (ROOT / alias.name).exists() or (ROOT / f"{alias.name}.py").exists()
            ]
        )
        for name in used:
            assert layer_of(name) <= layer_of(own), (
                f"{path.relative_to(ROOT)} (layer {own}) imports fastcache.{name}, which is above it"
            )
