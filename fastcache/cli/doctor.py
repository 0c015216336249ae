"""`fastcache doctor`."""

import platform
from typing import Annotated

import numpy
import torch
from rich.console import Console
from rich.table import Table
from typer import Exit, Option

from fastcache import backends
from fastcache.backends import tuning
from fastcache.backends.library import OPERATORS, cpu_capability
from fastcache.ops.verify import Verdict, verify
from fastcache.version import __version__


def doctor(
    verify: Annotated[
        bool, Option(help="Check every operator and backend on this machine against float64.")
    ] = False,
) -> None:
    """Show what was built, what runs where, and why the rest does not."""
    console = Console()
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


def _libraries() -> Table:
    table = Table(title="compiled libraries", title_justify="left")
    for heading in ("library", "loaded", "what it is, or why not"):
        table.add_column(heading, overflow="fold")
    for name, library in backends.LIBRARIES.items():
        detail = (
            f"instruction set {cpu_capability(library)}"
            if name == "cpu" and library.loaded
            else library.reason
        )
        table.add_row(library.path.name, "yes" if library.loaded else "no", detail)
    try:
        from fastcache import _C  # type: ignore[attr-defined]  # compiled, without a stub
    except ImportError:
        table.add_row("_C", "no", "build information was not built (optional)")
    else:
        table.add_row(
            "_C",
            "yes",
            ", ".join(
                f"{key} {value}" for key, value in {**_C.build(), "this processor": _C.cpu_features()}.items()
            ),
        )
    return table


def _backends() -> Table:
    table = Table(title="backends", title_justify="left")
    for heading in ("backend", "runs", "what it is, or why not"):
        table.add_column(heading, overflow="fold")
    for name, status in backends.status().items():
        table.add_row(name, "yes" if status.available else "no", status.reason)
    return table


def _operators() -> Table:
    """Which backend runs each operator, and of the others, which cannot run here and which have no kernel of
    it.
    """
    devices = ["cpu"] + (["cuda"] if torch.cuda.is_available() else [])
    table = Table(title="operators", title_justify="left")
    for heading in ("operator", *(f"on {device}" for device in devices), *backends.NAMES):
        table.add_column(heading, overflow="fold")
    for operator in OPERATORS:
        chosen = [backends.chosen_name(torch.device(device), operator=operator) for device in devices]
        table.add_row(operator, *chosen, *(_standing(name, operator) for name in backends.NAMES))
    return table


def _standing(name: str, operator: str) -> str:
    if operator not in backends.IMPLEMENTS[name]:
        return "no kernel of it"
    return "yes" if backends.status()[name].available else "cannot run here"


def _verified(console: Console) -> bool:
    devices = [torch.device("cpu")] + ([torch.device("cuda")] if torch.cuda.is_available() else [])
    failures = 0
    for device in devices:
        table = Table(
            title=(
                f"error against float64 on {device}, as a multiple of the eager definition's (at most 1.1; -"
                " where a backend has no kernel)"
            ),
            title_justify="left",
        )
        verdicts = list(verify(device))
        columns = list(dict.fromkeys((verdict.backend, verdict.dtype) for verdict in verdicts))
        for heading in ("form", *(f"{backend}\n{dtype}" for backend, dtype in columns)):
            table.add_column(heading)
        for form in dict.fromkeys(verdict.form for verdict in verdicts):
            row = {(v.backend, v.dtype): v for v in verdicts if v.form == form}
            table.add_row(form, *(_mark(row.get(c)) for c in columns))
        failures += sum(not verdict.passed for verdict in verdicts)
        console.print(table)
        met = backends.take_index_errors(device)
        failures += bool(met)
        console.print(f"indices out of range that kernels met on {device}: {met or 'none'}")
    console.print("every check passed" if not failures else f"[red]{failures} checks failed[/]")
    return not failures


def _mark(verdict: Verdict | None) -> str:
    if verdict is None:
        return "-"
    return f"[{'green' if verdict.passed else 'red'}]{verdict.error or f'{verdict.ratio:.2f}'}[/]"
