"""What a step costs: a DiT uncached, under FORA as its original does it, and under `accelerate`."""

import enum
import statistics
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, field

import torch
from torch import Tensor

from benchmarks.correctness import WrongValues, relative_rms
from benchmarks.original_fora import OriginalFORA
from benchmarks.timing import Effort, Timing
from fastcache import FORA, accelerate
from fastcache.models import DiT
from fastcache.models.dit import DiTConfig
from fastcache.report import OperatorCount

ALLOWED_ERROR = 1e-4  # relative RMS between two orders of float32 arithmetic through a whole model


class Way(str, enum.Enum):
    """How a generation is run."""

    UNCACHED = "uncached"
    ORIGINAL = "FORA as its original does it"
    SESSION = "accelerate(FORA)"
    BEGUN = "accelerate(FORA) and begin()"


@dataclass(frozen=True)
class SessionSize:
    """A random float32 DiT, `batch` rows (CFG halves included), and the plan that it runs."""

    name: str
    config: DiTConfig
    batch: int = 2
    steps: int = 9
    interval: int = 3

    @property
    def plan(self) -> str:
        """The plan in words."""
        return f"FORA(interval={self.interval}), {self.steps} steps"

    @property
    def full_steps(self) -> list[int]:
        """Execution indices of the full steps under FORA."""
        return FORA(interval=self.interval).full_steps(self.steps)


SESSION_SIZES = (
    SessionSize(
        "Glyph DiT B2",
        DiTConfig(
            input_size=32,
            patch_size=4,
            in_channels=3,
            hidden_size=160,
            depth=12,
            num_heads=5,
            num_classes=36,
            learn_sigma=False,
        ),
    ),
    SessionSize(
        "DiT-B/2 B2",
        DiTConfig(input_size=32, patch_size=2, in_channels=4, hidden_size=768, depth=12, num_heads=12),
    ),
)
TINY_SESSION = SessionSize(
    "Tiny DiT",
    DiTConfig(input_size=8, patch_size=2, in_channels=3, hidden_size=32, depth=2, num_heads=2, num_classes=4),
    steps=4,
)


@dataclass(frozen=True)
class SessionRow:
    """One way on one model. full, reuse: time of a step of that kind; begin, generation: of a whole
    generation, the steps and `begin` together. ops_*: operators dispatched by a step, views excluded.
    error: relative RMS of the outputs against the original's."""

    model: str
    plan: str
    way: str
    full: Timing
    reuse: Timing | None
    begin: Timing | None
    generation: Timing
    ops_full: int
    ops_reuse: int | None
    error: float | None


@dataclass
class Samples:
    """Seconds, collected over generations."""

    full: list[float] = field(default_factory=list)
    reuse: list[float] = field(default_factory=list)
    begin: list[float] = field(default_factory=list)
    generation: list[float] = field(default_factory=list)

    def row(self, size: SessionSize, way: Way, operators: list[int], error: float | None) -> SessionRow:
        """What the report shows."""
        timing = lambda samples: Timing.of(samples) if samples else None  # noqa: E731
        kinds = [step in size.full_steps or way is Way.UNCACHED for step in range(size.steps)]
        by_kind = {
            kind: [count for count, full in zip(operators, kinds) if full is kind] for kind in (True, False)
        }
        ops_full, ops_reuse = (
            int(statistics.median(by_kind[kind])) if by_kind[kind] else None for kind in (True, False)
        )
        return SessionRow(
            size.name,
            size.plan,
            way.value,
            timing(self.full),
            timing(self.reuse),
            timing(self.begin),
            timing(self.generation),
            ops_full,
            ops_reuse,
            error,
        )


@dataclass(frozen=True)
class Generation:
    """What one generation gave: outputs of its steps, seconds of its steps and of `begin`, operators of its steps."""

    outputs: list[Tensor]
    seconds: list[float]
    begin_seconds: float
    operators: list[int]


class Run:
    """A model, and the same inputs for every way."""

    def __init__(self, size: SessionSize, seed: int = 0) -> None:
        self.size, config = size, size.config
        generator = torch.Generator().manual_seed(seed)
        self.model = DiT.from_config(config).eval().requires_grad_(False)
        for parameter in self.model.parameters():
            parameter.normal_(std=0.05, generator=generator)
        shape = (size.batch, config.in_channels, config.input_size, config.input_size)
        self.noise = [torch.randn(shape, generator=generator) for _ in range(size.steps)]
        self.timesteps = torch.linspace(999, 0, size.steps)
        self.labels = torch.arange(size.batch) % config.num_classes

    def generate(self, way: Way, *, count_operators: bool = False) -> Generation:
        """All steps of one generation."""
        outputs, seconds, operators, begin_seconds = [], [], [], 0.0
        with self._installed(way) as control:
            if way is Way.BEGUN:
                start = time.perf_counter()
                control.begin(timesteps=self.timesteps, conditions={"y": self.labels})
                begin_seconds = time.perf_counter() - start
            for step, (x, t) in enumerate(zip(self.noise, self.timesteps)):
                if way is Way.ORIGINAL:
                    control.step = step
                t = t.expand(self.size.batch)
                with OperatorCount() if count_operators else nullcontext() as counter:
                    start = time.perf_counter()
                    outputs.append(self.model(x, t, self.labels))
                    seconds.append(time.perf_counter() - start)
                operators.append(0 if counter is None else counter.count)
        return Generation(outputs, seconds, begin_seconds, operators)

    @contextmanager
    def _installed(self, way: Way) -> Iterator[object]:
        if way is Way.UNCACHED:
            yield None
        elif way is Way.ORIGINAL:
            with OriginalFORA(self.model, self.size.full_steps) as original:
                yield original
        else:
            with accelerate(
                self.model,
                FORA(interval=self.size.interval),
                self.size.steps,
                calls_per_step=1,
                count_ops=False,
            ) as session:
                yield session


@torch.inference_mode()
def measure_session(
    effort: Effort,
    sizes: Sequence[SessionSize] = SESSION_SIZES,
    say: Callable[[str], None] = lambda text: None,
) -> tuple[SessionRow, ...]:
    """Generations take turns, way by way, after one of each to check the values and count operators. On the CPU."""
    rows = []
    for size in sizes:
        say(size.name)
        run, samples = Run(size), {way: Samples() for way in Way}
        operators, errors = checked(run)
        begun, rounds = time.perf_counter(), 0
        while rounds < effort.min_rounds or (
            rounds < effort.max_rounds and time.perf_counter() - begun < effort.seconds
        ):
            for way in Way:
                _collect(samples[way], run.generate(way), size, way)
            rounds += 1
        rows += [samples[way].row(size, way, operators[way], errors[way]) for way in Way]
    return tuple(rows)


def checked(run: Run) -> tuple[dict[Way, list[int]], dict[Way, float | None]]:
    """Operators of each step, and the error against the original, of one untimed generation in each way. Raises WrongValues."""
    found = {way: run.generate(way, count_operators=True) for way in Way}
    exact = torch.stack(found[Way.ORIGINAL].outputs).double()
    errors: dict[Way, float | None] = {Way.UNCACHED: None}
    for way in (Way.ORIGINAL, Way.SESSION, Way.BEGUN):
        errors[way] = relative_rms(torch.stack(found[way].outputs), exact)
        if not errors[way] <= ALLOWED_ERROR:
            raise WrongValues(
                f"{run.size.name}: {way.value} differs from the original by {errors[way]:.2e} (relative RMS), allowed {ALLOWED_ERROR:.0e}"
            )
    return {way: generation.operators for way, generation in found.items()}, errors


def _collect(samples: Samples, generation: Generation, size: SessionSize, way: Way) -> None:
    for step, seconds in enumerate(generation.seconds):
        full = way is Way.UNCACHED or step in size.full_steps
        (samples.full if full else samples.reuse).append(seconds)
    if way is Way.BEGUN:
        samples.begin.append(generation.begin_seconds)
    samples.generation.append(sum(generation.seconds) + generation.begin_seconds)
