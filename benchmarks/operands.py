"""The tensors of a case of the residual stream."""

import copy
import itertools
from dataclasses import dataclass, replace

import torch
from torch import Tensor, nn

from benchmarks.cases import MLP_RATIO, PARTIAL_BLOCKS, REFRESHING, Case, Form
from fastcache.models.dit import Mlp
from fastcache.ops import slot_map

SHIFT = 977  # elements between two tensors in the common noise; no divisor of a row
DISTANCE = -2  # steps since the last full one


@dataclass
class Operands:
    """Operands of one call. Tensors that the form does not have are None.

    x, features, slot: [B, N, D]; fresh: [B, N, D] (store) or [B, K, D]. table: [3 J, B, D] or
    [6, B, D], shift, scale and gate of every branch, as a modulation table has them; gate_index: [J] int32,
    rows of `table`. weights: [J] float32, DISTANCE^k / k! (a forecast). fresh_index, row_index: [B, K] int64,
    ascending; fresh_slots, row_slots: the same as slot maps [B, N] int32. body: of a partial block.

    gates: [B, D] of every term; gate: of the first branch; shift, scale: of the branch after it.
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
    body: nn.Module | None = None

    def __post_init__(self) -> None:
        self.gates = [self.table[3 * j + 2] for j in range(len(self.gate_index))]
        self.gate, self.shift, self.scale = self.table[2], self.table[3], self.table[4]

    def at(self, tokens: Tensor) -> "Operands":
        """The same call on these tokens only; for forms in which every token is on its own."""
        streams = {name: getattr(self, name) for name in ("x", "slot", "fresh")}
        taken = {name: tensor[:, tokens] for name, tensor in streams.items() if tensor is not None}
        return replace(self, features=tuple(feature[:, tokens] for feature in self.features), **taken)

    def double(self) -> "Operands":
        """The same call in float64, on copies."""
        names = ("x", "table", "slot", "fresh")
        wide = {name: getattr(self, name).double() for name in names if getattr(self, name) is not None}
        features = tuple(feature.double() for feature in self.features)
        body = None if self.body is None else copy.deepcopy(self.body).double()
        return replace(self, features=features, body=body, **wide)


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
    """Normally distributed operands of a case, each in memory of its own.

    Cheap noise: tensors are copies of one normal sequence, each rolled further.
    """
    J, form, size, generator = case.terms, case.form, case.size, torch.Generator(device).manual_seed(seed)
    normal = lambda *shape: torch.randn(*shape, generator=generator, device=device)
    noise, shifts = normal(size.elements).to(case.dtype), itertools.count(0, SHIFT)
    tensor = lambda: noise.roll(next(shifts)).view(size.batch, size.tokens, size.channels)
    rows = lambda: normal(size.batch, size.tokens).argsort(1)[:, : case.rows].sort(1).values

    table = normal(max(6, 3 * J), size.batch, size.channels).to(case.dtype)
    gate_index = torch.arange(2, 3 * J, 3, dtype=torch.int32, device=device)
    made = Operands(tensor(), (), table, gate_index, body=body)
    if form is Form.STORE:
        return replace(made, slot=tensor(), fresh=tensor())
    if form in REFRESHING:
        fresh, row = rows(), rows()
        maps = [slot_map(index, size.tokens).slots for index in (fresh, row)]
        made = replace(made, fresh_index=fresh, row_index=row, fresh_slots=maps[0], row_slots=maps[1])
        made = replace(made, slot=tensor(), fresh=tensor()[:, : case.rows].contiguous())
        return replace(made, features=(tensor(),)) if form in PARTIAL_BLOCKS else made
    if form is Form.MODULATE:
        return made
    made = replace(made, features=tuple(tensor() for _ in range(J)))
    if form.order:
        orders = torch.arange(J, device=device)
        factorials = torch.cumprod(orders.clamp(min=1), 0)
        return replace(made, weights=(torch.full_like(orders, DISTANCE) ** orders / factorials).float())
    return made
