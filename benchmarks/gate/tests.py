"""Stage `tests`: `pytest -m gpu tests/gpu`, counted test by test."""

import importlib.util
import os

import pytest

from benchmarks.gate.stage import ROOT, Failed, Stage, run

PROCESSES = 6  # compile Triton kernels side by side; the GPU is shared
OPTIONS = ("-m", "gpu", "-q", "--no-header", "-p", "no:cacheprovider", "--rootdir", str(ROOT), "--tb=short")


class Progress:
    """A pytest plugin that keeps the results up to date."""

    def __init__(self, stage: Stage) -> None:
        self._stage, self.counts = stage, {"passed": 0, "failed": 0, "skipped": 0}
        self._reasons: dict[str, int] = {}

    def pytest_runtest_logreport(self, report: pytest.TestReport) -> None:
        if report.when != "call" and report.outcome == "passed":
            return
        self.counts[report.outcome] += 1
        text = report.longrepr[2] if isinstance(report.longrepr, tuple) else str(report.longrepr)
        if report.outcome == "failed":
            error = text.strip().splitlines()[-1][:400]
            self._stage.add("failures", {"test": report.nodeid, "error": error})
        if report.outcome == "skipped":
            self._reasons[text] = self._reasons.get(text, 0) + 1
        self._stage.put(counts=self.counts, skipped=self._reasons)


def tests(stage: Stage) -> None:
    """In a dry run the tests of values are rehearsed on the CPU, and the others skip themselves."""
    progress = Progress(stage)
    if stage.dry_run:
        os.environ["FASTCACHE_GPU_TESTS_ON_CPU"] = "1"
    side_by_side = importlib.util.find_spec("xdist") and not stage.dry_run
    parallel = ["-n", str(PROCESSES)] if side_by_side else []
    code = int(pytest.main([*OPTIONS, str(ROOT / "tests" / "gpu"), *parallel], plugins=[progress]))
    counts = progress.counts
    stage.put(exit_status=code)
    stage.say(", ".join(f"{count} {outcome}" for outcome, count in counts.items()))
    if code != 0 or counts["failed"]:
        raise Failed(f"{counts['failed']} tests failed (pytest ended with status {code})")
    if not sum(counts.values()) if stage.dry_run else not counts["passed"]:
        raise Failed("no test ran; `skipped` says why")


if __name__ == "__main__":
    run("tests", tests)
