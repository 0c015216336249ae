"""`fastcache quality`: many pictures per setting, judged by Frechet distance, class accuracy and PSNR."""

import json
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np

from fastcache.files.arrays import read_arrays, write_arrays
from fastcache.files.damaged import set_aside
from fastcache.files.whole import remove_leftovers, require_writable_folder, write_text_whole
from fastcache.workshop.environment import Environment, environment
from fastcache.workshop.glyphs import dataset, load_classifier, load_glyph_dit
from fastcache.workshop.glyphs.classifier import GlyphClassifier, read
from fastcache.workshop.metrics import accuracy, frechet_distance, psnr
from fastcache.workshop.studies.comparison import SETTINGS, UNCACHED, Sampler, Setting, labels_of

REAL_SEEDS = (5, 6)  # pictures that neither the DiT nor the classifier was trained on


@dataclass(frozen=True)
class Pictures:
    """The pictures of one setting, as kept in `{name}.npz`."""

    pictures: np.ndarray  # [n, 32, 32, 3] uint8
    seconds: float  # to sample them all
    kept: bool  # by an earlier run


@dataclass(frozen=True)
class QualityRow:
    """How good the pictures of one setting are, and what they cost."""

    setting: str
    policy: dict[str, object]
    frechet_distance: float  # to one half of the real pictures
    accuracy: float
    psnr_db: float | None  # mean over pictures, against the uncached pictures; None for those
    seconds_per_picture: float


@dataclass(frozen=True)
class QualityReport:
    """The whole of `report.json`. `floor`: Frechet distance between two halves of real pictures, as many in
    each.
    """

    environment: Environment
    sampler: Sampler
    pictures: int
    floor: float
    real_accuracy: float
    rows: list[QualityRow]
    finished_before: bool  # no picture was left to sample


def run_quality(
    out: Path, *, per_class: int = 28, sampler: Sampler = Sampler(batch_size=36)
) -> QualityReport:
    """36 * per_class pictures under every setting; `report.json` in `out`.

    The pictures of a finished setting are kept in `out` and not sampled again by a later run with the
    same sampler and count. Raises ValueError if per_class is less than 2.
    """
    if per_class < 2:
        raise ValueError(f"per_class: expected at least 2, got {per_class}")
    require_writable_folder(out)
    remove_leftovers(out)
    made = {setting.name: _pictures_of(setting, out, per_class, sampler) for setting in SETTINGS}
    classifier = load_classifier()
    halves = [dataset.make(per_class, seed) for seed in REAL_SEEDS]
    real, others = (read(classifier, dataset.to_model_range(pictures)) for pictures, _ in halves)
    report = QualityReport(
        environment=environment(),
        sampler=sampler,
        pictures=len(real[0]),
        floor=frechet_distance(real[0], others[0]),
        real_accuracy=accuracy(real[1], halves[0][1]),
        rows=[_row(setting, made, classifier, real[0]) for setting in SETTINGS],
        finished_before=all(pictures.kept for pictures in made.values()),
    )
    write_text_whole(out / "report.json", json.dumps(asdict(report), indent=2) + "\n")
    return report


def _pictures_of(setting: Setting, out: Path, per_class: int, sampler: Sampler) -> Pictures:
    """Read from `out` if a run with the same sampler and count left them there, else sampled and written."""
    count = per_class * len(dataset.CLASSES)
    made_by = json.dumps({"sampler": asdict(sampler), "pictures": count, "policy": setting.fields()})
    path = out / f"{setting.name.replace(' ', '-').lower()}.npz"
    if path.exists():
        try:
            kept = read_arrays(path, ("pictures", "seconds", "made_by"))
        except ValueError as error:
            set_aside(path, error)
        else:
            if str(kept["made_by"]) == made_by:
                return Pictures(kept["pictures"], float(kept["seconds"]), kept=True)
    samples = sampler.run(load_glyph_dit(), range(count), setting.policy, progress=True, title=setting.name)
    made = Pictures(dataset.to_pixels(samples.pictures), sum(samples.batch_seconds), kept=False)
    kept = {"pictures": made.pictures, "seconds": np.array(made.seconds), "made_by": np.array(made_by)}
    write_arrays(path, kept)
    return made


def _row(
    setting: Setting, made: dict[str, Pictures], classifier: GlyphClassifier, real: np.ndarray
) -> QualityRow:
    own, uncached = made[setting.name], made[UNCACHED.name]
    features, logits = read(classifier, dataset.to_model_range(own.pictures))
    return QualityRow(
        setting=setting.name,
        policy=setting.fields(),
        frechet_distance=frechet_distance(features, real),
        accuracy=accuracy(logits, labels_of(range(len(own.pictures)))),
        psnr_db=(
            None if own is uncached else float(psnr(own.pictures, uncached.pictures, value_range=255).mean())
        ),
        seconds_per_picture=own.seconds / len(own.pictures),
    )
