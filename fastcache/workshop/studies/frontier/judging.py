"""How good pictures are: against the uncached ones, to the classifier, and against real ones."""

from dataclasses import dataclass

import numpy as np
from torch import Tensor

from fastcache.workshop.glyphs import dataset, load_classifier
from fastcache.workshop.glyphs.classifier import GlyphClassifier, read
from fastcache.workshop.metrics import accuracy, frechet_distance, psnr
from fastcache.workshop.studies.comparison import labels_of

REAL_SEEDS = (5, 6)  # pictures that neither the DiT nor the classifier was trained on


@dataclass(frozen=True)
class Verdict:
    """The quality of one setting's pictures."""

    frechet_distance: float  # to the real pictures
    accuracy: float
    psnr_db: float | None  # mean over pictures, against the uncached pictures; None for those
    features: np.ndarray  # [n, 64] float32, of the classifier


class Judge:
    """The classifier and as many real pictures as are judged. `floor`: their distance to other real ones."""

    def __init__(self, pictures: int) -> None:
        self.classifier: GlyphClassifier = load_classifier()
        per_class = -(-pictures // len(dataset.CLASSES))
        halves = [
            read(self.classifier, dataset.to_model_range(dataset.make(per_class, seed)[0]))[0]
            for seed in REAL_SEEDS
        ]
        self.real: np.ndarray = np.asarray(halves[0])
        self.floor: float = frechet_distance(halves[0], halves[1])

    def verdict(self, pictures: Tensor, reference: Tensor | None) -> Verdict:
        """pictures and reference [n, 3, 32, 32] in [-1, 1]; picture i shows class i mod 36."""
        features, logits = read(self.classifier, pictures)
        return Verdict(
            frechet_distance=frechet_distance(features, self.real),
            accuracy=accuracy(logits, labels_of(range(len(pictures)))),
            psnr_db=None if reference is None else float(psnr(pictures, reference, value_range=2).mean()),
            features=np.asarray(features, np.float32),
        )
