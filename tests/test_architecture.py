"""The folders of ARCHITECTURE.md import only from those below them, and no import goes in a circle."""

import ast
from collections.abc import Iterator
from pathlib import Path

import pytest

import fastcache

ROOT = Path(fastcache.__file__).parent
# from the bottom up: a folder or file of the package imports from itself and from what stands before it
ORDER = (
    "errors", "version", "extras", "files", "kernels", "backends", "ops", "plan", "stream", "policies",
    "hosts", "engine", "calibration", "compat", "models", "workshop", "schedule", "glyphs", "cli",
    "public", "__init__", "__main__",
)  # fmt: skip


def modules() -> dict[str, Path]:
    """Every module of the package by its dotted name, kernels (a link to the top level) included."""
    found = {}
    for path in sorted(ROOT.rglob("*.py")):
        parts = path.relative_to(ROOT).with_suffix("").parts
        found[".".join(("fastcache", *(parts[:-1] if parts[-1] == "__init__" else parts)))] = path
    return found


MODULES = modules()


def place(name: str) -> str:
    """The folder or file of the package root that a module belongs to."""
    parts = name.split(".")
    return parts[1] if len(parts) > 1 else "__init__"


def imported(path: Path) -> Iterator[str]:
    """Modules of fastcache that any statement of a file imports, in functions and under TYPE_CHECKING too."""
    return imported_by(path.read_text())


def imported_by(source: str) -> Iterator[str]:
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names if alias.name.split(".")[0] == "fastcache")
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, "relative imports are not used here"
            if (node.module or "").split(".")[0] == "fastcache":
                for alias in node.names:
                    whole = f"{node.module}.{alias.name}"
                    if whole != "fastcache._C":  # compiled: facts about the build
                        yield whole if whole in MODULES else str(node.module)


@pytest.mark.parametrize("name", MODULES)
def test_a_module_imports_only_from_its_own_folder_and_those_below(name: str) -> None:
    own = ORDER.index(place(name))
    above = [other for other in imported(MODULES[name]) if ORDER.index(place(other)) > own]
    assert not above, f"{name} imports {above}, which stand above it"


def test_no_import_goes_in_a_circle() -> None:
    edges = {name: sorted({*imported(path)} & {*MODULES} - {name}) for name, path in MODULES.items()}
    edges["fastcache"] = []  # its names are those of its parts; who imports it is checked by folder
    done: set[str] = set()

    def visit(name: str, way: tuple[str, ...]) -> None:
        assert name not in way, f"imports in a circle: {' -> '.join((*way[way.index(name) :], name))}"
        if name not in done:
            for other in edges[name]:
                visit(other, (*way, name))
            done.add(name)

    for name in edges:
        visit(name, ())


def test_every_part_of_the_package_has_a_place_in_the_order() -> None:
    assert {place(name) for name in MODULES} <= set(ORDER)


def test_the_package_root_holds_at_most_eight_files() -> None:
    assert len(list(ROOT.glob("*.py"))) <= 8


@pytest.mark.parametrize(
    "statement",
    [
        "import fastcache.cli.main",
        "from fastcache.cli import main",
        "def f():\n    from fastcache.cli.main import main",
        "if TYPE_CHECKING:\n    import fastcache.cli.main as m",
    ],
)
def test_every_form_of_import_is_seen(statement: str) -> None:
    assert [place(name) for name in imported_by(statement)] == ["cli"]
