"""`make report`: tables and rooflines of the runs of the gate that are committed, lost rows included.

    python -m benchmarks.gate.report [--results benchmarks/results] [--out out/report]

One `<device>-<date>.json` gives one page and one picture. A dry run measures nothing and is refused.
"""

import argparse
import json
import sys
from collections.abc import Sequence
from pathlib import Path

from benchmarks.cases import Form
from benchmarks.gate.stage import FORMAT, ROOT
from benchmarks.roofline import draw_roofline
from benchmarks.tables import (
    APART,
    COLUMNS,
    NOISY,
    OURS,
    RATIOS,
    absences,
    case_notes,
    lost,
    microseconds,
    notes,
    section,
    shown,
    table,
)

RESULTS = ROOT / "benchmarks" / "results"
LARGE = 60e6  # bytes from which a target holds
TARGETS = {
    "trunk": 0.87,
    "update": 0.87,
    "update-modulate": 0.82,
    "modulate": 0.82,
}  # share of the copy bandwidth
NOTHING = (
    "no GPU result is committed yet, so there is nothing to draw: run benchmarks/gpu_gate.sh on a "
    "machine with a GPU and commit its JSON as benchmarks/results/<device>-<date>.json"
)
SUMMARY = (
    "form",
    "size",
    "dtype",
    "contender",
    "MB",
    "us",
    "GB/s",
    "of copy",
    *(f"x {other}" for other in RATIOS),
)
CASE = (
    "size",
    "dtype",
    "contender",
    "MB",
    "cache",
    "us",
    "p10",
    "p90",
    "CPU us",
    "GB/s",
    "of copy",
    "of datasheet",
)
COST = ("host us", "launches", "extra MB", "error")
BLOCK = ("work", "size", "K", "contender", "MB", "us", "CPU us", "of copy", "GFLOP/s", "host us", "launches")


class BadResults(Exception):
    """A file among the results is none."""


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
    kernels, whole = (content["stages"].get(stage, {}) for stage in ("kernels", "end_to_end"))
    cases, blocks = kernels.get("cases", []), kernels.get("blocks", [])
    ours = [row for row in cases if row["contender"] in OURS]
    bold = f"Bold: FastCache is the slower one. ~: p90 beyond {NOISY} x p10."
    lines = [f"# {name}", "", *head(content), *targets(ours)]
    lines += section("Operators: FastCache in every case", SUMMARY, ours, bold) + lost(cases)
    ways, beyond = compared(whole.get("ways", []))
    read = kernels.get("bandwidth", {}).get("read_gbps", 0.0)
    lines += notes(case_notes([*cases, *blocks], read) + beyond)
    for form in Form:
        rows = [row for row in cases if row["form"] == form.value]
        lines += section(f"{form.value}: {form.meaning}", (*CASE, *COST), rows)
    heading = "Partial blocks, and the choice of tokens for 28 layers"
    lines += section(heading, (*BLOCK, "x naive", "x torch.compile", "error"), blocks)
    if ways:
        heading = f"End to end: {whole['model']}, {whole['num_steps']} steps, {whole['policy']}"
        lines += section(heading, way_columns(ways), ways)
    lines += section("The reuse step in a CUDA graph", GRAPH, whole.get("graphs", []))
    missing = [*kernels.get("absent", []), *kernels.get("blocks_absent", [])]
    absent = [(one["provider"], one["reason"], one["case"]) for one in missing]
    for one in whole.get("absent", []):
        absent.append((one["way"], one["reason"], f"{one.get('pixels', 256)} px, batch {one['batch']}"))
    return lines + absences(absent) + checks(content)


def head(content: dict) -> list[str]:
    """Where and when, and what became of every stage."""
    machine, stages = content["machine"], content["stages"]
    versions = machine.get("versions", {}).items()
    packages = ", ".join(f"{package} {version}" for package, version in versions if version)
    gpus = "; ".join(machine.get("gpus", [])) or "GPU unknown"
    lines = [f"{gpus}. {packages}. Begun {content.get('begun', '?')}.", ""]
    bursts = [stages.get("kernels", {}).get(key) for key in ("bandwidth", "bandwidth_after")]
    copies = [burst["copy_gbps"] for burst in bursts if burst]
    if copies:
        each, vendor = ", ".join(f"{copy:.0f}" for copy in copies), stages["kernels"].get("datasheet_gbps")
        copied = f"Copy bandwidth of this run, bytes read plus written: {max(copies):.0f} GB/s ({each})"
        lines += [f"{copied}; datasheet {vendor or 'unknown'} GB/s.", ""]
    rows = []
    for stage, found in stages.items():
        skipped = found.get("skipped", "")
        reason = found.get("reason", skipped if isinstance(skipped, str) else "")
        rows.append(
            {"stage": stage, "status": found.get("status"), "seconds": found.get("wall_s"), "reason": reason}
        )
    return lines + table(("stage", "status", "seconds", "reason"), rows)


def targets(ours: Sequence[dict]) -> list[str]:
    """The bandwidth that is to be reached, and whether it is; a missed one is bold."""
    large = [
        row for row in ours if row["form"] in TARGETS and row["bytes"] >= LARGE and row["dtype"] == "bf16"
    ]
    rows = [row | {"target": f"{TARGETS[row['form']]:.0%}"} for row in large]
    met = {"": lambda row: "met" if row["share_of_copy"] >= TARGETS[row["form"]] else "**missed**"}
    names = ("form", "size", "contender", "of copy", "target")
    columns = {name: COLUMNS.get(name, lambda row, name=name: row[name]) for name in names}
    return section("Targets from 60 MB up", columns | met, rows)


GRAPH = {
    "images": lambda row: row["batch"],
    "us": lambda row: microseconds(row["replay"]),
    "floor us": lambda row: shown(row["floor_us"], ".1f"),
    "target us": lambda row: shown(row["target_us"], ".1f"),
    "": lambda row: "met" if row["replay"]["median_us"] <= row["target_us"] else "**missed**",
    "launches": lambda row: shown(row["launches"], ".0f"),
}


def compared(ways: Sequence[dict]) -> tuple[list[dict], list[str]]:
    """(generations with their speedups over the uncached one of their size, notes about those beyond
    ideal)."""
    size = lambda row: (row.get("pixels", 256), row["batch"])
    uncached = {size(row): row["generation"]["median_us"] for row in ways if row["way"] == "uncached"}
    rows, lines = [], []
    for row in ways:
        base, ideal = uncached.get(size(row)), row.get("ideal")
        speedup = None if base is None else base / row["generation"]["median_us"]
        quotient = speedup / ideal if speedup and ideal else None
        pixels, images = size(row)
        rows.append(row | {"pixels": pixels, "images": images, "speedup": speedup, "quotient": quotient})
        if quotient and quotient > APART:
            cheap = ", ".join(
                f"a {kind} step {time['median_us'] / 1e3:.2f} ms" for kind, time in row["steps"].items()
            )
            lines.append(f"- {pixels} px, {images} images, {row['way']}: {quotient:.2f} of ideal: {cheap}")
    return rows, lines


def way_columns(ways: Sequence[dict]) -> dict:
    """Columns of a generation, and of its steps by kind."""
    columns = {name: lambda row, name=name: row[name] for name in ("pixels", "images", "way")}
    columns["generation ms"] = lambda row: microseconds(row["generation"], ".0f", 1e-3)
    columns["x uncached"] = COLUMNS["measured x"]
    columns |= {name: COLUMNS[name] for name in ("ideal x", "measured / ideal")}
    for kind in dict.fromkeys(kind for row in ways for kind in row["steps"]):
        columns[f"{kind} step ms"] = lambda row, kind=kind: microseconds(row["steps"].get(kind), ".2f", 1e-3)
        columns[f"{kind} step launches"] = lambda row, kind=kind: shown(row["launches"].get(kind), ".0f")
    columns["peak GB"] = lambda row: shown(row["peak_bytes"], ".2f", 1e-9)
    return columns | {"error": COLUMNS["error"]}


def checks(content: dict) -> list[str]:
    """Tests and sanitizers."""
    tests, sanitizer = (content["stages"].get(stage, {}) for stage in ("tests", "sanitizer"))
    counts = ", ".join(f"{count} {outcome}" for outcome, count in tests.get("counts", {}).items())
    lines = [f"- tests: {counts}"] if counts else []
    lines += [f"- failed: {one['test']}: {one['error']}" for one in tests.get("failures", [])]
    lines += [f"- {name}: {verdict}" for name, verdict in sanitizer.get("verdicts", {}).items()]
    return ["## Checks", "", *lines, ""] if lines else []


def draw(name: str, content: dict, path: Path) -> bool:
    """The roofline of a run; False if it has no microbenchmarks."""
    kernels = content["stages"].get("kernels", {})
    burst, rows = kernels.get("bandwidth"), kernels.get("cases")
    if not rows or not burst:
        return False
    subtitle = f"{'; '.join(content['machine'].get('gpus', [])) or name}, {content.get('begun', '')[:10]}"
    draw_roofline(rows, burst["copy_gbps"], burst["read_gbps"], subtitle, path)
    return True


def main(arguments: Sequence[str] | None = None) -> None:
    """The command."""
    text = "Draw what benchmarks/gpu_gate.sh measured."
    parser = argparse.ArgumentParser(prog="python -m benchmarks.gate.report", description=text)
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
