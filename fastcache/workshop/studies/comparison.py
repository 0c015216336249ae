"""What the demo and the quality run have in common: the settings compared, and how each of them samples."""

from collections.abc import Sequence
from dataclasses import dataclass

from fastcache.models import DiT
from fastcache.policies import FORA, DuCa, Policy, TaylorSeer, ToCa
from fastcache.workshop.glyphs import DIFFUSION
from fastcache.workshop.glyphs.dataset import CLASSES
from fastcache.workshop.sampling import Samples, sample


@dataclass(frozen=True)
class Setting:
    """One row of a comparison. No policy: the model as it is, outside any session."""

    name: str
    policy: Policy | None = None

    def fields(self) -> dict[str, object]:
        """The policy's settings by name, for reports."""
        return {} if self.policy is None else self.policy.fields()


UNCACHED = Setting("uncached")
SETTINGS = (
    UNCACHED,
    Setting("FORA interval 2", FORA(interval=2)),
    Setting("FORA interval 3", FORA(interval=3)),
    Setting("FORA interval 5", FORA(interval=5)),
    Setting("ToCa interval 3", ToCa(fresh_threshold=3)),
    Setting("DuCa interval 3", DuCa(fresh_threshold=3)),
    Setting("TaylorSeer interval 5", TaylorSeer(interval=5)),
)


@dataclass(frozen=True)
class Sampler:
    """How every setting of a comparison samples."""

    steps: int = 50
    guidance: float = 2.5
    scheduler: str = "ddim"
    seed: int = 0
    batch_size: int = 9

    def run(
        self,
        model: DiT,
        indices: Sequence[int],
        policy: Policy | None,
        *,
        progress: bool = False,
        title: str = "sampling",
    ) -> Samples:
        """Pictures `indices` of the glyph model; picture i shows class i mod 36, on its own noise."""
        return sample(
            model,
            labels_of(indices),
            indices=indices,
            steps=self.steps,
            guidance=self.guidance,
            seed=self.seed,
            scheduler=self.scheduler,
            diffusion=DIFFUSION,
            policy=policy,
            batch_size=self.batch_size,
            progress=progress,
            title=title,
        )


def labels_of(indices: Sequence[int]) -> list[int]:
    """The classes that pictures `indices` of a comparison show."""
    return [index % len(CLASSES) for index in indices]
