"""What is measured: op forms at the sizes of real models, and the bytes that each must move at least.

Nothing here knows a device or a clock.
"""

import enum
import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch

REFRESH_RATIO = 0.3  # share of the tokens that a refresh recomputes
DTYPE_NAMES = {torch.bfloat16: "bf16", torch.float16: "fp16", torch.float32: "fp32"}


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

    @property
    def meaning(self) -> str:
        """What is computed, in one line."""
        return MEANINGS[self]

    @property
    def order(self) -> int:
        """Order of a forecast; its terms are order + 1."""
        return {Form.FORECAST_2: 2, Form.FORECAST_4: 4}[self]

    @property
    def rms(self) -> bool:
        """True for the forms that only kernels of other projects on a GPU are compared in."""
        return self in (Form.UPDATE_MODULATE_RMS, Form.MODULATE_RMS)

    @property
    def forecasts(self) -> bool:
        """True for the weighted sums."""
        return self in (Form.FORECAST_2, Form.FORECAST_4)

    @property
    def writes_slot(self) -> bool:
        """True if a stored feature is written in place."""
        return self in (Form.STORE, Form.REFRESH)


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
}
SINGLE_UPDATES = (Form.UPDATE, Form.UPDATE_MODULATE, Form.MODULATE)


@dataclass(frozen=True)
class Size:
    """x is [batch, tokens, channels]; `terms` cached branches in a trunk; forms and dtypes that are measured at this size."""

    name: str
    batch: int
    tokens: int
    channels: int
    terms: int
    dtypes: tuple[torch.dtype, ...] = (torch.bfloat16,)
    forms: tuple[Form, ...] = tuple(form for form in Form if not form.rms)

    @property
    def elements(self) -> int:
        """Elements of x."""
        return self.batch * self.tokens * self.channels

    @property
    def rows(self) -> int:
        """K, tokens per sample that a refresh recomputes."""
        return math.floor(REFRESH_RATIO * self.tokens)

    @property
    def slug(self) -> str:
        """The name for test ids: `dit-256-b2`."""
        return self.name.lower().replace(" ", "-")


BOTH = (torch.bfloat16, torch.float32)
SIZES = (
    Size("DiT-256 B2", 2, 256, 1152, 56, BOTH),
    Size("DiT-512 B2", 2, 1024, 1152, 56, BOTH),  # the same bytes as DiT-256 B8
    Size("DiT-256 B64", 64, 256, 1152, 56, BOTH),
    Size("PixArt-1024 B2", 2, 4096, 1152, 56),
    Size("FLUX B1", 1, 4608, 3072, 76),
    Size("Wan-480p B1", 1, 32760, 5120, 80, forms=SINGLE_UPDATES),
)
TINY = Size("Tiny B2", 2, 24, 64, 5, BOTH)  # for tests and --quick: correct, and too small to mean anything


@dataclass(frozen=True)
class Traffic:
    """What a form moves at least: whole tensors [B, N, D], rows [B, K, D], vectors [B, D], and 4-byte words."""

    tensors: int
    rows: int = 0
    vectors: int = 0
    words: int = 0


@dataclass(frozen=True)
class Case:
    """One form at one size in one dtype (of x, features and vectors alike)."""

    form: Form
    size: Size
    dtype: torch.dtype

    @property
    def name(self) -> str:
        """`trunk-dit-256-b2-bf16`."""
        return f"{self.form.value}-{self.size.slug}-{self.dtype_name}"

    @property
    def dtype_name(self) -> str:
        """`bf16` or `fp32`."""
        return DTYPE_NAMES[self.dtype]

    @property
    def terms(self) -> int:
        """Features that are added."""
        if self.form is Form.TRUNK:
            return self.size.terms
        return self.form.order + 1 if self.form.forecasts else 1

    @property
    def tensor_bytes(self) -> int:
        """Bytes of one tensor [B, N, D]."""
        return self.size.elements * self.dtype.itemsize

    @property
    def min_bytes(self) -> int:
        """Least bytes that any implementation reads and writes, each operand once.

        U = B N D e bytes of one tensor, V = B D e of one vector, r = K / N, J terms, m the order:

            trunk            (J + 2) U + J V + 4 J         x, J features, x'; J gates; gate_index
            update           3 U + V                       x, F, x'; gate
            update-modulate  4 U + 3 V                     x, F, x', h; gate, shift, scale
            modulate         2 U + 2 V                     x, h; shift, scale
            store            4 U + V                       x, F, slot, x'; gate
            refresh          (3 + 2 r) U + 3 V + 8 B N     x, slot or fresh, x'; slot rows and h rows written; two slot maps
            forecast-m       (m + 3) U + V + 4 (m + 1)     x, m + 1 features, x'; gate; weights
            errors           2 U + 12 B                    F, R; three fp32 sums per sample
            ...-rms          as with LayerNorm
        """
        found, size = traffic(self), self.size
        elements = (
            found.tensors * size.elements
            + found.rows * size.batch * size.rows * size.channels
            + found.vectors * size.batch * size.channels
        )
        return elements * self.dtype.itemsize + 4 * found.words


def traffic(case: Case) -> Traffic:
    """The table of `Case.min_bytes`."""
    J, size = case.terms, case.size
    return {
        Form.TRUNK: Traffic(J + 2, vectors=J, words=J),
        Form.UPDATE: Traffic(3, vectors=1),
        Form.UPDATE_MODULATE: Traffic(4, vectors=3),
        Form.MODULATE: Traffic(2, vectors=2),
        Form.STORE: Traffic(4, vectors=1),
        Form.REFRESH: Traffic(3, rows=2, vectors=3, words=2 * size.batch * size.tokens),
        Form.FORECAST_2: Traffic(J + 2, vectors=1, words=J),
        Form.FORECAST_4: Traffic(J + 2, vectors=1, words=J),
        Form.ERRORS: Traffic(2, words=3 * size.batch),
        Form.UPDATE_MODULATE_RMS: Traffic(4, vectors=3),
        Form.MODULATE_RMS: Traffic(2, vectors=2),
    }[case.form]


def cases(sizes: Sequence[Size] = SIZES) -> list[Case]:
    """Every case: bf16 at all sizes first, small before large, then fp32."""
    dtypes = [dtype for dtype in BOTH if any(dtype in size.dtypes for size in sizes)]
    return [
        Case(form, size, dtype)
        for dtype in dtypes
        for size in sizes
        if dtype in size.dtypes
        for form in size.forms
    ]


FLAGSHIP = Case(Form.TRUNK, SIZES[0], torch.bfloat16)
