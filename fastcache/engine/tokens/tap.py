"""Taking queries, keys and values out of a host's own self-attention, while it runs as it is.

A body is called inside `AttentionTap`. What it passes to scaled_dot_product_attention is exactly
what the score needs (after its norms and rotations), and the log-sum-exp that a flash kernel
computes anyway comes for free. Of several calls in one body, the block's own is the one over all of
its tokens; where that leaves a choice, it is an error. A body that multiplies its own softmax is read
at its packed `qkv` projection instead, and proven: attention over what was read there must be what
one of the body's other projections is given.
"""

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.attention import SDPBackend
from torch.overrides import TorchFunctionMode

from fastcache.errors import HostError

INSTEAD = "use a score that needs no attention (random, norm, similarity)"
EXACT, ROUNDED = 1e-3, 0.03  # relative error that rounding explains: of float32, of 16-bit types


class AttentionTap(TorchFunctionMode):
    """Records q, k, v [B, H, N, d], the scale and (if a kernel returns it) lse [B, H, N] of one attention.

    prove: compare what was read at a packed projection with what the body computes from it; reads the
    device.
    """

    def __init__(self, name: str, body: nn.Module, *, prove: bool = False) -> None:
        super().__init__()
        self._name, self._body, self._prove = name, body, prove
        self._tokens = self._batch = 0
        self._packed: Tensor | None = None
        self._given: list[Tensor] = []  # inputs of the body's projections
        self.q: Tensor | None = None
        self.k: Tensor | None = None
        self.v: Tensor | None = None
        self.lse: Tensor | None = None
        self.scale: float | None = None

    def run(self, h: Tensor) -> Tensor:
        """The body's output on h; afterwards q, k and v are there. HostError if it has no attention to
        read."""
        self._batch, self._tokens = h.shape[:2]
        hooks = []
        projection = getattr(self._body, "qkv", None)
        if isinstance(projection, nn.Module):
            hooks.append(projection.register_forward_hook(self._keep_packed))
            if self._prove:
                others = [m for m in self._body.modules() if m is not projection and isinstance(m, nn.Linear)]
                hooks += [module.register_forward_pre_hook(self._keep_given) for module in others]
        try:
            with self:
                output = self._body(h)
        finally:
            for hook in hooks:
                hook.remove()
        if self.q is None:
            self._unpack()
        self._given = []
        return output

    def __torch_function__(self, func, types, args=(), kwargs=None):
        if func is not F.scaled_dot_product_attention:
            return func(*args, **(kwargs or {}))
        return self._attend(*args, **(kwargs or {}))

    def _attend(
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        attn_mask: Tensor | None = None,
        dropout_p: float = 0.0,
        is_causal: bool = False,
        scale: float | None = None,
        **more: Any,
    ) -> Tensor:
        own = query.shape[-2] == key.shape[-2] == self._tokens and query.shape[0] == self._batch
        if not own:  # windows, pooled or other tokens, a context
            return F.scaled_dot_product_attention(
                query, key, value, attn_mask, dropout_p, is_causal, scale=scale, **more
            )
        if attn_mask is not None or is_causal or dropout_p or query.ndim != 4 or any(more.values()):
            raise HostError(
                f"{self._name}: its scores need a plain self-attention over [B, H, N, d] (no mask, dropout or"
                f" grouped heads), got {list(query.shape)} with mask {attn_mask is not None}, causal"
                f" {is_causal}, dropout {dropout_p}; {INSTEAD}"
            )
        if self.q is not None:
            raise HostError(
                f"{self._name}: it attends over all tokens more than once, and which of them scores the"
                f" tokens cannot be told; {INSTEAD}"
            )
        self.q, self.k, self.v, self.scale = query, key, value, scale
        output, self.lse = attention_and_lse(query, key, value, scale)
        return output

    def _keep_packed(self, module: nn.Module, args: tuple[Any, ...], output: Tensor) -> None:
        self._packed = output

    def _keep_given(self, module: nn.Module, args: tuple[Any, ...]) -> None:
        if args and isinstance(args[0], Tensor):
            self._given.append(args[0].detach())

    def _unpack(self) -> None:
        heads = getattr(self._body, "num_heads", getattr(self._body, "heads", None))
        packed = self._packed
        form = (self._batch, self._tokens)
        if not isinstance(packed, Tensor) or packed.ndim != 3 or packed.shape[:2] != form:
            heads = None  # windows, registers, another layout: not the stream's own tokens
        if not heads or packed.shape[-1] % (3 * heads):
            raise HostError(
                f"{self._name}: no queries and keys to score tokens with: it neither calls"
                " torch.nn.functional.scaled_dot_product_attention over its tokens nor has a packed `qkv`"
                f" projection [B, N, 3 C] with `num_heads`; {INSTEAD}"
            )
        B, N, width = packed.shape
        parts = packed.view(B, N, 3, heads, width // (3 * heads)).permute(2, 0, 3, 1, 4)
        self.q, self.k, self.v = parts.unbind(0)
        self.scale = getattr(self._body, "scale", None)
        if self._prove and not self._is_what_the_body_computes():
            raise HostError(
                f"{self._name}: no queries and keys to score tokens with: attention over its packed `qkv`"
                " projection (q, k, v of num_heads heads, softmax(q k^T scale) v) is not what its other"
                " projections get, so it norms, rotates, masks or orders them in a way of its own; let it"
                f" call torch.nn.functional.scaled_dot_product_attention, or {INSTEAD}"
            )

    def _is_what_the_body_computes(self) -> bool:
        """Whether softmax(q k^T scale) v, heads side by side, went into a projection of the body."""
        scale = self.scale if isinstance(self.scale, (int, float)) else None
        attended = F.scaled_dot_product_attention(self.q, self.k, self.v, scale=scale)
        expected = attended.transpose(1, 2).flatten(2).double()
        tolerance = EXACT if self.q.dtype in (torch.float32, torch.float64) else ROUNDED
        for given in self._given:
            if given.shape == expected.shape:
                difference = (given.double() - expected).norm()
                if float(difference) <= tolerance * float(expected.norm()):
                    return True
        return False


def attention_and_lse(q: Tensor, k: Tensor, v: Tensor, scale: float | None) -> tuple[Tensor, Tensor | None]:
    """scaled_dot_product_attention by the kernel that PyTorch chooses, and its log-sum-exp [B, H, N] if it
    returns one.
    """
    chosen = torch._fused_sdp_choice(q, k, v, scale=scale)
    if chosen == SDPBackend.FLASH_ATTENTION.value and q.device.type == "cpu":
        output, lse = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu(q, k, v, scale=scale)
    elif chosen == SDPBackend.FLASH_ATTENTION.value and q.device.type == "cuda" and q.shape[-1] % 8 == 0:
        output, lse = torch.ops.aten._scaled_dot_product_flash_attention(q, k, v, scale=scale)[:2]
    elif chosen == SDPBackend.EFFICIENT_ATTENTION.value and q.device.type == "cuda":
        output, lse = torch.ops.aten._scaled_dot_product_efficient_attention(
            q, k, v, None, True, scale=scale
        )[:2]
        lse = lse[:, :, : q.shape[2]]  # padded to a whole tile
    else:
        return F.scaled_dot_product_attention(q, k, v, scale=scale), None
    return output, lse if lse.shape == q.shape[:3] else None
