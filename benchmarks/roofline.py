"""The picture: bytes of every case against achieved GB/s, under the copy ceiling."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.ticker import FuncFormatter, NullFormatter

from benchmarks.cases import Form
from benchmarks.providers import Provider


@dataclass(frozen=True)
class Look:
    """How a contender is drawn."""

    colour: str
    marker: str
    ours: bool = False


LOOKS = {
    Provider.NAIVE.value: Look("#b13f3f", "v"),
    Provider.BEST_EAGER.value: Look("#e0a43b", "s"),
    Provider.COMPILED.value: Look("#4f86c6", "D"),
    "torch.compile autotuned": Look("#274c77", "d"),
    Provider.OURS.value: Look("#1b7a4b", "o", ours=True),
    "fastcache cuda": Look("#1b7a4b", "o", ours=True),
    "fastcache triton": Look("#7b4fc6", "^", ours=True),
    Provider.OURS_EAGER.value: Look("#a9b4bd", "x"),
}
OTHER = Look("#777777", "P")  # kernels of other projects
STYLES = {"bf16": "-", "fp32": ":"}


class Point(Protocol):
    """What is drawn of a row."""

    form: str
    dtype: str
    provider: str
    bytes: int
    gbps: float


def draw_roofline(
    rows: Sequence[Point], copy_gbps: float, read_gbps: float, subtitle: str, path: Path
) -> None:
    """One panel per form. Lines join the sizes of one contender: solid bf16, dotted fp32."""
    forms = [form for form in Form if any(row.form == form.value for row in rows)]
    columns = min(3, max(1, len(forms)))
    lines = -(-max(1, len(forms)) // columns)
    figure = Figure(figsize=(4.6 * columns, 3.4 * lines + 1.3), layout="constrained")
    axes = figure.subplots(lines, columns, squeeze=False, sharex=True, sharey=True).flat
    achieved = [row.gbps for row in rows] + [copy_gbps, read_gbps]
    for axis, form in zip(axes, forms):
        _panel(axis, [row for row in rows if row.form == form.value], form, copy_gbps, read_gbps)
    axes[0].set_ylim(min(achieved) / 1.4, max(achieved) * 1.4)
    for axis in list(axes)[len(forms) :]:
        axis.set_visible(False)
    figure.suptitle(f"Least bytes of a form over its median time\n{subtitle}", fontsize=11)
    figure.supylabel("achieved GB/s", fontsize=10)
    figure.legend(
        handles=_legend(rows, copy_gbps, read_gbps),
        loc="outside lower center",
        ncols=9,
        fontsize=8,
        frameon=False,
        columnspacing=1.2,
    )
    figure.savefig(path, dpi=120)


def present(rows: Sequence[Point]) -> list[str]:
    """Contenders of some rows, those that LOOKS knows first."""
    found = dict.fromkeys(row.provider for row in rows)
    return [name for name in LOOKS if name in found] + [name for name in found if name not in LOOKS]


def _panel(axis: Axes, rows: Sequence[Point], form: Form, copy_gbps: float, read_gbps: float) -> None:
    axis.set_xscale("log")
    axis.set_yscale("log")
    for provider in present(rows):
        look = LOOKS.get(provider, OTHER)
        for dtype, style in STYLES.items():
            found = sorted(
                (row.bytes / 1e6, row.gbps) for row in rows if row.provider == provider and row.dtype == dtype
            )
            if found:
                fill = look.colour if dtype == "bf16" else "white"
                front = 3 if look.ours else 2
                axis.plot(
                    *zip(*found),
                    style,
                    marker=look.marker,
                    color=look.colour,
                    markerfacecolor=fill,
                    markersize=5,
                    linewidth=1.4,
                    zorder=front,
                )
    axis.axhline(copy_gbps, color="black", linewidth=1.1)
    axis.axhline(read_gbps, color="black", linewidth=0.9, linestyle="--")
    axis.set_title(f"{form.value}\n", fontsize=10, loc="left", fontweight="bold")
    axis.text(0, 1.02, form.meaning, transform=axis.transAxes, fontsize=7)
    axis.set_xlabel("least bytes, MB", fontsize=8)
    axis.grid(True, which="both", linewidth=0.3, color="#cccccc")
    axis.xaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
    axis.yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
    axis.yaxis.set_minor_formatter(
        FuncFormatter(lambda value, _: f"{value:g}" if f"{value:g}"[0] in "25" else "")
    )
    axis.xaxis.set_minor_formatter(NullFormatter())
    axis.tick_params(which="both", labelsize=8, labelbottom=True, labelleft=True)


def _legend(rows: Sequence[Point], copy_gbps: float, read_gbps: float) -> list[Line2D]:
    looks = {provider: LOOKS.get(provider, OTHER) for provider in present(rows)}
    contenders = [
        Line2D([], [], color=look.colour, marker=look.marker, label=provider)
        for provider, look in looks.items()
    ]
    dtypes = [
        Line2D([], [], color="#555555", linestyle=style, label=dtype)
        for dtype, style in STYLES.items()
        if any(row.dtype == dtype for row in rows)
    ]
    lines = [
        Line2D([], [], color="black", label=f"copy, {copy_gbps:.1f}"),
        Line2D([], [], color="black", linestyle="--", label=f"read, {read_gbps:.1f}"),
    ]
    return contenders + dtypes + lines
