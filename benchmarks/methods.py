"""The part `methods`: generations of whole models, every caching method as its original executes it and by `accelerate`."""

import enum
import statistics
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass, field, replace

import torch
from torch import Tensor

from benchmarks.correctness import WrongValues, relative_rms
from benchmarks.original import Original
from benchmarks.original_taylorseer import OriginalTaylorSeer
from benchmarks.original_toca import OriginalToCa
from benchmarks.timing import Effort, Timing
from fastcache import DuCa, Policy, SmoothCache, TaylorSeer, ToCa, accelerate
from fastcache.compat.smoothcache import SmoothCacheHelper
from fastcache.hosts import recognise
from fastcache.models import DiT
from fastcache.models.dit import Block, DiTConfig
from fastcache.report import OperatorCount
from fastcache.schedule import Layout, Schedule

ALLOWED_ERROR = (
    1e-3  # relative RMS over a whole generation: a tie between two tokens' scores may end either way
)
UNCACHED = "uncached"


class Way(str, enum.Enum):
    """How a method is executed."""

    ORIGINAL = "original"
    OURS = "fastcache"
    BEGUN = "fastcache, begun"


@dataclass(frozen=True)
class Method:
    """A caching method. policy(steps): its settings; original: what executes its schedule as the authors do."""

    name: str
    policy: Callable[[int], Policy]
    original: Callable[[DiT, Policy, Schedule], AbstractContextManager]


def alternating(steps: int) -> dict[str, list[int]]:
    """A schedule in SmoothCache's form, as a calibration gives it: attention every third step, MLP every second; the first and last in full."""
    rows = {
        name: [int(k % interval == 0) for k in range(steps)] for name, interval in (("attn", 3), ("mlp", 2))
    }
    return {name: [*row[:-1], 1] for name, row in rows.items()}


METHODS = (
    Method(
        "ToCa",
        lambda steps: ToCa(fresh_threshold=3),
        lambda model, policy, schedule: OriginalToCa(model, schedule),
    ),
    Method(
        "DuCa",
        lambda steps: DuCa(fresh_threshold=3, fresh_ratio=0.05, cache_type="kv-norm"),
        lambda model, policy, schedule: OriginalToCa(model, schedule),
    ),
    Method(
        "TaylorSeer",
        lambda steps: TaylorSeer(),
        lambda model, policy, schedule: OriginalTaylorSeer(
            model, policy.full_steps(schedule.num_steps), policy.max_order
        ),
    ),
    Method(
        "SmoothCache",
        lambda steps: SmoothCache(alternating(steps)),
        lambda model, policy, schedule: SmoothCacheHelper(model, Block, ("attn", "mlp"), policy.published),
    ),
)


@dataclass(frozen=True)
class ModelSize:
    """A random float32 DiT; `batch` rows, CFG halves included."""

    name: str
    config: DiTConfig
    steps: int
    batch: int = 2


MODEL_SIZES = (
    ModelSize(
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
        50,
    ),
    ModelSize(
        "DiT-B/2 B2",
        DiTConfig(input_size=32, patch_size=2, in_channels=4, hidden_size=768, depth=12, num_heads=12),
        12,
    ),
)
TINY_MODEL = ModelSize(
    "Tiny DiT",
    DiTConfig(input_size=8, patch_size=2, in_channels=3, hidden_size=32, depth=2, num_heads=2, num_classes=4),
    8,
)


@dataclass(frozen=True)
class Floors:
    """What a step of a plan takes at least, in ms, each alone: its FLOPs at the rate of an uncached step;
    weights that its bodies and modulations read; features and stream, each byte once."""

    arithmetic: float
    weights: float
    stream: float

    @property
    def limit(self) -> str:
        """What a perfect implementation would wait for."""
        return max(("arithmetic", "weights", "stream"), key=lambda name: getattr(self, name))


@dataclass(frozen=True)
class KindRow:
    """Steps of one kind: how many, the time of one, operators that it dispatches (views excluded), and its floors."""

    kind: str
    steps: int
    timing: Timing
    operators: int
    floors: Floors | None = None


@dataclass(frozen=True)
class MethodRow:
    """One method executed one way. generation: time of all steps and of `begin`, typical_us: the same as a sum of
    every step's own median over the rounds, which a disturbed step does not move. speedup: uncached
    over this one, both typical; ideal: by FLOPs; error: relative RMS of all outputs against the original's. ridge_rows: rows (B K) of a
    body below which its weights take longer to read than its arithmetic takes, in this run."""

    model: str
    method: str
    way: str
    plan: str
    generation: Timing
    begin: Timing | None
    typical_us: float
    speedup: float
    ideal: float
    error: float | None
    kinds: tuple[KindRow, ...]
    ridge_rows: float | None = None

    @property
    def quotient(self) -> float:
        """Measured over ideal speedup."""
        return self.speedup / self.ideal


@dataclass
class Samples:
    """Seconds, collected over generations."""

    steps: dict[str, list[float]] = field(default_factory=dict)
    begin: list[float] = field(default_factory=list)
    generation: list[float] = field(default_factory=list)
    by_step: list[list[float]] = field(default_factory=list)

    @property
    def typical(self) -> float:
        """Seconds of a generation of typical steps."""
        return sum(map(statistics.median, zip(*self.by_step))) + statistics.median(self.begin)

    def add(self, generation: "Generation", kinds: Sequence[str]) -> None:
        """One more generation."""
        for kind, seconds in zip(kinds, generation.seconds, strict=True):
            self.steps.setdefault(kind, []).append(seconds)
        self.by_step.append(generation.seconds)
        self.begin.append(generation.begin)
        self.generation.append(sum(generation.seconds) + generation.begin)


@dataclass(frozen=True)
class Generation:
    """Outputs, seconds and operators of the steps of one generation, and the seconds of `begin`."""

    outputs: Tensor
    seconds: list[float]
    begin: float
    operators: list[int]


class Contest:
    """A model, its inputs, and everyone who generates with it: (method, way), or (None, None) uncached."""

    def __init__(self, size: ModelSize, methods: Sequence[Method] = METHODS, seed: int = 0) -> None:
        self.size, config = size, size.config
        generator = torch.Generator().manual_seed(seed)
        self.model = DiT.from_config(config).eval().requires_grad_(False)
        for parameter in self.model.parameters():
            parameter.normal_(std=0.05, generator=generator)
        shape = (size.batch, config.in_channels, config.input_size, config.input_size)
        start, end = (torch.randn(shape, generator=generator) for _ in range(2))
        self.inputs = [torch.lerp(start, end, k / size.steps) for k in range(size.steps)]
        self.timesteps = torch.linspace(999, 0, size.steps)
        self.labels = torch.arange(size.batch) % config.num_classes
        self.layout: Layout = recognise(self.model).layout()
        self.policies = {method.name: method.policy(size.steps) for method in methods}
        self.schedules = {
            name: policy.schedule(size.steps, self.layout) for name, policy in self.policies.items()
        }
        self.entrants: tuple[tuple[Method | None, Way | None], ...] = (
            (None, None),
            *((method, way) for method in methods for way in Way),
        )

    def kinds(self, method: Method | None) -> list[str]:
        """The kind of every step."""
        return (
            [UNCACHED] * self.size.steps
            if method is None
            else [step.kind for step in self.schedules[method.name].steps]
        )

    def generate(
        self, method: Method | None, way: Way | None, *, count_operators: bool = False
    ) -> Generation:
        """All steps of one generation."""
        outputs, seconds, operators, begin = [], [], [], 0.0
        with self._entered(method, way) as control:
            if way is Way.BEGUN:
                begun = time.perf_counter()
                control.begin(timesteps=self.timesteps, conditions={"y": self.labels})
                begin = time.perf_counter() - begun
            for step, (x, t) in enumerate(zip(self.inputs, self.timesteps)):
                if isinstance(control, Original):
                    control.step = step
                t = t.expand(self.size.batch)
                with OperatorCount() if count_operators else nullcontext() as counter:
                    begun = time.perf_counter()
                    outputs.append(self.model(x, t, self.labels))
                    seconds.append(time.perf_counter() - begun)
                operators.append(0 if counter is None else counter.count)
        return Generation(torch.stack(outputs), seconds, begin, operators)

    @contextmanager
    def _entered(self, method: Method | None, way: Way | None) -> Iterator[object]:
        if method is None:
            yield None
        elif way is Way.ORIGINAL:
            with method.original(
                self.model, self.policies[method.name], self.schedules[method.name]
            ) as control:
                yield control
        else:
            with accelerate(
                self.model, self.policies[method.name], self.size.steps, calls_per_step=1, count_ops=False
            ) as session:
                yield session


@torch.inference_mode()
def measure_methods(
    effort: Effort,
    sizes: Sequence[ModelSize] = MODEL_SIZES,
    methods: Sequence[Method] = METHODS,
    say: Callable[[str], None] = lambda text: None,
) -> tuple[MethodRow, ...]:
    """Generations take turns, the uncached one before every method, after one of each to check the values and count operators. On the CPU."""
    rows = []
    for size in sizes:
        contest = Contest(size, methods)
        say(f"methods: {size.name}, {len(contest.entrants)} contenders")
        operators, errors = checked(contest)
        samples = [Samples() for _ in contest.entrants]
        begun, rounds = time.perf_counter(), 0
        while rounds < effort.min_rounds or (
            rounds < effort.max_rounds and time.perf_counter() - begun < effort.seconds
        ):
            for (method, way), own in zip(contest.entrants[1:], samples[1:]):
                if way is Way.ORIGINAL:
                    samples[0].add(contest.generate(None, None), contest.kinds(None))
                own.add(contest.generate(method, way), contest.kinds(method))
            rounds += 1
        uncached = samples[0].typical
        found = [
            _row(contest, method, way, own, counts, error, uncached)
            for (method, way), own, counts, error in zip(contest.entrants, samples, operators, errors)
        ]
        rows += found
        for row in found:
            say(
                f"methods: {row.model}, {row.method}, {row.way}: {row.typical_us / 1e3:.0f} ms, {row.speedup:.2f}x, {row.quotient:.2f} of ideal"
            )
    return tuple(rows)


def checked(contest: Contest) -> tuple[list[list[int]], list[float | None]]:
    """Operators of each step, and the error against the original, of one untimed generation each. Raises WrongValues."""
    operators, errors, exact = [], [], None
    for method, way in contest.entrants:
        found = contest.generate(method, way, count_operators=True)
        operators.append(found.operators)
        exact = found.outputs.double() if way is Way.ORIGINAL else exact
        error = relative_rms(found.outputs, exact) if way in (Way.OURS, Way.BEGUN) else None
        if error is not None and not error <= ALLOWED_ERROR:
            raise WrongValues(
                f"{contest.size.name}, {method.name}: {way.value} differs from the original by {error:.2e} (relative RMS), allowed {ALLOWED_ERROR:.0e}"
            )
        errors.append(error)
    return operators, errors


def _row(
    contest: Contest,
    method: Method | None,
    way: Way | None,
    samples: Samples,
    operators: list[int],
    error: float | None,
    uncached: float,
) -> MethodRow:
    kinds = contest.kinds(method)
    rows = tuple(
        KindRow(
            kind,
            kinds.count(kind),
            Timing.of(found),
            int(statistics.median(count for count, other in zip(operators, kinds) if other == kind)),
        )
        for kind, found in samples.steps.items()
    )
    generation, begin = Timing.of(samples.generation), Timing.of(samples.begin) if way is Way.BEGUN else None
    typical_us = 1e6 * samples.typical
    speedup = 1e6 * uncached / typical_us
    if method is None:
        return MethodRow(
            contest.size.name,
            UNCACHED,
            "host",
            f"{contest.size.steps} steps",
            generation,
            begin,
            typical_us,
            speedup,
            1.0,
            None,
            rows,
        )
    schedule = contest.schedules[method.name]
    return MethodRow(
        contest.size.name,
        method.name,
        way.value,
        described(contest.policies[method.name], schedule),
        generation,
        begin,
        typical_us,
        speedup,
        schedule.ideal_speedup(),
        error,
        rows,
    )


def described(policy: Policy, schedule: Schedule) -> str:
    """The settings that matter and what they come to."""
    fields = {
        key: value
        for key, value in policy.fields().items()
        if key in ("fresh_threshold", "fresh_ratio", "cache_type", "interval", "max_order", "schedule")
    }
    counts = ", ".join(f"{count} {kind}" for kind, count in schedule.kinds().items())
    return (
        f"{type(policy).__name__}({', '.join(f'{key}={value}' for key, value in fields.items())}), {counts}"
    )


def with_floors(
    rows: Sequence[MethodRow],
    copy_gbps: float,
    read_gbps: float,
    sizes: Sequence[ModelSize] = MODEL_SIZES,
    methods: Sequence[Method] = METHODS,
) -> tuple[MethodRow, ...]:
    """The rows with the floors of every kind of step, by the bandwidths and the uncached steps of the same run."""
    from benchmarks.method_floors import floors_of, ridge_rows

    found = []
    for row in rows:
        size = next(size for size in sizes if size.name == row.model)
        full_ms = next(
            other.kinds[0].timing.median_us / 1e3
            for other in rows
            if other.model == row.model and other.method == UNCACHED
        )
        floors = floors_of(
            size,
            next((method for method in methods if method.name == row.method), None),
            full_ms,
            copy_gbps,
            read_gbps,
            modulated=row.way != Way.BEGUN.value,
        )
        found.append(
            replace(
                row,
                ridge_rows=ridge_rows(size, full_ms, read_gbps),
                kinds=tuple(replace(kind, floors=floors.get(kind.kind)) for kind in row.kinds),
            )
        )
    return tuple(found)
