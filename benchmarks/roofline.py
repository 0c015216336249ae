"""The picture: bytes of every case against achieved GB/s, under the copy ceiling."""

from collections.abc import Sequence
from pathlib import Path

from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.ticker import FuncFormatter, NullFormatter

from benchmarks.cases import Form
from benchmarks.contest import Row

LOOKS = {  # colour and marker of a contender
    "naive": ("#b13f3f", "v"),
    "best eager": ("#e0a43b", "s"),
    "torch.compile": ("#4f86c6", "D"),
    "torch.compile autotuned": ("#274c77", "d"),
    "fastcache": ("#1b7a4b", "o"),
    "fastcache cuda": ("#1b7a4b", "o"),
    "fastcache triton": ("#7b4fc6", "^"),
    "fastcache eager": ("#a9b4bd", "x"),
}
STYLES = {"bf16": "-", "fp32": ":"}
PLAIN = FuncFormatter(lambda value, _: f"{value:g}")


def draw_roofline(found: dict, subtitle: str, path: Path) -> None:
    """A panel per form. Lines join the sizes of one contender; the horizontal ones are copy and read."""
    rows = [row for row in found["rows"] if row["part"] == "forms"]
    forms = [form for form in Form if any(row["form"] == form.value for row in rows)]
    columns, lines = min(3, max(1, len(forms))), -(-max(1, len(forms)) // 3)
    figure = Figure(figsize=(4.6 * columns, 3.4 * lines + 1.3), layout="constrained")
    axes = list(figure.subplots(lines, columns, squeeze=False, sharex=True, sharey=True).flat)
    ceilings = {"copy": (found["copy_gbps"], "-"), "read": (found["read_gbps"], "--")}
    for axis, form in zip(axes, forms, strict=False):
        _panel(axis, [row for row in rows if row["form"] == form.value], form)
        for gbps, style in ceilings.values():
            axis.axhline(gbps, color="black", linewidth=1, linestyle=style)
    achieved = [row["gbps"] for row in rows] + [gbps for gbps, _ in ceilings.values()]
    axes[0].set_ylim(min(achieved) / 1.4, max(achieved) * 1.4)
    for axis in axes[len(forms) :]:
        axis.set_visible(False)
    figure.suptitle(f"Least bytes of a form over its median time\n{subtitle}", fontsize=11)
    figure.supylabel("achieved GB/s", fontsize=10)
    looks = {name: look for name, look in LOOKS.items() if any(row["contender"] == name for row in rows)}
    handles = [Line2D([], [], color=look[0], marker=look[1], label=name) for name, look in looks.items()]
    for name, style in STYLES.items():
        handles.append(Line2D([], [], color="#555555", linestyle=style, label=name))
    for name, (gbps, style) in ceilings.items():
        handles.append(Line2D([], [], color="black", linestyle=style, label=f"{name}, {gbps:.1f}"))
    figure.legend(handles=handles, loc="outside lower center", ncols=9, fontsize=8, frameon=False)
    figure.savefig(path, dpi=120)


def _panel(axis: Axes, rows: Sequence[Row], form: Form) -> None:
    axis.set(xscale="log", yscale="log")
    for name, (colour, marker) in LOOKS.items():
        own = [row for row in rows if row["contender"] == name]
        for dtype, style in STYLES.items():
            points = sorted((row["bytes"] / 1e6, row["gbps"]) for row in own if row["dtype"] == dtype)
            if points:
                look = {"color": colour, "marker": marker, "markersize": 5, "linewidth": 1.4}
                look["markerfacecolor"] = colour if dtype == "bf16" else "white"
                axis.plot(*zip(*points, strict=True), style, **look)
    axis.set_title(f"{form.value}\n", fontsize=10, loc="left", fontweight="bold")
    axis.text(0, 1.02, form.meaning, transform=axis.transAxes, fontsize=7)
    axis.set_xlabel("least bytes, MB", fontsize=8)
    axis.grid(True, which="both", linewidth=0.3, color="#cccccc")
    axis.xaxis.set(major_formatter=PLAIN, minor_formatter=NullFormatter())
    axis.yaxis.set_major_formatter(PLAIN)
    axis.tick_params(which="both", labelsize=8, labelbottom=True, labelleft=True)
