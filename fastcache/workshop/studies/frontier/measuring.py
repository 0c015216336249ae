"""Sampling one setting, with uncached batches in between to compare times with."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from statistics import median

import torch
from torch import Tensor

from fastcache.engine.record import Summary
from fastcache.models import DiT
from fastcache.policies import Policy
from fastcache.workshop.studies.comparison import Sampler


@dataclass(frozen=True)
class Measurement:
    """What sampling a setting gave. Seconds are per picture, of the compared batches: both lists in pairs."""

    pictures: Tensor  # [n, 3, 32, 32] in [-1, 1]
    seconds: tuple[float, ...]
    uncached_seconds: tuple[float, ...]
    summary: Summary | None  # of the last batch

    @property
    def seconds_per_picture(self) -> float:
        """The median of the setting's compared batches."""
        return median(self.seconds)

    @property
    def uncached_seconds_per_picture(self) -> float:
        """The median of the uncached batches between them."""
        return median(self.uncached_seconds)

    @property
    def speedup(self) -> float:
        """The ratio of these medians."""
        return self.uncached_seconds_per_picture / self.seconds_per_picture

    @property
    def speedup_of_fastest(self) -> float:
        """The same of the fastest batches; far from `speedup`: the machine was busy."""
        return min(self.uncached_seconds) / min(self.seconds)


def measure(
    model: DiT,
    policy: Policy | None,
    sampler: Sampler,
    pictures: int,
    comparisons: int,
    on_batch: Callable[[Mapping[str, int]], object],
) -> Measurement:
    """Pictures 0 ... pictures - 1 under `policy`; before `comparisons` of the batches, the same batch
    uncached.

    Compared batches are spread over the run and follow each other, so that a busy machine slows both.
    `on_batch` gets the number of steps of each kind after every batch.
    """
    batches = [
        range(first, min(first + sampler.batch_size, pictures))
        for first in range(0, pictures, sampler.batch_size)
    ]
    compared = compared_batches(len(batches), comparisons)
    made, seconds, uncached, summary = [], [], [], None
    for number, indices in enumerate(batches):
        if policy is not None and number in compared:
            uncached.append(sampler.run(model, indices, None).batch_seconds[0] / len(indices))
            on_batch({"full": sampler.steps})
        samples = sampler.run(model, indices, policy)
        on_batch({"full": sampler.steps} if samples.schedule is None else samples.schedule.kinds())
        made.append(samples.pictures.clamp(-1, 1))
        summary = samples.summary
        if policy is None or number in compared:
            seconds.append(samples.batch_seconds[0] / len(indices))
    return Measurement(torch.cat(made), tuple(seconds), tuple(uncached or seconds), summary)


def compared_batches(batches: int, comparisons: int) -> frozenset[int]:
    """Numbers of up to `comparisons` batches, spread evenly, the last among them; the first only if it must
    be.
    """
    return frozenset(round((number + 1) * (batches - 1) / comparisons) for number in range(comparisons))
