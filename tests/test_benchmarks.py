"""The benchmarks measure what they say: bytes, values, guards and reports. No test here asserts a speed."""

import json
import sys
import time
from pathlib import Path

import pytest
import torch

sys.path.insert(0, str(Path(__file__).parents[1]))

from benchmarks import cases as described
from benchmarks.cases import FLAGSHIP, TINY, TINY_TOKENS, Case, ChoiceCase, Form, Size
from benchmarks.contest import (
    Entrant,
    NotMeasured,
    Prepared,
    WrongValues,
    entrants,
    measure_case,
    sequences_of,
)
from benchmarks.machine import threads
from benchmarks.run import PARTS, QUICK, main, measured
from benchmarks.tables import case_notes, method_notes
from benchmarks.timing import Effort, Sample, Timing, measure
from benchmarks.tokens import SELECTION, dispatch_case, operator_cases
from fastcache.backends.eager_tokens import select_tokens_
from fastcache.models.dit import Mlp

CPU, ONCE = torch.device("cpu"), Effort(0.0, 1, 1)
FORMS = [Case(form, TINY, dtype) for form in described.FORMS for dtype in TINY.dtypes]
BLOCKS = described.token_cases((TINY_TOKENS,), (0.01, 0.25, 1.0))[1:]
BLOCKS += [Case(form, TINY_TOKENS, torch.bfloat16, 0.25) for form in described.PARTIAL_BLOCKS]
TOKENS = [ChoiceCase(TINY_TOKENS, 0.3, 5), *operator_cases((24,), 64, 4, 2), dispatch_case()]
each_case = pytest.mark.parametrize("case", [*FORMS, *BLOCKS, *TOKENS], ids=lambda case: case.name)


@pytest.fixture(autouse=True)
def quiet():
    with torch.no_grad(), threads(1):
        yield


# x [2, 24, 64] in bf16: a tensor has 6,144 bytes, a vector 256, the 7 rows of both samples 1,792
TINY_BYTES = {
    Form.TRUNK: 7 * 6144 + 5 * 256 + 20,
    Form.UPDATE: 18_688,
    Form.UPDATE_MODULATE: 25_344,
    Form.MODULATE: 12_800,
    Form.STORE: 24_832,
    Form.REFRESH: 3 * 6144 + 2 * 1792 + 3 * 256 + 2 * 48 * 4,
    Form.FORECAST_2: 30_988,
    Form.FORECAST_4: 43_284,
}


def test_least_bytes_are_those_counted_by_hand() -> None:
    assert {form: Case(form, TINY, torch.bfloat16).min_bytes for form in TINY_BYTES} == TINY_BYTES
    # x [2, 16, 32] in float32 has 4,096 bytes, 4 rows of both samples 1,024, a vector 256, a slot map 128
    stream, block = (Case(form, TINY_TOKENS, torch.float32, 0.25) for form in described.PARTIAL_BLOCKS)
    weights = 4 * sum(parameter.numel() for parameter in Mlp(32, 128).parameters())
    assert stream.min_bytes == 4 * 4096 + 2 * 1024 + 4 * 256 + 2 * 128 and stream.flops == 0
    assert block.min_bytes == stream.min_bytes + weights and block.flops == 2 * (2 * 4) * 2 * 32 * 128
    assert ChoiceCase(TINY_TOKENS, 0.2, 3).min_bytes == 3 * 2 * 16 * 4 * 4
    sizes = {size.name: size for size in described.SIZES}
    assert FLAGSHIP.min_bytes == 68_677_856 and FLAGSHIP.terms == 56
    assert Case(Form.TRUNK, sizes["FLUX-B1"], torch.bfloat16).min_bytes == 2_208_768_304
    assert Case(Form.UPDATE, sizes["Wan-480p-B1"], torch.bfloat16).min_bytes == 1_006_397_440
    assert Case(Form.FORECAST_2, sizes["PixArt-1024-B2"], torch.bfloat16).min_bytes == 94_376_460


def test_cases_have_unique_names_and_span_what_is_promised() -> None:
    found = [*described.cases(), *described.token_cases()]
    assert len({case.name for case in found}) == len(found)
    assert {case.form for case in found if case.size.name.startswith("Wan")} == set(described.SINGLE_UPDATES)
    assert all(size.tokens**0.5 % SELECTION.cell == 0 for size in described.TOKEN_SIZES)


@each_case
def test_every_contender_gives_what_the_definition_gives(case) -> None:
    # torch.compile traces here and does not generate code: that takes seconds
    rows, absent = measure_case(case, CPU, ONCE, "eager", 1)
    names = ["naive", "best eager", "torch.compile", "fastcache"]
    assert absent == [] and [row["contender"] for row in rows][:4] == names
    assert all(row["timing"]["cpu_us"] > 0 and row["bytes"] == case.min_bytes for row in rows)
    launches = {"block": 4, "dispatch": 100}.get(case.label, 1)  # of a block, and two GEMMs and a GELU
    assert next(row["operators"] for row in rows if row["contender"] == "fastcache") == launches


def test_one_sample_takes_the_affine_layer_norm_and_agrees() -> None:
    for form in (Form.UPDATE_MODULATE, Form.MODULATE, Form.REFRESH):
        measure_case(Case(form, Size("One", 1, 24, 64, 5), torch.float32), CPU, ONCE, None, 1)


@each_case
def test_a_contender_that_leaves_out_a_part_is_refused(case) -> None:
    prepared = Prepared(case, CPU, 1)
    bind = sequences_of(case).contenders["fastcache"]

    def cheat(operands):
        call = bind(operands)
        return lambda: without_a_token(call(), operands)

    with pytest.raises(WrongValues, match=f"{case.name}: cheat is off by"):
        prepared.bound(Entrant("cheat", cheat))


def without_a_token(result, operands):
    """Right shapes and dtypes, and in the first output one token is not updated."""
    if isinstance(result, torch.Tensor):
        return result * 1.01 + 0.01
    if hasattr(operands, "ages"):
        return operands.ages[..., :2].fill_(0)
    first, *others = (tensor for tensor in result if tensor is not None)
    first = first.clone()
    first[:, 0] = operands.x[:, 0] if first.shape == operands.x.shape else 0
    return (first, *others)


def test_a_choice_is_the_one_of_the_eager_operator() -> None:
    case = ChoiceCase(TINY_TOKENS, 0.3, 5)
    sequences = sequences_of(case)
    exact = sequences.make(CPU)
    slots, _ = select_tokens_(exact.scores.view(-1, 16), exact.ages.view(-1, 16), exact.device_counts, 16,
                              SELECTION.age_weight, True, 4, SELECTION.cell, SELECTION.bonus)  # fmt: skip
    for name, bind in sequences.contenders.items():
        own = sequences.make(CPU)
        bind(own)()
        assert torch.equal(own.ages, exact.ages), name
    assert torch.equal(sequences.exact(sequences.make(CPU))[0], (slots >= 0).view_as(exact.ages))


def test_one_graph_of_torch_compile_serves_every_number_of_tokens() -> None:
    torch.compiler.reset()
    torch._dynamo.utils.counters.clear()
    for share in (0.2, 0.3, 0.6):
        case = Case(Form.BLOCK, TINY_TOKENS, torch.float32, share)
        prepared = Prepared(case, CPU, 1)
        prepared.bound(next(one for one in entrants(prepared.sequences, "eager") if one.may_fail))
    assert torch._dynamo.utils.counters["stats"]["unique_graphs"] == 1


def test_what_does_not_fit_is_absent_with_the_reason() -> None:
    with pytest.raises(NotMeasured, match=r"needs \d+\.\d GB of memory, 1\.0 GB are free"):
        Prepared(Case(Form.TRUNK, described.SIZES[4], torch.bfloat16), CPU, free=1_000_000_000)
    _, [absent] = measure_case(Case(Form.BLOCK, described.TOKEN_SIZES[-1], torch.float32, 0.6), CPU, ONCE)
    assert "GFLOP a call" in absent["reason"]
    rows, [late, *_] = measured(QUICK, "forms", ONCE, begun=-1e9)
    assert rows == [] and "wall-time budget" in late["reason"]


def test_without_a_compiler_torch_compile_is_absent_with_the_reason(monkeypatch) -> None:
    def broken(function, **options):
        def call(*args):
            raise RuntimeError("No working C++ compiler found\nand a long trace")

        return call

    monkeypatch.setattr(torch, "compile", broken)
    rows, [absent] = measure_case(Case(Form.UPDATE, TINY, torch.float32), CPU, ONCE, max_copies=1)
    assert absent["provider"] == "torch.compile"
    assert absent["reason"] == "RuntimeError: No working C++ compiler found"
    assert [row["contender"] for row in rows] == ["naive", "best eager", "fastcache", "fastcache eager"]
    assert all("vs_compile" not in row and row["vs_naive"] for row in rows)


def test_ratios_and_gbps_follow_from_the_medians() -> None:
    case = Case(Form.BLOCK, TINY_TOKENS, torch.float32, 0.25)
    rows = {row["contender"]: row for row in measure_case(case, CPU, Effort(0.0, 3, 3), None, 1)[0]}
    ours, clocks = rows["fastcache"], {name: row["timing"] for name, row in rows.items()}
    naive, own, alone = clocks["naive"], clocks["fastcache"], clocks["MLP alone"]
    assert ours["vs_naive"] == naive["median_us"] / own["median_us"]
    assert ours["cpu_vs_naive"] == naive["cpu_us"] / own["cpu_us"]
    assert ours["gbps"] == pytest.approx(case.min_bytes / (own["median_us"] * 1e-6) / 1e9)
    assert ours["beside_us"] == own["median_us"] - alone["median_us"] and "vs_naive" not in rows["MLP alone"]


def test_every_sample_gets_the_next_buffer_and_both_clocks() -> None:
    seen = []
    contenders = {
        name: [lambda name=name, buffer=buffer: seen.append(buffer) for buffer in range(3)] for name in "ab"
    }
    measure(contenders, Effort(0.0, 4, 4), CPU)
    assert seen == [turn % 3 for turn in range(2 * (4 + 1))]  # one round to warm up
    asleep = measure({"sleeper": [lambda: time.sleep(0.01)]}, ONCE, CPU)["sleeper"]
    assert asleep.median_us > 9e3 and asleep.cpu_us < 1e3
    timing = Timing.of([Sample(sample * 1e-6, 3e-6) for sample in range(1, 12)])
    assert timing == Timing(*map(pytest.approx, (6, 2, 10, 1)), 11, pytest.approx(3))


def row(**changes: object) -> dict:
    made = {"case": "made-up", "contender": "fastcache", "vs_naive": 2.0, "cpu_vs_naive": 2.0}
    return made | {"cache": "cold", "share_of_copy": 1.0, "gbps": 10.0} | changes


def test_case_ratios_that_the_clocks_disagree_about_or_no_memory_explains_get_a_note() -> None:
    assert case_notes([row(), row(contender="naive", share_of_copy=2.0)], 12.0) == []
    assert "noise: 2.00 by wall time and 1.70" in case_notes([row(cpu_vs_naive=1.7)], 12.0)[0]
    assert "mostly reads" in case_notes([row(share_of_copy=1.2)], 12.0)[0]
    assert "in a cache" in case_notes([row(share_of_copy=1.2, cache="warm")], 12.0)[0]
    assert "noise: no memory" in case_notes([row(share_of_copy=2.0, gbps=20.0)], 12.0)[0]


def test_speedups_beyond_ideal_are_explained_by_a_step_or_are_noise() -> None:
    def method(speedup: float, cpu: float, of_uncached: float, **kind: object) -> list[dict]:
        kind = {"kind": "reuse", "of_uncached": of_uncached, "of_flops": 0.1, "operators": 20} | kind
        made = {"model": "M", "method": "A", "way": "w", "speedup": speedup, "cpu_speedup": cpu, "ideal": 2.0}
        return [host, made | {"quotient": speedup / 2.0, "kinds": [kind]}]

    host = {"model": "M", "method": "uncached", "way": "host", "speedup": 1.0, "cpu_speedup": 1.0}
    host |= {"quotient": 1.0, "kinds": [{"operators": 100}]}
    assert method_notes(method(2.2, 2.2, 0.05)) == []
    [line] = method_notes(method(2.6, 2.6, 0.05))
    beyond = "1.30 of ideal (1.30 by CPU time): a reuse step takes 5% of an uncached one and 10% of its FLOPs"
    assert beyond in line and "100 operators of an uncached step are 20" in line
    assert "noise: no kind" in method_notes(method(2.6, 2.6, 0.15))[0]
    assert "noise: 2.60 by wall" in method_notes(method(2.6, 2.0, 0.05))[0]


@pytest.mark.slow
def test_a_quick_run_writes_numbers_tables_and_picture(tmp_path, capsys) -> None:
    main(["--quick", "--out", str(tmp_path)])
    report = json.loads((tmp_path / "bench.json").read_text())
    where = report["machine"]["environment"]
    assert all(where[key] for key in ("processor", "threads", "torch", "fastcache", "backend"))
    parts = {part: [row for row in report["rows"] if row["part"] == part] for part in PARTS}
    assert len(parts["forms"]) == len(described.cases((TINY,))) * 4
    for part in ("forms", "operators", "tokens"):
        assert parts[part] and all(row["bytes"] and row["timing"]["cpu_us"] for row in parts[part])
        assert all(row["share_of_copy"] == row["gbps"] / report["copy_gbps"] for row in parts[part])
    assert {row["method"] for row in report["methods"] if row["part"] == "session"} == {"uncached", "FORA"}
    methods = {row["method"] for row in report["methods"] if row["part"] == "methods"}
    assert methods == {"uncached", "ToCa", "DuCa", "TaylorSeer", "SmoothCache"}
    assert parts["flagship"] and all(row["threads"] == 1 for row in parts["flagship"])
    text = (tmp_path / "bench.md").read_text()
    headings = ["Bandwidth", "Flagship", "Operators: ", "Lost", "dispatch", "choice", "stream", "block"]
    headings += [f"{part}: {what}" for part in ("Session", "Methods") for what in ("generations", "steps")]
    assert all(f"## {heading}" in text for heading in headings) and str(tmp_path) not in text
    assert "measured / ideal" in text and "beside the MLP us" in text
    assert (tmp_path / "roofline.png").read_bytes().startswith(b"\x89PNG")


def test_a_part_can_be_run_alone(tmp_path, capsys) -> None:
    main(["--quick", "--only", "dispatch", "--out", str(tmp_path)])
    report = json.loads((tmp_path / "bench.json").read_text())
    assert {row["part"] for row in report["rows"]} == {"dispatch"} and report["methods"] == []
