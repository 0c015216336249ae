"""What is measured, and the bytes that each case must move at least. Nothing here knows a device or clock."""

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

    meaning: str

    def __new__(cls, value: str, meaning: str) -> "Form":
        form = str.__new__(cls, value)
        form._value_, form.meaning = value, meaning
        return form

    TRUNK = "trunk", "x + sum_j g_j * F_j over every cached branch, in one call"
    UPDATE = "update", "x + g * F"
    UPDATE_MODULATE = "update-modulate", "x' = x + g * F and h = LayerNorm(x') * (1 + scale) + shift"
    MODULATE = "modulate", "h = LayerNorm(x) * (1 + scale) + shift"
    STORE = "store", "slot = F for all rows, x + g * slot"
    REFRESH = "refresh", "slot takes 30 % fresh rows, x' = x + g * slot, h of another 30 %"
    FORECAST_2 = "forecast-2", "x + g * sum_k w_k F_k, order 2 (three features)"
    FORECAST_4 = "forecast-4", "x + g * sum_k w_k F_k, order 4 (five features)"
    STREAM = "stream", "slot takes K fresh rows, x' = x + g * slot + g' * attention, h of K other rows"
    BLOCK = "block", "the same, and the MLP on the K rows of h"

    @property
    def order(self) -> int:
        """Order of a forecast, 0 for other forms; its terms are order + 1."""
        return {Form.FORECAST_2: 2, Form.FORECAST_4: 4}.get(self, 0)


SINGLE_UPDATES = (Form.UPDATE, Form.UPDATE_MODULATE, Form.MODULATE)
PARTIAL_BLOCKS = (Form.STREAM, Form.BLOCK)  # the part `tokens`
REFRESHING = (*PARTIAL_BLOCKS, Form.REFRESH)  # rows are gathered and scattered, so that tokens mix
WRITING = (*REFRESHING, Form.STORE)  # a stored feature is written in place
MODULATING = (*REFRESHING, *(form for form in Form if "modulate" in form.value))
FORMS = tuple(form for form in Form if form not in PARTIAL_BLOCKS)


@dataclass(frozen=True)
class Size:
    """x is [batch, tokens, channels]; `terms` branches in a trunk; forms and dtypes measured at this size."""

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


BOTH, FP32 = (torch.bfloat16, torch.float32), (torch.float32,)
SIZES = (
    Size("DiT-256-B2", 2, 256, dtypes=BOTH),
    Size("DiT-512-B2", 2, 1024, dtypes=BOTH),  # the same bytes as DiT-256 B8
    Size("DiT-256-B64", 64, 256, dtypes=BOTH),
    Size("PixArt-1024-B2", 2, 4096),
    Size("FLUX-B1", 1, 4608, 3072, 76),
    Size("Wan-480p-B1", 1, 32760, 5120, 80, forms=SINGLE_UPDATES),
)
TOKEN_SIZES = tuple(  # squares of an even side, as the spatial bonus needs them
    Size(f"N{tokens}-B{batch}", batch, tokens, dtypes=FP32, forms=PARTIAL_BLOCKS)
    for batch, tokens in ((2, 256), (2, 1024), (2, 4096), (1, 24336))
)
# for tests and --quick: correct, and too small to mean anything
TINY = Size("Tiny-B2", 2, 24, 64, 5, BOTH)
TINY_TOKENS = Size("Tiny-B2", 2, 16, 32, dtypes=FP32, forms=PARTIAL_BLOCKS)
SHARES = (0.01, 0.07, 0.25, 0.6)


@dataclass(frozen=True)
class Case:
    """One form at one size in one dtype. share: of tokens that are refreshed."""

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
        """`trunk-DiT-256-B2-bf16`, `block-N256-B2-7pc-fp32`."""
        share = f"{100 * self.share:.0f}pc-" if self.form in PARTIAL_BLOCKS else ""
        return f"{self.label}-{self.size.name}-{share}{DTYPE_NAMES[self.dtype]}"

    @property
    def rows(self) -> int:
        """K, tokens per sample that a refresh recomputes."""
        return max(1, int(self.share * self.size.tokens)) if self.form in REFRESHING else 0

    @property
    def terms(self) -> int:
        """Features that are added."""
        if self.form is Form.TRUNK:
            return self.size.terms
        return 2 if self.form in PARTIAL_BLOCKS else self.form.order + 1

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
        return self.tensor_bytes * (1 + self.terms + 2 * (self.form in WRITING))

    @property
    def working_bytes(self) -> int:
        """Bytes that the eager definition and the check in float64 may hold at once."""
        return 4 * 16 * self.size.elements + 3 * self.weight_bytes

    @property
    def min_bytes(self) -> int:
        """Least bytes that any implementation reads and writes: each operand once, and a block's weights."""
        J, size = self.terms, self.size
        maps = 2 * size.batch * size.tokens  # two slot maps
        # of [B, N, D], [B, K, D], [B, D] and 4 bytes: how many; x', h and what is written in place included
        tensors, rows, vectors, words = {
            Form.TRUNK: (J + 2, 0, J, J),  # gate_index
            Form.UPDATE: (3, 0, 1, 0),
            Form.UPDATE_MODULATE: (4, 0, 3, 0),
            Form.MODULATE: (2, 0, 2, 0),
            Form.STORE: (4, 0, 1, 0),
            Form.REFRESH: (3, 2, 3, maps),  # of slot and fresh rows, every row is read from one
            Form.FORECAST_2: (J + 2, 0, 1, J),  # weights
            Form.FORECAST_4: (J + 2, 0, 1, J),
            Form.STREAM: (4, 2, 4, maps),  # the attention's feature and gate too
            Form.BLOCK: (4, 2, 4, maps),
        }[self.form]
        per_row = tensors * size.tokens + rows * self.rows + vectors
        return per_row * size.batch * size.channels * self.dtype.itemsize + 4 * words + self.weight_bytes


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
        """`choice-N256-B2-18pc`."""
        return f"choice-{self.size.name}-{100 * self.share:.0f}pc"

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
        """A score and an age read, an age and a slot written, 4 bytes each, for all tokens and layers."""
        return 16 * self.layers * self.size.batch * self.size.tokens

    operand_bytes = working_bytes = min_bytes


def cases(sizes: Sequence[Size] = SIZES) -> list[Case]:
    """Every case: bf16 at all sizes first, small before large, then fp32."""
    sized = [(dtype, size) for dtype in BOTH for size in sizes if dtype in size.dtypes]
    return [Case(form, size, dtype) for dtype, size in sized for form in size.forms]


def token_cases(sizes: Sequence[Size] = TOKEN_SIZES, shares: Sequence[float] = SHARES) -> list:
    """Choices of tokens, then partial blocks: the stream alone first, small before large."""
    works = [(work, size) for work in PARTIAL_BLOCKS for size in sizes]
    blocks = [Case(*work, dtype, share) for work in works for dtype in work[1].dtypes for share in shares]
    return [*map(ChoiceCase, sizes), *blocks]


FLAGSHIP = Case(Form.TRUNK, SIZES[0], torch.bfloat16)
