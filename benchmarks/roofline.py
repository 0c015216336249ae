"""The picture: bytes of every case against achieved GB/s, under the copy ceiling."""
from collections.abc import Sequence
from pathlib import Path

from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.ticker import FuncFormatter, NullFormatter

from benchmarks.cases import Form
from benchmarks.forms import Row
from benchmarks.providers import Provider

COLOURS = {Provider.NAIVE: "#b13f3f", Provider.BEST_EAGER: "#e0a43b", Provider.COMPILED: "#4f86c6", Provider.OURS: "#1b7a4b", Provider.OURS_EAGER: "#a9b4bd"}
MARKERS = {Provider.NAIVE: "v", Provider.BEST_EAGER: "s", Provider.COMPILED: "D", Provider.OURS: "o", Provider.OURS_EAGER: "x"}
STYLES = {"bf16": "-", "fp32": ":"}


def draw_roofline(rows: Sequence[Row], copy_gbps: float, read_gbps: float, subtitle: str, path: Path) -> None:
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
    figure.legend(handles=_legend(rows, copy_gbps, read_gbps), loc="outside lower center", ncols=9, fontsize=8, frameon=False, columnspacing=1.2)
    figure.savefig(path, dpi=120)


def _panel(axis: Axes, rows: Sequence[Row], form: Form, copy_gbps: float, read_gbps: float) -> None:
    axis.set_xscale("log")
    axis.set_yscale("log")
    for provider in Provider:
        for dtype, style in STYLES.items():
            found = sorted((row.bytes / 1e6, row.gbps) for row in rows if row.provider == provider.value and row.dtype == dtype)
            if found:
                fill = COLOURS[provider] if dtype == "bf16" else "white"
                front = 3 if provider is Provider.OURS else 2
                axis.plot(*zip(*found), style, marker=MARKERS[provider], color=COLOURS[provider], markerfacecolor=fill, markersize=5, linewidth=1.4, zorder=front)
    axis.axhline(copy_gbps, color="black", linewidth=1.1)
    axis.axhline(read_gbps, color="black", linewidth=0.9, linestyle="--")
    axis.set_title(f"{form.value}\n", fontsize=10, loc="left", fontweight="bold")
    axis.text(0, 1.02, form.meaning, transform=axis.transAxes, fontsize=7)
    axis.set_xlabel("least bytes, MB", fontsize=8)
    axis.grid(True, which="both", linewidth=0.3, color="#cccccc")
    axis.xaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
    axis.yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
    axis.yaxis.set_minor_formatter(FuncFormatter(lambda value, _: f"{value:g}" if f"{value:g}"[0] in "25" else ""))
    axis.xaxis.set_minor_formatter(NullFormatter())
    axis.tick_params(which="both", labelsize=8, labelbottom=True, labelleft=True)


def _legend(rows: Sequence[Row], copy_gbps: float, read_gbps: float) -> list[Line2D]:
    present = [provider for provider in Provider if any(row.provider == provider.value for row in rows)]
    contenders = [Line2D([], [], color=COLOURS[provider], marker=MARKERS[provider], label=provider.value) for provider in present]
    dtypes = [Line2D([], [], color="#555555", linestyle=style, label=dtype) for dtype, style in STYLES.items() if any(row.dtype == dtype for row in rows)]
    lines = [Line2D([], [], color="black", label=f"copy, {copy_gbps:.1f}"), Line2D([], [], color="black", linestyle="--", label=f"read, {read_gbps:.1f}")]
    return contenders + dtypes + lines
