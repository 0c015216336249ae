"""diffusers' schedulers by short names, and what a model was trained to undo. Imports neither torch nor
diffusers by itself: the command line reads the names for its help.
"""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from fastcache.extras import needs_extra

METADATA = {
    "prediction_type": ("epsilon", "v_prediction", "sample"),
    "beta_schedule": ("linear", "scaled_linear", "squaredcos_cap_v2"),
}


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
        """From a checkpoint's metadata; what is not there is as in the DiT family's ImageNet models.

        Raises ValueError for a value that diffusers does not know.
        """
        known: dict[str, Any] = {name: metadata[name] for name in METADATA if name in metadata}
        for name, value in known.items():
            if value not in METADATA[name]:
                raise ValueError(
                    f"metadata: {name}: expected one of {', '.join(METADATA[name])}, got {value!r}"
                )
        return cls(**known)


IMAGENET = Diffusion()  # the DiT family's models


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
