"""How a generation is run, end to end. Add a way here, and the stage `end_to_end` measures it at every batch."""

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass, field
from functools import lru_cache, partial

import torch
from torch import Tensor

from benchmarks.original import Original
from benchmarks.original_fora import OriginalFORA
from benchmarks.original_taylorseer import OriginalTaylorSeer
from benchmarks.original_toca import OriginalToCa
from fastcache import FORA, DuCa, Policy, TaylorSeer, ToCa, accelerate
from fastcache.hosts import recognise
from fastcache.models import DiT
from fastcache.models.dit import DiTConfig
from fastcache.schedule import Branch, Layout, Schedule

INTERVAL = 3
TOCA, DUCA, TAYLORSEER = (
    ToCa(fresh_threshold=3),
    DuCa(fresh_threshold=3, fresh_ratio=0.05, cache_type="kv-norm"),
    TaylorSeer(),
)
TOKENS_SETTLED = 0.3  # share of a generation after which ToCa and DuCa refresh tokens


@dataclass(frozen=True)
class Trajectory:
    """What every way is given: a random model and the inputs of its steps, on one device.

    x: [2 B, C, S, S], CFG halves of fixed noise (no sampler: times are of the model); t: [S] per step.
    """

    model: DiT
    x: Tensor
    timesteps: Tensor
    y: Tensor
    steps: int

    @property
    def rows(self) -> int:
        """Rows of the model's batch, both halves."""
        return len(self.x)

    def call(self, step: int) -> Tensor:
        """The model call of a step."""
        return self.model.forward_with_cfg(self.x, self.timesteps[step].expand(self.rows), self.y, 4.0)


def trajectory(
    config: DiTConfig, batch: int, steps: int, device: torch.device, dtype: torch.dtype
) -> Trajectory:
    """A model of random weights (adaLN too: the identity that DiT starts as would skip work in nobody) and its inputs."""
    generator = torch.Generator(device).manual_seed(0)
    with torch.device(device):
        model = DiT.from_config(config).to(dtype).eval().requires_grad_(False)
    for parameter in model.parameters():
        parameter.normal_(std=0.02, generator=generator)
    half = torch.randn(
        batch, config.in_channels, config.input_size, config.input_size, generator=generator, device=device
    ).to(dtype)
    classes = torch.arange(batch, device=device) % config.num_classes
    y = torch.cat([classes, torch.full_like(classes, config.num_classes)])
    return Trajectory(model, torch.cat([half, half]), torch.linspace(999, 0, steps, device=device), y, steps)


class Control:
    """What a way does between model calls. This one does nothing."""

    def begin(self) -> None:
        """Before the first step of a generation; its time counts."""

    def before(self, step: int) -> None:
        """Before the call of a step."""

    def stop(self) -> None:
        """After a generation that was not finished."""


@dataclass(frozen=True)
class Way:
    """enter: installs the way on a trajectory's model while it lasts. kind: of a step, "full" or the name of a cheaper one.

    exact: name of the way whose outputs it must reproduce up to rounding, "" for the first of its kind. policy: what it follows.
    settled: share of a generation before which its cheap steps are not yet typical.
    """

    name: str
    enter: Callable[[Trajectory], AbstractContextManager[Control]]
    kind: Callable[[int, int], str] = field(default=lambda step, steps: "full")
    exact: str = ""
    policy: Policy | None = None
    settled: float = 0.0


@contextmanager
def untouched(trajectory: Trajectory) -> Iterator[Control]:
    """The model as it is."""
    yield Control()


@contextmanager
def compiled_blocks(trajectory: Trajectory) -> Iterator[Control]:
    """torch.compile of the block: one graph that serves all of them. In a rehearsal on a CPU it is only traced."""
    torch.compiler.reset()
    backend = "inductor" if trajectory.x.device.type == "cuda" else "eager"
    try:
        for block in trajectory.model.blocks:
            block.compile(fullgraph=True, dynamic=False, backend=backend)
        yield Control()
    finally:
        for block in trajectory.model.blocks:
            block._compiled_call_impl = None


class OriginalControl(Control):
    """Tells the original's implementation which step it is."""

    def __init__(self, original: Original) -> None:
        self._original = original

    def before(self, step: int) -> None:
        self._original.step = step


def schedule(policy: Policy, trajectory: Trajectory) -> Schedule:
    """What a policy plans for a trajectory."""
    return policy.schedule(trajectory.steps, recognise(trajectory.model).layout())


def originally(
    make: Callable[[Trajectory], Original],
) -> Callable[[Trajectory], AbstractContextManager[Control]]:
    """A method as its authors implement it."""

    @contextmanager
    def enter(trajectory: Trajectory) -> Iterator[Control]:
        with make(trajectory) as original:
            yield OriginalControl(original)

    return enter


def original_fora(trajectory: Trajectory) -> Original:
    return OriginalFORA(trajectory.model, FORA(interval=INTERVAL).full_steps(trajectory.steps))


def original_tokens(policy: Policy, trajectory: Trajectory) -> Original:
    return OriginalToCa(trajectory.model, schedule(policy, trajectory))


def original_taylorseer(trajectory: Trajectory) -> Original:
    return OriginalTaylorSeer(trajectory.model, TAYLORSEER.full_steps(trajectory.steps), TAYLORSEER.max_order)


class SessionControl(Control):
    """Announces a generation to a session, if it is `begun`."""

    def __init__(self, session, trajectory: Trajectory, begun: bool) -> None:
        self._session, self._trajectory, self._begun = session, trajectory, begun

    def begin(self) -> None:
        if self._begun:
            self._session.begin(timesteps=self._trajectory.timesteps, conditions={"y": self._trajectory.y})

    def stop(self) -> None:
        self._session.reset()


def session(
    policy, *, begun: bool, **options: object
) -> Callable[[Trajectory], AbstractContextManager[Control]]:
    """`accelerate` with a policy of ours: the way for ToCa, DuCa, TaylorSeer and whatever comes."""

    @contextmanager
    def enter(trajectory: Trajectory) -> Iterator[Control]:
        with accelerate(
            trajectory.model, policy, trajectory.steps, calls_per_step=1, count_ops=False, **options
        ) as entered:
            yield SessionControl(entered, trajectory, begun)

    return enter


def fora_kind(step: int, steps: int) -> str:
    """ "full" or "reuse"."""
    return "full" if step in FORA(interval=INTERVAL).full_steps(steps) else "reuse"


@lru_cache(maxsize=64)
def planned_kinds(policy: Policy, steps: int) -> tuple[str, ...]:
    """Kinds of all steps; those of a DiT do not depend on its size."""
    layout = Layout("DiT", 256, 1, 1, tuple(Branch(0, name, 1) for name in ("attn", "mlp")))
    return tuple(step.kind for step in policy.schedule(steps, layout).steps)


def kind_by(policy: Policy) -> Callable[[int, int], str]:
    """The kind of a step in the policy's plan."""
    return lambda step, steps: planned_kinds(policy, steps)[step]


def pair(policy: Policy, original: Callable[[Trajectory], Original], **options: object) -> tuple[Way, Way]:
    """A method as its original does it, and ours."""
    name, kind = type(policy).__name__, kind_by(policy)
    first = f"{name} as its original does it"
    return Way(first, originally(original), kind, policy=policy, **options), Way(
        f"{name} ours, begun", session(policy, begun=True), kind, exact=first, policy=policy, **options
    )


UNCACHED, COMPILED, ORIGINAL, SESSION, BEGUN = (
    "uncached",
    "uncached, compiled blocks",
    "FORA as its original does it",
    "FORA ours",
    "FORA ours, begun",
)
WAYS = (
    Way(UNCACHED, untouched),
    Way(COMPILED, compiled_blocks, exact=UNCACHED),
    Way(ORIGINAL, originally(original_fora), fora_kind, policy=FORA(interval=INTERVAL)),
    Way(
        SESSION,
        session(FORA(interval=INTERVAL), begun=False),
        fora_kind,
        exact=ORIGINAL,
        policy=FORA(interval=INTERVAL),
    ),
    Way(
        BEGUN,
        session(FORA(interval=INTERVAL), begun=True),
        fora_kind,
        exact=ORIGINAL,
        policy=FORA(interval=INTERVAL),
    ),
    *pair(TOCA, partial(original_tokens, TOCA), settled=TOKENS_SETTLED),
    *pair(DUCA, partial(original_tokens, DUCA), settled=TOKENS_SETTLED),
    *pair(TAYLORSEER, original_taylorseer),
)
