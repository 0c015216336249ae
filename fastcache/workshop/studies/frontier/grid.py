"""The settings of the frontier, and the smaller grid of the automated test."""

from collections.abc import Sequence
from dataclasses import dataclass
from fnmatch import fnmatch

from fastcache.policies import FORA, DuCa, Policy, TaylorSeer, ToCa

METHODS = ("TaylorSeer", "DuCa", "ToCa", "FORA", "SmoothCache")


@dataclass(frozen=True)
class Calibrated:
    """A SmoothCache schedule that the run calibrates: the smallest threshold with this ideal speedup.

    per_layer: a schedule of its own for every branch of every block. It stands for methods with such
    schedules, as L2C: no router was trained for the shipped model.
    """

    target_speedup: float
    per_layer: bool = False


@dataclass(frozen=True)
class FrontierSetting:
    """A point to be measured.

    interval: the base interval by which methods are compared, if the method has one. usual: as the
    method's authors set it (TaylorSeer: their order on DiT, ToCa and DuCa: their ratio and score);
    of the settings at an interval, this one stands for its method.
    """

    name: str
    method: str
    policy: Policy | Calibrated | None
    interval: int | None = None
    usual: bool = False

    @property
    def slug(self) -> str:
        """The name as the stem of a file."""
        return self.name.lower().replace(" ", "-")


UNCACHED = FrontierSetting("uncached", "uncached", None)


def _token_settings(kind: type[ToCa] | type[DuCa]) -> list[FrontierSetting]:
    name = kind.__name__
    usual = [
        FrontierSetting(f"{name} {n} attention", name, kind(fresh_threshold=n), n, usual=True) for n in (3, 5)
    ]
    return usual + [
        FrontierSetting(f"{name} 3 {score}", name, kind(fresh_threshold=3, cache_type=score), 3)
        for score in ("kv-norm", "random")
    ]


DEFAULT_GRID: tuple[FrontierSetting, ...] = (
    UNCACHED,
    *(FrontierSetting(f"FORA {n}", "FORA", FORA(interval=n), n, usual=True) for n in (2, 3, 5)),
    *_token_settings(ToCa),
    # the authors' ratio refreshes no token in the first quarter of the steps; this one a quarter of them
    # throughout
    FrontierSetting(
        "ToCa 3 constant 0.25",
        "ToCa",
        ToCa(fresh_threshold=3, fresh_ratio=0.25, ratio_scheduler="constant"),
        3,
    ),
    *_token_settings(DuCa),
    *(
        FrontierSetting(
            f"TaylorSeer {n} order {order}",
            "TaylorSeer",
            TaylorSeer(interval=n, max_order=order),
            n,
            usual=order == 4,
        )
        for n in (3, 5, 4, 6)
        for order in (4, 2, 1)
    ),
    *(
        FrontierSetting(f"SmoothCache {target:g}x", "SmoothCache", Calibrated(target), usual=True)
        for target in (1.5, 2.0, 3.0)
    ),
    FrontierSetting("SmoothCache 2x per layer", "SmoothCache", Calibrated(2.0, per_layer=True)),
)
TINY_GRID: tuple[FrontierSetting, ...] = (
    UNCACHED,
    FrontierSetting("FORA 2", "FORA", FORA(interval=2), 2, usual=True),
    FrontierSetting("SmoothCache 1.5x", "SmoothCache", Calibrated(1.5)),
)


def chosen(grid: Sequence[FrontierSetting], only: Sequence[str]) -> tuple[FrontierSetting, ...]:
    """The settings whose name fits one of the patterns (any case, * and ?), and always the uncached one.

    No pattern chooses all. Raises ValueError for a pattern that fits none.
    """
    if not only:
        return tuple(grid)
    for pattern in only:
        if not any(_fits(setting, pattern) for setting in grid):
            raise ValueError(
                f"only: expected names or patterns of {', '.join(setting.name for setting in grid)}, got"
                f" {pattern!r}"
            )
    return tuple(
        setting for setting in grid if setting is UNCACHED or any(_fits(setting, pattern) for pattern in only)
    )


def _fits(setting: FrontierSetting, pattern: str) -> bool:
    """A bare method name fits all of its settings."""
    name, wanted = setting.name.lower(), pattern.strip().lower()
    return wanted == setting.method.lower() or fnmatch(name, wanted) or fnmatch(setting.slug, wanted)
