"""TaylorSeer's forecast as weights of the last raw features: host arithmetic only.

Method: docs/methods/taylorseer.md.

The published form keeps differences, D_0 = F and D_{m+1} = (D_m - D_m of the full step before) / gap,
and forecasts sum_m D_m x^m / m! at x steps after the last full one. That is a linear combination
of the last order + 1 features, so nothing but the features has to be kept, and a full step updates
nothing. Backward differences are not derivatives: beyond linear features the forecast is not exact
(for F(s) = s^2 and full steps N apart, order 2 is off by -N k after k steps), as in the original.
"""

from collections.abc import Sequence


def forecast_weights(step: int, stored: Sequence[int], order: int) -> tuple[float, ...]:
    """Weights of the order + 1 newest features, newest first; they sum to 1.

    step: execution index to forecast. stored: execution indices of the full steps whose features
    are kept, newest first; at least order + 1 of them. Raises ValueError naming the argument.
    """
    if order < 0 or len(stored) <= order:
        raise ValueError(
            f"order: expected 0..{len(stored) - 1} with {len(stored)} stored features, got {order}"
        )
    if any(newer <= older for newer, older in zip((step, *stored), stored, strict=False)):
        raise ValueError(f"stored: expected steps before {step}, newest first, got {list(stored)}")
    # differences[j]: D_m at the j-th newest full step, as weights of the features
    differences = [[float(i == j) for i in range(order + 1)] for j in range(order + 1)]
    weights = list(differences[0])
    factor = 1.0
    for m in range(1, order + 1):
        differences = [
            [
                (new - old) / (stored[j] - stored[j + 1])
                for new, old in zip(differences[j], differences[j + 1], strict=True)
            ]
            for j in range(order + 1 - m)
        ]
        factor *= (step - stored[0]) / m
        weights = [weight + factor * part for weight, part in zip(weights, differences[0], strict=True)]
    return tuple(weights)
