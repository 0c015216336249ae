"""The tensors of a case of the residual stream."""

from dataclasses import dataclass, replace

import torch
from torch import Tensor, nn

from benchmarks.cases import MLP_RATIO, PARTIAL_BLOCKS, REFRESHING, Case, Form
from fastcache.models.dit import Mlp
from fastcache.ops import slot_map

SHIFT = 977  # elements between two tensors in the common noise; no divisor of a row
DISTANCE = -2  # steps since the last full one


@dataclass(frozen=True)
class Operands:
    """Operands of one call. Tensors that the form does not have are None.

    x, features, slot, reference: [B, N, D]; fresh: [B, N, D] (store) or [B, K, D]. table: [3 J, B, D] or
    [6, B, D], shift, scale and gate of every branch, as a modulation table has them; gate_index: [J] int32,
    rows of `table`. weights: [J] float32, DISTANCE^k / k! (a forecast). fresh_index, row_index: [B, K] int64,
    ascending; fresh_slots, row_slots: the same as slot maps [B, N] int32. body: of a partial block.
    """

    x: Tensor
    features: tuple[Tensor, ...]
    table: Tensor
    gate_index: Tensor
    weights: Tensor | None = None
    slot: Tensor | None = None
    fresh: Tensor | None = None
    fresh_index: Tensor | None = None
    fresh_slots: Tensor | None = None
    row_index: Tensor | None = None
    row_slots: Tensor | None = None
    reference: Tensor | None = None
    body: nn.Module | None = None

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

    def at(self, tokens: Tensor) -> "Operands":
        """The same call on these tokens only; for forms in which every token is on its own."""
        streams = {name: getattr(self, name) for name in ("x", "slot", "fresh")}
        taken = {name: tensor[:, tokens] for name, tensor in streams.items() if tensor is not None}
        return replace(self, features=tuple(feature[:, tokens] for feature in self.features), **taken)

    def double(self) -> "Operands":
        """The same call in float64, on copies, without its body."""
        names = ("x", "table", "slot", "fresh", "reference")
        wide = {name: getattr(self, name).double() for name in names if getattr(self, name) is not None}
        features = tuple(feature.double() for feature in self.features)
        return replace(self, features=features, body=nn.Identity(), **wide)


def make_mlp(case: Case, device: torch.device) -> nn.Module:
    """The MLP of a block of this width, with weights of a plausible size; nothing for the stream alone."""
    if case.form is not Form.BLOCK:
        return nn.Identity()
    generator = torch.Generator(device).manual_seed(1)
    with torch.device(device):
        mlp = Mlp(case.size.channels, MLP_RATIO * case.size.channels).to(case.dtype)
    for parameter in mlp.parameters():
        parameter.data.normal_(std=0.02, generator=generator)
    return mlp.eval().requires_grad_(False)


def make_operands(case: Case, device: torch.device, seed: int = 0, body: nn.Module | None = None) -> Operands:
    """Normally distributed operands of a case, each in memory of its own."""
    source, J, form = Noise(case, device, seed), case.terms, case.form
    table = source.vectors(max(6, 3 * J))
    gate_index = torch.arange(2, 3 * J, 3, dtype=torch.int32, device=device)
    made = Operands(source.tensor(), (), table, gate_index, body=body)
    if form is Form.ERRORS:
        return replace(made, features=(made.x,), reference=source.tensor())
    if form is Form.STORE:
        return replace(made, slot=source.tensor(), fresh=source.tensor())
    if form in REFRESHING:
        fresh, row = source.rows(), source.rows()
        maps = [slot_map(index, case.size.tokens).slots for index in (fresh, row)]
        made = replace(made, fresh_index=fresh, row_index=row, fresh_slots=maps[0], row_slots=maps[1])
        made = replace(made, slot=source.tensor(), fresh=source.tensor()[:, : case.rows].contiguous())
        return replace(made, features=(source.tensor(),)) if form in PARTIAL_BLOCKS else made
    if form in (Form.MODULATE, Form.MODULATE_RMS):
        return made
    made = replace(made, features=tuple(source.tensor() for _ in range(J)))
    if form.order:
        orders = torch.arange(J, device=device)
        factorials = torch.cumprod(orders.clamp(min=1), 0)
        return replace(made, weights=(torch.full_like(orders, DISTANCE) ** orders / factorials).float())
    return made


class Noise:
    """Cheap noise: tensors are copies of one long normal sequence, each from another place in it."""

    def __init__(self, case: Case, device: torch.device, seed: int) -> None:
        self._case, self._taken = case, 0
        self._generator = torch.Generator(device=device).manual_seed(seed)
        self._noise = self._normal(case.size.elements + SHIFT * (case.terms + 4)).to(case.dtype)

    def _normal(self, *shape: int) -> Tensor:
        return torch.randn(*shape, generator=self._generator, device=self._generator.device)

    def tensor(self) -> Tensor:
        """[B, N, D]."""
        size, first = self._case.size, self._taken * SHIFT
        self._taken += 1
        part = self._noise[first : first + size.elements]
        return part.view(size.batch, size.tokens, size.channels).clone()

    def vectors(self, count: int) -> Tensor:
        """[count, B, D]."""
        size = self._case.size
        return self._normal(count, size.batch, size.channels).to(self._noise.dtype)

    def rows(self) -> Tensor:
        """[B, K] int64: a random choice of tokens per sample, ascending."""
        order = self._normal(self._case.size.batch, self._case.size.tokens).argsort(dim=1)
        return order[:, : self._case.rows].sort(dim=1).values
