"""Equal or loud: a run gives the method's outputs, or an error of FastCache says what to do."""

import copy
from collections.abc import Callable, Collection

import torch
from hosts import STEPS, inputs, run
from torch import Tensor, nn

import fastcache

POLICY = fastcache.FORA(interval=3)
FULL = POLICY.full_steps(STEPS)
ROUNDING = 1e-5  # relative L2 error of float32 sums in another order


def assert_equal(found: list[Tensor], expected: list[Tensor], tolerance: float = ROUNDING) -> None:
    """Every output within a relative L2 error; NaN is never equal."""
    pairs = list(zip(found, expected, strict=True))
    assert pairs
    errors = [float((a.double() - b.double()).norm() / b.double().norm()) for a, b in pairs]
    assert all(error < tolerance for error in errors), [round(error, 6) for error in errors]


def equal_or_loud(
    play: Callable[[], list[Tensor]],
    expected: list[Tensor],
    loud: type[Exception] = fastcache.FastCacheError,
    tolerance: float = ROUNDING,
) -> None:
    """The outputs of `play` are the expected ones, or it raises an error of FastCache's own with a text."""
    try:
        found = play()
    except loud as error:
        assert len(str(error)) > 20, f"an error that does not say what to do: {error!r}"
        return
    assert_equal(found, expected, tolerance)


def cached(model: nn.Module, policy=POLICY, steps: int = STEPS, **options) -> list[Tensor]:
    """Outputs of one generation in a session of its own."""
    with fastcache.accelerate(model, policy, steps, **options):
        return run(model, steps)


class StepCaching:
    """The definition of step caching for any host, whatever its blocks do with their bodies.

    The host's own forward runs, hooks included. At a full step its bodies run too; at another step the
    i-th call of a body returns what the i-th call returned at the last full step.
    """

    def __init__(
        self, model: nn.Module, full: Collection[int] = FULL, names: tuple[str, ...] = ("attn", "mlp")
    ):
        self.model, self.full = copy.deepcopy(model), full
        self._features: dict[int, list[Tensor]] = {}
        stands: dict[nn.Module, StoredBody] = {}
        for block in dict.fromkeys(self.model.blocks):
            for name in names:
                body = getattr(block, name)
                setattr(block, name, stands.setdefault(body, StoredBody(body, self)))

    def restart(self) -> None:
        """A generation begins: nothing is stored."""
        self._features.clear()

    @torch.no_grad()
    def __call__(self, step: int, *args: Tensor, call: int = 0) -> Tensor:
        self.computing = step in self.full or call not in self._features
        if self.computing:
            self._features[call] = []
        self.features, self.position = self._features[call], 0
        return self.model(*args).clone()

    def run(self, steps: int = STEPS, batch: int = 4, size: int = 8) -> list[Tensor]:
        """Outputs of one generation."""
        self.restart()
        return [self(step, *inputs(step, batch, size)) for step in range(steps)]


class StoredBody(nn.Module):
    """A body that is run at full steps only."""

    def __init__(self, body: nn.Module, definition: StepCaching) -> None:
        super().__init__()
        self.body = body
        self.__dict__["definition"] = definition

    def forward(self, h: Tensor) -> Tensor:
        definition = self.definition
        if definition.computing:
            definition.features.append(self.body(h).clone())
        definition.position += 1
        return definition.features[definition.position - 1].clone()


def defined(model: nn.Module, full: Collection[int] = FULL, steps: int = STEPS) -> list[Tensor]:
    """Outputs of one generation by the definition."""
    return StepCaching(model, full).run(steps)
