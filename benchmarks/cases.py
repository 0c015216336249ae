"""What is measured, and the bytes that each case must move at least. Nothing here knows a device or a clock."""

import enum
from collections.abc import Sequence
from dataclasses import dataclass

import torch

REFRESH_RATIO = 0.3  # share of the tokens that a refresh recomputes
DTYPE_NAMES = {torch.bfloat16: "bf16", torch.float16: "fp16", torch.float32: "fp32"}
MLP_RATIO = 4
LAYERS = 28  # of a step's choice


class Form(str, enum.Enum):
    """A piece of arithmetic on the residual stream. Vectors (shift, scale, gate) are [B, D]."""

    TRUNK = "trunk"
    UPDATE = "update"
    UPDATE_MODULATE = "update-modulate"
    MODULATE = "modulate"
    STORE = "store"
    REFRESH = "refresh"
    FORECAST_2 = "forecast-2"
    FORECAST_4 = "forecast-4"
    ERRORS = "errors"
    UPDATE_MODULATE_RMS = "update-modulate-rms"
    MODULATE_RMS = "modulate-rms"
    STREAM = "stream"
    BLOCK = "block"

    @property
    def meaning(self) -> str:
        """What is computed, in one line."""
        return MEANINGS[self]

    @property
    def order(self) -> int:
        """Order of a forecast, 0 for other forms; its terms are order + 1."""
        return {Form.FORECAST_2: 2, Form.FORECAST_4: 4}.get(self, 0)

    @property
    def rms(self) -> bool:
        """True for the forms that only kernels of other projects on a GPU are compared in."""
        return self in (Form.UPDATE_MODULATE_RMS, Form.MODULATE_RMS)

    @property
    def partial(self) -> bool:
        """True for partial blocks: the part `tokens`."""
        return self in (Form.STREAM, Form.BLOCK)

    @property
    def refreshes(self) -> bool:
        """True if rows are gathered and scattered, so that tokens mix."""
        return self.partial or self is Form.REFRESH

    @property
    def writes_slot(self) -> bool:
        """True if a stored feature is written in place."""
        return self.refreshes or self is Form.STORE


MEANINGS = {
    Form.TRUNK: "x + sum_j g_j * F_j over every cached branch, in one call",
    Form.UPDATE: "x + g * F",
    Form.UPDATE_MODULATE: "x' = x + g * F and h = LayerNorm(x') * (1 + scale) + shift",
    Form.MODULATE: "h = LayerNorm(x) * (1 + scale) + shift",
    Form.STORE: "slot = F for all rows, x + g * slot",
    Form.REFRESH: "slot takes 30 % fresh rows, x' = x + g * slot, h of another 30 %",
    Form.FORECAST_2: "x + g * sum_k w_k F_k, order 2 (three features)",
    Form.FORECAST_4: "x + g * sum_k w_k F_k, order 4 (five features)",
    Form.ERRORS: "sums of |F - R|, |F| and |R| per sample",
    Form.UPDATE_MODULATE_RMS: "x' = x + g * F and h = RMSNorm(x') * (1 + scale) + shift",
    Form.MODULATE_RMS: "h = RMSNorm(x) * (1 + scale) + shift",
    Form.STREAM: "slot takes K fresh rows, x' = x + g * slot + g' * attention, h of K other rows",
    Form.BLOCK: "the same, and the MLP on the K rows of h",
}
SINGLE_UPDATES = (Form.UPDATE, Form.UPDATE_MODULATE, Form.MODULATE)
PARTIAL_BLOCKS = (Form.STREAM, Form.BLOCK)
FORMS = tuple(form for form in Form if not form.rms and not form.partial)


@dataclass(frozen=True)
class Size:
    """x is [batch, tokens, channels]; `terms` cached branches in a trunk; forms and dtypes measured at this size.

    For choices of tokens, `tokens` is a square of an even side, as the spatial bonus needs it.
    """

    name: str
    batch: int
    tokens: int
    channels: int = 1152
    terms: int = 56
    dtypes: tuple[torch.dtype, ...] = (torch.bfloat16,)
    forms: tuple[Form, ...] = FORMS

    @property
    def elements(self) -> int:
        """Elements of x."""
        return self.batch * self.tokens * self.channels

    @property
    def slug(self) -> str:
        """The name for test ids: `dit-256-b2`."""
        return self.name.lower().replace(" ", "-")


BOTH, FP32 = (torch.bfloat16, torch.float32), (torch.float32,)
SIZES = (
    Size("DiT-256 B2", 2, 256, dtypes=BOTH),
    Size("DiT-512 B2", 2, 1024, dtypes=BOTH),  # the same bytes as DiT-256 B8
    Size("DiT-256 B64", 64, 256, dtypes=BOTH),
    Size("PixArt-1024 B2", 2, 4096),
    Size("FLUX B1", 1, 4608, 3072, 76),
    Size("Wan-480p B1", 1, 32760, 5120, 80, forms=SINGLE_UPDATES),
)
TOKEN_SIZES = tuple(
    Size(f"N{tokens} B{batch}", batch, tokens, dtypes=FP32, forms=PARTIAL_BLOCKS)
    for batch, tokens in ((2, 256), (2, 1024), (2, 4096), (1, 24336))
)
# for tests and --quick: correct, and too small to mean anything
TINY = Size("Tiny B2", 2, 24, 64, 5, BOTH)
TINY_TOKENS = Size("Tiny B2", 2, 16, 32, dtypes=FP32, forms=PARTIAL_BLOCKS)
SHARES = (0.01, 0.07, 0.25, 0.6)


@dataclass(frozen=True)
class Traffic:
    """What a form moves at least: whole tensors [B, N, D], rows [B, K, D], vectors [B, D], and 4-byte words."""

    tensors: int
    rows: int = 0
    vectors: int = 0
    words: int = 0


@dataclass(frozen=True)
class Case:
    """One form at one size in one dtype (of x, features and vectors alike). share: of tokens that are refreshed."""

    form: Form
    size: Size
    dtype: torch.dtype
    share: float = REFRESH_RATIO

    @property
    def label(self) -> str:
        """The form."""
        return self.form.value

    @property
    def name(self) -> str:
        """`trunk-dit-256-b2-bf16`, `block-n256-b2-7pc-fp32`."""
        share = f"{100 * self.share:.0f}pc-" if self.form.partial else ""
        return f"{self.label}-{self.size.slug}-{share}{DTYPE_NAMES[self.dtype]}"

    @property
    def rows(self) -> int:
        """K, tokens per sample that a refresh recomputes."""
        return max(1, int(self.share * self.size.tokens)) if self.form.refreshes else 0

    @property
    def terms(self) -> int:
        """Features that are added."""
        if self.form is Form.TRUNK:
            return self.size.terms
        return 2 if self.form.partial else self.form.order + 1

    @property
    def tensor_bytes(self) -> int:
        """Bytes of one tensor [B, N, D]."""
        return self.size.elements * self.dtype.itemsize

    @property
    def weight_bytes(self) -> int:
        """Bytes of the MLP's weights and biases."""
        D = self.size.channels if self.form is Form.BLOCK else 0
        return ((2 * MLP_RATIO * D + MLP_RATIO + 1) * D) * self.dtype.itemsize

    @property
    def flops(self) -> int:
        """Of the MLP, 2 per multiply-add; 0 for the other forms."""
        work = 4 * MLP_RATIO * self.size.batch * self.rows * self.size.channels**2
        return work if self.form is Form.BLOCK else 0

    @property
    def operand_bytes(self) -> int:
        """Bytes of the operands of one call, rows [B, K, D] counted as whole tensors."""
        return self.tensor_bytes * (1 + self.terms + 2 * self.form.writes_slot)

    @property
    def working_bytes(self) -> int:
        """Bytes that the eager definition and the check in float64 may hold at once."""
        return 4 * 16 * self.size.elements + 3 * self.weight_bytes

    @property
    def min_bytes(self) -> int:
        """Least bytes that any implementation reads and writes, each operand once.

        U = B N D e bytes of one tensor, V = B D e of one vector, r = K / N, J terms, m the order:

            trunk            (J + 2) U + J V + 4 J         x, J features, x'; J gates; gate_index
            update           3 U + V                       x, F, x'; gate
            update-modulate  4 U + 3 V                     x, F, x', h; gate, shift, scale
            modulate         2 U + 2 V                     x, h; shift, scale
            store            4 U + V                       x, F, slot, x'; gate
            refresh          (3 + 2 r) U + 3 V + 8 B N     x, slot or fresh, x'; rows of slot and h; two slot maps
            forecast-m       (m + 3) U + V + 4 (m + 1)     x, m + 1 features, x'; gate; weights
            errors           2 U + 12 B                    F, R; three fp32 sums per sample
            ...-rms          as with LayerNorm
            stream           (4 + 2 r) U + 4 V + 8 B N     as refresh; the attention's feature and gate
            block            as stream, and its MLP's weights
        """
        moved, size = traffic(self), self.size
        elements = moved.tensors * size.elements + moved.vectors * size.batch * size.channels
        elements += moved.rows * size.batch * self.rows * size.channels
        return elements * self.dtype.itemsize + 4 * moved.words + self.weight_bytes


def traffic(case: Case) -> Traffic:
    """The table of `Case.min_bytes`."""
    J, size = case.terms, case.size
    maps = 2 * size.batch * size.tokens
    return {
        Form.TRUNK: Traffic(J + 2, vectors=J, words=J),
        Form.UPDATE: Traffic(3, vectors=1),
        Form.UPDATE_MODULATE: Traffic(4, vectors=3),
        Form.MODULATE: Traffic(2, vectors=2),
        Form.STORE: Traffic(4, vectors=1),
        Form.REFRESH: Traffic(3, rows=2, vectors=3, words=maps),
        Form.FORECAST_2: Traffic(J + 2, vectors=1, words=J),
        Form.FORECAST_4: Traffic(J + 2, vectors=1, words=J),
        Form.ERRORS: Traffic(2, words=3 * size.batch),
        Form.UPDATE_MODULATE_RMS: Traffic(4, vectors=3),
        Form.MODULATE_RMS: Traffic(2, vectors=2),
        Form.STREAM: Traffic(4, rows=2, vectors=4, words=maps),
        Form.BLOCK: Traffic(4, rows=2, vectors=4, words=maps),
    }[case.form]


@dataclass(frozen=True)
class ChoiceCase:
    """Choosing tokens for every layer of a step, K growing over layers as in ToCa's `ToCa-ddim50`.

    share: 0.175 is what fresh_ratio=0.07 comes to in the middle of the steps, 0.07 * 2.5 * (3 - 4 / 2).
    """

    size: Size
    share: float = 0.175
    layers: int = LAYERS
    label, dtype, flops, weight_bytes = "choice", torch.float32, 0, 0

    @property
    def name(self) -> str:
        """`choice-n256-b2-18pc`."""
        return f"choice-{self.size.slug}-{100 * self.share:.0f}pc"

    @property
    def counts(self) -> list[int]:
        """K of every layer."""
        N, last = self.size.tokens, max(1, self.layers - 1)
        shares = [self.share * (0.8 + 0.4 * layer / last) for layer in range(self.layers)]
        return [min(N, max(1, int(share * N))) for share in shares]

    @property
    def rows(self) -> int:
        """The largest K."""
        return max(self.counts)

    @property
    def min_bytes(self) -> int:
        """A score and an age read, an age and a slot written, 4 bytes each, for every token of every layer."""
        return 16 * self.layers * self.size.batch * self.size.tokens

    @property
    def operand_bytes(self) -> int:
        """Scores and ages."""
        return self.min_bytes // 2

    working_bytes = operand_bytes


def cases(sizes: Sequence[Size] = SIZES) -> list[Case]:
    """Every case: bf16 at all sizes first, small before large, then fp32."""
    dtypes = [dtype for dtype in BOTH if any(dtype in size.dtypes for size in sizes)]
    sized = [(dtype, size) for dtype in dtypes for size in sizes if dtype in size.dtypes]
    return [Case(form, size, dtype) for dtype, size in sized for form in size.forms]


def block_cases(sizes: Sequence[Size] = TOKEN_SIZES, shares: Sequence[float] = SHARES) -> list[Case]:
    """Partial blocks: the stream alone first, small before large."""
    return [
        Case(work, size, dtype, share)
        for work in PARTIAL_BLOCKS
        for size in sizes
        for dtype in size.dtypes
        for share in shares
    ]


FLAGSHIP = Case(Form.TRUNK, SIZES[0], torch.bfloat16)
