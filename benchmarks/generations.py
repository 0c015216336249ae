"""Whole generations of a random DiT: uncached, and by each method as its original executes it and as we
do."""

import enum
import statistics
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass
from functools import cached_property
from itertools import pairwise

import torch
from torch import Tensor

from benchmarks.contest import WrongValues
from benchmarks.floors import Floors, floors_of, ridge_rows
from benchmarks.machine import Bandwidth
from benchmarks.originals import Original
from benchmarks.sequences import relative_rms
from benchmarks.timing import Effort, Sample, Stopwatch, Timing
from fastcache import FORA, DuCa, Policy, SmoothCache, TaylorSeer, ToCa, accelerate
from fastcache.compat.smoothcache import SmoothCacheHelper
from fastcache.engine.record import OperatorCount
from fastcache.hosts import recognise
from fastcache.models import DiT
from fastcache.models.dit import Block, DiTConfig
from fastcache.schedule import Schedule, StepPlan, full_step

CPU = torch.device("cpu")
ALLOWED_ERROR = 1e-3  # relative RMS of a generation: a tie between two tokens' scores may end either way
GUIDANCE = 4.0
UNCACHED = "uncached"


class Way(str, enum.Enum):
    """How a method is executed; the first two are no method."""

    HOST = "host"
    COMPILED = "compiled blocks"
    ORIGINAL = "original"
    OURS = "fastcache"
    BEGUN = "fastcache, begun"


METHOD_WAYS = (Way.ORIGINAL, Way.OURS, Way.BEGUN)


@dataclass(frozen=True)
class Method:
    """A caching method. policy(steps): its settings; original: what executes its schedule as the authors
    do."""

    name: str
    policy: Callable[[int], Policy]
    original: Callable[[DiT, Policy, Schedule], AbstractContextManager] = lambda model, policy, schedule: (
        Original(model, schedule)
    )


def alternating(steps: int) -> dict[str, list[int]]:
    """A schedule in SmoothCache's form: attention every third step, MLP every second; the first and last
    full."""
    rows = {"attn": [int(k % 3 == 0) for k in range(steps)], "mlp": [int(k % 2 == 0) for k in range(steps)]}
    return {name: [*row[:-1], 1] for name, row in rows.items()}


FORA_3 = Method("FORA", lambda steps: FORA(interval=3))
METHODS = (
    Method("ToCa", lambda steps: ToCa(fresh_threshold=3)),
    Method("DuCa", lambda steps: DuCa(fresh_threshold=3, fresh_ratio=0.05, cache_type="kv-norm")),
    Method("TaylorSeer", lambda steps: TaylorSeer()),
    Method(
        "SmoothCache",
        lambda steps: SmoothCache(alternating(steps)),
        lambda model, policy, _: SmoothCacheHelper(model, Block, ("attn", "mlp"), policy.published),
    ),
)


@dataclass(frozen=True)
class ModelSize:
    """A random DiT, and how many images and steps; the model's batch is twice that. std: of its weights."""

    name: str
    config: DiTConfig
    steps: int
    images: int = 1
    std: float = 0.05


GLYPH = DiTConfig(32, 4, 3, 160, 12, 5, num_classes=36, learn_sigma=False)
B_2 = DiTConfig(32, 2, 4, 768, 12, 12)
TINY_DIT = DiTConfig(8, 2, 4, 32, 2, 2, num_classes=4)
MODEL_SIZES = (ModelSize("Glyph DiT B2", GLYPH, 50), ModelSize("DiT-B/2 B2", B_2, 12))
SESSION_SIZES = (ModelSize("Glyph DiT B2", GLYPH, 9), ModelSize("DiT-B/2 B2", B_2, 9))
TINY_MODEL = ModelSize("Tiny DiT", TINY_DIT, 8)


@dataclass(frozen=True)
class Entrant:
    """Who generates."""

    method: Method | None
    way: Way

    @property
    def name(self) -> str:
        """`uncached`, `uncached, compiled blocks`, `ToCa, original`."""
        way = "" if self.way is Way.HOST else f", {self.way.value}"
        return (self.method.name if self.method else UNCACHED) + way


@dataclass(frozen=True)
class Generation:
    """Outputs, times and operators (views excluded) of the steps of one generation, and the time of
    `begin`."""

    outputs: Sequence[Tensor]
    steps: list[Sample]
    begin: Sample
    operators: list[int]

    @property
    def total(self) -> Sample:
        """The whole of it."""
        return sum(self.steps, self.begin)


class Contest:
    """A model, the inputs of its steps (no sampler: times are of the model), and everyone who generates with
    it.

    Weights are random everywhere: the identity that a DiT starts as would skip work in nobody.
    """

    def __init__(
        self,
        size: ModelSize,
        methods: Sequence[Method] = METHODS,
        device: torch.device = CPU,
        dtype: torch.dtype = torch.float32,
    ) -> None:
        self.size, self.device, config = size, device, size.config
        generator = torch.Generator(device).manual_seed(0)
        with torch.device(device):
            self.model = DiT.from_config(config).to(dtype).eval().requires_grad_(False)
        for parameter in self.model.parameters():
            parameter.normal_(std=size.std, generator=generator)
        shape = (2, size.images, config.in_channels, config.input_size, config.input_size)
        ends = torch.randn(shape, generator=generator, device=device).to(dtype).repeat(1, 2, 1, 1, 1)
        self.inputs = [torch.lerp(*ends, k / size.steps) for k in range(size.steps)]
        self.timesteps = torch.linspace(999, 0, size.steps, device=device)
        classes = torch.arange(size.images, device=device) % config.num_classes
        self.labels = torch.cat([classes, torch.full_like(classes, config.num_classes)])
        self.layout = recognise(self.model).layout()
        self.policies = {method.name: method.policy(size.steps) for method in methods}
        plans = self.policies.items()
        self.schedules = {name: policy.schedule(size.steps, self.layout) for name, policy in plans}

    def plans(self, method: Method | None) -> tuple[StepPlan, ...]:
        """Of every step."""
        return self.schedules[method.name].steps if method else (full_step(self.layout),) * self.size.steps

    def kinds(self, method: Method | None) -> list[str]:
        """The kind of every step."""
        return [plan.kind for plan in self.plans(method)]

    @contextmanager
    def entered(self, entrant: Entrant) -> Iterator["Control"]:
        """The way is installed on the model while this lasts."""
        method, way = entrant.method, entrant.way
        if way is Way.COMPILED:
            with _compiled_blocks(self.model, self.device):
                yield Control(self)
        elif method is None:
            yield Control(self)
        elif way is Way.ORIGINAL:
            with method.original(self.model, self.policies[method.name], self.schedules[method.name]) as made:
                yield Control(self, original=made if isinstance(made, Original) else None)
        else:
            steps, policy = self.size.steps, self.policies[method.name]
            with accelerate(self.model, policy, steps, calls_per_step=1, count_ops=False) as session:
                yield Control(self, session=session, begun=way is Way.BEGUN)

    def generate(self, entrant: Entrant, *, count: bool = False) -> Generation:
        """All steps of one generation."""
        with self.entered(entrant) as control:
            return control.generate(count=count)


@dataclass(frozen=True)
class Control:
    """Model calls in one way. session.begin announces the generation where it is `begun`."""

    contest: Contest
    original: Original | None = None
    session: object = None
    begun: bool = False

    def begin(self) -> None:
        """Before the first step of a generation; its time counts."""
        if self.begun:
            self.session.begin(timesteps=self.contest.timesteps, conditions={"y": self.contest.labels})

    def call(self, step: int) -> Tensor:
        """The model call of a step."""
        contest = self.contest
        if self.original is not None:
            self.original.step = step
        t = contest.timesteps[step].expand(len(contest.labels))
        return contest.model.forward_with_cfg(contest.inputs[step], t, contest.labels, GUIDANCE)

    def stop(self) -> None:
        """After a generation that was not finished."""
        if self.session is not None:
            self.session.reset()

    def generate(self, *, kept: int | None = None, count: bool = False) -> Generation:
        """All steps, with a mark in time around each. kept: last outputs to keep, None for all."""
        watch, outputs, operators = Stopwatch(self.contest.device), deque(maxlen=kept), []
        marks = [watch.mark()]
        self.begin()
        marks.append(watch.mark())
        for step in range(self.contest.size.steps):
            with OperatorCount() if count else nullcontext() as counter:
                outputs.append(self.call(step))
            marks.append(watch.mark())
            operators.append(counter.count if counter else 0)
        begin, *steps = (watch.between(one, other) for one, other in pairwise(marks))
        return Generation(outputs, steps, begin, operators)


@contextmanager
def _compiled_blocks(model: DiT, device: torch.device) -> Iterator[None]:
    """torch.compile of the block: one graph that serves all of them. In a rehearsal on a CPU it is only
    traced."""
    torch.compiler.reset()
    try:
        for block in model.blocks:
            block.compile(
                fullgraph=True, dynamic=False, backend="inductor" if device.type == "cuda" else "eager"
            )
        yield
    finally:
        for block in model.blocks:
            block._compiled_call_impl = None


# --- on a CPU ------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class KindRow:
    """Steps of one kind: how many, the time of one, the operators that it dispatches, and its floors."""

    kind: str
    steps: int
    timing: Timing
    operators: int
    floors: Floors


@dataclass(frozen=True)
class MethodRow:
    """One method executed one way.

    generation: time of all steps and of `begin`; typical_us: the same as a sum of every step's own median
    over the rounds, which a disturbed step does not move; cpu_us: that sum of CPU time. speedup, cpu_speedup:
    uncached over this one, both typical; ideal: by FLOPs; quotient: speedup over ideal. error: relative RMS
    of all outputs against the original's. ridge_rows: rows (B K) of a body below which its weights take
    longer to read than its arithmetic takes, in this run.
    """

    model: str
    method: str
    way: str
    plan: str
    generation: Timing
    begin: Timing | None
    typical_us: float
    cpu_us: float
    speedup: float
    cpu_speedup: float
    ideal: float
    quotient: float
    error: float | None
    kinds: tuple[KindRow, ...]
    ridge_rows: float


@dataclass
class Samples:
    """Generations of one entrant."""

    generations: list[Generation]

    @cached_property
    def typical(self) -> Sample:
        """Of a generation of typical steps."""
        by_step = [*zip(*(one.steps for one in self.generations), strict=True)]
        return sum((_median(step) for step in by_step), _median([one.begin for one in self.generations]))

    def timing(self, kinds: Sequence[str], kind: str) -> Timing:
        """Of a step of a kind."""
        steps = (zip(kinds, one.steps, strict=True) for one in self.generations)
        return Timing.of([sample for paired in steps for name, sample in paired if name == kind])


def _median(samples: Sequence[Sample]) -> Sample:
    return Sample(*(statistics.median(getattr(one, clock) for one in samples) for clock in ("wall", "cpu")))


@torch.inference_mode()
def measure_generations(
    effort: Effort,
    sizes: Sequence[ModelSize],
    methods: Sequence[Method],
    bandwidth: Bandwidth,
    say: Callable[[str], None] = lambda text: None,
) -> tuple[MethodRow, ...]:
    """Generations take turns, the uncached one before every method, after one of each that is checked."""
    rows = []
    for size in sizes:
        contest = Contest(size, methods)
        host = Entrant(None, Way.HOST)
        everyone = [host, *(Entrant(method, way) for method in methods for way in METHOD_WAYS)]
        operators, errors = checked(contest, everyone)
        found: dict[Entrant, list[Generation]] = {entrant: [] for entrant in everyone}
        for _ in effort.rounds():
            for entrant in everyone[1:]:
                if entrant.way is Way.ORIGINAL:
                    found[host].append(contest.generate(host))
                found[entrant].append(contest.generate(entrant))
        samples = {entrant: Samples(generations) for entrant, generations in found.items()}
        for entrant in everyone:
            row = _row(contest, entrant, samples, operators[entrant], errors.get(entrant), bandwidth)
            found_ = f"{row.typical_us / 1e3:.0f} ms, {row.speedup:.2f}x, {row.quotient:.2f} of ideal"
            say(f"{row.model}, {entrant.name}: {found_}")
            rows.append(row)
    return tuple(rows)


def checked(
    contest: Contest, everyone: Sequence[Entrant]
) -> tuple[dict[Entrant, list[int]], dict[Entrant, float]]:
    """Operators of each step, and errors against the originals, of one generation each. Raises
    WrongValues."""
    operators, errors, exact = {}, {}, None
    for entrant in everyone:
        found = contest.generate(entrant, count=True)
        operators[entrant] = found.operators
        outputs = torch.stack([*found.outputs])
        if entrant.way is Way.ORIGINAL:
            exact = outputs
        elif entrant.method is not None:
            errors[entrant] = relative_rms(outputs, exact)
            if not errors[entrant] <= ALLOWED_ERROR:
                off = f"differs from the original by {errors[entrant]:.2e} (relative RMS)"
                raise WrongValues(f"{contest.size.name}, {entrant.name}: {off}, allowed {ALLOWED_ERROR:.0e}")
    return operators, errors


def _row(
    contest: Contest,
    entrant: Entrant,
    samples: dict[Entrant, Samples],
    operators: list[int],
    error: float | None,
    bandwidth: Bandwidth,
) -> MethodRow:
    method, own = entrant.method, samples[entrant]
    uncached = samples[Entrant(None, Way.HOST)]
    full_us, kinds = uncached.timing(contest.kinds(None), "full").median_us, contest.kinds(method)
    begun = entrant.way is Way.BEGUN
    rows = []
    for kind in dict.fromkeys(kinds):
        plans = [plan for plan in contest.plans(method) if plan.kind == kind]
        count = statistics.median(n for n, other in zip(operators, kinds, strict=True) if other == kind)
        floors = floors_of(plans, len(contest.labels), full_us / 1e3, bandwidth, modulated=not begun)
        rows.append(KindRow(kind, len(plans), own.timing(kinds, kind), int(count), floors))
    ideal = contest.schedules[method.name].ideal_speedup() if method else 1.0
    typical, base = own.typical, uncached.typical
    return MethodRow(
        model=contest.size.name,
        method=method.name if method else UNCACHED,
        way=entrant.way.value,
        plan=described(contest, method),
        generation=Timing.of([one.total for one in own.generations]),
        begin=Timing.of([one.begin for one in own.generations]) if begun else None,
        typical_us=1e6 * typical.wall,
        cpu_us=1e6 * typical.cpu,
        speedup=base.wall / typical.wall,
        cpu_speedup=base.cpu / typical.cpu,
        ideal=ideal,
        quotient=base.wall / typical.wall / ideal,
        error=error,
        kinds=tuple(rows),
        ridge_rows=ridge_rows(contest.layout, len(contest.labels), full_us / 1e3, bandwidth.read_gbps),
    )


def described(contest: Contest, method: Method | None) -> str:
    """The settings that matter and what they come to."""
    if method is None:
        return f"{contest.size.steps} steps"
    names = ("fresh_threshold", "fresh_ratio", "cache_type", "interval", "max_order", "schedule")
    policy = contest.policies[method.name]
    fields = ", ".join(f"{key}={value}" for key, value in policy.fields().items() if key in names)
    counts = ", ".join(f"{count} {kind}" for kind, count in contest.schedules[method.name].kinds().items())
    return f"{type(policy).__name__}({fields}), {counts}"
