"""Whole generations of a random DiT: uncached, and by each method as its original executes it and as we do.

A row is one method executed one way, as it is in the JSON: generation, begin: times of all steps and of
`begin`; typical_us: the same as a sum of every step's own median over the rounds, which a disturbed step does
not move, and cpu_us that of CPU time; speedup, cpu_speedup: uncached over this one, both typical; ideal: by
FLOPs; quotient: speedup over ideal; error: relative RMS of the outputs against the original's; kinds: of
steps, with how many, the time of one, what it dispatches or launches, and its share of an uncached step's
time and FLOPs.
"""

import enum
import statistics
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import asdict, dataclass, field
from itertools import pairwise

import torch
from torch import Tensor

from benchmarks.contest import Row, WrongValues
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


def original_of(model: DiT, policy: Policy, schedule: Schedule) -> AbstractContextManager:
    """What executes a schedule as the method's authors do."""
    if isinstance(policy, SmoothCache):
        return SmoothCacheHelper(model, Block, ("attn", "mlp"), policy.published)
    return Original(model, schedule)


@dataclass(frozen=True)
class Method:
    """A method: its settings for a number of steps; how its original is executed."""

    name: str
    policy: Callable[[int], Policy]
    original: Callable[[DiT, Policy, Schedule], AbstractContextManager] = original_of


def alternating(steps: int) -> dict[str, list[int]]:
    """In SmoothCache's form: attention every third step, MLP every second; the first and last full."""
    rows = {"attn": [int(k % 3 == 0) for k in range(steps)], "mlp": [int(k % 2 == 0) for k in range(steps)]}
    return {name: [*row[:-1], 1] for name, row in rows.items()}


FORA_3 = Method("FORA", lambda steps: FORA(interval=3))
METHODS = (
    Method("ToCa", lambda steps: ToCa(fresh_threshold=3)),
    Method("DuCa", lambda steps: DuCa(fresh_threshold=3, fresh_ratio=0.05, cache_type="kv-norm")),
    Method("TaylorSeer", lambda steps: TaylorSeer()),
    Method("SmoothCache", lambda steps: SmoothCache(alternating(steps))),
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


HOST = Entrant(None, Way.HOST)


@dataclass(frozen=True)
class Generation:
    """Outputs, times and operators (views excluded) of the steps, and the time of `begin`."""

    outputs: Sequence[Tensor]
    steps: list[Sample]
    begin: Sample
    operators: list[int]


class Contest:
    """A model, the inputs of its steps (no sampler: times are of the model), and everyone who generates.

    Weights are random everywhere: the identity that a DiT starts as would skip work in nobody.
    """

    def __init__(
        self,
        size: ModelSize,
        methods: Sequence[Method] = METHODS,
        device: torch.device = CPU,
        dtype: torch.dtype = torch.float32,
    ) -> None:
        self.size, self.device, self.dtype, config = size, device, dtype, size.config
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
            policy = self.policies[method.name]
            with accelerate(self.model, policy, self.size.steps, calls_per_step=1) as session:
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
    """One graph that serves all blocks. In a rehearsal on a CPU it is only traced."""
    torch.compiler.reset()
    backend = "inductor" if device.type == "cuda" else "eager"
    try:
        for block in model.blocks:
            block.compile(fullgraph=True, dynamic=False, backend=backend)
        yield
    finally:
        for block in model.blocks:
            block._compiled_call_impl = None


# --- what a report shows -------------------------------------------------------------------------------


@dataclass
class Found:
    """Of one entrant. costs: {kind of step: {"operators" or "launches": how many}}."""

    costs: dict[str, dict[str, int | None]]
    error: float | None = None
    generations: list[Generation] = field(default_factory=list)

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
    say: Callable[[str], None] = lambda text: None,
) -> list[Row]:
    """Generations take turns, the uncached one before every method, after one of each that is checked."""
    rows = []
    for size in sizes:
        contest = Contest(size, methods)
        found = checked(contest, [HOST, *(Entrant(method, way) for method in methods for way in METHOD_WAYS)])
        for _ in effort.rounds():
            for entrant in [*found][1:]:
                for one in (HOST, entrant) if entrant.way is Way.ORIGINAL else (entrant,):
                    found[one].generations.append(contest.generate(one))
        for entrant in found:
            row = method_row(contest, entrant, found)
            measured = f"{row['speedup']:.2f}x, {row['quotient']:.2f} of ideal"
            say(f"{size.name}, {entrant.name}: {row['typical_us'] / 1e3:.0f} ms, {measured}")
            rows.append(row)
    return rows


def checked(contest: Contest, everyone: Sequence[Entrant]) -> dict[Entrant, Found]:
    """Operators of each kind of step, and errors, of one generation each. Raises WrongValues."""
    results, exact = {}, None
    for entrant in everyone:
        made, costs = contest.generate(entrant, count=True), {}
        for kind, count in zip(contest.kinds(entrant.method), made.operators, strict=True):
            costs.setdefault(kind, []).append(count)
        costs = {kind: {"operators": int(statistics.median(counts))} for kind, counts in costs.items()}
        found, outputs = Found(costs), torch.stack([*made.outputs])
        if entrant.way is Way.ORIGINAL:
            exact = outputs
        elif entrant.method is not None:
            found.error = relative_rms(outputs, exact)
            if not found.error <= ALLOWED_ERROR:
                off = f"differs from the original by {found.error:.2e} (relative RMS)"
                raise WrongValues(f"{contest.size.name}, {entrant.name}: {off}, allowed {ALLOWED_ERROR:.0e}")
        results[entrant] = found
    return results


def method_row(contest: Contest, entrant: Entrant, found: dict[Entrant, Found]) -> Row:
    """What a report shows of an entrant; no speedup where the uncached model was not measured."""
    method, own, typical = entrant.method, found[entrant], found[entrant].typical()
    uncached, kinds, batch = found.get(HOST), contest.kinds(method), len(contest.labels)
    full_us = uncached.timing(contest.kinds(None), "full").median_us if uncached else None
    full_flops, steps = full_step(contest.layout).flops(batch), []
    for kind in dict.fromkeys(kinds):
        flops = [plan.flops(batch) for plan in contest.plans(method) if plan.kind == kind]
        timing = own.timing(kinds, kind)
        step = {"kind": kind, "steps": len(flops), "timing": asdict(timing)} | own.costs.get(kind, {})
        step |= {"of_uncached": timing.median_us / full_us} if full_us else {}
        steps.append(step | {"of_flops": statistics.median(flops) / full_flops})
    plan = ", ".join(f"{step['steps']} {step['kind']}" for step in steps)
    row = {"model": contest.size.name, "method": method.name if method else UNCACHED}
    row |= {"way": entrant.way.value, "plan": plan, "kinds": steps}
    totals = [sum(one.steps, one.begin) for one in own.generations]
    row |= {"generation": asdict(Timing.of(totals)), "begin": None}
    if entrant.way is Way.BEGUN:
        row["begin"] = asdict(Timing.of([one.begin for one in own.generations]))
    row |= {"typical_us": 1e6 * typical.wall, "cpu_us": 1e6 * typical.cpu, "error": own.error}
    row |= {"ideal": contest.schedules[method.name].ideal_speedup() if method else 1.0}
    if uncached is None:
        return row | {"speedup": None, "cpu_speedup": None, "quotient": None}
    base = uncached.typical()
    row |= {"speedup": base.wall / typical.wall, "cpu_speedup": base.cpu / typical.cpu}
    return row | {"quotient": row["speedup"] / row["ideal"]}
