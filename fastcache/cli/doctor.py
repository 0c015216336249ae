"""`fastcache doctor`."""

import importlib
import platform
from typing import TYPE_CHECKING, Annotated, Any

from typer import Exit, Option

from fastcache.cli.tables import plain_table
from fastcache.version import __version__

if TYPE_CHECKING:
    from rich.console import Console
    from rich.table import Table

    from fastcache.ops.verify import Verdict


def doctor(
    verify: Annotated[
        bool, Option("--verify", help="Check every operator and backend on this machine against float64.")
    ] = False,
) -> None:
    """Show what was built, what runs where, and why the rest does not."""
    import numpy
    import torch
    from rich.console import Console

    from fastcache.backends import tuning

    console = Console(highlight=False)
    console.print(
        f"fastcache {__version__}, torch {torch.__version__}, numpy {numpy.__version__}, Python"
        f" {platform.python_version()}, {platform.machine()}"
    )
    console.print(_libraries())
    console.print(_backends())
    console.print(_operators())
    console.print(
        f"launch configurations of GPU kernels: {len(tuning.table())} measured entries (FASTCACHE_TUNING),"
        " the heuristics for everything else"
    )
    if verify and not _verified(console):
        raise Exit(1)


def _libraries() -> "Table":
    from fastcache import backends
    from fastcache.backends.library import cpu_capability

    table = plain_table(
        "compiled libraries",
        "",
        ("library", "loaded", "what it is, or why not"),
        text=("loaded", "what it is, or why not"),
        whole=("library",),
    )
    for name, library in backends.LIBRARIES.items():
        detail = (
            f"instruction set {cpu_capability(library)}"
            if name == "cpu" and library.loaded
            else library.reason
        )
        table.add_row(library.path.stem, "yes" if library.loaded else "no", detail)
    try:
        _C: Any = importlib.import_module("fastcache._C")  # compiled, without a stub
    except ImportError:
        table.add_row("_C", "no", "build information was not built (optional)")
    else:
        facts = {**_C.build(), "this processor": _C.cpu_features()}
        table.add_row("_C", "yes", ", ".join(f"{key} {value}" for key, value in facts.items()))
    return table


def _backends() -> "Table":
    from fastcache import backends

    table = plain_table(
        "backends",
        "",
        ("backend", "runs", "what it is, or why not"),
        text=("runs", "what it is, or why not"),
        whole=("backend",),
    )
    for name, status in backends.status().items():
        table.add_row(name, "yes" if status.available else "no", status.reason)
    return table


def _operators() -> "Table":
    """Which backend runs each operator, and of the others, which cannot run here and which have no kernel of
    it.
    """
    import torch

    from fastcache import backends
    from fastcache.backends.library import OPERATORS

    devices = ["cpu"] + (["cuda"] if torch.cuda.is_available() else [])
    headings = [f"on {device}" for device in devices]
    table = plain_table(
        "operators",
        "",
        ("operator", *headings, *backends.NAMES),
        text=(*headings, *backends.NAMES),
        whole=("operator", *headings),
    )
    for operator in OPERATORS:
        chosen = [backends.chosen_name(torch.device(device), operator=operator) for device in devices]
        table.add_row(operator, *chosen, *(_standing(name, operator) for name in backends.NAMES))
    return table


def _standing(name: str, operator: str) -> str:
    from fastcache import backends

    if operator not in backends.IMPLEMENTS[name]:
        return "no kernel of it"
    return "yes" if backends.status()[name].available else "cannot run here"


def _verified(console: "Console") -> bool:
    import torch

    from fastcache import backends
    from fastcache.ops.verify import verify

    devices = [torch.device("cpu")] + ([torch.device("cuda")] if torch.cuda.is_available() else [])
    failures = 0
    for device in devices:
        verdicts = list(verify(device))
        console.print(verdict_table(verdicts, device.type))
        for verdict in verdicts:
            if verdict.error:
                console.print(f"[red]{verdict.form}, {verdict.backend}, {verdict.dtype}:[/] {verdict.error}")
        failures += sum(not verdict.passed for verdict in verdicts)
        met = backends.take_index_errors(device)
        failures += bool(met)
        console.print(f"indices out of range that kernels met on {device}: {met or 'none'}")
    console.print("every check passed" if not failures else f"[red]{failures} checks failed[/]")
    return not failures


def verdict_table(verdicts: "list[Verdict]", device: str) -> "Table":
    """A line per form and backend, with the limit that applies to it."""
    dtypes = list(dict.fromkeys(verdict.dtype for verdict in verdicts))
    table = plain_table(
        f"error against float64 on {device}, as a multiple of the eager definition's",
        "a check passes if no multiple is above the limit of its line",
        ("form", "backend", *dtypes, "limit"),
        text=("backend",),
    )
    lines: dict[tuple[str, str], dict[str, Verdict]] = {}
    for verdict in verdicts:
        lines.setdefault((verdict.form, verdict.backend), {})[verdict.dtype] = verdict
    for (form, backend), found in lines.items():
        limit = next(iter(found.values())).allowed
        table.add_row(form, backend, *(_mark(found.get(dtype)) for dtype in dtypes), f"{limit:.1f}")
    return table


def _mark(verdict: "Verdict | None") -> str:
    if verdict is None:
        return "-"
    text = "error" if verdict.error else f"{verdict.ratio:.2f}"
    return f"[{'green' if verdict.passed else 'red'}]{text}[/]"
