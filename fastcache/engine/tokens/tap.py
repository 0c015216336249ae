"""Taking queries, keys and values out of a host's own self-attention, while it runs as it is.

A body is called inside `AttentionTap`. What it passes to scaled_dot_product_attention is exactly
what the score needs (after its norms and rotations), and the log-sum-exp that a flash kernel
computes anyway comes for free. A body that multiplies its own softmax is read at its packed `qkv`
projection instead.
"""

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.attention import SDPBackend
from torch.overrides import TorchFunctionMode

from fastcache.errors import HostError


class AttentionTap(TorchFunctionMode):
    """Records q, k, v [B, H, N, d], the scale and (if a kernel returns it) lse [B, H, N] of one attention."""

    def __init__(self, name: str, body: nn.Module) -> None:
        super().__init__()
        self._name, self._body = name, body
        self._packed: Tensor | None = None
        self.q: Tensor | None = None
        self.k: Tensor | None = None
        self.v: Tensor | None = None
        self.lse: Tensor | None = None
        self.scale: float | None = None

    def run(self, h: Tensor) -> Tensor:
        """The body's output on h; afterwards q, k and v are there. HostError if it has no attention to
        read.
        """
        projection = getattr(self._body, "qkv", None)
        hook = (
            projection.register_forward_hook(self._keep_packed) if isinstance(projection, nn.Module) else None
        )
        try:
            with self:
                output = self._body(h)
        finally:
            if hook is not None:
                hook.remove()
        if self.q is None:
            self._unpack()
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
        attn_mask=None,
        dropout_p: float = 0.0,
        is_causal: bool = False,
        scale: float | None = None,
        **more: Any,
    ) -> Tensor:
        if attn_mask is not None or is_causal or dropout_p or query.ndim != 4 or any(more.values()):
            raise HostError(
                f"{self._name}: its scores need a plain self-attention over [B, H, N, d] (no mask, dropout or"
                f" grouped heads), got {list(query.shape)} with mask {attn_mask is not None}, causal"
                f" {is_causal}, dropout {dropout_p}"
            )
        self.q, self.k, self.v, self.scale = query, key, value, scale
        output, self.lse = attention_and_lse(query, key, value, scale)
        return output

    def _keep_packed(self, module: nn.Module, args: tuple, output: Tensor) -> None:
        self._packed = output

    def _unpack(self) -> None:
        heads = getattr(self._body, "num_heads", getattr(self._body, "heads", None))
        normed = [
            name
            for name in ("q_norm", "k_norm")
            if not isinstance(getattr(self._body, name, None), (nn.Identity, type(None)))
        ]
        if self._packed is None or not heads or normed:
            raise HostError(
                f"{self._name}: no queries and keys to score tokens with: it neither calls"
                " torch.nn.functional.scaled_dot_product_attention nor has a packed `qkv` projection with"
                f" `num_heads`{' and without ' + ' and '.join(normed) if normed else ''}; use a score that"
                " needs no attention (random, norm, similarity)"
            )
        B, N, width = self._packed.shape
        self.q, self.k, self.v = (
            self._packed.view(B, N, 3, heads, width // (3 * heads)).permute(2, 0, 3, 1, 4).unbind(0)
        )
        self.scale = getattr(self._body, "scale", None)


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
