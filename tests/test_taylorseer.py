"""TaylorSeer: step rule, orders, and forecast weights against the published difference form.

Method: docs/methods/taylorseer.md, "Conformance".
"""

import math

import numpy as np
import pytest
import torch
from hosts import assert_close, inputs, small_dit
from hypothesis import given, settings, strategies as st
from support import available_backends

import fastcache
from fastcache import TaylorSeer
from fastcache.plan.forecast import forecast_weights
from fastcache.schedule import REUSE, Branch, Layout, Schedule, forecast

DIT_XL_2 = Layout(
    "DiT", 256, 1152, 16, tuple(Branch(index // 2, ("attn", "mlp")[index % 2], 1) for index in range(56))
)


class Differences:
    """The published form: factors D_0..D_O of one feature, updated at full steps."""

    def __init__(self, max_order: int) -> None:
        self.max_order, self.factors, self.last = max_order, [], None

    def full(self, step: int, feature: np.ndarray) -> None:
        updated = [feature]
        for old in self.factors[: self.max_order]:
            updated.append((updated[-1] - old) / (step - self.last))
        self.factors, self.last = updated, step

    def predict(self, step: int) -> np.ndarray:
        x = step - self.last
        return sum(factor * x**m / math.factorial(m) for m, factor in enumerate(self.factors))


def forecasts(feature, policy: TaylorSeer, steps: int, index=lambda k, steps: k) -> dict[int, float]:
    """Step to (forecast, by weights) of a scalar feature(index) over a whole generation."""
    full, stored, found = set(policy.full_steps(steps)), [], {}
    plan = policy.schedule(steps, DIT_XL_2)
    for k in range(steps):
        if k in full:
            stored.insert(0, k)
            continue
        order = plan.steps[k].actions[0].order or 0
        weights = forecast_weights(k, stored, order)
        found[k] = sum(weight * feature(index(s, steps)) for weight, s in zip(weights, stored, strict=False))
    return found


# -- the plan -----------------------------------------------------------------------------------


@pytest.mark.parametrize(("interval", "count"), [(4, 14), (3, 18), (5, 11), (6, 10)])
def test_number_of_full_steps_is_the_originals(interval: int, count: int) -> None:
    assert len(TaylorSeer(interval).full_steps(50)) == count


def test_full_steps_of_the_default_are_the_originals() -> None:
    assert [49 - k for k in TaylorSeer().full_steps(50)] == [49, *range(48, -1, -4)]
    assert TaylorSeer().full_steps(50) == [0, *range(1, 50, 4)]
    assert [49 - k for k in TaylorSeer(5).full_steps(50)] == [49, *range(48, 2, -5)]


def test_a_longer_start_is_that_of_the_flux_code() -> None:
    assert TaylorSeer(6, 1, first_enhance=3).full_steps(50) == [0, 1, 2, *range(8, 50, 6)]


def test_orders_grow_by_one_per_full_step_up_to_the_largest() -> None:
    plan = TaylorSeer().schedule(50, DIT_XL_2)
    assert [plan.steps[k].actions[0].order for k in (2, 5 + 1, 9 + 1, 13 + 1, 17 + 1, 48)] == [
        1,
        2,
        3,
        4,
        4,
        4,
    ]
    assert plan.kinds() == {"full": 14, "forecast": 36}
    assert plan.history == 5
    assert plan.ideal_speedup() == pytest.approx(50 / 14)
    assert Schedule.from_json(plan.to_json()) == plan


def test_order_zero_is_plain_reuse() -> None:
    plan = TaylorSeer(5, 0, 1).schedule(20, DIT_XL_2)
    assert plan.kinds() == {"full": 4, "reuse": 16} and plan.history == 1


def test_nothing_but_reuse_is_possible_after_a_single_full_step() -> None:
    plan = TaylorSeer(3, 2, first_enhance=1).schedule(7, DIT_XL_2)
    assert [plan.steps[k].actions[0] for k in (1, 2, 4, 5)] == [REUSE, REUSE, forecast(1), forecast(1)]


@pytest.mark.parametrize("steps", [1, 2, 3])
def test_short_generations_are_full(steps: int) -> None:
    assert TaylorSeer().schedule(steps, DIT_XL_2).kinds().get("full") == min(steps, 2)


@pytest.mark.parametrize(
    "fields",
    [{"interval": 0}, {"max_order": -1}, {"first_enhance": 0}, {"interval": 2.0}, {"max_order": True}],
)
def test_a_bad_field_is_named(fields: dict) -> None:
    with pytest.raises(ValueError, match=next(iter(fields))):
        TaylorSeer(**fields)


def test_reference_flops_equal_the_published_figures() -> None:
    assert TaylorSeer(3, 3).reference_flops(50, DIT_XL_2, 2) / 1e12 == pytest.approx(8.56, abs=0.005)
    assert 23.7352812032 / (TaylorSeer(5, 3).reference_flops(50, DIT_XL_2, 2) / 1e12) == pytest.approx(
        4.53, abs=0.01
    )


# -- the weights -----------------------------------------------------------------------------------


@pytest.mark.parametrize("order", [1, 2, 3, 4])
def test_linear_features_are_forecast_exactly(order: int) -> None:
    for k, value in forecasts(lambda s: 3.0 - 2.0 * s, TaylorSeer(4, order), 50).items():
        assert value == pytest.approx(3.0 - 2.0 * k, abs=1e-9)


@pytest.mark.parametrize("interval", [3, 4, 5])
def test_a_quadratic_is_off_by_minus_interval_times_steps(interval: int) -> None:
    """F(s) = s^2 in the original's descending index, order 2, between full steps `interval` apart."""
    policy = TaylorSeer(interval, 2)
    full = policy.full_steps(50)
    for k, value in forecasts(
        lambda i: float(i) ** 2, policy, 50, index=lambda k, steps: steps - 1 - k
    ).items():
        if k > full[4]:
            since = max(step for step in full if step < k)
            assert value - (49 - k) ** 2 == pytest.approx(-interval * (k - since), abs=1e-8)


def test_a_non_uniform_gap_uses_only_the_last_one_for_every_order() -> None:
    """Full at i = 49, 48, 44: D1 = (F44 - F48) / -4, D2 = (D1 - (F48 - F49) / -1) / -4."""
    F = {49: 1.7, 48: -0.4, 44: 2.3}
    D1 = (F[44] - F[48]) / -4
    D2 = (D1 - (F[48] - F[49]) / -1) / -4
    for i in (43, 42, 41):
        x = i - 44
        weights = forecast_weights(49 - i, [5, 1, 0], 2)
        assert sum(w * F[49 - s] for w, s in zip(weights, [5, 1, 0], strict=False)) == pytest.approx(
            F[44] + D1 * x + D2 * x**2 / 2
        )


def test_order_zero_weighs_only_the_newest() -> None:
    assert forecast_weights(7, [5, 1, 0], 0) == (1.0,)


def test_order_one_is_linear_extrapolation() -> None:
    assert forecast_weights(7, [5, 1], 1) == (1.5, -0.5)


@settings(deadline=None)
@given(st.integers(0, 2**32 - 1), st.integers(0, 5), st.lists(st.integers(1, 7), min_size=1, max_size=12))
def test_weights_equal_the_difference_form_on_random_features(
    seed: int, max_order: int, gaps: list[int]
) -> None:
    random = np.random.default_rng(seed)
    differences, stored, features = Differences(max_order), [], []
    step = 0
    for gap in gaps:
        feature = random.standard_normal(8)
        differences.full(step, feature)
        stored, features = [step, *stored][: max_order + 1], [feature, *features][: max_order + 1]
        order = len(stored) - 1
        assert len(differences.factors) == order + 1  # one order more per full step, up to the largest
        for k in range(1, gap):
            weights = forecast_weights(step + k, stored, order)
            assert sum(weights) == pytest.approx(1.0, abs=1e-8)
            combined = sum(weight * feature for weight, feature in zip(weights, features, strict=False))
            scale = max(1.0, sum(abs(weight) for weight in weights))
            assert np.abs(combined - differences.predict(step + k)).max() < 1e-11 * scale
        step += gap


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ((7, [5], 1), "order: expected 0..0"),
        ((7, [5, 1], -1), "order"),
        ((5, [5, 1], 1), "stored"),
        ((7, [1, 5], 1), "stored"),
    ],
)
def test_bad_arguments_are_named(arguments: tuple, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        forecast_weights(*arguments)


# -- running -------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "fields",
    [
        {},
        {"interval": 3, "max_order": 2},
        {"interval": 2, "max_order": 1, "first_enhance": 3},
        {"interval": 3, "max_order": 0, "first_enhance": 1},
    ],
    ids=str,
)
@pytest.mark.parametrize("backend", available_backends("cpu"))
@torch.no_grad()
def test_a_model_follows_the_published_difference_form(backend: str, fields: dict) -> None:
    policy, steps, model = TaylorSeer(**fields), 14, small_dit()
    expected = by_differences(small_dit(dtype=torch.float64), policy, steps)
    with fastcache.use_backend(backend), fastcache.accelerate(model, policy, steps) as session:
        first = [model(*slow_inputs(k, torch.float32)) for k in range(steps)]
        second = [model(*slow_inputs(k, torch.float32)) for k in range(steps)]
    assert_close(first, expected, 1e-5)
    assert_close(second, first, 1e-12)
    assert session.summary().recomputed == 0


def slow_inputs(
    step: int, dtype: torch.dtype = torch.float64
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Inputs that drift, as a sampler's do."""
    x, t, y = inputs(0, dtype=dtype)
    return x * (1 + 0.05 * step), t - 20 * step, y


def by_differences(model, policy: TaylorSeer, steps: int) -> list[torch.Tensor]:
    full, outputs = set(policy.full_steps(steps)), []
    stored = {
        (index, name): Differences(policy.max_order)
        for index in range(len(model.blocks))
        for name in ("attn", "mlp")
    }
    for k in range(steps):
        x, t, y = slow_inputs(k)
        x, c = model.x_embedder(x) + model.pos_embed, model.t_embedder(t) + model.y_embedder(y)
        for index, block in enumerate(model.blocks):
            shift1, scale1, gate1, shift2, scale2, gate2 = block.adaLN_modulation(c)[:, None].chunk(6, -1)
            for name, body, norm, shift, scale, gate in (
                ("attn", block.attn, block.norm1, shift1, scale1, gate1),
                ("mlp", block.mlp, block.norm2, shift2, scale2, gate2),
            ):
                if k in full:
                    stored[index, name].full(k, body(norm(x) * (1 + scale) + shift))
                x = x + gate * stored[index, name].predict(k)
        outputs.append(model._unpatch(model.final_layer(x, c)))
    return outputs
