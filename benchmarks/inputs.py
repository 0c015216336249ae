"""The tensors of a case."""

from dataclasses import dataclass, replace

import torch
from torch import Tensor

from benchmarks.cases import Case, Form
from fastcache.ops import slot_map

SHIFT = 977  # elements between two tensors in the common noise; no divisor of a row


@dataclass(frozen=True)
class Inputs:
    """Operands of one call. Tensors that the form does not have are None.

    x, features, slot, reference: [B, N, D]; fresh: [B, N, D] (store) or [B, K, D] (refresh).
    table: [3 J, B, D] or [6, B, D], shift, scale and gate of every branch, as a modulation table
    has them; gate_index: [J] int32, rows of `table`. distance: steps since the last full one, and
    weights: [J] float32, distance^k / k! (a forecast). fresh_index, row_index: [B, K] int64,
    ascending; fresh_slots, row_slots: the same as slot maps [B, N] int32.
    """

    x: Tensor
    features: tuple[Tensor, ...]
    table: Tensor
    gate_index: Tensor
    distance: int = -2
    weights: Tensor | None = None
    slot: Tensor | None = None
    fresh: Tensor | None = None
    fresh_index: Tensor | None = None
    fresh_slots: Tensor | None = None
    row_index: Tensor | None = None
    row_slots: Tensor | None = None
    reference: Tensor | None = None

    @property
    def gates(self) -> list[Tensor]:
        """Gate [B, D] of every term."""
        return [self.table[3 * j + 2] for j in range(len(self.gate_index))]

    @property
    def gate(self) -> Tensor:
        """Gate [B, D] of the first branch."""
        return self.table[2]

    @property
    def shift(self) -> Tensor:
        """Shift [B, D] of the branch after the first."""
        return self.table[3]

    @property
    def scale(self) -> Tensor:
        """Scale [B, D] of the branch after the first."""
        return self.table[4]

    @property
    def nbytes(self) -> int:
        """Bytes of the tensors [B, N, D] and [B, K, D]."""
        streams = {
            id(tensor): tensor
            for tensor in (self.x, *self.features, self.slot, self.fresh, self.reference)
            if tensor is not None
        }
        return sum(tensor.numel() * tensor.element_size() for tensor in streams.values())

    def at(self, tokens: Tensor) -> "Inputs":
        """The same call on these tokens only; for forms in which every token is on its own."""
        take = lambda tensor: None if tensor is None else tensor[:, tokens]  # noqa: E731
        return replace(
            self,
            x=take(self.x),
            features=tuple(map(take, self.features)),
            slot=take(self.slot),
            fresh=take(self.fresh),
        )

    def double(self) -> "Inputs":
        """The same call in float64, on copies."""
        wide = lambda tensor: None if tensor is None else tensor.double()  # noqa: E731
        streams = {name: wide(getattr(self, name)) for name in ("x", "table", "slot", "fresh", "reference")}
        return replace(self, features=tuple(map(wide, self.features)), **streams)


def make_inputs(case: Case, device: torch.device, seed: int = 0) -> Inputs:
    """Normally distributed operands of a case, each in memory of its own."""
    source = Noise(case, device, seed)
    J, size = case.terms, case.size
    table = source.vectors(max(6, 3 * J))
    gate_index = torch.arange(2, 3 * J, 3, dtype=torch.int32, device=device)
    if case.form is Form.ERRORS:
        feature = source.tensor()
        return Inputs(feature, (feature,), table, gate_index, reference=source.tensor())
    inputs = Inputs(source.tensor(), (), table, gate_index)
    if case.form is Form.STORE:
        return replace(inputs, slot=source.tensor(), fresh=source.tensor())
    if case.form is Form.REFRESH:
        fresh_index, row_index = source.tokens(), source.tokens()
        maps = {
            "fresh_slots": slot_map(fresh_index, size.tokens).slots,
            "row_slots": slot_map(row_index, size.tokens).slots,
        }
        fresh = source.tensor()[:, : size.rows].contiguous()
        return replace(
            inputs, slot=source.tensor(), fresh=fresh, fresh_index=fresh_index, row_index=row_index, **maps
        )
    if case.form in (Form.MODULATE, Form.MODULATE_RMS):
        return inputs
    inputs = replace(inputs, features=tuple(source.tensor() for _ in range(J)))
    if case.form.forecasts:
        orders = torch.arange(J, device=device)
        factorials = torch.cumprod(orders.clamp(min=1), 0)
        return replace(
            inputs, weights=(torch.full_like(orders, inputs.distance) ** orders / factorials).float()
        )
    return inputs


class Noise:
    """Cheap noise: tensors are copies of one long normal sequence, each from another place in it."""

    def __init__(self, case: Case, device: torch.device, seed: int) -> None:
        self._size, self._taken = case.size, 0
        self._generator = torch.Generator(device=device).manual_seed(seed)
        self._noise = self._normal(case.size.elements + SHIFT * (case.terms + 4)).to(case.dtype)

    def _normal(self, *shape: int) -> Tensor:
        return torch.randn(*shape, generator=self._generator, device=self._generator.device)

    def tensor(self) -> Tensor:
        """[B, N, D]."""
        size, first = self._size, self._taken * SHIFT
        self._taken += 1
        return self._noise[first : first + size.elements].view(size.batch, size.tokens, size.channels).clone()

    def vectors(self, count: int) -> Tensor:
        """[count, B, D]."""
        return self._normal(count, self._size.batch, self._size.channels).to(self._noise.dtype)

    def tokens(self) -> Tensor:
        """[B, K] int64: a random choice of tokens per sample, ascending."""
        order = self._normal(self._size.batch, self._size.tokens).argsort(dim=1)
        return order[:, : self._size.rows].sort(dim=1).values
