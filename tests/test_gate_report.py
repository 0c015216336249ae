"""`make report`: what is drawn of a committed run. The runs are made up, with numbers no machine gave."""

import json
import sys
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).parents[1]))

from benchmarks.gate.report import RESULTS, main, runs
from benchmarks.gate.stage import FORMAT

ROW = {"case": "trunk-DiT-256-B2-bf16", "form": "trunk", "size": "DiT-256-B2", "dtype": "bf16", "rows": 0}
ROW |= {"bytes": 68_677_856, "cache": "cold", "buffers": 2, "share_of_datasheet": 0.5, "host_us": 3.0}
ROW |= {"launches": 1, "error": 1e-3, "vs_naive": 2.0, "vs_best_eager": 1.5, "part": "forms"}
TIMING = {"p10_us": 900.0, "p90_us": 1100.0, "best_us": 900.0, "rounds": 3, "cpu_us": 30.0}
WHOLE = TIMING | {"median_us": 1000.0}


def row(contender: str, median: float, share: float, vs_compile: float, **changes: object) -> dict:
    timing = TIMING | {"median_us": median, "p10_us": 0.9 * median, "p90_us": 1.1 * median}
    made = {"timing": timing, "gbps": 1e-3 * ROW["bytes"] / median, "vs_compile": vs_compile}
    return ROW | made | {"contender": contender, "share_of_copy": share} | changes


def way(method: str, way: str, quotient: float, **kind: object) -> dict:
    made = {"model": "512 px, 1 images", "part": "methods", "method": method, "way": way, "plan": "a plan"}
    made |= {
        "generation": WHOLE,
        "begin": None,
        "typical_us": 1e3,
        "cpu_us": 1e3,
        "error": None,
        "ideal": 1.5,
    }
    made |= {"speedup": 1.5 * quotient, "cpu_speedup": 1.5 * quotient, "quotient": quotient}
    made |= {"peak_bytes": 2_000_000_000}
    return made | {"kinds": [{"kind": "full", "steps": 9, "timing": WHOLE, "launches": 9} | kind]}


def made_up(**changes: object) -> dict:
    """A run of a machine that does not exist."""
    rows = [row("torch.compile", 90.0, 0.76, 1.0), row("fastcache cuda", 100.0, 0.69, 0.9)]
    rows.append(row("fastcache triton", 75.0, 0.92, 1.2))
    tokens = {"part": "tokens", "form": "block", "rows": 7, "flops": 10**9, "case": "block-N256"}
    rows.append(row("fastcache cuda", 1000.0, 0.5, 0.5, **tokens))
    absent = [{"case": "update-DiT-256-B2-bf16", "provider": None, "reason": "the budget was used up"}]
    bandwidth = {"copy_gbps": 1000.0, "read_gbps": 1100.0}
    kernels = {"status": "stopped", "reason": "stopped after 158 s", "rows": rows, "absent": absent}
    cheap = {"kind": "reuse", "of_uncached": 0.04, "of_flops": 0.1, "launches": 3}
    methods = [way("uncached", "host", 1.0), way("FORA", "fastcache", 1.33, **cheap)]
    graph = {"images": 1, "replay": WHOLE | {"median_us": 99.0}, "floor_us": 16.0, "target_us": 78.4}
    tests = {"status": "failed", "reason": "1 tests failed", "wall_s": 3.0, "skipped": {"one GPU": 2}}
    tests |= {"counts": {"passed": 5, "failed": 1}, "failures": [{"test": "test_x", "error": "E  assert"}]}
    stages = {"tests": tests, "sanitizer": {"status": "done", "verdicts": {"memcheck cuda": "clean"}}}
    stages["kernels"] = kernels | {"bandwidth": bandwidth, "datasheet_gbps": None}
    stages["end_to_end"] = {"status": "done", "absent": [], "methods": methods, "graphs": [graph]}
    machine = {"gpus": ["Made-up GPU"], "versions": {"torch": "0.0"}}
    made = {"format": FORMAT, "dry_run": False, "begun": "2000-01-01T00:00:00+00:00", "machine": machine}
    return made | {"stages": stages} | changes


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    (tmp_path / "results").mkdir()
    return tmp_path / "results"


def report(folder: Path, content: dict) -> str:
    (folder / "made-up-20000101.json").write_text(json.dumps(content))
    main(["--results", str(folder), "--out", str(folder.parent / "out")])
    return (folder.parent / "out" / "made-up-20000101.md").read_text()


def test_a_run_gives_a_page_and_a_picture(folder: Path, capsys: pytest.CaptureFixture) -> None:
    text = report(folder, made_up())
    assert "Made-up GPU. torch 0.0. Begun 2000-01-01" in text and "| 1000.0 | 1100.0 |" in text
    assert (folder.parent / "out" / "made-up-20000101.png").read_bytes().startswith(b"\x89PNG")
    headings = ["Targets from 60 MB up", "Operators: FastCache in every case", "Lost", "trunk: ", "block: "]
    headings += ["Methods: generations", "Methods: steps", "The reuse step in a CUDA graph", "Not measured"]
    assert all(f"## {heading}" in text for heading in [*headings, "Checks"])


def test_lost_rows_are_bold_and_listed(folder: Path, capsys: pytest.CaptureFixture) -> None:
    text = report(folder, made_up())
    assert "## Lost: 2 of 9 comparisons" in text and "**0.90**" in text and "**0.50**" in text
    assert "- trunk-DiT-256-B2-bf16, fastcache cuda: torch.compile is 1.11x faster" in text
    assert "| trunk | DiT-256-B2 | fastcache cuda | 69% | 87% | **missed** |" in text
    assert "| trunk | DiT-256-B2 | fastcache triton | 92% | 87% | met |" in text
    assert "| 1 | 99.0 | 16.0 | 78.4 | **missed** |" in text


def test_what_is_beyond_ideal_was_not_measured_or_failed_is_shown(folder: Path, capsys) -> None:
    text = report(folder, made_up())
    assert (
        "512 px, 1 images, FORA, fastcache: 1.33 of ideal (1.33 by CPU time): a reuse step takes 4%" in text
    )
    assert "9 launches of an uncached step are 3" in text
    assert "- all contenders: the budget was used up: update-DiT-256-B2-bf16" in text
    assert "| kernels | stopped | - | stopped after 158 s |" in text and "- tests: 5 passed, 1 failed" in text
    assert "- failed: test_x: E  assert" in text and "- memcheck cuda: clean" in text


def test_a_run_that_ended_before_the_kernels_has_a_page_without_a_picture(folder: Path, capsys) -> None:
    stages = {"build": {"status": "failed", "reason": "nvcc was not found"}}
    assert "| build | failed | nvcc was not found |" in report(folder, made_up(stages=stages))
    assert not (folder.parent / "out" / "made-up-20000101.png").exists()


def test_an_empty_folder_says_that_nothing_was_measured_and_how_to(folder: Path, capsys) -> None:
    main(["--results", str(folder), "--out", str(folder.parent / "out")])
    assert "no GPU result is committed yet" in capsys.readouterr().out
    assert not (folder.parent / "out").exists()


REFUSED = {"is a dry run, which measures nothing": made_up(dry_run=True), "expected a result": []}
REFUSED["expected a result of benchmarks/gpu_gate.sh of format"] = made_up(format=99)


@pytest.mark.parametrize("reason", REFUSED)
def test_what_is_no_measurement_is_refused(reason: str, folder: Path) -> None:
    (folder / "x.json").write_text(json.dumps(REFUSED[reason]))
    with pytest.raises(SystemExit, match=reason):
        main(["--results", str(folder), "--out", str(folder.parent / "out")])


def test_every_committed_result_can_be_drawn() -> None:
    assert all(not content["dry_run"] for content in runs(RESULTS).values())
