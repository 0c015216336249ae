"""`make report`: what is drawn of a committed run. The runs here are made up, with numbers that no machine
gave."""

import json
import sys
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).parents[1]))

from benchmarks.gate.report import RESULTS, main, runs

ROW = {"case": "trunk-dit-256-b2-bf16", "form": "trunk", "size": "DiT-256 B2", "dtype": "bf16"}
ROW |= {"bytes": 68_677_856, "cache": "cold", "buffers": 2, "share_of_datasheet": 0.5, "host_us": 3.0}
ROW |= {"launches": 1, "extra_bytes": 1_200_000, "error": 1e-3, "vs_naive": 2.0, "vs_best_eager": 1.5}
TIMING = {
    "median_us": 1000.0,
    "p10_us": 900.0,
    "p90_us": 1100.0,
    "best_us": 900.0,
    "rounds": 3,
    "cpu_us": 30.0,
}


def row(contender: str, median: float, share: float, vs_compile: float, **changes: object) -> dict:
    timing = {
        "median_us": median,
        "p10_us": 0.9 * median,
        "p90_us": 1.1 * median,
        "best_us": median,
        "rounds": 9,
    }
    made = {
        "timing": timing,
        "gbps": 1e-3 * ROW["bytes"] / median,
        "vs_compile": vs_compile,
        "vs_autotuned": None,
    }
    return ROW | made | {"contender": contender, "share_of_copy": share} | changes


def made_up(**changes: object) -> dict:
    """A run of a machine that does not exist."""
    step = {"batch": 1, "generation": TIMING, "steps": {"full": TIMING}, "launches": {"full": 9}}
    step |= {"peak_bytes": 2_000_000_000, "error": None, "way": "uncached"}
    steps = {"full": TIMING, "reuse": TIMING | {"median_us": 40.0}}
    ours = step | {"way": "FORA ours", "steps": steps, "launches": {"full": 9, "reuse": 3}, "error": 1e-3}
    ours |= {"generation": TIMING | {"median_us": 500.0}}
    graph = {
        "batch": 1,
        "replay": TIMING | {"median_us": 99.0},
        "floor_us": 16.0,
        "target_us": 78.4,
        "launches": 8,
    }
    cases = [row("torch.compile", 90.0, 0.76, 1.0), row("fastcache cuda", 100.0, 0.69, 0.9)]
    cases += [row("fastcache triton", 75.0, 0.92, 1.2), row("somebody's kernel", 80.0, 0.86, 1.1)]
    late = {
        "case": "update-dit-256-b2-bf16",
        "provider": None,
        "reason": "the budget of the stage was used up",
    }
    stages = {
        "tests": {"status": "failed", "reason": "1 tests failed", "wall_s": 3.0, "skipped": {"one GPU": 2}},
        "sanitizer": {"status": "done", "verdicts": {"memcheck cuda": "clean"}},
        "kernels": {"status": "stopped", "reason": "stopped after 158 s", "cases": cases, "absent": [late]},
        "end_to_end": {
            "status": "done",
            "model": "Made-up model",
            "num_steps": 50,
            "policy": "FORA(interval=3)",
        },
    }
    stages["tests"]["counts"] = {"passed": 5, "failed": 1, "skipped": 2}
    stages["tests"]["failures"] = [{"test": "test_x", "error": "E  assert"}]
    stages["kernels"] |= {"bandwidth": {"copy_gbps": 1000.0, "read_gbps": 1100.0}, "datasheet_gbps": None}
    stages["end_to_end"] |= {"absent": [], "ways": [step, ours], "graphs": [graph]}
    machine = {"gpus": ["Made-up GPU"], "versions": {"torch": "0.0"}}
    made = {"format": 1, "dry_run": False, "begun": "2000-01-01T00:00:00+00:00", "machine": machine}
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
    assert (
        "Made-up GPU. torch 0.0. Begun 2000-01-01" in text
        and "Copy bandwidth of this run, bytes read plus written: 1000 GB/s" in text
    )
    assert (folder.parent / "out" / "made-up-20000101.png").read_bytes().startswith(b"\x89PNG")
    for heading in (
        "## Targets from 60 MB up",
        "## Operators: FastCache in every case",
        "## Lost",
        "## trunk: ",
        "## End to end: Made-up model",
        "## The reuse step in a CUDA graph",
        "## Not measured",
        "## Checks",
    ):
        assert heading in text


def test_lost_rows_are_bold_and_listed(folder: Path, capsys: pytest.CaptureFixture) -> None:
    text = report(folder, made_up())
    assert "## Lost: 2 of 8 comparisons" in text
    assert "- trunk-dit-256-b2-bf16, fastcache cuda: torch.compile is 1.11x faster" in text
    assert "- trunk-dit-256-b2-bf16, fastcache cuda: somebody's kernel is 1.25x faster" in text
    assert (
        "**0.90**" in text
        and "| trunk | DiT-256 B2 | fastcache cuda | 69% | 87% | **missed** |" in text
        and "| trunk | DiT-256 B2 | fastcache triton | 92% | 87% | met |" in text
    )
    assert "| 1 | 99.0 | 16.0 | 78.4 | **missed** | 8 |" in text


def test_what_was_not_measured_or_failed_is_shown(folder: Path, capsys: pytest.CaptureFixture) -> None:
    text = report(folder, made_up())
    assert "- all contenders: the budget of the stage was used up: update-dit-256-b2-bf16" in text
    assert (
        "| kernels | stopped | - | stopped after 158 s |" in text
        and "- failed: test_x: E  assert" in text
        and "- tests: 5 passed, 1 failed, 2 skipped" in text
    )


def test_a_run_that_ended_before_the_kernels_has_a_page_without_a_picture(
    folder: Path, capsys: pytest.CaptureFixture
) -> None:
    content = made_up()
    content["stages"] = {"build": {"status": "failed", "reason": "nvcc was not found"}}
    assert "| build | failed | - | nvcc was not found |" in report(folder, content)
    assert not (folder.parent / "out" / "made-up-20000101.png").exists()


def test_blocks_and_quotients_are_shown_and_what_is_beyond_ideal_is_noted(
    folder: Path, capsys: pytest.CaptureFixture
) -> None:
    content = made_up()
    kernels, ways = content["stages"]["kernels"], content["stages"]["end_to_end"]["ways"]
    kernels["blocks"] = [row("fastcache cuda", 1000.0, 0.5, 0.5, work="block", rows=7, flops=10**9)]
    kernels["blocks_absent"] = [{"case": "another", "provider": None, "reason": "no time"}]
    ways[0] |= {"pixels": 512}
    ways[1] |= {"pixels": 512, "ideal": 1.5}
    text = report(folder, content)
    assert (
        "| block | DiT-256 B2 | 7 | fastcache cuda |" in text
        and "**0.50**" in text
        and "no time: another" in text
    )
    assert "| 512 | 1 | FORA ours | 0 | 2.00 | 1.50 | 1.33 |" in text
    assert "- 512 px, 1 images, FORA ours: 1.33 of ideal: a full step 1.00 ms, a reuse step 0.04 ms" in text


def test_an_empty_folder_says_that_nothing_was_measured_and_how_to(
    folder: Path, capsys: pytest.CaptureFixture
) -> None:
    main(["--results", str(folder), "--out", str(folder.parent / "out")])
    assert (
        "no GPU result is committed yet" in capsys.readouterr().out and not (folder.parent / "out").exists()
    )


@pytest.mark.parametrize(
    ("content", "reason"),
    [
        (made_up(dry_run=True), "is a dry run, which measures nothing"),
        (made_up(format=99), "expected a result of benchmarks/gpu_gate.sh of format 1"),
        ([], "expected a result"),
    ],
    ids=["dry-run", "format", "list"],
)
def test_what_is_no_measurement_is_refused(content: object, reason: str, folder: Path) -> None:
    (folder / "x.json").write_text(json.dumps(content))
    with pytest.raises(SystemExit, match=reason):
        main(["--results", str(folder), "--out", str(folder.parent / "out")])


def test_every_committed_result_can_be_drawn() -> None:
    assert all(not content["dry_run"] for content in runs(RESULTS).values())
