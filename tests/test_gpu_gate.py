"""The GPU gate without a GPU: limits, partial results, what is missing, and a rehearsal of its stages."""

import json
import sys
import time
from dataclasses import asdict
from pathlib import Path

import pytest
import torch

sys.path.insert(0, str(Path(__file__).parents[1]))

from benchmarks.cases import PARTIAL_BLOCKS, TINY, TINY_TOKENS, Case, ChoiceCase, Form
from benchmarks.gate import (
    __main__ as gate,
    build,
    end_to_end,
    kernels,
    peers,
    prerequisites,
    sanitizer,
)
from benchmarks.gate.prerequisites import Tool
from benchmarks.gate.stage import Failed, Results, Stage
from benchmarks.gate.tests import Progress
from benchmarks.generations import Contest, Entrant, Method, Way
from benchmarks.machine import Bandwidth, threads
from benchmarks.sequences import FormSequences
from benchmarks.timing import Effort, Timing, captured, host_us, measure_replays
from fastcache import FORA

CPU = torch.device("cpu")
ONCE = Effort(0.0, 1, 1)
BF16 = torch.bfloat16
COPY = Bandwidth(1, 1, 10.0, 20.0, Timing(1, 1, 1, 1, 1), Timing(1, 1, 1, 1, 1))


@pytest.fixture(autouse=True)
def quiet():
    with torch.no_grad(), threads(1):
        yield


def stage(tmp_path: Path, name: str, *, dry_run: bool = True, seconds: float = 60.0) -> Stage:
    return Stage(
        name,
        Results.new(tmp_path / "gate.json", dry_run=dry_run, machine={}),
        dry_run,
        time.monotonic() + seconds,
    )


def found(tmp_path: Path) -> dict:
    return json.loads((tmp_path / "gate.json").read_text())["stages"]


# --- the frame ------------------------------------------------------------------------------------


def test_the_default_budgets_fit_into_one_call_of_nine_minutes() -> None:
    assert sum(gate.STAGES.values()) + gate.GRACE <= 540


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (
            ["--only", "build,fly"],
            "--only: expected some of build, tests, sanitizer, kernels, end_to_end, got 'build,fly'",
        ),
        (["--seconds", "fly=3"], "--seconds: expected STAGE=N"),
        (["--seconds", "build=x"], "--seconds: expected STAGE=N"),
    ],
)
def test_a_bad_option_is_refused_by_name(
    arguments: list[str], message: str, capsys: pytest.CaptureFixture
) -> None:
    with pytest.raises(SystemExit):
        gate.parsed(arguments)
    assert message in capsys.readouterr().err


def test_stages_and_budgets_can_be_chosen() -> None:
    options = gate.parsed(["--only", "tests,kernels", "--seconds", "kernels=300"])
    assert options.stages == ["tests", "kernels"] and options.budgets == gate.STAGES | {"kernels": 300}


def test_without_a_gpu_it_says_so_and_names_the_dry_run(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setattr(gate, "facts", lambda: {"gpus": [], "absent": {}})
    with pytest.raises(SystemExit, match="nvidia-smi finds no GPU here. Use --dry-run"):
        gate.main(["--out", str(tmp_path / "gate.json")])


def test_a_missing_package_is_named_with_what_needs_it(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(
        gate, "missing_packages", lambda: {"pytest": "the stages tests and sanitizer need it"}
    )
    with pytest.raises(
        SystemExit,
        match=r"missing packages: pytest \(the stages tests and sanitizer need it\). Fix: pip install pytest",
    ):
        gate.main(["--dry-run"])


def one_stage(code: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path, seconds: int = 60) -> dict:
    """Run a stage whose process executes `code` after it has found 1."""
    Results.new(tmp_path / "gate.json", dry_run=False, machine={})
    run = gate.stopped_after
    opened = f"Results(Path({str(tmp_path / 'gate.json')!r})).add('kernels', 'cases', 1)"
    imports = "import os, time; from pathlib import Path; from benchmarks.gate.stage import Results"
    program = f"{imports}; {opened}; {code}"
    monkeypatch.setattr(gate, "GRACE", 0)
    monkeypatch.setattr(
        gate, "stopped_after", lambda command, limit: run([sys.executable, "-c", program], limit)
    )
    gate.run_stage("kernels", seconds, False, tmp_path / "gate.json")
    return found(tmp_path)["kernels"]


def test_a_stage_that_is_stopped_at_its_limit_keeps_what_it_found(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    kept = one_stage("time.sleep(60)", monkeypatch, tmp_path, seconds=2)
    assert (
        kept["status"] == "stopped"
        and kept["cases"] == [1]
        and "stopped after 2 s" in kept["reason"]
        and kept["wall_s"] < 20
    )


def test_a_stage_that_crashes_keeps_what_it_found(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    kept = one_stage("os.abort()", monkeypatch, tmp_path)
    assert kept["status"] == "failed" and kept["cases"] == [1] and "status -6" in kept["reason"]


def test_the_file_is_replaced_as_a_whole(tmp_path: Path) -> None:
    results = Results.new(tmp_path / "gate.json", dry_run=False, machine={"gpus": []})
    seen = []
    write = Path.replace
    results.add("kernels", "cases", 1)
    before = (tmp_path / "gate.json").read_text()
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(
            Path,
            "replace",
            lambda path, target: (
                seen.append((json.loads(path.read_text()), (tmp_path / "gate.json").read_text()))
                or write(path, target)
            ),
        )
        results.add("kernels", "cases", 2)
    assert seen[0][0]["stages"]["kernels"]["cases"] == [1, 2] and seen[0][1] == before
    assert [path.name for path in tmp_path.iterdir()] == ["gate.json"]


def test_the_facts_name_no_path_of_the_machine() -> None:
    text = json.dumps(prerequisites.facts())
    assert str(Path.home()) not in text and sys.prefix not in text


# --- build, tests, sanitizer ----------------------------------------------------------------------


@pytest.mark.parametrize(
    ("absent", "fix"), [("cmake", "pip install cmake ninja"), ("nvcc", "install the CUDA toolkit")]
)
def test_a_build_without_its_tools_fails_with_the_fix(
    absent: str, fix: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    original = prerequisites.tool
    monkeypatch.setattr(
        prerequisites,
        "tool",
        lambda name: Tool(name, "", original(name).fix) if name == absent else Tool(name, "/bin/true", ""),
    )
    with pytest.raises(
        Failed,
        match=f"{absent} was not found, so the CUDA kernels are not built .* Fix: .*{fix}",
    ):
        build.build(stage(tmp_path, "build"))


@pytest.mark.parametrize(("version", "old"), [("", True), ("68.1.2", True), ("77.0.0", False), ("80", False)])
def test_a_setuptools_that_setup_py_refuses_is_gone_around(version: str, old: bool) -> None:
    assert build.too_old(version) is old
    configure, make = build.with_cmake("90-real")
    assert (
        "-DFASTCACHE_CUDA=1" in configure
        and "-DFASTCACHE_CUDA_ARCHS=90-real" in configure
        and "--build" in make
    )


def test_a_failed_build_is_named_by_its_first_error() -> None:
    first = "CMake Error at CMakeLists.txt:89 (enable_language):"
    output = f"-- Configuring\n{first}\n  no such compiler\nmore\nError again"
    assert build.first_error(output) == f"{first} no such compiler"
    assert build.first_error("one\ntwo\nthree") == "two three" and build.first_error("") == ""


class Report:
    """As pytest reports a test."""

    def __init__(self, when: str, outcome: str, text: str = "") -> None:
        self.when, self.outcome, self.nodeid = when, outcome, "tests/gpu/test_x.py::test_y"
        self.longrepr = ("file", 1, text) if outcome == "skipped" else text


def test_tests_are_counted_and_failures_named_as_they_come(tmp_path: Path) -> None:
    progress = Progress(stage(tmp_path, "tests"))
    for report in (
        Report("setup", "passed"),
        Report("call", "passed"),
        Report("teardown", "passed"),
        Report("setup", "skipped", "one GPU"),
        Report("call", "failed", "trace\nE  assert 1 == 2"),
    ):
        progress.pytest_runtest_logreport(report)
    progress.save()
    kept = found(tmp_path)["tests"]
    assert kept["counts"] == {"passed": 1, "failed": 1, "skipped": 1} and kept["skipped"] == {"one GPU": 1}
    assert kept["failures"] == [{"test": "tests/gpu/test_x.py::test_y", "error": "E  assert 1 == 2"}]


def test_without_compute_sanitizer_the_stage_is_skipped_with_the_reason(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setattr(sanitizer, "tool", lambda name: Tool(name, "", "it comes with the CUDA toolkit"))
    sanitizer.sanitizer(stage(tmp_path, "sanitizer", dry_run=False))
    assert (
        found(tmp_path)["sanitizer"]["skipped"]
        == "compute-sanitizer was not found; it comes with the CUDA toolkit"
    )


@pytest.mark.parametrize(
    ("code", "output", "verdict"),
    [
        (0, "12 calls of cuda on cuda: ok\n========= ERROR SUMMARY: 0 errors", "clean"),
        (86, "12 calls of cuda on cuda: ok\n========= ERROR SUMMARY: 3 errors", "status 86: 3 errors"),
        (1, "AssertionError: x: 3 elements off", "status 1: no summary"),
        (
            255,
            "========= Error: Device not supported. Please refer",
            "cannot run on this machine: Error: Device not supported. Please refer",
        ),
    ],
)
def test_a_sanitizer_is_believed_only_if_the_calls_ended_well(code: int, output: str, verdict: str) -> None:
    assert sanitizer.verdict(code, output) == verdict


def test_the_sanitizer_watches_every_kind_of_kernel_path() -> None:
    forms = sanitizer.calls()
    assert (
        {bool(form.norm) for form in forms}
        == {bool(form.slot) for form in forms}
        == {form.slot == "float8_e4m3fn" for form in forms}
        == {True, False}
    )
    assert (
        any(form.reference for form in forms)
        and any(form.rows for form in forms)
        and any(form.channels % 4 for form in forms)
        and any(form.channels >= 3072 for form in forms)
    )


# --- kernels --------------------------------------------------------------------------------------


def test_the_cases_decide_first_and_cover_every_form_and_size_of_the_design() -> None:
    forms, blocks = kernels.form_cases(False), kernels.block_cases(False)
    assert len({case.name for case in (*forms, *blocks)}) == len(forms) + len(blocks)
    assert {case.form for case in forms} == {form for form in Form if form not in PARTIAL_BLOCKS}
    assert {size.name for size in kernels.GATE_SIZES} == {case.size.name for case in forms}
    decisive = [case.form in kernels.DECISIVE for case in forms if case.dtype is BF16]
    assert decisive == sorted(decisive, reverse=True)
    assert {case.share for case in blocks if isinstance(case, Case)} == {0.01, 0.07, 0.25, 0.6}


HOST = ["naive", "best eager"]
COMPILED = ["torch.compile", "torch.compile autotuned"]
OURS = ["fastcache cuda", "fastcache triton"]
REHEARSED = [
    (Case(Form.TRUNK, TINY, BF16), [*HOST, *COMPILED, *OURS]),
    (Case(Form.REFRESH, TINY, BF16), [*HOST, *COMPILED, *OURS]),
    (Case(Form.MODULATE_RMS, TINY, BF16), [*HOST, *COMPILED, *OURS]),
    (Case(Form.STREAM, TINY_TOKENS, BF16, 0.25), [*HOST, "torch.compile", *OURS]),
    (Case(Form.BLOCK, TINY_TOKENS, BF16, 0.25), [*HOST, "torch.compile", *OURS, "MLP alone"]),
    (ChoiceCase(TINY_TOKENS, 0.3), ["naive", "topk per layer", "best eager", "torch.compile", "fastcache"]),
]


@pytest.mark.parametrize(("case", "everyone"), REHEARSED, ids=lambda one: getattr(one, "name", ""))
def test_a_rehearsed_case_has_every_contender_or_the_reason_why_not(case, everyone: list[str]) -> None:
    rows, absent = kernels.measure_gate_case(case, CPU, COPY, 100.0, ONCE)
    assert [row.contender for row in rows] == everyone
    assert {one.provider for one in absent} == (
        {peer.name for peer in peers.PEERS} if everyone[3] == COMPILED[1] else set()
    )
    naive = rows[0].timing.median_us
    for row in rows:
        assert row.share_of_copy == pytest.approx(row.gbps / 10) and row.share_of_datasheet == pytest.approx(
            row.gbps / 100
        )
        assert row.vs_naive == (
            None if row.contender == "MLP alone" else pytest.approx(naive / row.timing.median_us)
        )
        assert (
            row.host_us > 0
            and row.launches is None
            and row.timing.cpu_us
            and row.error < 1e-2
            and asdict(row)
        )


def test_a_contender_with_wrong_values_is_not_timed_and_fails_the_stage(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    class Wrong(FormSequences):
        def __init__(self, case: Case) -> None:
            super().__init__(case)
            self.contenders["fastcache"] = lambda operands: lambda: (operands.x, None, None)

    monkeypatch.setattr("benchmarks.contest.FormSequences", Wrong)
    monkeypatch.setattr(kernels, "form_cases", lambda dry_run: [Case(Form.UPDATE, TINY, BF16)])
    monkeypatch.setattr(kernels, "block_cases", lambda dry_run: [])
    with pytest.raises(Failed, match="wrong values, so not timed: update-tiny-b2-bf16: fastcache cuda"):
        kernels.kernels(stage(tmp_path, "kernels"))
    assert set(found(tmp_path)["kernels"]["cases"][0]["ran"]) == {*HOST, *COMPILED}


@pytest.mark.slow
def test_a_dry_run_accepts_every_real_case_and_keeps_no_times(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    real, few = kernels.form_cases(False), [Case(Form.UPDATE, TINY, BF16)]
    monkeypatch.setattr(kernels, "form_cases", lambda dry_run: few if dry_run else real)
    kernels.kernels(stage_ := stage(tmp_path, "kernels"))
    assert stage_.found["real_cases"] == len(real) and len(stage_.found["blocks"]) == 1 + 2 * len(
        kernels.BLOCK_SHARES
    )
    end_to_end.end_to_end(whole := Stage("end_to_end", stage_.results, True, 0.0))
    text = json.dumps(stage_.results.content)
    assert "median_us" not in text and "gbps" not in text
    assert {one["way"] for one in whole.found["ways"]} == {entrant.name for entrant in end_to_end.ENTRANTS}


def test_a_spent_budget_leaves_every_case_with_the_reason(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    late = stage(tmp_path, "kernels", dry_run=False, seconds=0.0)
    monkeypatch.setattr(kernels, "measure_bandwidth", lambda *args, **kwargs: COPY)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: "NVIDIA H200")
    with pytest.raises(Failed, match="no case was measured"):
        kernels.kernels(late)
    kept = found(tmp_path)["kernels"]
    for missing, cases, budget in (
        ("absent", kernels.form_cases, "stage"),
        ("blocks_absent", kernels.block_cases, "blocks"),
    ):
        assert [one["case"] for one in kept[missing]] == [case.name for case in cases(False)]
        assert {one["reason"] for one in kept[missing]} == {f"the budget of the {budget} was used up"}


@pytest.mark.parametrize(
    ("name", "gbps"),
    [
        ("NVIDIA H200", 4800.0),
        ("NVIDIA H100 80GB HBM3", 3350.0),
        ("NVIDIA A100-SXM4-80GB", 2039.0),
        ("Some GPU", None),
    ],
)
def test_the_datasheet_is_looked_up_by_name(name: str, gbps: float | None) -> None:
    assert kernels.datasheet_gbps(name) == gbps


def test_a_peer_takes_part_when_its_file_is_named_and_computes_the_same(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    (tmp_path / "scale_residual.py").write_text(
        "import torch.nn.functional as F\n"
        "def fused_scale_residual_norm_scale_shift_triton("
        "*, residual, x, gate, shift, scale, weight, bias, eps):\n"
        "    x = residual + gate * x\n"
        "    return F.layer_norm(x, x.shape[-1:], eps=eps) * (1 + scale) + shift, x\n"
    )
    monkeypatch.setenv("FASTCACHE_PEER_SGLANG", str(tmp_path / "scale_residual.py"))
    one = Case(Form.UPDATE_MODULATE, TINY, BF16)
    peer = next(peer for peer in peers.PEERS if peer.name == "sglang triton")
    assert peer.absence(one) == "takes one sample only"
    single = Case(one.form, type(TINY)("One", 1, 24, 64, 5), one.dtype)
    rows, _ = kernels.measure_gate_case(single, CPU, COPY, None, ONCE)
    assert "sglang triton" in {row.contender for row in rows}
    monkeypatch.setenv("FASTCACHE_PEER_SGLANG", str(tmp_path / "none.py"))
    assert peer.absence(single) == "FASTCACHE_PEER_SGLANG: there is no such file"


def test_a_replay_uses_every_buffer_equally_often_and_scales_to_one_call() -> None:
    seen: list[int] = []
    calls = [lambda buffer=buffer: seen.append(buffer) for buffer in range(3)]
    replay = captured(calls, CPU, ideal_us=100.0)
    replay.run()
    assert replay.calls == 6 and seen == [0, 1, 2, 0, 1, 2]
    assert captured(calls, CPU, ideal_us=1e9).calls == 3
    slow = captured([lambda: time.sleep(0.01)], CPU, ideal_us=250.0)
    assert slow.calls == 2 and 9e3 < measure_replays({"slow": slow}, ONCE, CPU)["slow"].median_us < 19e3
    assert host_us(calls, CPU) > 0


# --- end to end -----------------------------------------------------------------------------------


def test_a_way_that_computes_something_else_fails_the_stage(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    wrong = Method(
        "FORA",
        lambda steps: FORA(4),
        lambda *_: end_to_end.FORA_3.original(_[0], _[1], FORA(2).schedule(4, _[2].layout)),
    )
    monkeypatch.setattr(end_to_end, "METHODS", (wrong,))
    monkeypatch.setattr(
        end_to_end, "ENTRANTS", tuple(Entrant(wrong, way) for way in (Way.ORIGINAL, Way.OURS))
    )
    monkeypatch.setattr(end_to_end, "ALLOWED_ERROR", 1e-9)
    monkeypatch.setattr(end_to_end, "check_real_model", lambda stage: None)
    with pytest.raises(ValueError, match="differs from 'FORA, original'"):
        end_to_end.end_to_end(stage(tmp_path, "end_to_end"))


def test_the_larger_pictures_are_measured_last_with_one_batch() -> None:
    assert [(end_to_end.pixels(size), size.images) for size in end_to_end.SIZES] == [
        (256, 1),
        (256, 8),
        (256, 32),
        (512, 4),
    ]


def test_launches_are_counted_when_tokens_are_refreshed(monkeypatch: pytest.MonkeyPatch) -> None:
    counted, contest = [], Contest(end_to_end.TINY, end_to_end.METHODS)
    monkeypatch.setattr(end_to_end, "launches", lambda call, device: counted.append(call.__defaults__[0]))
    kinds = [
        *contest.kinds(None)[:1],
        "partial",
        "skip",
        "partial",
        "full",
        "skip",
        "partial",
        "full",
        "full",
        "skip",
    ]
    with contest.entered(end_to_end.HOST) as control:
        monkeypatch.setattr(type(control), "call", lambda control, step: None)
        assert set(end_to_end.counted(control, kinds, 3)) == {"full", "partial", "skip"}
    assert counted == [6, 7, 9]
