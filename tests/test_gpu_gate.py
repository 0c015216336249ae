"""The GPU gate without a GPU: limits, partial results, what is missing, and a rehearsal of its stages."""

import argparse
import json
import sys
import time
from pathlib import Path

import pytest
import torch

sys.path.insert(0, str(Path(__file__).parents[1]))

from benchmarks.cases import FORMS, TINY, TINY_TOKENS, Case, ChoiceCase, Form
from benchmarks.contest import WrongValues
from benchmarks.gate import __main__ as gate, build, end_to_end, kernels, prerequisites, sanitizer
from benchmarks.gate.prerequisites import Tool
from benchmarks.gate.stage import Failed, Stage, begin
from benchmarks.gate.tests import Progress
from benchmarks.generations import Contest, Entrant, Method, Way
from benchmarks.machine import Bandwidth, threads
from benchmarks.sequences import FormSequences
from benchmarks.timing import Effort, Timing, captured, host_us, measure
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
    begin(tmp_path / "gate.json", dry_run=dry_run, machine={})
    return Stage(name, tmp_path / "gate.json", dry_run=dry_run, deadline=time.monotonic() + seconds)


def found(tmp_path: Path) -> dict:
    return json.loads((tmp_path / "gate.json").read_text())["stages"]


# --- the frame ------------------------------------------------------------------------------------


def test_the_default_budgets_fit_into_one_call_of_nine_minutes() -> None:
    assert sum(gate.STAGES.values()) + gate.GRACE <= 540


@pytest.mark.parametrize("arguments", ["--only build,fly", "--seconds fly=3", "--seconds build=x"])
def test_a_bad_option_is_refused_by_name(arguments: str, capsys: pytest.CaptureFixture) -> None:
    option, value = arguments.split()
    with pytest.raises(SystemExit):
        gate.parsed([option, value])
    error = capsys.readouterr().err
    assert f"{option}: expected" in error and f"got '{value}'" in error and "end_to_end" in error


def test_stages_and_budgets_can_be_chosen() -> None:
    options = gate.parsed(["--only", "tests,kernels", "--seconds", "kernels=300"])
    assert options.stages == ["tests", "kernels"] and options.budgets == gate.STAGES | {"kernels": 300}


def test_what_is_missing_is_named(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(gate, "facts", lambda: {"gpus": [], "absent": {}})
    with pytest.raises(SystemExit, match="nvidia-smi finds no GPU here. Use --dry-run"):
        gate.main(["--out", str(tmp_path / "gate.json")])
    monkeypatch.setattr(gate, "missing", lambda packages: {"pytest": "tests"})
    message = r"missing packages: pytest \(needed by tests\). Fix: pip install pytest"
    with pytest.raises(SystemExit, match=message):
        gate.main(["--dry-run"])


def one_stage(code: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path, seconds: int = 60) -> dict:
    """Run a stage whose process executes `code` after it has found 1."""
    begin(out := tmp_path / "gate.json", dry_run=False, machine={})
    run = gate.stopped_after
    imports = "import os, time; from pathlib import Path; from benchmarks.gate.stage import Stage"
    program = f"{imports}; Stage('kernels', Path({str(out)!r})).add('rows', 1); {code}"
    started = lambda command, limit: run([sys.executable, "-c", program], limit)
    monkeypatch.setattr(gate, "GRACE", 0)
    monkeypatch.setattr(gate, "stopped_after", started)
    status = gate.run_stage("kernels", seconds, argparse.Namespace(out=out, dry_run=False))
    kept = found(tmp_path)["kernels"]
    assert kept["status"] == status and kept["rows"] == [1]
    return kept


def test_a_stage_that_is_stopped_at_its_limit_keeps_what_it_found(monkeypatch, tmp_path: Path) -> None:
    kept = one_stage("time.sleep(60)", monkeypatch, tmp_path, seconds=2)
    assert kept["status"] == "stopped" and "stopped after 2 s" in kept["reason"] and kept["wall_s"] < 20


def test_a_stage_that_crashes_keeps_what_it_found(monkeypatch, tmp_path: Path) -> None:
    kept = one_stage("os.abort()", monkeypatch, tmp_path)
    assert kept["status"] == "failed" and "status -6" in kept["reason"]


def test_the_file_is_replaced_as_a_whole(monkeypatch, tmp_path: Path) -> None:
    one, replace, seen = stage(tmp_path, "kernels"), Path.replace, []
    one.add("rows", 1)
    before = (tmp_path / "gate.json").read_text()

    def watched(path: Path, target: Path) -> Path:
        seen.extend([json.loads(path.read_text()), target.read_text()])
        return replace(path, target)

    monkeypatch.setattr(Path, "replace", watched)
    one.add("rows", 2)
    assert seen[0]["stages"]["kernels"]["rows"] == [1, 2] and seen[1] == before
    assert [path.name for path in tmp_path.iterdir()] == ["gate.json"]


def test_the_facts_name_no_path_of_the_machine() -> None:
    text = json.dumps(prerequisites.facts())
    assert str(Path.home()) not in text and sys.prefix not in text


# --- build, tests, sanitizer ----------------------------------------------------------------------


@pytest.mark.parametrize("absent", ["cmake", "nvcc"])
def test_a_build_without_its_tools_fails_with_the_fix(absent: str, monkeypatch, tmp_path: Path) -> None:
    of = lambda name: Tool("" if name == absent else "/bin/true", "install it")
    monkeypatch.setattr(build, "tool", of)
    message = f"{absent} was not found, so the CUDA kernels are not built .* Fix: install it"
    with pytest.raises(Failed, match=message):
        build.build(stage(tmp_path, "build"))


def test_a_failed_build_is_named_by_its_first_error() -> None:
    first = "CMake Error at CMakeLists.txt:89 (enable_language):"
    output = f"-- Configuring\n{first}\n  no such compiler\nmore\nError again"
    assert build.first_error(output) == f"{first} no such compiler"
    assert build.first_error("one\ntwo\nthree") == "two three" and build.first_error("") == ""


def test_tests_are_counted_and_failures_named_as_they_come(tmp_path: Path) -> None:
    progress, name = Progress(stage(tmp_path, "tests")), "tests/gpu/test_x.py::test_y"

    def report(when: str, outcome: str, longrepr: object = "") -> None:
        found = {"when": when, "outcome": outcome, "longrepr": longrepr, "nodeid": name}
        progress.pytest_runtest_logreport(argparse.Namespace(**found))

    report("setup", "passed")
    report("call", "passed")
    report("setup", "skipped", ("file", 1, "one GPU"))
    report("call", "failed", "trace\nE  assert 1 == 2")
    kept = found(tmp_path)["tests"]
    assert kept["counts"] == {"passed": 1, "failed": 1, "skipped": 1} and kept["skipped"] == {"one GPU": 1}
    assert kept["failures"] == [{"test": name, "error": "E  assert 1 == 2"}]


def test_without_compute_sanitizer_the_stage_is_skipped_with_the_reason(monkeypatch, tmp_path: Path) -> None:
    monkeypatch.setattr(sanitizer, "tool", lambda name: Tool("", "it comes with the CUDA toolkit"))
    sanitizer.sanitizer(stage(tmp_path, "sanitizer", dry_run=False))
    reason = "skipped: compute-sanitizer was not found; it comes with the CUDA toolkit"
    assert found(tmp_path)["sanitizer"]["reason"] == reason


def test_a_sanitizer_is_believed_only_if_the_calls_ended_well() -> None:
    verdict = sanitizer.verdict
    assert verdict(0, "ok\n========= ERROR SUMMARY: 0 errors") == "clean"
    assert verdict(86, "ok\n========= ERROR SUMMARY: 3 errors") == "status 86: 3 errors"
    assert verdict(1, "AssertionError: x: 3 elements off") == "status 1: no summary"
    refused = "cannot run on this machine: Error: Device not supported. Please refer"
    assert verdict(255, "========= Error: Device not supported. Please refer") == refused


# --- kernels --------------------------------------------------------------------------------------


def test_the_cases_decide_first_and_cover_every_form_and_size_of_the_design() -> None:
    forms, tokens = kernels.form_cases(), kernels.token_cases()
    assert len({case.name for case in (*forms, *tokens)}) == len(forms) + len(tokens)
    assert {case.form for case in forms} == {*FORMS}
    assert {size.name for size in kernels.GATE_SIZES} == {case.size.name for case in forms}
    decisive = [case.form in kernels.DECISIVE for case in forms if case.dtype is BF16]
    assert decisive == sorted(decisive, reverse=True)
    assert {case.share for case in tokens if isinstance(case, Case)} == {0.01, 0.07, 0.25, 0.6}


HOST, OURS = ["naive", "best eager", "torch.compile"], ["fastcache cuda", "fastcache triton"]
REHEARSED = {
    Case(Form.REFRESH, TINY, BF16): [*HOST, "torch.compile autotuned", *OURS],
    Case(Form.BLOCK, TINY_TOKENS, BF16, 0.25): [*HOST, *OURS, "MLP alone"],
    ChoiceCase(TINY_TOKENS, 0.3): [*HOST, "fastcache"],
}


@pytest.mark.parametrize("case", REHEARSED, ids=lambda case: case.name)
def test_a_rehearsed_case_has_every_contender(case) -> None:
    rows, absent = kernels.measure_gate_case(case, kernels.Gpu(CPU, COPY, 100.0, effort=ONCE))
    assert [row["contender"] for row in rows] == REHEARSED[case] and absent == []
    for row in rows:
        assert row["share_of_copy"] == pytest.approx(row["gbps"] / 10)
        assert row["share_of_datasheet"] == pytest.approx(row["gbps"] / 100)
        assert row["host_us"] > 0 and row["launches"] is None and row["timing"]["cpu_us"]
        assert row["error"] < 1e-2 and json.dumps(row)


def test_an_absent_backend_and_autotuning_without_a_budget_leave_their_contender_out(monkeypatch) -> None:
    monkeypatch.setattr(kernels, "STAND_INS", {"cuda": "cuda", "triton": "eager"})
    monkeypatch.setattr(kernels, "AUTOTUNED_SIZES", ())
    gpu = kernels.Gpu(CPU, COPY, autotune_everywhere=False, effort=ONCE)
    rows, [absent] = kernels.measure_gate_case(Case(Form.UPDATE, TINY, BF16), gpu)
    assert [row["contender"] for row in rows] == [*HOST, "fastcache triton"]
    assert absent["provider"] == "fastcache cuda" and "'cuda' cannot run here" in absent["reason"]


def test_a_contender_with_wrong_values_is_not_timed_and_fails_the_stage(monkeypatch, tmp_path: Path) -> None:
    class Wrong(FormSequences):
        def __init__(self, case: Case) -> None:
            super().__init__(case)
            self.contenders["fastcache"] = lambda operands: lambda: (operands.x, None, None)

    monkeypatch.setattr("benchmarks.contest.FormSequences", Wrong)
    monkeypatch.setattr(kernels, "form_cases", lambda sizes: [Case(Form.UPDATE, TINY, BF16)])
    monkeypatch.setattr(kernels, "token_cases", lambda sizes: [])
    with pytest.raises(Failed, match="wrong values, so not timed: update-Tiny-B2-bf16: fastcache cuda"):
        kernels.kernels(stage(tmp_path, "kernels"))
    ran = {row["contender"] for row in found(tmp_path)["kernels"]["rows"]}
    assert ran == {*HOST, "torch.compile autotuned"}


def test_a_dry_run_keeps_no_times(monkeypatch, tmp_path: Path) -> None:
    monkeypatch.setattr(kernels, "form_cases", lambda sizes: [Case(Form.UPDATE, TINY, BF16)])
    monkeypatch.setattr(kernels, "token_cases", lambda sizes: [])
    kernels.kernels(stage(tmp_path, "kernels"))
    end_to_end.end_to_end(Stage("end_to_end", tmp_path / "gate.json", dry_run=True))
    text, whole = (tmp_path / "gate.json").read_text(), found(tmp_path)["end_to_end"]
    assert "_us" not in text and "gbps" not in text and whole["absent"] == []
    ways = {
        (entrant.method.name if entrant.method else "uncached", entrant.way)
        for entrant in end_to_end.ENTRANTS
    }
    assert {(row["method"], row["way"]) for row in whole["methods"]} == ways


def test_a_spent_budget_leaves_every_case_with_the_reason(monkeypatch, tmp_path: Path) -> None:
    late = stage(tmp_path, "kernels", dry_run=False, seconds=0.0)
    monkeypatch.setattr(kernels, "measure_bandwidth", lambda *args, **kwargs: COPY)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: "NVIDIA H200")
    with pytest.raises(Failed, match="no case was measured"):
        kernels.kernels(late)
    kept, cases = found(tmp_path)["kernels"], [*kernels.token_cases(), *kernels.form_cases()]
    assert [one["case"] for one in kept["absent"]] == [case.name for case in cases]
    reasons = {f"the budget of the part {part} was used up" for part in ("tokens", "forms")}
    assert {one["reason"] for one in kept["absent"]} == reasons and kept["datasheet_gbps"] == 4800.0


def test_a_replay_uses_every_buffer_equally_often_and_scales_to_one_call() -> None:
    seen: list[int] = []
    calls = [lambda buffer=buffer: seen.append(buffer) for buffer in range(3)]
    replay = captured(calls, CPU, ideal_us=100.0)
    replay.run()
    assert replay.calls == 6 and seen == [0, 1, 2, 0, 1, 2]
    assert captured(calls, CPU, ideal_us=1e9).calls == 3
    slow = captured([lambda: time.sleep(0.01)], CPU, ideal_us=250.0)
    assert slow.calls == 2 and 9e3 < measure({"slow": [slow]}, ONCE, CPU)["slow"].median_us < 19e3
    assert host_us(calls, CPU) > 0


# --- end to end -----------------------------------------------------------------------------------


def test_a_way_that_computes_something_else_fails_the_stage(monkeypatch, tmp_path: Path) -> None:
    other = lambda model, policy, schedule: end_to_end.FORA_3.original(
        model, policy, FORA(2).schedule(4, schedule.layout)
    )
    wrong = Method("FORA", lambda steps: FORA(4), other)
    monkeypatch.setattr(end_to_end, "METHODS", (wrong,))
    ways = [Entrant(wrong, way) for way in (Way.ORIGINAL, Way.OURS)]
    monkeypatch.setattr(end_to_end, "ENTRANTS", (end_to_end.HOST, *ways))
    monkeypatch.setattr(end_to_end, "ALLOWED_ERROR", 1e-9)
    with pytest.raises(WrongValues, match="differs from 'FORA, original'"):
        end_to_end.end_to_end(stage(tmp_path, "end_to_end"))


def test_the_larger_pictures_are_measured_last() -> None:
    names = ["256 px, 1 images", "256 px, 8 images", "256 px, 32 images", "512 px, 4 images"]
    assert [end_to_end.named(size) for size in end_to_end.SIZES] == names


def test_launches_are_counted_of_the_last_step_of_each_kind(monkeypatch: pytest.MonkeyPatch) -> None:
    counted, contest = [], Contest(end_to_end.TINY, end_to_end.METHODS)
    monkeypatch.setattr(end_to_end, "launches", lambda call, device: counted.append(call.__defaults__[0]))
    kinds = ["full", "partial", "skip", "partial", "full", "skip", "partial", "full", "full", "skip"]
    with contest.entered(end_to_end.HOST) as control:
        monkeypatch.setattr(type(control), "call", lambda control, step: None)
        assert set(end_to_end.counted(control, kinds)) == {"full", "partial", "skip"}
    assert counted == [6, 8, 9]
