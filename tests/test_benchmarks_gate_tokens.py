"""What the GPU gate has of token-wise refresh, without a GPU: cases, ways, a rehearsal, and its tables."""

import json
import sys
import time
from pathlib import Path

import pytest
import torch

sys.path.insert(0, str(Path(__file__).parents[1]))

from benchmarks.bandwidth import Bandwidth  # noqa: E402
from benchmarks.gate import blocks, end_to_end, kernels, report, ways  # noqa: E402
from benchmarks.gate.results import Results  # noqa: E402
from benchmarks.gate.stage import Stage  # noqa: E402
from benchmarks.machine import threads  # noqa: E402
from benchmarks.timing import Effort, Timing  # noqa: E402
from benchmarks.token_cases import TINY, BlockCase, ChoiceCase, Work  # noqa: E402

CPU = torch.device("cpu")
ONCE = Effort(0.0, 1, 1)
COPY = Bandwidth(1, 1, 10.0, 20.0, Timing(1, 1, 1, 1, 1), Timing(1, 1, 1, 1, 1))


@pytest.fixture(autouse=True)
def quiet():
    with torch.no_grad(), threads(1):
        yield


def stage(tmp_path: Path, name: str, *, dry_run: bool = True) -> Stage:
    return Stage(
        name, Results.new(tmp_path / "gate.json", dry_run=dry_run, machine={}), dry_run, time.monotonic() + 60
    )


def test_every_real_block_is_accepted_and_fits_into_a_gpu() -> None:
    assert blocks.check_real_blocks(kernels.SMALLEST_GPU) == len(Work) * len(blocks.GPU_SIZES) * len(
        blocks.GPU_SHARES
    )
    assert {case.share for case in blocks.gate_block_cases(dry_run=False)} >= {0.01, 0.6}


def test_rehearsed_blocks_and_choices_have_every_contender_and_no_times(tmp_path: Path) -> None:
    rehearsal = stage(tmp_path, "kernels")
    blocks.measure_blocks(rehearsal, CPU, COPY, ONCE, 0.0)
    found = rehearsal.results.stage("kernels")
    ran = {one["case"]: set(one["ran"]) for one in found["blocks"]}
    assert ran["stream-tiny-b2-25pc-bf16"] == {
        "naive",
        "best eager",
        "torch.compile",
        "fastcache cuda",
        "fastcache triton",
    }
    assert ran["block-tiny-b2-25pc-bf16"] == ran["stream-tiny-b2-25pc-bf16"] | {"MLP alone"}
    assert ran["choice-tiny-b2-18pc"] == {"naive", "topk per layer", "best eager", "fastcache"}
    assert found["blocks_absent"] == [] and "median_us" not in json.dumps(found)


def test_a_row_has_ratios_and_shares_of_the_copy() -> None:
    entrants, absent = blocks.takers(
        BlockCase(Work.BLOCK, TINY, 0.25, torch.bfloat16), CPU, blocks.token_sequences.compiled_block("eager")
    )
    rows, failed = blocks.timed(BlockCase(Work.BLOCK, TINY, 0.25, torch.bfloat16), entrants, CPU, COPY, ONCE)
    own = {row.contender: row for row in rows}
    assert absent == failed == [] and own["naive"].vs_naive == 1 and own["MLP alone"].vs_naive is None
    for row in rows:
        assert row.share_of_copy == pytest.approx(row.gbps / 10) and row.rows == 4 and row.launches is None


def test_a_wrong_choice_is_absent_and_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(blocks.token_choices.CONTENDERS, "fastcache", lambda inputs: inputs.ages.zero_())
    entrants, [absent] = blocks.choosers(ChoiceCase(TINY, 0.3), CPU)
    assert (
        "fastcache" not in entrants
        and absent.provider == "fastcache"
        and absent.reason.startswith("WRONG VALUES")
    )


def test_a_spent_budget_leaves_every_block_with_the_reason(tmp_path: Path) -> None:
    late = stage(tmp_path, "kernels", dry_run=False)
    blocks.measure_blocks(late, CPU, COPY, ONCE, 0.0)
    absent = late.results.stage("kernels")["blocks_absent"]
    assert len(absent) == len(blocks.gate_block_cases(dry_run=False)) + len(
        blocks.gate_choice_cases(dry_run=False)
    )
    assert {one["reason"] for one in absent} == {"the budget of the blocks was used up"}


def test_kinds_of_steps_are_those_of_the_plan_at_any_size() -> None:
    for way in ways.WAYS:
        if way.policy is not None:
            run = ways.trajectory(end_to_end.TINY_MODEL, 1, 50, CPU, torch.float32)
            assert [way.kind(step, 50) for step in range(50)] == [
                step.kind for step in ways.schedule(way.policy, run).steps
            ], way.name


def test_toca_duca_and_taylorseer_compute_what_their_originals_compute() -> None:
    steps = 12
    run = ways.trajectory(end_to_end.TINY_MODEL, 1, steps, CPU, torch.float32)
    for parameter in run.model.parameters():
        parameter.normal_(std=0.2, generator=torch.Generator().manual_seed(parameter.numel()))
    outputs = {}
    for way in ways.WAYS:
        with way.enter(run) as control:
            control.begin()
            outputs[way.name] = []
            for step in range(steps):
                control.before(step)
                outputs[way.name].append(run.call(step))
        if way.exact:
            assert (
                end_to_end.relative_rms(
                    torch.stack(outputs[way.name]), torch.stack(outputs[way.exact]).double()
                )
                < 1e-5
            ), way.name
    for method in ("ToCa", "DuCa", "TaylorSeer"):
        assert not torch.equal(
            torch.stack(outputs[f"{method} as its original does it"]), torch.stack(outputs[ways.UNCACHED])
        )


def test_the_larger_pictures_are_measured_last_with_one_batch() -> None:
    found = [
        (end_to_end.pixels(config), batch)
        for config, batch in end_to_end.runs(end_to_end.MODEL, end_to_end.BATCHES, dry_run=False)
    ]
    assert found == [(256, 1), (256, 8), (256, 32), (512, end_to_end.LARGE_BATCH)]
    assert end_to_end.LARGE_MODEL.grid == 32


def test_launches_are_counted_when_tokens_are_refreshed(monkeypatch: pytest.MonkeyPatch) -> None:
    counted = []
    run = ways.trajectory(end_to_end.TINY_MODEL, 1, 50, CPU, torch.float32)
    way = next(way for way in ways.WAYS if way.policy == ways.DUCA)
    monkeypatch.setattr(end_to_end, "launches", lambda call, device: counted.append(call.__defaults__[0]))
    with way.enter(run) as control:
        found = end_to_end.counted(
            run, control, [way.kind(step, 50) for step in range(50)], CPU, round(way.settled * 50)
        )
    assert set(found) == {"full", "partial", "skip"} and min(counted) >= 15


def test_the_report_has_blocks_and_quotients() -> None:
    timing = {"median_us": 1000.0, "p10_us": 900.0, "p90_us": 1100.0, "best_us": 900.0, "rounds": 3}
    row = {
        "case": "made-up",
        "work": "block",
        "size": "N=1 B=1",
        "rows": 1,
        "bytes": 10**6,
        "flops": 10**9,
        "timing": timing,
        "gbps": 1.0,
        "share_of_copy": 0.5,
        "host_us": 2.0,
        "launches": 4,
        "error": 1e-3,
        "vs_naive": 0.5,
        "vs_compile": None,
    }
    step = {
        "batch": 4,
        "generation": timing,
        "steps": {"full": timing},
        "launches": {"full": 9},
        "peak_bytes": None,
        "error": None,
    }
    content = {"stages": {
        "kernels": {"blocks": [row | {"contender": "fastcache cuda"}], "blocks_absent": [{"case": "another", "provider": None, "reason": "no time"}]},
        "end_to_end": {"model": "Made-up", "num_steps": 50, "policy": "some", "ways": [step | {"way": "uncached", "pixels": 512, "ideal": None}, step | {"way": "ToCa ours, begun", "pixels": 512, "ideal": 2.5, "generation": timing | {"median_us": 500.0}}]},
    }}  # fmt: skip
    assert any(
        "| block | N=1 B=1 | 1 | fastcache cuda |" in line and "**0.50**" in line
        for line in report.blocks(content)
    )
    assert any(
        "| 512 | 4 | ToCa ours, begun | 0 | 2.00 | 2.50 | 0.80 |" in line for line in report.steps(content)
    )
    assert any("no time: another" in line for line in report.absences(content))
