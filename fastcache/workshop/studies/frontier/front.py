"""What a frontier says: Pareto fronts, and whether the methods come in the order of their papers."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from fastcache.workshop.metrics import frechet_distance
from fastcache.workshop.studies.frontier.results import FrontierRow

EXPECTED = ("TaylorSeer", "DuCa", "ToCa", "FORA")  # best first, at equal interval
RESAMPLES = 40


@dataclass(frozen=True)
class Metric:
    """A measure of quality; `goodness` of a row is higher for better pictures."""

    name: str
    label: str
    value: Callable[[FrontierRow], float]
    higher_is_better: bool
    text: str  # format of a value

    def goodness(self, row: FrontierRow) -> float:
        """The value, turned so that more is better."""
        return self.value(row) if self.higher_is_better else -self.value(row)


FRECHET = Metric("frechet_distance", "Frechet distance", lambda row: row.frechet_distance, False, "{:.3f}")
PSNR = Metric(
    "psnr_db",
    "PSNR against uncached, dB",
    lambda row: float("inf") if row.psnr_db is None else row.psnr_db,
    True,
    "{:.1f} dB",
)
ACCURACY = Metric("accuracy", "read correctly", lambda row: row.accuracy, True, "{:.1%}")
METRICS = (FRECHET, PSNR, ACCURACY)
SPEEDS: Mapping[str, Callable[[FrontierRow], float]] = {
    "measured": lambda row: row.speedup,
    "ideal": lambda row: row.ideal_speedup,
}


@dataclass(frozen=True)
class Place:
    """One method in a ranking."""

    method: str
    setting: str
    value: float
    ideal_speedup: float


@dataclass(frozen=True)
class OrderCheck:
    """Methods at one interval by one metric, best first, against the order of the papers.

    broken: the pairs (expected better, found better) that are the other way round. within_noise:
    those of them whose difference is less than two standard errors (Frechet distance only).
    """

    interval: int
    metric: str
    ranking: tuple[Place, ...]
    broken: tuple[tuple[str, str], ...]
    within_noise: tuple[tuple[str, str], ...] = ()

    @property
    def holds(self) -> bool:
        """True if every method stands where the papers expect it."""
        return not self.broken


def pareto_front(points: Sequence[tuple[float, float]]) -> list[int]:
    """Indices of the points (speed, goodness) that no other one beats in both, by rising speed.

    Of equal points the first is taken. More is better in both; NaN is beaten by everything.
    """
    order = sorted(
        (index for index, point in enumerate(points) if not any(np.isnan(point))),
        key=lambda index: (-points[index][0], -points[index][1], index),
    )
    front: list[int] = []
    best = float("-inf")
    for index in order:
        if not front or points[index][1] > best:
            front.append(index)
            best = points[index][1]
    return front[::-1]


def fronts(rows: Sequence[FrontierRow]) -> dict[str, dict[str, list[str]]]:
    """Settings on the Pareto front by kind of speedup and metric."""
    return {
        speed: {
            metric.name: [
                rows[index].setting
                for index in pareto_front([(at(row), metric.goodness(row)) for row in rows])
            ]
            for metric in METRICS
        }
        for speed, at in SPEEDS.items()
    }


def order_checks(
    rows: Sequence[FrontierRow], features: Mapping[str, np.ndarray], real: np.ndarray
) -> list[OrderCheck]:
    """A check for every interval at which two methods or more were measured, by Frechet distance and by PSNR.

    A method is represented by its usual setting, or by the first one if that was not measured.
    features: of a setting's pictures [n, 64], for the noise of Frechet distances; may lack settings.
    """
    ranked = [row for row in rows if row.method in EXPECTED]
    checks = []
    for interval in sorted({row.interval for row in ranked if row.interval is not None}):
        at: dict[str, FrontierRow] = {}
        for row in sorted((row for row in ranked if row.interval == interval), key=lambda row: not row.usual):
            at.setdefault(row.method, row)
        if len(at) < 2:
            continue
        for metric in (FRECHET, PSNR):
            ranking = sorted(at.values(), key=metric.goodness, reverse=True)
            expected = [method for method in EXPECTED if method in at]
            broken = tuple(
                (a, b)
                for index, a in enumerate(expected)
                for b in expected[index + 1 :]
                if metric.goodness(at[b]) > metric.goodness(at[a])
            )
            noise = tuple(
                pair
                for pair in broken
                if metric is FRECHET and _within_noise(at[pair[0]], at[pair[1]], features, real)
            )
            places = tuple(
                Place(row.method, row.setting, metric.value(row), row.ideal_speedup) for row in ranking
            )
            checks.append(OrderCheck(interval, metric.name, places, broken, noise))
    return checks


def _within_noise(
    a: FrontierRow, b: FrontierRow, features: Mapping[str, np.ndarray], real: np.ndarray
) -> bool:
    if a.setting not in features or b.setting not in features:
        return False
    error = frechet_difference_error(features[a.setting], features[b.setting], real)
    return abs(a.frechet_distance - b.frechet_distance) < 2 * error


def frechet_difference_error(a: np.ndarray, b: np.ndarray, real: np.ndarray) -> float:
    """Standard error of the difference of two Frechet distances to `real`, by resampling pictures.

    a, b [n, d]: features of the same pictures under two settings, so both are resampled alike
    (Efron's bootstrap); the noise that they share cancels.
    """
    rng = np.random.default_rng(0)
    found = []
    for _ in range(RESAMPLES):
        drawn = rng.integers(len(a), size=len(a))
        found.append(frechet_distance(a[drawn], real) - frechet_distance(b[drawn], real))
    return float(np.std(found, ddof=1))
