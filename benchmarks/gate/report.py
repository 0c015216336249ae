"""`make report`: tables and rooflines of the runs of the gate that are committed, rows that FastCache lost included.

    python -m benchmarks.gate.report [--results benchmarks/results] [--out out/report]

One `<device>-<date>.json` gives one page and one picture. A dry run measures nothing and is refused.
"""

import argparse
import json
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from benchmarks.cases import Form
from benchmarks.gate.results import FORMAT
from benchmarks.report import NOISY, bold_below_one, percent, table, times
from benchmarks.roofline import draw_roofline

RESULTS = Path(__file__).resolve().parents[1] / "results"
OURS = ("fastcache cuda", "fastcache triton")
RATIOS = {
    "vs_naive": "naive",
    "vs_best_eager": "best eager",
    "vs_compile": "torch.compile",
    "vs_autotuned": "torch.compile autotuned",
}
TARGETS = {
    "trunk": 0.87,
    "update": 0.87,
    "update-modulate": 0.82,
    "modulate": 0.82,
}  # share of the copy bandwidth, from LARGE bytes up
LARGE = 60e6


NOTHING = "no GPU result is committed yet, so there is nothing to draw: run benchmarks/gpu_gate.sh on a machine with a GPU and commit its JSON as benchmarks/results/<device>-<date>.json"


class BadResults(Exception):
    """A file among the results is none."""


@dataclass(frozen=True)
class Point:
    """A row of the gate, as the roofline draws it."""

    form: str
    dtype: str
    provider: str
    bytes: int
    gbps: float


def runs(folder: Path) -> dict[str, dict]:
    """The committed runs by name. Raises BadResults for a file that is none."""
    found = {}
    for path in sorted(folder.glob("*.json")):
        try:
            content = json.loads(path.read_text())
        except ValueError as reason:
            raise BadResults(f"{path.name}: is not JSON ({reason})") from reason
        if not isinstance(content, dict) or content.get("format") != FORMAT or "stages" not in content:
            raise BadResults(f"{path.name}: expected a result of benchmarks/gpu_gate.sh of format {FORMAT}")
        if content["dry_run"]:
            raise BadResults(f"{path.name}: is a dry run, which measures nothing; remove it from the results")
        found[path.stem] = content
    return found


def page(name: str, content: dict) -> list[str]:
    """Everything about one run, in the order in which a reader asks."""
    lines = [f"# {name}", "", *head(content)]
    for section in (targets, summary, losses, every_row, blocks, steps, graphs, absences, checks):
        lines += section(content)
    return lines


def head(content: dict) -> list[str]:
    """Where and when."""
    machine, stages = content["machine"], content["stages"]
    versions = ", ".join(
        f"{package} {version}" for package, version in machine.get("versions", {}).items() if version
    )
    copies = [
        burst["copy_gbps"]
        for key in ("bandwidth", "bandwidth_after")
        if (burst := stages.get("kernels", {}).get(key))
    ]
    lines = [
        f"{'; '.join(machine.get('gpus', [])) or 'GPU unknown'}. {versions}. Begun {content.get('begun', '?')}.",
        "",
    ]
    if copies:
        lines += [
            f"Copy bandwidth of this run, bytes read plus written: {max(copies):.0f} GB/s ({', '.join(f'{copy:.0f}' for copy in copies)}); datasheet {stages['kernels'].get('datasheet_gbps') or 'unknown'} GB/s.",
            "",
        ]
    return lines + [
        *table(
            ("stage", "status", "seconds", "reason"),
            [
                (
                    stage,
                    found.get("status"),
                    found.get("wall_s", "-"),
                    found.get(
                        "reason", found.get("skipped", "") if isinstance(found.get("skipped"), str) else ""
                    ),
                )
                for stage, found in stages.items()
            ],
        )
    ]


def rows_of(content: dict) -> list[dict]:
    """All rows of the microbenchmarks."""
    return content["stages"].get("kernels", {}).get("cases", [])


def targets(content: dict) -> list[str]:
    """The bandwidth that is to be reached, and whether it is; a missed one is bold."""
    cells = []
    for row in rows_of(content):
        if (
            row["contender"] in OURS
            and row["form"] in TARGETS
            and row["bytes"] >= LARGE
            and row["dtype"] == "bf16"
        ):
            met = row["share_of_copy"] >= TARGETS[row["form"]]
            cells.append(
                (
                    row["form"],
                    row["size"],
                    row["contender"],
                    percent(row["share_of_copy"]),
                    percent(TARGETS[row["form"]]),
                    "met" if met else "**missed**",
                )
            )
    return (
        [
            "## Targets from 60 MB up",
            "",
            *table(("form", "size", "contender", "of copy", "target", ""), cells),
        ]
        if cells
        else []
    )


def summary(content: dict) -> list[str]:
    """FastCache in every case, and how it compares."""
    cells = [
        (row["form"], row["size"], row["dtype"], row["contender"], f"{row['bytes'] / 1e6:.1f}", us(row), f"{row['gbps'] / 1e3:.2f}", percent(row["share_of_copy"]), *(bold_below_one(row[ratio]) for ratio in RATIOS))
        for row in rows_of(content) if row["contender"] in OURS
    ]  # fmt: skip
    return (
        [
            "## Operators: FastCache in every case",
            "",
            "Bold: FastCache is the slower one. ~: p90 beyond 1.5 x p10.",
            "",
            *table(
                (
                    "form",
                    "size",
                    "dtype",
                    "contender",
                    "MB",
                    "us",
                    "TB/s",
                    "of copy",
                    *(f"x {other}" for other in RATIOS.values()),
                ),
                cells,
            ),
        ]
        if cells
        else []
    )


def losses(content: dict) -> list[str]:
    """Every comparison that FastCache lost."""
    ours = [row for row in rows_of(content) if row["contender"] in OURS]
    compared = [
        (row[ratio], other, row) for row in ours for ratio, other in RATIOS.items() if row[ratio] is not None
    ]
    peers = [
        (other["timing"]["median_us"] / row["timing"]["median_us"], other["contender"], row)
        for row in ours
        for other in rows_of(content)
        if other["case"] == row["case"] and other["contender"] not in (*OURS, *RATIOS.values())
    ]
    lost = sorted((one for one in compared + peers if one[0] < 1), key=lambda one: one[0])
    lines = [
        f"- {row['case']}, {row['contender']}: {other} is {1 / ratio:.2f}x faster"
        for ratio, other, row in lost
    ]
    return (
        [f"## Lost: {len(lost)} of {len(compared) + len(peers)} comparisons", "", *(lines or ["none"]), ""]
        if ours
        else []
    )


def every_row(content: dict) -> list[str]:
    """All columns of all contenders, form by form."""
    headings = (
        "size",
        "dtype",
        "contender",
        "MB",
        "cache",
        "us",
        "p10",
        "p90",
        "TB/s",
        "of copy",
        "of datasheet",
        "host us",
        "launches",
        "extra MB",
        "error",
    )
    lines = []
    for form in Form:
        cells = [
            (
                row["size"], row["dtype"], row["contender"], f"{row['bytes'] / 1e6:.1f}", row["cache"], us(row), f"{row['timing']['p10_us']:.1f}", f"{row['timing']['p90_us']:.1f}", f"{row['gbps'] / 1e3:.2f}",
                percent(row["share_of_copy"]), percent(row["share_of_datasheet"]), f"{row['host_us']:.1f}", dash(row["launches"]), "-" if row["extra_bytes"] is None else f"{row['extra_bytes'] / 1e6:.1f}", f"{row['error']:.0e}",
            )
            for row in rows_of(content) if row["form"] == form.value
        ]  # fmt: skip
        if cells:
            lines += [f"## {form.value}: {form.meaning}", "", *table(headings, cells)]
    return lines


def blocks(content: dict) -> list[str]:
    """Partial blocks and choices of tokens."""
    rows = content["stages"].get("kernels", {}).get("blocks", [])
    headings = (
        "work",
        "size",
        "K",
        "contender",
        "MB",
        "us",
        "of copy",
        "TFLOP/s",
        "host us",
        "launches",
        "x naive",
        "x compile",
        "error",
    )
    cells = [
        (
            row["work"], row["size"], row["rows"], row["contender"], f"{row['bytes'] / 1e6:.1f}", us(row), percent(row["share_of_copy"]), f"{1e-6 * row['flops'] / row['timing']['median_us']:.0f}" if row["flops"] else "-",
            f"{row['host_us']:.1f}", dash(row["launches"]), *((bold_below_one if row["contender"].startswith("fastcache") else times)(row[ratio]) for ratio in ("vs_naive", "vs_compile")), f"{row['error']:.0e}",
        )
        for row in rows
    ]  # fmt: skip
    return (
        ["## Partial blocks, and the choice of tokens for 28 layers", "", *table(headings, cells)]
        if rows
        else []
    )


def steps(content: dict) -> list[str]:
    """Generations and steps, end to end."""
    found = content["stages"].get("end_to_end", {})
    rows = found.get("ways", [])
    if not rows:
        return []
    kinds = list(dict.fromkeys(kind for row in rows for kind in row["steps"]))
    size = lambda row: (row.get("pixels", 256), row["batch"])  # noqa: E731
    uncached = {size(row): row["generation"]["median_us"] for row in rows if row["way"] == "uncached"}
    cells = []
    for row in rows:
        measured = uncached[size(row)] / row["generation"]["median_us"] if size(row) in uncached else None
        ideal = row.get("ideal")
        cells.append((
            *size(row), row["way"], f"{row['generation']['median_us'] / 1e3:.0f}", times(measured), times(ideal), times(None if measured is None or ideal is None else measured / ideal),
            *(cell for kind in kinds for cell in ((f"{row['steps'][kind]['median_us'] / 1e3:.2f}", dash(row["launches"].get(kind))) if kind in row["steps"] else ("-", "-"))),
            "-" if row["peak_bytes"] is None else f"{row['peak_bytes'] / 1e9:.2f}", "-" if row["error"] is None else f"{row['error']:.0e}",
        ))  # fmt: skip
    headings = (
        "pixels",
        "images",
        "way",
        "generation ms",
        "x uncached",
        "ideal x",
        "measured / ideal",
        *(heading for kind in kinds for heading in (f"{kind} step ms", "launches")),
        "peak GB",
        "error",
    )
    return [
        f"## End to end: {found['model']}, {found['num_steps']} steps, {found['policy']}",
        "",
        *table(headings, cells),
    ]


def graphs(content: dict) -> list[str]:
    """The reuse step alone, against the floor of its trunk."""
    rows = content["stages"].get("end_to_end", {}).get("graphs", [])
    cells = [
        (
            row["batch"],
            f"{row['replay']['median_us']:.1f}",
            f"{row['floor_us']:.1f}",
            f"{row['target_us']:.1f}",
            "met" if row["replay"]["median_us"] <= row["target_us"] else "**missed**",
            dash(row["launches"]),
        )
        for row in rows
    ]
    return (
        [
            "## The reuse step in a CUDA graph",
            "",
            *table(("images", "us", "floor us", "target us", "", "launches"), cells),
        ]
        if cells
        else []
    )


def absences(content: dict) -> list[str]:
    """What was not measured, and why."""
    by_reason: dict[tuple[str, str], list[str]] = {}
    kernels = content["stages"].get("kernels", {})
    for one in (*kernels.get("absent", []), *kernels.get("blocks_absent", [])):
        by_reason.setdefault((one["provider"] or "all contenders", one["reason"]), []).append(one["case"])
    for one in content["stages"].get("end_to_end", {}).get("absent", []):
        by_reason.setdefault((one["way"], one["reason"]), []).append(
            f"{one.get('pixels', 256)} px, batch {one['batch']}"
        )
    return (
        [
            "## Not measured",
            "",
            *(f"- {who}: {reason}: {', '.join(what)}" for (who, reason), what in by_reason.items()),
            "",
        ]
        if by_reason
        else []
    )


def checks(content: dict) -> list[str]:
    """Tests and sanitizers."""
    tests, sanitizer = (content["stages"].get(stage, {}) for stage in ("tests", "sanitizer"))
    lines = (
        [f"- tests: {', '.join(f'{count} {outcome}' for outcome, count in tests['counts'].items())}"]
        if "counts" in tests
        else []
    )
    lines += [f"- failed: {one['test']}: {one['error']}" for one in tests.get("failures", [])]
    lines += [f"- {name}: {verdict}" for name, verdict in sanitizer.get("verdicts", {}).items()]
    return ["## Checks", "", *lines, ""] if lines else []


def us(row: dict) -> str:
    """The median, marked if it is noisy."""
    timing = row["timing"]
    return f"{timing['median_us']:.1f}{'~' if timing['p90_us'] > NOISY * timing['p10_us'] else ''}"


def dash(value: object) -> object:
    """The value, or a dash."""
    return "-" if value is None else value


def draw(name: str, content: dict, path: Path) -> bool:
    """The roofline of a run; False if it has no microbenchmarks."""
    rows = [
        Point(row["form"], row["dtype"], row["contender"], row["bytes"], row["gbps"])
        for row in rows_of(content)
    ]
    bandwidth = content["stages"].get("kernels", {}).get("bandwidth")
    if not rows or not bandwidth:
        return False
    draw_roofline(
        rows,
        bandwidth["copy_gbps"],
        bandwidth["read_gbps"],
        f"{'; '.join(content['machine'].get('gpus', [])) or name}, {content.get('begun', '')[:10]}",
        path,
    )
    return True


def main(arguments: Sequence[str] | None = None) -> None:
    """The command."""
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.gate.report", description="Draw what benchmarks/gpu_gate.sh measured."
    )
    parser.add_argument("--results", type=Path, default=RESULTS)
    parser.add_argument("--out", type=Path, default=Path("out/report"))
    options = parser.parse_args(arguments)
    try:
        found = runs(options.results)
    except BadResults as reason:
        sys.exit(f"report: {reason}")
    if not found:
        print(f"report: {NOTHING}")
        return
    options.out.mkdir(parents=True, exist_ok=True)
    for name, content in found.items():
        drawn = draw(name, content, options.out / f"{name}.png")
        picture = [f"![roofline]({name}.png)", ""] if drawn else []
        (options.out / f"{name}.md").write_text("\n".join([*page(name, content), *picture]) + "\n")
        print(f"{name}.md{f' and {name}.png' if drawn else ', without a picture: no microbenchmark in it'}")


if __name__ == "__main__":
    main()
