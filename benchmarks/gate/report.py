"""`make report`: tables and rooflines of the runs of the gate that are committed, lost rows included.

    python -m benchmarks.gate.report [--results benchmarks/results] [--out out/report]

One `<device>-<date>.json` gives one page and one picture. A dry run measures nothing and is refused.
"""

import argparse
import json
import sys
from collections.abc import Sequence
from pathlib import Path

from benchmarks.gate.stage import FORMAT, ROOT
from benchmarks.report import page
from benchmarks.roofline import draw_roofline
from benchmarks.tables import OURS, listing, section

RESULTS = ROOT / "benchmarks" / "results"
LARGE = 60e6  # bytes from which a target holds
TARGETS = {"trunk": 0.87, "update": 0.87, "update-modulate": 0.82, "modulate": 0.82}  # share of the copy
TARGET = ("form", "size", "contender", "of copy", "target", "verdict")
GRAPH = ("images", "replay us", "floor us", "target us", "verdict", "launches")
NOTHING = (
    "no GPU result is committed yet, so there is nothing to draw: run benchmarks/gpu_gate.sh on a "
    "machine with a GPU and commit its JSON as benchmarks/results/<device>-<date>.json"
)


def runs(folder: Path) -> dict[str, dict]:
    """The committed runs by name. Exits with a message about a file that is none."""
    found = {}
    for path in sorted(folder.glob("*.json")):
        try:
            content = json.loads(path.read_text())
        except ValueError as reason:
            sys.exit(f"report: {path.name}: is not JSON ({reason})")
        if not isinstance(content, dict) or content.get("format") != FORMAT or "stages" not in content:
            sys.exit(f"report: {path.name}: expected a result of benchmarks/gpu_gate.sh of format {FORMAT}")
        if content["dry_run"]:
            sys.exit(f"report: {path.name}: is a dry run, which measures nothing; remove it from the results")
        found[path.stem] = content
    return found


def measured(content: dict) -> dict:
    """What a run measured, as benchmarks.report has it."""
    kernels, whole = (content["stages"].get(stage, {}) for stage in ("kernels", "end_to_end"))
    bursts = [burst for key in ("bandwidth", "bandwidth_after") if (burst := kernels.get(key))]
    best = {key: max((one[key] for one in bursts), default=0.0) for key in ("copy_gbps", "read_gbps")}
    found = {"rows": kernels.get("rows", []), "methods": whole.get("methods", []), "bandwidths": bursts}
    return found | best | {"absent": [*kernels.get("absent", []), *whole.get("absent", [])]}


def head(content: dict, found: dict) -> list[str]:
    """Where and when, what became of every stage, and whether the targets are met."""
    machine, stages = content["machine"], content["stages"]
    versions = machine.get("versions", {}).items()
    packages = ", ".join(f"{package} {version}" for package, version in versions if version)
    gpus = "; ".join(machine.get("gpus", [])) or "GPU unknown"
    vendor = f"Datasheet: {stages.get('kernels', {}).get('datasheet_gbps') or 'unknown'} GB/s."
    lines = [f"{gpus}. {packages}. Begun {content.get('begun', '?')}.", ""]
    named = [{"stage": stage, "seconds": one.get("wall_s")} | one for stage, one in stages.items()]
    lines += section("Stages", ("stage", "status", "seconds", "reason"), named)
    lines += section("Copy and read bandwidth", ("copy GB/s", "read GB/s"), found["bandwidths"], vendor)
    rows = []
    for row in (row for row in found["rows"] if row["contender"] in OURS and row["form"] in TARGETS):
        if row["bytes"] >= LARGE and row["dtype"] == "bf16":
            target = TARGETS[row["form"]]
            verdict = "met" if row["share_of_copy"] >= target else "**missed**"
            rows.append(row | {"target": target, "verdict": verdict})
    return lines + section("Targets from 60 MB up", TARGET, rows)


def tail(content: dict) -> list[str]:
    """Graphs, tests and sanitizers."""
    graphs = []
    for row in content["stages"].get("end_to_end", {}).get("graphs", []):
        met = row["replay"]["median_us"] <= row["target_us"]
        graphs.append(row | {"verdict": "met" if met else "**missed**"})
    tests, sanitizer = (content["stages"].get(stage, {}) for stage in ("tests", "sanitizer"))
    counts = ", ".join(f"{count} {outcome}" for outcome, count in tests.get("counts", {}).items())
    lines = [f"- tests: {counts}"] if counts else []
    lines += [f"- failed: {one['test']}: {one['error']}" for one in tests.get("failures", [])]
    lines += [f"- {name}: {verdict}" for name, verdict in sanitizer.get("verdicts", {}).items()]
    return section("The reuse step in a CUDA graph", GRAPH, graphs) + listing("Checks", lines)


def main(arguments: Sequence[str] | None = None) -> None:
    """The command."""
    text = "Draw what benchmarks/gpu_gate.sh measured."
    parser = argparse.ArgumentParser(prog="python -m benchmarks.gate.report", description=text)
    parser.add_argument("--results", type=Path, default=RESULTS)
    parser.add_argument("--out", type=Path, default=Path("out/report"))
    options = parser.parse_args(arguments)
    contents = runs(options.results)
    if not contents:
        print(f"report: {NOTHING}")
        return
    options.out.mkdir(parents=True, exist_ok=True)
    for name, content in contents.items():
        found, gpus = measured(content), "; ".join(content["machine"].get("gpus", []))
        lines = [f"# {name}", "", *head(content, found), *page(found), *tail(content)]
        if found["rows"] and found["bandwidths"]:
            subtitle = f"{gpus or name}, {content.get('begun', '')[:10]}"
            draw_roofline(found, subtitle, options.out / f"{name}.png")
            lines += [f"![roofline]({name}.png)", ""]
        (options.out / f"{name}.md").write_text("\n".join(lines) + "\n")
        print(f"{name}.md")


if __name__ == "__main__":
    main()
