"""The picture: bytes of every case against achieved GB/s, under the copy ceiling."""

from collections.abc import Mapping, Sequence
from pathlib import Path

from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.ticker import FuncFormatter, NullFormatter

from benchmarks.cases import Form

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
OTHER = ("#777777", "P")  # kernels of other projects
STYLES = {"bf16": "-", "fp32": ":"}
PLAIN = FuncFormatter(lambda value, _: f"{value:g}")
Row = Mapping[str, object]


def draw_roofline(rows: Sequence[Row], copy_gbps: float, read_gbps: float, subtitle: str, path: Path) -> None:
    """One panel per form. Lines join the sizes of one contender: solid bf16, dotted fp32."""
    forms = [form for form in Form if any(row["form"] == form.value for row in rows)]
    columns = min(3, max(1, len(forms)))
    lines = -(-max(1, len(forms)) // columns)
    figure = Figure(figsize=(4.6 * columns, 3.4 * lines + 1.3), layout="constrained")
    axes = list(figure.subplots(lines, columns, squeeze=False, sharex=True, sharey=True).flat)
    achieved = [row["gbps"] for row in rows] + [copy_gbps, read_gbps]
    for axis, form in zip(axes, forms, strict=False):
        _panel(axis, [row for row in rows if row["form"] == form.value], form)
        axis.axhline(copy_gbps, color="black", linewidth=1.1)
        axis.axhline(read_gbps, color="black", linewidth=0.9, linestyle="--")
    axes[0].set_ylim(min(achieved) / 1.4, max(achieved) * 1.4)
    for axis in axes[len(forms) :]:
        axis.set_visible(False)
    figure.suptitle(f"Least bytes of a form over its median time\n{subtitle}", fontsize=11)
    figure.supylabel("achieved GB/s", fontsize=10)
    handles = [
        Line2D([], [], color=_look(name)[0], marker=_look(name)[1], label=name) for name in _present(rows)
    ]
    used = [dtype for dtype in STYLES if any(row["dtype"] == dtype for row in rows)]
    handles += [Line2D([], [], color="#555555", linestyle=STYLES[dtype], label=dtype) for dtype in used]
    handles += [Line2D([], [], color="black", label=f"copy, {copy_gbps:.1f}")]
    handles += [Line2D([], [], color="black", linestyle="--", label=f"read, {read_gbps:.1f}")]
    figure.legend(handles=handles, loc="outside lower center", ncols=9, fontsize=8, frameon=False)
    figure.savefig(path, dpi=120)


def _look(contender: str) -> tuple[str, str]:
    return LOOKS.get(contender, OTHER)


def _present(rows: Sequence[Row]) -> list[str]:
    found = dict.fromkeys(row["contender"] for row in rows)
    return [name for name in LOOKS if name in found] + [name for name in found if name not in LOOKS]


def _panel(axis: Axes, rows: Sequence[Row], form: Form) -> None:
    axis.set_xscale("log")
    axis.set_yscale("log")
    for contender in _present(rows):
        colour, marker = _look(contender)
        own = [row for row in rows if row["contender"] == contender]
        for dtype, style in STYLES.items():
            found = sorted((row["bytes"] / 1e6, row["gbps"]) for row in own if row["dtype"] == dtype)
            if found:
                look = {"color": colour, "marker": marker, "markersize": 5, "linewidth": 1.4}
                fill, front = colour if dtype == "bf16" else "white", 3 if "fastcache" in contender else 2
                axis.plot(*zip(*found, strict=True), style, markerfacecolor=fill, zorder=front, **look)
    axis.set_title(f"{form.value}\n", fontsize=10, loc="left", fontweight="bold")
    axis.text(0, 1.02, form.meaning, transform=axis.transAxes, fontsize=7)
    axis.set_xlabel("least bytes, MB", fontsize=8)
    axis.grid(True, which="both", linewidth=0.3, color="#cccccc")
    axis.xaxis.set_major_formatter(PLAIN)
    axis.yaxis.set_major_formatter(PLAIN)
    axis.xaxis.set_minor_formatter(NullFormatter())
    axis.tick_params(which="both", labelsize=8, labelbottom=True, labelleft=True)
