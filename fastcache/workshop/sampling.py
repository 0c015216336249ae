"""Pictures from a class-conditional model: diffusers' schedulers, batched guidance, an optional policy."""

import inspect
import math
import time
from collections.abc import Callable, Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from fastcache.engine.record import Summary
from fastcache.engine.session import accelerate
from fastcache.errors import FastCacheError
from fastcache.models import DiT
from fastcache.plan.schedule import Schedule
from fastcache.policies import Policy
from fastcache.workshop.progress import Progress
from fastcache.workshop.schedulers import IMAGENET, Diffusion, make_scheduler


@dataclass(frozen=True)
class Samples:
    """What one `sample` call made and how long it took."""

    pictures: Tensor  # [n, C, S, S] float32 on the CPU, in the model's own range
    batch_seconds: tuple[float, ...]  # one per batch, in order
    summary: Summary | None  # None without a policy
    schedule: Schedule | None


@torch.inference_mode()
def sample(
    model: DiT,
    labels: Sequence[int],
    *,
    steps: int = 50,
    guidance: float = 2.5,
    seed: int = 0,
    indices: Sequence[int] | None = None,
    scheduler: str = "ddim",
    diffusion: Diffusion = IMAGENET,
    policy: Policy | None = None,
    batch_size: int = 12,
    null_label: int | None = None,
    progress: bool = True,
    title: str = "sampling",
    on_batch: Callable[[Sequence[int], Tensor], object] | None = None,
) -> Samples:
    """One picture for each of `labels`, under `policy` if there is one.

    The noise of a picture, that of a stochastic scheduler included, depends on `seed` and the picture's
    index alone: `indices` names them (default 0, 1, 2, ...), so that batch size and resuming do not
    change a picture beyond rounding. guidance 1.0 calls the model without the unconditional half;
    `null_label` defaults to the model's own. `on_batch` gets the indices and the pictures of each batch
    when it is done. `title` stands before the progress bar. Ho and Salimans, "Classifier-free diffusion
    guidance" (2022).
    Raises ValueError naming the argument; FastCacheError, before `on_batch`, if a batch is not finite, with
    the step at which that began.
    """
    indices = range(len(labels)) if indices is None else indices
    null_label = model.config.num_classes if null_label is None else null_label
    if len(indices) != len(labels):
        raise ValueError(f"indices: expected {len(labels)}, one for each label, got {len(indices)}")
    if not math.isfinite(guidance):
        raise ValueError(f"guidance: expected a finite number, got {guidance}")
    if batch_size < 1:
        raise ValueError(f"batch_size: expected at least 1, got {batch_size}")
    calls = len(make_scheduler(scheduler, steps, diffusion).timesteps)
    starts = range(0, len(labels), batch_size)
    pictures, seconds = [torch.empty(0, *_picture_shape(model))], []
    accelerated = (
        nullcontext() if policy is None else accelerate(model, policy, num_steps=calls, count_ops=True)
    )
    with accelerated as session, Progress(calls * len(starts), title, "step", shown=progress) as bar:
        for first in starts:
            start = time.perf_counter()
            solver = make_scheduler(scheduler, steps, diffusion, learned_variance=model.config.learn_sigma)
            chosen = torch.tensor(labels[first : first + batch_size])
            if guidance != 1.0:
                chosen = torch.cat([chosen, torch.full_like(chosen, null_label)])
            chosen = chosen.to(model.pos_embed.device)
            if session is not None:
                session.begin(timesteps=solver.timesteps.float(), conditions={"y": chosen})
            drawn = indices[first : first + batch_size]
            noise = PictureNoise(seed, drawn)
            kinds = None if session is None else [step.kind for step in session.schedule.steps]
            # called in this round only
            on_step = lambda step: bar.ran({"full" if kinds is None else kinds[step]: 1})  # noqa: B023
            pictures.append(_denoise(model, chosen, guidance, solver, noise, on_step).cpu())
            seconds.append(time.perf_counter() - start)
            if on_batch is not None:
                on_batch(drawn, pictures[-1])
    return Samples(
        torch.cat(pictures),
        tuple(seconds),
        None if session is None else session.summary(),
        None if session is None else session.schedule,
    )


class PictureNoise:
    """The random numbers of some pictures: each has its own generator, seeded by (seed, index), on the
    CPU.
    """

    def __init__(self, seed: int, indices: Sequence[int]) -> None:
        seeds = [np.random.SeedSequence([seed, index]).generate_state(1, np.uint64)[0] for index in indices]
        self.generators = [torch.Generator().manual_seed(int(seed)) for seed in seeds]

    def draw(self, shape: tuple[int, ...]) -> Tensor:
        """Standard normal float32 [len(indices), *shape]."""
        return torch.stack([torch.randn(shape, generator=generator) for generator in self.generators])


def _denoise(
    model: DiT,
    labels: Tensor,
    guidance: float,
    solver: Any,
    noise: PictureNoise,
    on_step: Callable[[int], object],
) -> Tensor:
    """Pictures [B, C, S, S] in float32; labels [2B] = [classes, null] with guidance, else [B].

    Whether values are finite stays on the device until the last step: no step waits for it.
    """
    weight = model.pos_embed
    x = noise.draw(_picture_shape(model)).to(weight.device) * solver.init_noise_sigma
    draws_noise = "generator" in inspect.signature(solver.step).parameters
    step_options = {"generator": noise.generators} if draws_noise else {}
    finite = []  # [2] of each step: the model's prediction, what the scheduler made of it
    for step, t in enumerate(solver.timesteps):
        x_in = solver.scale_model_input(x, t).to(weight.dtype)
        out = _predict(model, x_in, t.to(weight.device).expand(len(labels)), labels, guidance).float()
        if solver.config.get("variance_type") != "learned_range":
            out = out[:, : x.shape[1]]
        x = solver.step(out, t, x, **step_options).prev_sample
        finite.append(torch.stack([out.isfinite().all(), x.isfinite().all()]))
        on_step(step)
    _require_finite(torch.stack(finite).tolist(), solver.timesteps.tolist(), guidance)
    return x


def _require_finite(finite: Sequence[tuple[bool, bool]], timesteps: Sequence[float], guidance: float) -> None:
    for step, found in enumerate(finite):
        if not all(found):
            where = (
                "what the scheduler made of the model's prediction" if found[0] else "the model's prediction"
            )
            raise FastCacheError(
                f"sampling: NaN or infinity first appeared at step {step} of {len(timesteps)} (timestep"
                f" {timesteps[step]:g}), in {where}; check the weights, the dtype and guidance {guidance:g}"
            )


def _predict(model: DiT, x: Tensor, t: Tensor, labels: Tensor, guidance: float) -> Tensor:
    if guidance == 1.0:
        return model(x, t, labels)
    return model.forward_with_cfg(torch.cat([x, x]), t, labels, guidance)[: len(x)]


def _picture_shape(model: DiT) -> tuple[int, int, int]:
    return model.config.in_channels, model.config.input_size, model.config.input_size
