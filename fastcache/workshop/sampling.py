"""Pictures from a class-conditional model: diffusers' schedulers, batched guidance, an optional policy."""

import inspect
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import nullcontext
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from torch import Tensor

from fastcache.engine.record import Summary
from fastcache.engine.session import accelerate
from fastcache.extras import needs_extra
from fastcache.models import DiT
from fastcache.plan.schedule import Schedule
from fastcache.policies import Policy


@dataclass(frozen=True)
class Diffusion:
    """What a model was trained to undo: field names and values are those of diffusers' schedulers."""

    prediction_type: str = "epsilon"
    beta_schedule: str = "linear"
    beta_start: float = 1e-4
    beta_end: float = 0.02
    num_train_timesteps: int = 1000

    @classmethod
    def from_metadata(cls, metadata: Mapping[str, str]) -> "Diffusion":
        """From a checkpoint's metadata; what is not there is as in the DiT family's ImageNet models."""
        usual = cls()
        return cls(
            metadata.get("prediction_type", usual.prediction_type),
            metadata.get("beta_schedule", usual.beta_schedule),
        )


@dataclass(frozen=True)
class SchedulerKind:
    """A scheduler of diffusers: its class name, and the options that it is used with here."""

    class_name: str
    options: Mapping[str, object] = field(default_factory=dict)


# No clipping: DDIM with a clipped picture and the unclipped noise drifts off its path under guidance
# (class accuracy on Glyphs-36, 50 steps, guidance 2.5: 64% clipped, 100% not).
SCHEDULERS: dict[str, SchedulerKind] = {
    "ddim": SchedulerKind("DDIMScheduler", {"clip_sample": False}),
    "ddpm": SchedulerKind("DDPMScheduler", {"clip_sample": False}),
    "dpm++": SchedulerKind("DPMSolverMultistepScheduler", {"lambda_min_clipped": -5.1}),
    "unipc": SchedulerKind("UniPCMultistepScheduler"),
    "euler": SchedulerKind("EulerDiscreteScheduler"),
}


@dataclass(frozen=True)
class Samples:
    """What one `sample` call made and how long it took."""

    pictures: Tensor  # [n, C, S, S] float32 on the CPU, in the model's own range
    batch_seconds: tuple[float, ...]  # one per batch, in order
    summary: Summary | None  # None without a policy
    schedule: Schedule | None


def make_scheduler(name: str, steps: int, diffusion: Diffusion, *, learned_variance: bool = False) -> Any:
    """diffusers' scheduler `name` (a key of `SCHEDULERS`), set to `steps` steps, first timestep 999.

    `len(scheduler.timesteps)` is the number of model evaluations.
    `learned_variance` makes ddpm use the second half of a learn_sigma model's output.
    """
    if name not in SCHEDULERS:
        raise ValueError(f"scheduler: expected one of {', '.join(SCHEDULERS)}, got {name!r}")
    if not 1 <= steps <= diffusion.num_train_timesteps:
        raise ValueError(f"steps: expected 1..{diffusion.num_train_timesteps}, got {steps}")
    with needs_extra("demo"):
        import diffusers
    kind = SCHEDULERS[name]
    options = dict(kind.options)
    if learned_variance and name == "ddpm":
        options["variance_type"] = "learned_range"
    scheduler = getattr(diffusers, kind.class_name)(
        num_train_timesteps=diffusion.num_train_timesteps,
        beta_schedule=diffusion.beta_schedule,
        beta_start=diffusion.beta_start,
        beta_end=diffusion.beta_end,
        prediction_type=diffusion.prediction_type,
        timestep_spacing="trailing",
        **options,
    )
    scheduler.set_timesteps(steps)
    return scheduler


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
    diffusion: Diffusion = Diffusion(),
    policy: Policy | None = None,
    batch_size: int = 12,
    null_label: int | None = None,
    progress: bool = True,
    on_batch: Callable[[Sequence[int], Tensor], object] | None = None,
) -> Samples:
    """One picture for each of `labels`, under `policy` if there is one.

    The noise of a picture, that of a stochastic scheduler included, depends on `seed` and the picture's
    index alone: `indices` names them (default 0, 1, 2, ...), so that batch size and resuming do not
    change a picture beyond rounding. guidance 1.0 calls the model without the unconditional half;
    `null_label` defaults to the model's own. `on_batch` gets the indices and the pictures of each batch
    when it is done. Ho and Salimans, "Classifier-free diffusion guidance" (2022).
    Raises ValueError naming the argument.
    """
    indices = range(len(labels)) if indices is None else indices
    null_label = model.config.num_classes if null_label is None else null_label
    if len(indices) != len(labels):
        raise ValueError(f"indices: expected {len(labels)}, one for each label, got {len(indices)}")
    if batch_size < 1:
        raise ValueError(f"batch_size: expected at least 1, got {batch_size}")
    calls = len(make_scheduler(scheduler, steps, diffusion).timesteps)
    starts = range(0, len(labels), batch_size)
    pictures, seconds = [torch.empty(0, *_picture_shape(model))], []
    accelerated = nullcontext() if policy is None else accelerate(model, policy, num_steps=calls)
    with accelerated as session, _progress_bar(calls * len(starts), progress) as bar:
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
            pictures.append(
                _denoise(model, chosen, guidance, solver, PictureNoise(seed, drawn), bar.update).cpu()
            )
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
    on_step: Callable[[], object],
) -> Tensor:
    """Pictures [B, C, S, S] in float32; labels [2B] = [classes, null] with guidance, else [B]."""
    weight = model.pos_embed
    x = noise.draw(_picture_shape(model)).to(weight.device) * solver.init_noise_sigma
    draws_noise = "generator" in inspect.signature(solver.step).parameters
    step_options = {"generator": noise.generators} if draws_noise else {}
    for t in solver.timesteps:
        x_in = solver.scale_model_input(x, t).to(weight.dtype)
        out = _predict(model, x_in, t.to(weight.device).expand(len(labels)), labels, guidance).float()
        if solver.config.get("variance_type") != "learned_range":
            out = out[:, : x.shape[1]]
        x = solver.step(out, t, x, **step_options).prev_sample
        on_step()
    return x


def _predict(model: DiT, x: Tensor, t: Tensor, labels: Tensor, guidance: float) -> Tensor:
    if guidance == 1.0:
        return model(x, t, labels)
    return model.forward_with_cfg(torch.cat([x, x]), t, labels, guidance)[: len(x)]


def _picture_shape(model: DiT) -> tuple[int, int, int]:
    return model.config.in_channels, model.config.input_size, model.config.input_size


def _progress_bar(total: int, shown: bool) -> Any:
    with needs_extra("demo"):
        from tqdm import tqdm
    return tqdm(total=total, unit="step", desc="sampling", disable=not shown, leave=False)
