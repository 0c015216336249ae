"""How far a set of pictures is from another: PSNR, Frechet distance, class accuracy. NumPy, float64."""

import numpy as np
from numpy.typing import ArrayLike


def psnr(a: ArrayLike, b: ArrayLike, *, value_range: float) -> np.ndarray:
    """10 log10(value_range^2 / mean squared error) in dB for each picture: [n, ...] and [n, ...] -> [n].

    `value_range` is the largest possible difference: 255 for uint8, 2 for pictures in [-1, 1].
    Identical pictures give inf. Raises ValueError if the shapes differ or the range is not positive.
    """
    a, b = np.asarray(a, np.float64), np.asarray(b, np.float64)
    if a.shape != b.shape or a.ndim < 2:
        raise ValueError(f"b: expected the shape of a, [n, ...], {list(a.shape)}, got {list(b.shape)}")
    if not value_range > 0:
        raise ValueError(f"value_range: expected a positive number, got {value_range}")
    error = np.square(a - b).reshape(len(a), -1).mean(axis=1)
    with np.errstate(divide="ignore"):
        return 10 * np.log10(value_range**2 / error)


def frechet_distance(features_a: ArrayLike, features_b: ArrayLike) -> float:
    """|mean_a - mean_b|^2 + tr(A + B - 2 (A^1/2 B A^1/2)^1/2) of the two sets' Gaussians.

    features [n, d] and [m, d], n and m at least 2; A and B are their covariances (n - 1). The value
    is squared, as in FID, and biased upwards for small sets: compare sets of one size.
    Source: Dowson and Landau (1982); Heusel et al., "GANs trained by a two time-scale update rule" (2017).
    Raises ValueError naming the argument.
    """
    a, b = np.asarray(features_a, np.float64), np.asarray(features_b, np.float64)
    for name, features in (("features_a", a), ("features_b", b)):
        if features.ndim != 2 or len(features) < 2 or features.shape[1] != a.shape[-1]:
            raise ValueError(f"{name}: expected [n >= 2, d] with one d for both, got {list(features.shape)}")
    cov_a, cov_b = np.atleast_2d(np.cov(a, rowvar=False)), np.atleast_2d(np.cov(b, rowvar=False))
    root_a = _symmetric_root(cov_a)
    overlap = np.sqrt(_eigenvalues_from_zero(np.linalg.eigvalsh(root_a @ cov_b @ root_a))).sum()
    offset = np.square(a.mean(axis=0) - b.mean(axis=0)).sum()
    return float(max(offset + np.trace(cov_a) + np.trace(cov_b) - 2 * overlap, 0.0))


def accuracy(logits: ArrayLike, labels: ArrayLike) -> float:
    """Share of rows of logits [n, classes] whose largest entry is at labels [n]."""
    logits, labels = np.asarray(logits), np.asarray(labels)
    if logits.ndim != 2 or labels.shape != logits.shape[:1] or not len(labels):
        raise ValueError(
            f"labels: expected [n >= 1] for logits [n, classes] {list(logits.shape)}, got"
            f" {list(labels.shape)}"
        )
    return float(np.mean(logits.argmax(axis=1) == labels))


def _symmetric_root(matrix: np.ndarray) -> np.ndarray:
    """The symmetric square root of a positive semidefinite matrix [d, d], by its eigenvectors."""
    values, vectors = np.linalg.eigh(matrix)
    return (vectors * np.sqrt(_eigenvalues_from_zero(values))) @ vectors.T


def _eigenvalues_from_zero(values: np.ndarray) -> np.ndarray:
    """Eigenvalues of a positive semidefinite matrix without the negative ones that rounding leaves."""
    return np.maximum(values, 0.0)
