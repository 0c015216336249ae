"""`fastcache demo`: the glyph model uncached and under FORA, ToCa, DuCa and TaylorSeer, on the same noise;
pictures, plans and a report.
"""

import json
import statistics
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path

import torch
from torch import Tensor

from fastcache.engine.record import StepKindSummary
from fastcache.files.whole import require_writable_folder, write_text_whole
from fastcache.models import DiT
from fastcache.plan.drawing import draw_schedules
from fastcache.policies import FORA
from fastcache.policies.token_refresh import TokenRefresh
from fastcache.workshop.environment import Environment, environment
from fastcache.workshop.glyphs import load_classifier, load_glyph_dit
from fastcache.workshop.glyphs.classifier import GlyphClassifier, read
from fastcache.workshop.glyphs.dataset import CLASSES, to_pixels
from fastcache.workshop.metrics import accuracy, psnr
from fastcache.workshop.progress import Progress
from fastcache.workshop.sampling import Samples
from fastcache.workshop.studies.comparison import SETTINGS, UNCACHED, Sampler, Setting, labels_of
from fastcache.workshop.studies.grid import GridRow, draw_grid
from fastcache.workshop.studies.tokens import draw_tokens, record_tokens

PICTURES = range(len(CLASSES))
WARM_UP_STEPS = 4  # a full and a cached step for every policy
TOKEN_PICTURES = (0, 17, 31)  # A, R and 5: straight, round and mixed


@dataclass(frozen=True)
class DemoRow:
    """What one setting cost and gave. Speedups are against the uncached runs of the same batches."""

    setting: str
    policy: dict[str, object]
    batch_seconds: list[float]  # in the order of the run
    seconds_per_picture: float  # median over batches
    speedup: float  # uncached median / this setting's median
    speedup_of_fastest: float  # the same of the fastest batches; far from `speedup`: the machine was busy
    ideal_speedup: float  # uncached FLOPs / planned FLOPs
    quotient: float  # speedup / ideal_speedup
    psnr_db: float | None  # mean over pictures, against the uncached pictures; None for those
    accuracy: float  # share of pictures that the classifier reads as their class
    steps: dict[str, StepKindSummary]  # by kind of step, of the last batch
    feature_bytes: int
    table_bytes: int


@dataclass(frozen=True)
class DemoReport:
    """The whole of `report.json`."""

    environment: Environment
    sampler: Sampler
    pictures: int
    rounds: int
    rows: list[DemoRow]


@dataclass
class Measurement:
    """What is collected for one setting while the demo runs."""

    pictures: Tensor  # [36, 3, 32, 32] in [-1, 1]
    last: Samples  # with a summary: of the warm-up at first, then of the last batch
    seconds: list[float] = field(default_factory=list)  # of each batch
    seconds_per_picture: list[float] = field(default_factory=list)  # in each batch


def run_demo(out: Path, *, rounds: int = 2, sampler: Sampler = Sampler()) -> DemoReport:
    """A picture of each class under every setting, `rounds` times; grid.png, steps.png, tokens.png and
    report.json in `out`.
    """
    require_writable_folder(out)
    model, classifier = load_glyph_dit(), load_classifier()
    found = _measure(model, rounds, sampler)
    rows = [_row(setting, found, classifier) for setting in SETTINGS]
    report = DemoReport(environment(), sampler, len(PICTURES), rounds, rows)
    draw_grid(
        [GridRow(row.setting, _captions(row), to_pixels(found[row.setting].pictures)) for row in rows],
        out / "grid.png",
    )
    plans = {s.name: found[s.name].last.schedule for s in SETTINGS if s.policy is not None}
    draw_schedules(
        {name: plan for name, plan in plans.items() if plan is not None},
        out / "steps.png",
    )
    refreshing = {s.name: s.policy for s in SETTINGS if isinstance(s.policy, TokenRefresh)}
    # recording waits for every step, so it has a run of its own
    draw_tokens(
        {name: record_tokens(model, policy, sampler, TOKEN_PICTURES) for name, policy in refreshing.items()},
        out / "tokens.png",
    )
    write_text_whole(out / "report.json", json.dumps(asdict(report), indent=2) + "\n")
    return report


def _measure(model: DiT, rounds: int, sampler: Sampler) -> dict[str, Measurement]:
    """Settings take turns batch by batch, so that a busy machine slows all of them alike."""
    batches = [
        PICTURES[first : first + sampler.batch_size] for first in range(0, len(PICTURES), sampler.batch_size)
    ]
    found = {}
    with Progress((rounds * len(batches) + 1) * len(SETTINGS), "warming up", "batch") as bar:
        for setting in SETTINGS:
            bar.begin(f"warm-up, {setting.name}")
            found[setting.name] = _warm_up(model, setting, batches[0], sampler)
            plan = found[setting.name].last.schedule
            bar.ran({"full": sampler.steps} if plan is None else plan.kinds())
        for _ in range(rounds):
            for indices in batches:
                for setting in SETTINGS:
                    bar.begin(setting.name)
                    samples = sampler.run(model, indices, setting.policy)
                    _add(found[setting.name], samples, indices)
                    bar.ran({"full": sampler.steps} if samples.schedule is None else samples.schedule.kinds())
    return found


def _warm_up(model: DiT, setting: Setting, indices: Sequence[int], sampler: Sampler) -> Measurement:
    """A short run in a session; that of interval 1 runs the untouched model, and counts its operators."""
    short = replace(sampler, steps=WARM_UP_STEPS).run(model, indices, setting.policy or FORA(interval=1))
    return Measurement(torch.empty(len(PICTURES), *short.pictures.shape[1:]), short)


def _add(measurement: Measurement, samples: Samples, indices: range) -> None:
    measurement.pictures[indices.start : indices.stop] = samples.pictures.clamp(-1, 1)
    measurement.seconds += samples.batch_seconds
    measurement.seconds_per_picture += [seconds / len(indices) for seconds in samples.batch_seconds]
    if samples.summary is not None:
        measurement.last = samples


def _row(setting: Setting, found: dict[str, Measurement], classifier: GlyphClassifier) -> DemoRow:
    own, uncached = found[setting.name], found[UNCACHED.name]
    summary = own.last.summary
    assert summary is not None  # `last` is a run in a session
    speedup = statistics.median(uncached.seconds_per_picture) / statistics.median(own.seconds_per_picture)
    return DemoRow(
        setting=setting.name,
        policy=setting.fields(),
        batch_seconds=own.seconds,
        seconds_per_picture=statistics.median(own.seconds_per_picture),
        speedup=speedup,
        speedup_of_fastest=min(uncached.seconds_per_picture) / min(own.seconds_per_picture),
        ideal_speedup=summary.ideal_speedup,
        quotient=speedup / summary.ideal_speedup,
        psnr_db=(
            None if own is uncached else float(psnr(own.pictures, uncached.pictures, value_range=2).mean())
        ),
        accuracy=accuracy(read(classifier, own.pictures)[1], labels_of(PICTURES)),
        steps=summary.steps,
        feature_bytes=summary.bytes_held,
        table_bytes=summary.table_bytes,
    )


def _captions(row: DemoRow) -> list[str]:
    if row.psnr_db is None:
        return [f"{row.seconds_per_picture:.2f} s a picture", f"{row.accuracy:.0%} read correctly"]
    return [
        f"{row.seconds_per_picture:.2f} s a picture, {row.speedup:.2f}x",
        f"{row.accuracy:.0%} read correctly",
        f"PSNR {row.psnr_db:.1f} dB",
    ]
