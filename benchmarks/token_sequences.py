"""How a partial block is computed: the original's sequence, eager PyTorch at its best, and ours in one launch."""

from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from benchmarks.cases import Case, Form, Size
from benchmarks.inputs import Noise
from benchmarks.token_cases import MLP_RATIO, BlockCase, Work
from fastcache.models.dit import Mlp, modulate
from fastcache.ops import Norm, residual_update_scatter_, slot_map

Outputs = tuple[Tensor, Tensor]
Body = Callable[[Tensor], Tensor]
SHIFT, SCALE, GATE, OLD_GATE = range(4)  # rows of the table


@dataclass(frozen=True)
class BlockInputs:
    """Operands of one call. x, attended, slot: [B, N, D]; fresh: [B, K, D], what the MLP before made;
    table: [4, B, D]; fresh_index, row_index: [B, K] int64, ascending, and the same as slot maps [B, N] int32."""

    x: Tensor
    attended: Tensor
    slot: Tensor
    fresh: Tensor
    table: Tensor
    gate_index: Tensor
    fresh_index: Tensor
    row_index: Tensor
    fresh_slots: Tensor
    row_slots: Tensor
    body: Body

    def double(self) -> "BlockInputs":
        """The same call in float64, on copies."""
        wide = {name: getattr(self, name).double() for name in ("x", "attended", "slot", "fresh", "table")}
        return replace(self, **wide)


def make_mlp(case: BlockCase, device: torch.device) -> nn.Module:
    """The MLP of a block of this width, with weights of a plausible size."""
    generator = torch.Generator(device).manual_seed(1)
    with torch.device(device):
        mlp = (
            Mlp(case.size.channels, MLP_RATIO * case.size.channels)
            .to(case.dtype)
            .eval()
            .requires_grad_(False)
        )
    for parameter in mlp.parameters():
        parameter.normal_(std=0.02, generator=generator)
    return mlp


def make_inputs(case: BlockCase, device: torch.device, mlp: nn.Module, seed: int = 0) -> BlockInputs:
    """Normally distributed operands, each in memory of its own; body is the MLP, or nothing where the stream alone is timed."""
    size = case.size
    like = Case(Form.REFRESH, Size("", size.batch, size.tokens, size.channels, 1), case.dtype)
    source = Noise(like, device, seed)
    chosen = [_tokens(case, device, 2 * seed + number) for number in range(2)]
    return BlockInputs(
        source.tensor(), source.tensor(), source.tensor(), source.tensor()[:, : case.rows].contiguous(), source.vectors(4), torch.tensor([OLD_GATE, GATE], dtype=torch.int32, device=device),
        *chosen, *(slot_map(index, size.tokens).slots for index in chosen), mlp if case.work is Work.BLOCK else nn.Identity(),
    )  # fmt: skip


def _tokens(case: BlockCase, device: torch.device, seed: int) -> Tensor:
    generator = torch.Generator(device).manual_seed(seed)
    order = torch.rand(case.size.batch, case.size.tokens, generator=generator, device=device).argsort(dim=1)
    return order[:, : case.rows].sort(dim=1).values


def naive_block(
    x: Tensor,
    attended: Tensor,
    slot: Tensor,
    fresh: Tensor,
    old_gate: Tensor,
    gate: Tensor,
    shift: Tensor,
    scale: Tensor,
    fresh_index: Tensor,
    row_index: Tensor,
    body: Body,
) -> Outputs:
    """From where an MLP has its fresh rows to where the next one has: scatter, two gated updates, gather, norm, modulate, MLP."""
    slot.scatter_(1, _columns(fresh_index, x), fresh)
    x = x + old_gate[:, None] * slot
    x = x + gate[:, None] * attended
    rows = x.gather(1, _columns(row_index, x))
    return x, body(modulate(F.layer_norm(rows, rows.shape[-1:], eps=1e-6), shift, scale))


def best_block(
    x: Tensor,
    attended: Tensor,
    slot: Tensor,
    fresh: Tensor,
    old_gate: Tensor,
    gate: Tensor,
    shift: Tensor,
    scale: Tensor,
    fresh_index: Tensor,
    row_index: Tensor,
    body: Body,
) -> Outputs:
    """The fused calls of PyTorch that a careful host could use."""
    slot.scatter_(1, _columns(fresh_index, x), fresh)
    x = torch.addcmul(x, old_gate[:, None], slot).addcmul_(gate[:, None], attended)
    rows = x.gather(1, _columns(row_index, x))
    return x, body(
        torch.addcmul(shift[:, None], F.layer_norm(rows, rows.shape[-1:], eps=1e-6), 1 + scale[:, None])
    )


def _columns(index: Tensor, x: Tensor) -> Tensor:
    """[B, K] -> [B, K, D], as gather and scatter_ take it."""
    return index[..., None].expand(-1, -1, x.shape[-1])


def arguments(i: BlockInputs) -> tuple:
    """Of the sequences of PyTorch."""
    return (
        i.x,
        i.attended,
        i.slot,
        i.fresh,
        i.table[OLD_GATE],
        i.table[GATE],
        i.table[SHIFT],
        i.table[SCALE],
        i.fresh_index,
        i.row_index,
        i.body,
    )


def ours(i: BlockInputs) -> Callable[[], Outputs]:
    """One launch, and the body."""
    launch = partial(
        residual_update_scatter_, i.x, i.slot, i.fresh, i.fresh_slots, [i.attended], position=0, gates=i.table, gate_index=i.gate_index,
        norm=Norm.LAYER, shift=i.table[SHIFT], scale=i.table[SCALE], row_slots=i.row_slots, row_count=i.row_index.shape[1],
    )  # fmt: skip

    def call() -> Outputs:
        updated = launch()
        return updated.x, i.body(updated.h)

    return call


def body_alone(i: BlockInputs) -> Callable[[], Outputs]:
    """The body on packed rows: what no stream can save."""
    return lambda: (i.fresh, i.body(i.fresh))


def compiled_block(
    inductor: str = "inductor", mode: str | None = None
) -> Callable[[BlockInputs], Callable[[], Outputs]]:
    """torch.compile of the original's sequence: one graph for any number of tokens, as K changes from layer to layer and step to step."""
    torch.compiler.reset()
    compiled = torch.compile(
        naive_block, fullgraph=True, backend=inductor, **({} if mode is None else {"mode": mode})
    )

    def bind(i: BlockInputs) -> Callable[[], Outputs]:
        for tensor in (i.x, i.attended, i.slot, i.fresh, i.fresh_index, i.row_index):
            torch._dynamo.maybe_mark_dynamic(tensor, 1)
        return partial(compiled, *arguments(i))

    return bind
