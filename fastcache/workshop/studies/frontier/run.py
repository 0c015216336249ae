"""Measuring a frontier, a setting at a time; the report is renewed after each."""

from collections.abc import Callable, Mapping
from pathlib import Path

from fastcache.workshop.progress import Progress
from fastcache.workshop.studies.frontier.grid import UNCACHED
from fastcache.workshop.studies.frontier.judging import Judge
from fastcache.workshop.studies.frontier.measuring import Measurement, compared_batches, measure
from fastcache.workshop.studies.frontier.plan import FrontierPlan, Planned
from fastcache.workshop.studies.frontier.report import FrontierReport, report_of, write_report
from fastcache.workshop.studies.frontier.results import FrontierRow


def run_frontier(plan: FrontierPlan, out: Path) -> FrontierReport:
    """Measures what is planned and not there yet; frontier.json, .csv, .md and .png in `out`, renewed after
    each setting.

    A run that was interrupted goes on where it stopped: a finished setting is not measured again.
    """
    judge = Judge(plan.options.pictures)
    left = plan.left
    # the pictures to compare with first, then what the methods are ranked by: an unfinished run says most
    left.sort(key=lambda planned: (planned.setting is not UNCACHED, not planned.setting.usual))
    with Progress(sum(_batches(plan, planned) for planned in left), "measuring", "batch") as bar:
        for planned in left:
            bar.begin(planned.setting.name)
            _measure(plan, planned, judge, bar.ran)
            write_report(_report(plan, judge), out)
    report = _report(plan, judge)
    write_report(report, out)
    return report


def _report(plan: FrontierPlan, judge: Judge) -> FrontierReport:
    found = {
        planned.setting.name: plan.store.row(planned.setting.slug, planned.fingerprint)
        for planned in plan.grid
    }
    rows = [row for row in found.values() if row is not None]
    missing = [name for name, row in found.items() if row is None]
    features = {
        planned.setting.name: plan.store.features(planned.setting.slug)
        for planned in plan.grid
        if planned.setting.interval is not None and found[planned.setting.name] is not None
    }
    return report_of(plan.options.sampler, plan.options.pictures, rows, missing, judge, features)


def _measure(
    plan: FrontierPlan, planned: Planned, judge: Judge, on_batch: Callable[[Mapping[str, int]], object]
) -> None:
    options, setting = plan.options, planned.setting
    measured = measure(
        plan.model, planned.policy, options.sampler, options.pictures, options.comparisons, on_batch
    )
    reference = None if setting is UNCACHED else plan.store.pictures(UNCACHED.slug)
    verdict = judge.verdict(measured.pictures, reference)
    arrays = {"features": verdict.features}
    if setting is UNCACHED:
        arrays["pictures"] = measured.pictures.numpy()
    plan.store.write(
        setting.slug,
        planned.fingerprint,
        _row(
            planned, options.pictures, measured, verdict.frechet_distance, verdict.accuracy, verdict.psnr_db
        ),
        arrays,
    )


def _row(
    planned: Planned,
    pictures: int,
    measured: Measurement,
    frechet: float,
    accuracy: float,
    psnr_db: float | None,
) -> FrontierRow:
    setting, summary = planned.setting, measured.summary
    return FrontierRow(
        setting=setting.name,
        method=setting.method,
        interval=setting.interval,
        usual=setting.usual,
        policy=planned.fields,
        pictures=pictures,
        frechet_distance=frechet,
        accuracy=accuracy,
        psnr_db=psnr_db,
        seconds_per_picture=measured.seconds_per_picture,
        uncached_seconds_per_picture=measured.uncached_seconds_per_picture,
        speedup=measured.speedup,
        speedup_of_fastest=measured.speedup_of_fastest,
        ideal_speedup=planned.ideal_speedup,
        quotient=measured.speedup / planned.ideal_speedup,
        batch_seconds=list(measured.seconds),
        uncached_batch_seconds=list(measured.uncached_seconds),
        step_kinds={} if planned.schedule is None else planned.schedule.kinds(),
        feature_bytes=0 if summary is None else summary.bytes_held,
    )


def _batches(plan: FrontierPlan, planned: Planned) -> int:
    count = -(-plan.options.pictures // plan.options.sampler.batch_size)
    return (
        count if planned.schedule is None else count + len(compared_batches(count, plan.options.comparisons))
    )
