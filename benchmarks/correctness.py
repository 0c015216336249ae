"""Values before times: every contender is compared with the naive sequence in float64."""

import torch
from torch import Tensor

from benchmarks.cases import Case, Form
from benchmarks.host_sequences import HOST_SEQUENCES, Outputs
from benchmarks.inputs import Inputs
from benchmarks.providers import Call, outputs

ROWS = 1024  # of a batch that are compared, evenly spaced; forms that mix tokens are compared whole
MIXING = (Form.REFRESH, Form.ERRORS)


class WrongValues(AssertionError):
    """A contender computes something else."""


class Reference:
    """The float64 outputs of a case, for some of its tokens."""

    def __init__(self, case: Case, inputs: Inputs) -> None:
        self._case, self._inputs = case, inputs
        self._tokens = (
            None
            if case.form in MIXING
            else _evenly(case.size.tokens, max(2, ROWS // case.size.batch), inputs.x.device)
        )
        self._slot = None if inputs.slot is None else inputs.slot.clone()
        wide = (inputs if self._tokens is None else inputs.at(self._tokens)).double()
        host = HOST_SEQUENCES[case.form]
        self._exact = outputs(case.form, wide, host.naive(*host.arguments(wide)))

    def check(self, name: str, call: Call) -> float:
        """Run a call on the inputs; its largest relative RMS error over the outputs. Raises WrongValues."""
        if self._slot is not None:
            self._inputs.slot.copy_(self._slot)
        found = outputs(self._case.form, self._inputs, call())
        error = max(
            relative_rms(part, exact) for part, exact in zip(self._seen(found), self._exact, strict=True)
        )
        if not error <= allowed_error(self._case):
            raise WrongValues(
                f"{self._case.name}: {name} is off by {error:.2e} (relative RMS against float64), allowed {allowed_error(self._case):.2e}"
            )
        return error

    def _seen(self, found: Outputs) -> Outputs:
        return found if self._tokens is None else tuple(tensor[:, self._tokens] for tensor in found)


def allowed_error(case: Case) -> float:
    """Relative RMS of as many roundings as the naive sequence makes: two a term, errors adding up as a random walk.

    The error sums add N D numbers in float32, whatever the dtype, at worst one after the other.
    """
    unit = torch.finfo(case.dtype).eps / 2
    summed = case.size.tokens * case.size.channels if case.form is Form.ERRORS else 0
    return unit * (4 + 2 * case.terms**0.5) + torch.finfo(torch.float32).eps / 2 * summed**0.5


def relative_rms(found: Tensor, exact: Tensor) -> float:
    """RMS of the error over RMS of the exact values."""
    if found.shape != exact.shape:
        return float("inf")
    return float(
        (found.double() - exact).square().mean().sqrt() / exact.square().mean().sqrt().clamp(min=1e-300)
    )


def _evenly(tokens: int, count: int, device: torch.device) -> Tensor:
    """At most `count` of the tokens, the first and the last included."""
    return torch.linspace(0, tokens - 1, min(count, tokens), device=device).round().long()
