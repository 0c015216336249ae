"""The benchmarks measure what they say: bytes, values, guards and reports. No test here asserts a speed."""

import json
import sys
from pathlib import Path

import pytest
import torch

sys.path.insert(0, str(Path(__file__).parents[1]))

from benchmarks.cases import FLAGSHIP, SIZES, TINY, Case, Form, Size, cases  # noqa: E402
from benchmarks.correctness import Reference, WrongValues  # noqa: E402
from benchmarks.forms import NotMeasured, Prepared, input_bytes, measure_case  # noqa: E402
from benchmarks.inputs import make_inputs  # noqa: E402
from benchmarks.machine import threads  # noqa: E402
from benchmarks.original_fora import OriginalFORA  # noqa: E402
from benchmarks.providers import Provider, binder  # noqa: E402
from benchmarks.run import Programme, main, measure_forms  # noqa: E402
from benchmarks.session import TINY_SESSION, Run, Way, checked  # noqa: E402
from benchmarks.timing import Effort, Timing, measure  # noqa: E402
from benchmarks.token_operators import Disagreement, check, measure_operators, operator_cases  # noqa: E402

CPU = torch.device("cpu")
ONCE = Effort(0.0, 1, 1)
BY_NAME = {size.name: size for size in SIZES}

each_form = pytest.mark.parametrize("form", Form, ids=lambda form: form.value)
each_dtype = pytest.mark.parametrize("dtype", TINY.dtypes, ids=("bf16", "fp32"))


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
    Form.ERRORS: 12_312,
    Form.UPDATE_MODULATE_RMS: 25_344,
    Form.MODULATE_RMS: 12_800,
}


@each_form
def test_least_bytes_are_those_counted_by_hand(form):
    assert Case(form, TINY, torch.bfloat16).min_bytes == TINY_BYTES[form]


@pytest.mark.parametrize(
    ("form", "size", "dtype", "expected"),
    [
        (Form.TRUNK, "DiT-256 B2", torch.bfloat16, 68_677_856),
        (Form.TRUNK, "DiT-256 B2", torch.float32, 137_355_488),
        (Form.TRUNK, "FLUX B1", torch.bfloat16, 2_208_768_304),
        (Form.UPDATE, "Wan-480p B1", torch.bfloat16, 1_006_397_440),
        (Form.FORECAST_2, "PixArt-1024 B2", torch.bfloat16, 94_376_460),
    ],
)
def test_least_bytes_of_real_models(form, size, dtype, expected):
    assert Case(form, BY_NAME[size], dtype).min_bytes == expected


def test_the_flagship_is_the_trunk_of_dit_xl_at_batch_2():
    assert (FLAGSHIP.form, FLAGSHIP.terms, FLAGSHIP.dtype) == (Form.TRUNK, 56, torch.bfloat16)
    assert (FLAGSHIP.size.batch, FLAGSHIP.size.tokens, FLAGSHIP.size.channels) == (2, 256, 1152)


def test_cases_have_unique_names_and_wan_only_single_updates():
    found = cases()
    assert len({case.name for case in found}) == len(found)
    assert {case.form for case in found if case.size.name.startswith("Wan")} == {
        Form.UPDATE,
        Form.UPDATE_MODULATE,
        Form.MODULATE,
    }


@each_dtype
@each_form
@pytest.mark.parametrize("provider", Provider, ids=lambda provider: provider.value)
def test_contenders_agree_with_float64(provider, form, dtype):
    # torch.compile traces here and does not generate code: that takes seconds
    Prepared(Case(form, TINY, dtype), CPU, max_copies=1).bound(provider, inductor="eager")


@each_form
def test_one_sample_takes_the_affine_layer_norm_and_agrees(form):
    case = Case(form, Size("One", 1, 24, 64, 5), torch.float32)
    Prepared(case, CPU, max_copies=1).bound(Provider.BEST_EAGER)


@each_form
def test_a_contender_that_leaves_out_a_part_is_refused(form):
    case = Case(form, TINY, torch.bfloat16)
    inputs = make_inputs(case, CPU)
    reference = Reference(case, inputs)
    last = binder(Provider.OURS, form)(inputs)
    x = inputs.x
    with pytest.raises(WrongValues, match=f"{case.name}: cheat is off by"):
        # right shapes, right dtypes, and in the first output one token is not updated
        reference.check("cheat", lambda: _with_first_token(last(), x))


def _with_first_token(result, x):
    outputs = [tensor for tensor in result if tensor is not None]
    outputs[0] = outputs[0].clone()
    outputs[0][:, 0] = x[:, 0] if outputs[0].shape == x.shape else 0
    return outputs


@each_form
def test_operands_take_at_most_the_memory_that_is_reserved(form):
    case = Case(form, TINY, torch.bfloat16)
    assert make_inputs(case, CPU).nbytes <= input_bytes(case)


def test_a_case_beyond_the_free_memory_is_absent_with_its_need():
    with pytest.raises(NotMeasured, match=r"needs \d+\.\d GB of memory, 1\.0 GB are free"):
        Prepared(Case(Form.TRUNK, BY_NAME["FLUX B1"], torch.bfloat16), CPU, free=1_000_000_000)


def test_a_spent_budget_leaves_every_case_absent_with_the_reason():
    rows, absent = measure_forms(Programme(sizes=(TINY,)), CPU, deadline=0.0)
    assert rows == () and len(absent) == len(cases((TINY,)))
    assert "wall-time budget" in absent[0].reason


def test_without_a_compiler_torch_compile_is_absent_with_the_reason(monkeypatch):
    def broken(function, **options):
        def call(*args):
            raise RuntimeError("No working C++ compiler found\nand a long trace")

        return call

    monkeypatch.setattr(torch, "compile", broken)
    measured = measure_case(Case(Form.UPDATE, TINY, torch.float32), CPU, ONCE, max_copies=1)
    assert [(one.provider, one.reason) for one in measured.absent] == [
        ("torch.compile", "RuntimeError: No working C++ compiler found")
    ]
    assert [row.provider for row in measured.rows] == ["naive", "best eager", "fastcache", "fastcache eager"]
    assert all(row.vs_compile is None and row.vs_naive is not None for row in measured.rows)


def test_ratios_and_gbps_follow_from_the_medians():
    case = Case(Form.UPDATE, TINY, torch.float32)
    rows = {
        row.provider: row
        for row in measure_case(case, CPU, Effort(0.0, 3, 3), (Provider.NAIVE, Provider.OURS), 1).rows
    }
    naive, ours = rows["naive"], rows["fastcache"]
    assert ours.vs_naive == naive.timing.median_us / ours.timing.median_us
    assert ours.gbps == pytest.approx(case.min_bytes / (ours.timing.median_us * 1e-6) / 1e9)
    assert ours.against(2 * ours.gbps).share_of_copy == 0.5


def test_every_call_gets_the_next_buffer():
    seen = []
    contenders = {
        name: [lambda name=name, buffer=buffer: seen.append(buffer) for buffer in range(3)] for name in "ab"
    }
    measure(contenders, Effort(0.0, 4, 4), CPU)
    assert seen == [turn % 3 for turn in range(len(seen))] and len(seen) == 2 * (4 + 1)


def test_timing_is_median_and_tenths():
    timing = Timing.of([sample * 1e-6 for sample in range(1, 12)])
    assert (timing.median_us, timing.p10_us, timing.p90_us, timing.best_us, timing.rounds) == (
        6,
        2,
        10,
        1,
        11,
    )


def test_every_way_of_a_session_computes_what_the_original_computes():
    operators, errors = checked(Run(TINY_SESSION))
    assert errors[Way.ORIGINAL] == 0 and errors[Way.BEGUN] is not None
    reuse = next(step for step in range(TINY_SESSION.steps) if step not in TINY_SESSION.full_steps)
    assert operators[Way.BEGUN][reuse] < operators[Way.ORIGINAL][reuse] < operators[Way.UNCACHED][reuse]


def test_the_original_gives_the_model_back():
    model = Run(TINY_SESSION).model
    with OriginalFORA(model, [0]):
        assert all("forward" in block.__dict__ for block in model.blocks)
    assert not any("forward" in block.__dict__ for block in model.blocks)


def test_a_quick_run_writes_numbers_tables_and_picture(tmp_path, capsys):
    main(["--quick", "--out", str(tmp_path)])
    report = json.loads((tmp_path / "bench.json").read_text())
    where = report["machine"]["environment"]
    assert (
        all(where[key] for key in ("processor", "threads", "torch", "fastcache", "backend"))
        and report["machine"]["date"]
    )
    assert report["machine"]["fastcache_cpu_capability"] and report["machine"]["torch_cpu_capability"]
    assert len(report["forms"]) == len(cases((TINY,))) * (len(Provider) - 1)
    assert all(row["bytes"] and row["gbps"] and row["share_of_copy"] for row in report["forms"])
    assert {row["mode"] for row in report["dispatch"]} == {"grad", "no_grad", "inference_mode"}
    assert {row["way"] for row in report["session"]} == {way.value for way in Way}
    assert report["blocks"] and all(
        row["bytes"] and row["gbps"] and row["floor_us"] for row in report["blocks"]
    )
    assert {row["provider"] for row in report["choices"]} == {
        "naive",
        "topk per layer",
        "best eager",
        "fastcache",
    }
    assert {row["method"] for row in report["methods"]} == {
        "uncached",
        "ToCa",
        "DuCa",
        "TaylorSeer",
        "SmoothCache",
    } and all(kind["floors"] for row in report["methods"] for kind in row["kinds"])
    assert report["flagship"]["rows"] and all(row["threads"] == 1 for row in report["flagship"]["rows"])
    text = (tmp_path / "bench.md").read_text()
    assert all(
        heading in text
        for heading in (
            "# FastCache benchmarks",
            "## Flagship",
            "## Operators",
            "## Lost",
            "## Dispatch",
            "## Session",
            "## Partial block, stream",
            "## Partial block, block",
            "## Choice of tokens",
            "## Methods: generations",
            "## Methods: steps",
        )
    )
    assert str(tmp_path) not in text
    assert (tmp_path / "roofline.png").read_bytes().startswith(b"\x89PNG")


def test_a_part_can_be_run_alone(tmp_path, capsys):
    main(["--quick", "--only", "dispatch", "--out", str(tmp_path)])
    report = json.loads((tmp_path / "bench.json").read_text())
    assert report["dispatch"] and not report["forms"] and not report["session"] and report["flagship"] is None


# --- tokens -------------------------------------------------------------------------------------

OPERATOR_CASES = operator_cases((40,), (24,), 64, 4, 2)


def test_every_operator_on_tokens_is_measured_against_every_contender():
    providers = [provider for provider in Provider if provider is not Provider.COMPILED]
    rows, absent = measure_operators(OPERATOR_CASES, CPU, ONCE, providers)
    assert not absent and {row.operator for row in rows} == {
        "select_tokens_",
        "row_score",
        "value_norm",
        "relative_error",
        "attention_received",
    }
    assert {(row.case, row.provider) for row in rows} == {
        (case.name, provider.value) for case in OPERATOR_CASES for provider in providers
    }
    assert all(row.vs_naive > 0 and row.vs_compile is None for row in rows)


def test_least_bytes_of_a_choice_are_those_counted_by_hand():
    case = OPERATOR_CASES[0]
    assert (
        case.bytes == 4 * 40 * 4 * 4 + 4 * 4 * 12 + 4 * 4
    )  # score in, age in and out, slots out; index; counts


def test_a_contender_that_chooses_other_tokens_stops_the_run():
    case = OPERATOR_CASES[0]
    arguments = case.make(torch.Generator().manual_seed(0))
    check(case, Provider.NAIVE, case.plain, arguments)
    with pytest.raises(Disagreement, match="select_tokens_-4x40-fp32: naive is off by"):
        check(case, Provider.NAIVE, lambda score, age, counts: case.plain(-score, age, counts), arguments)


@pytest.mark.parametrize("case", OPERATOR_CASES[1:], ids=lambda case: case.name)
def test_a_contender_with_other_values_stops_the_run(case):
    arguments = case.make(torch.Generator().manual_seed(0))
    check(case, Provider.BEST_EAGER, case.best, arguments)
    with pytest.raises(Disagreement, match="is off by"):
        check(case, Provider.BEST_EAGER, lambda *inputs: case.best(*inputs) * 1.01 + 0.01, arguments)
