"""Calls of the residual operators, and how exact their results must be.

A `Form` says what a call looks like: shapes, dtypes, strides, options, seed; all of it JSON.
`build` makes the tensors, each a view into a larger buffer of sentinels. `verify` runs a form on
a backend and compares everything it returned and wrote with the definition in float64; the
bounds follow from the dtypes and the number of roundings (`unit`, `sum_bound`, `modulated_bound`).
"""

from collections.abc import Callable
from dataclasses import dataclass, field, replace

import pytest
import torch
from support import available_backends
from torch import Tensor

import fastcache
from fastcache.backends import eager
from fastcache.ops import Norm, ResidualUpdate, residual_update, residual_update_scatter_

BACKENDS = available_backends("cpu")
FLOAT8 = "float8_e4m3fn"
GUARD = 64  # sentinel elements before and after the tensor
VECTOR_SHAPES: dict[str, Callable[[int, int, int], tuple[int, ...]]] = {
    "D": lambda B, N, D: (D,),
    "1D": lambda B, N, D: (1, D),
    "BD": lambda B, N, D: (B, D),
    "11D": lambda B, N, D: (1, 1, D),
    "B1D": lambda B, N, D: (B, 1, D),
    "1FD": lambda B, N, D: (1, frames_of(N), D),
    "BFD": lambda B, N, D: (B, frames_of(N), D),
    "1ND": lambda B, N, D: (1, N, D),
    "BND": lambda B, N, D: (B, N, D),
}
LAYOUTS = ("contiguous", "wide", "alternate", "swapped", "expanded", "repeated")
VECTOR_LAYOUTS = ("contiguous", "chunk", "wide")


@dataclass(frozen=True)
class Form:
    """One way to call the operators. A vector is "" (not given) or a key of VECTOR_SHAPES.

    dtypes are attribute names of torch; layout: strides of x, features, slot and reference;
    vector_layout: of gates, shift and scale ("chunk": one of six chunks of an adaLN output).
    slot "" is `residual_update`, a dtype is `residual_update_scatter_` into a slot of that dtype,
    with fresh_rows = K rows and a map, or None: every row.
    """

    batch: int = 2
    tokens: int = 6
    channels: int = 24
    terms: int = 1
    x: str = "float32"
    feature: str = "float32"
    vector: str = "float32"
    gate: str = ""
    packed: bool = False
    weights: bool = False
    scales: bool = False
    norm: int = 0
    shift: str = ""
    scale: str = ""
    affine: bool = False
    rows: int | None = None
    reference: bool = False
    need_x: bool = True
    slot: str = ""
    fresh: str = "float32"
    fresh_rows: int | None = None
    position: int = -1
    layout: str = "contiguous"
    vector_layout: str = "contiguous"
    offset: int = 0
    eps: float = 1e-6
    seed: int = 0

    def of(self, precision: "Precision") -> "Form":
        """The same call in other dtypes; a float8 feature or slot stays float8."""
        feature = self.feature if self.feature == FLOAT8 else precision.feature
        slot = self.slot if self.slot in ("", FLOAT8) else precision.feature
        return replace(
            self, x=precision.x, feature=feature, vector=precision.vector, slot=slot, fresh=precision.feature
        )


@dataclass(frozen=True)
class Precision:
    """dtypes of the stream, of the features and of gates, shifts and scales."""

    x: str
    feature: str
    vector: str


PRECISIONS = {
    "fp32": Precision("float32", "float32", "float32"),
    "fp16": Precision("float16", "float16", "float16"),
    "bf16": Precision("bfloat16", "bfloat16", "bfloat16"),
    "autocast": Precision("float32", "bfloat16", "bfloat16"),
    "fp32-vectors": Precision("bfloat16", "bfloat16", "float32"),
    "narrow-stream": Precision("float16", "float32", "bfloat16"),
}
UPDATES = {
    "copy": Form(terms=0),
    "one-term": Form(),
    "sum": Form(terms=5),
    "gated": Form(gate="BD"),
    "gated-per-frame": Form(gate="BFD"),
    "gated-per-token": Form(gate="BND", terms=2),
    "packed-gates": Form(terms=5, gate="BD", packed=True),
    "packed-per-frame": Form(terms=4, gate="BFD", packed=True),
    "weighted": Form(terms=4, weights=True),
    "weighted-gates": Form(terms=5, gate="B1D", packed=True, weights=True),
    "row-scales": Form(terms=3, scales=True),
    "float8": Form(terms=3, feature=FLOAT8, scales=True, gate="BD"),
    "modulated": Form(gate="BD", norm=Norm.LAYER, shift="BD", scale="BD"),
    "modulate-only": Form(terms=0, norm=Norm.LAYER, shift="BD", scale="BD", need_x=False),
    "norm-only": Form(norm=Norm.LAYER),
    "shift-only": Form(norm=Norm.LAYER, shift="D"),
    "scale-only": Form(norm=Norm.LAYER, scale="BFD"),
    "affine": Form(norm=Norm.LAYER, affine=True, shift="B1D", scale="B1D"),
    "rms": Form(norm=Norm.RMS, affine=True, scale="BD"),
    "identity": Form(norm=Norm.IDENTITY, shift="BD", scale="BD"),
    "identity-bare": Form(norm=Norm.IDENTITY),
    "packed-rows": Form(terms=2, gate="BD", norm=Norm.LAYER, shift="BD", scale="BND", rows=4),
    "packed-rows-only": Form(terms=2, norm=Norm.LAYER, shift="BFD", scale="BD", rows=3, need_x=False),
    "reference": Form(terms=2, gate="D", reference=True),
    "errors-only": Form(terms=2, feature=FLOAT8, scales=True, reference=True, need_x=False),
    "all": Form(
        terms=7,
        gate="BD",
        packed=True,
        weights=True,
        scales=True,
        norm=Norm.LAYER,
        shift="BD",
        scale="BD",
        affine=True,
        rows=5,
        reference=True,
    ),
}
SCATTERS = {
    "store": Form(terms=0, slot="float32"),
    "refresh": Form(terms=0, slot="float32", fresh_rows=3, gate="BD"),
    "refresh-after-terms": Form(terms=3, slot="float32", fresh_rows=4, gate="BD", packed=True),
    "refresh-first": Form(terms=2, slot="float32", fresh_rows=4, position=0, weights=True),
    "refresh-between": Form(terms=2, slot="float32", fresh_rows=2, position=1, scales=True, gate="BND"),
    "nothing-fresh": Form(terms=1, slot="float32", fresh_rows=0),
    "float8-store": Form(terms=0, slot=FLOAT8, gate="BD"),
    "float8-refresh": Form(terms=2, feature=FLOAT8, slot=FLOAT8, fresh_rows=3, scales=True),
    "refresh-modulated": Form(
        terms=1, slot="float32", fresh_rows=3, gate="BD", norm=Norm.LAYER, shift="BD", scale="BD"
    ),
    "refresh-all": Form(
        terms=3,
        slot="float32",
        fresh_rows=4,
        position=2,
        gate="BFD",
        packed=True,
        weights=True,
        norm=Norm.LAYER,
        shift="BD",
        scale="BD",
        affine=True,
        rows=3,
        reference=True,
    ),
    "store-without-x": Form(terms=1, slot="float32", fresh_rows=3, norm=Norm.RMS, rows=4, need_x=False),
    "store-alone": Form(terms=0, slot="float32", fresh_rows=3, need_x=False),
}
FORMS = UPDATES | SCATTERS

each_backend = pytest.mark.parametrize("backend", BACKENDS)
each_precision = pytest.mark.parametrize("precision", PRECISIONS.values(), ids=PRECISIONS)
each_layout = pytest.mark.parametrize("layout", LAYOUTS)
each_update = pytest.mark.parametrize("form", UPDATES.values(), ids=UPDATES)
each_scatter = pytest.mark.parametrize("form", SCATTERS.values(), ids=SCATTERS)
each_form = pytest.mark.parametrize("form", FORMS.values(), ids=FORMS)
each_dtype = pytest.mark.parametrize(
    "dtype", (torch.float32, torch.float16, torch.bfloat16), ids=("fp32", "fp16", "bf16")
)

REFUSED = (ValueError, TypeError, IndexError, RuntimeError)  # what the operators raise for bad arguments


@dataclass
class Call:
    """The arguments of one call, by their names in the schema, and the memory around them."""

    form: Form
    arguments: dict[str, object]
    buffers: dict[str, Tensor] = field(default_factory=dict)

    @property
    def scatter(self) -> bool:
        return bool(self.form.slot)

    def run(self, backend: str) -> ResidualUpdate:
        """Call the public operator on one backend."""
        with fastcache.use_backend(backend):
            return self.call_public()

    def call_public(self) -> ResidualUpdate:
        """Call the public operator, on whichever backend is chosen."""
        arguments = dict(self.arguments)
        arguments["norm"] = Norm(arguments["norm"])
        return (residual_update_scatter_ if self.scatter else residual_update)(**arguments)

    def call_registered(self) -> tuple[Tensor, Tensor, Tensor]:
        """Call the operator as PyTorch knows it."""
        return self.operator(**self.arguments)

    @property
    def operator(self) -> torch._ops.OpOverload:
        return (
            torch.ops.fastcache.residual_update_scatter_
            if self.scatter
            else torch.ops.fastcache.residual_update
        ).default

    def without(self, *names: str) -> "Call":
        """The same call with these optional arguments left out."""
        return self.given(**dict.fromkeys(names))

    def given(self, **arguments: object) -> "Call":
        """The same call with some arguments replaced."""
        assert arguments.keys() <= self.arguments.keys()
        return replace(self, arguments=self.arguments | arguments)

    def tensors(self) -> dict[str, Tensor]:
        """Every tensor argument; the features are features[0], features[1], ..."""
        listed = {f"features[{j}]": feature for j, feature in enumerate(self.arguments["features"])}
        return {name: value for name, value in self.arguments.items() if isinstance(value, Tensor)} | listed

    def snapshot(self) -> dict[str, Tensor]:
        """The bytes of every buffer, the sentinels around the tensors included."""
        return {name: buffer.view(torch.uint8).clone() for name, buffer in self.buffers.items()}

    def terms_exact(self) -> list[Tensor]:
        """scale * feature of every term in float64, the slot in its place."""
        a = self.arguments
        position = -1 if not self.scatter else len(a["features"]) if a["position"] < 0 else a["position"]
        numbers = [j for j in range(len(a["features"]) + self.scatter) if j != position]
        scales = a["scales"]
        terms = [
            feature.double() * (1.0 if scales is None else scales[j][..., None].double())
            for j, feature in zip(numbers, a["features"], strict=False)
        ]
        if self.scatter:
            terms.insert(
                position,
                a["slot"].double()
                * (1.0 if a["slot_scale"] is None else a["slot_scale"][..., None].double()),
            )
        return terms


def frames_of(tokens: int) -> int:
    """A number of frames that divides `tokens`, more than one and less than all where possible."""
    return next((f for f in range(2, tokens) if tokens % f == 0), 1)


def random_values(shape: tuple[int, ...], dtype: str, seed: int) -> Tensor:
    """Normal values, rounded to a dtype."""
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed)).to(getattr(torch, dtype))


def laid_out(values: Tensor, layout: str, offset: int = 0) -> tuple[Tensor, Tensor]:
    """The values in memory of their own, surrounded by sentinels: (view, flat buffer).

    contiguous; wide: rows of a wider buffer; alternate: every other token; swapped: [N, B, D]
    seen as [B, N, D]; expanded: one sample for all; repeated: one token for all; chunk: one of
    six chunks of the last dimension; transposed: unit stride in another dimension.
    """
    shape, D = list(values.shape), values.shape[-1] if values.ndim else 1
    pitch = {"wide": D + 7, "chunk": 6 * D}.get(layout, D)
    sizes = [*shape[:-1], pitch]
    if layout == "alternate":
        sizes[-2] *= 2
    strides = [1] * len(sizes)
    for i in reversed(range(len(sizes) - 1)):
        strides[i] = strides[i + 1] * max(sizes[i + 1], 1)
    start = GUARD + offset + {"wide": 3, "chunk": 2 * D, "alternate": D}.get(layout, 0)
    if layout == "alternate":
        strides[-2] *= 2
    if layout == "swapped" and len(shape) == 3:
        strides[0], strides[1] = D, shape[0] * D
    if layout == "transposed":
        strides[-1], strides[-2] = shape[-2], 1
    if layout == "expanded" and len(shape) == 3:
        strides[0] = 0
    if layout == "repeated" and len(shape) == 3:
        strides[0], strides[1] = D, 0
    reach = (
        sum((size - 1) * stride for size, stride in zip(shape, strides, strict=False)) + 1
        if values.numel()
        else 0
    )
    buffer = torch.full(
        ((start + reach + GUARD) * values.element_size(),),
        0xFF if values.is_floating_point() else 0x7F,
        dtype=torch.uint8,
    ).view(values.dtype)
    view = buffer.as_strided(shape, strides, start)
    if values.numel():
        shared = {"expanded": 0, "repeated": 1}.get(layout)
        target, source = (
            (view, values)
            if shared is None or len(shape) != 3
            else (view.select(shared, 0), values.select(shared, 0))
        )
        as_bytes = values.dtype == getattr(torch, FLOAT8)
        (target.view(torch.uint8) if as_bytes else target).copy_(
            source.view(torch.uint8) if as_bytes else source
        )
    return view, buffer


def build(form: Form) -> Call:
    """The tensors of a form; the same form gives the same values in the same memory layout."""
    B, N, D, J = form.batch, form.tokens, form.channels, form.terms + bool(form.slot)
    buffers: dict[str, Tensor] = {}
    random = torch.Generator().manual_seed(form.seed)
    seeds = iter(torch.randint(1 << 30, (4096,), generator=random).tolist())

    def tensor(name: str, values: Tensor, layout: str = form.layout) -> Tensor:
        view, buffers[name] = laid_out(values, layout, form.offset)
        return view

    def rows(name: str, dtype: str, layout: str = form.layout) -> Tensor:
        return tensor(name, random_values((B, N, D), dtype, next(seeds)), layout)

    def vector(name: str, shape: str, lead: tuple[int, ...] = ()) -> Tensor | None:
        seed = next(seeds)
        return (
            tensor(
                name,
                random_values((*lead, *VECTOR_SHAPES[shape](B, N, D)), form.vector, seed),
                form.vector_layout,
            )
            if shape
            else None
        )

    def row_factors(name: str, shape: tuple[int, ...]) -> Tensor:
        return tensor(
            name,
            random_values(shape, "float32", next(seeds)).abs() + 0.5,
            "contiguous" if form.layout == "contiguous" else "wide",
        )

    packed = form.packed and bool(form.gate)
    index = torch.randint(-1, 3, (J,), generator=random, dtype=torch.int32)
    index[: J // 2 : 2] = -1
    arguments: dict[str, object] = {
        "x": rows("x", form.x),
        "features": [rows(f"features[{j}]", form.feature) for j in range(form.terms)],
    }
    # an owned slot has rows of its own, whatever the layout of what is only read
    own = form.layout if form.layout in ("contiguous", "wide", "alternate", "swapped") else "wide"
    if form.slot:
        arguments["slot"] = rows("slot", form.slot, own)
        fresh = random_values(
            (B, N if form.fresh_rows is None else form.fresh_rows, D), form.fresh, next(seeds)
        )
        arguments["fresh"] = tensor("fresh", fresh)
        fresh_map = (
            torch.randint(-1, form.fresh_rows, (B, N), generator=random, dtype=torch.int32)
            if form.fresh_rows is not None
            else None
        )
        arguments["fresh_slots"] = None if fresh_map is None else tensor("fresh_slots", fresh_map, own)
        arguments["position"] = form.position
        arguments["slot_scale"] = row_factors("slot_scale", (B, N)) if form.slot == FLOAT8 else None
    arguments |= {
        "gates": vector("gates", form.gate, (3,) if packed else ()),
        "gate_index": tensor("gate_index", index, "contiguous") if packed else None,
        "weights": (
            tensor("weights", random_values((J,), "float32", next(seeds)), "contiguous")
            if form.weights
            else None
        ),
        "scales": row_factors("scales", (J, B, N)) if form.scales else None,
        "norm": int(form.norm),
        "shift": vector("shift", form.shift),
        "scale": vector("scale", form.scale),
        "norm_weight": vector("norm_weight", "D" if form.affine else ""),
        "norm_bias": vector("norm_bias", "D" if form.affine else ""),
        "eps": form.eps,
        "row_slots": (
            tensor("row_slots", random_row_slots(form, random), own) if form.rows is not None else None
        ),
        "row_count": form.rows or 0,
        "reference": (
            rows("reference", form.feature if form.feature != FLOAT8 else form.x) if form.reference else None
        ),
        "need_x": form.need_x,
    }
    return Call(form, arguments, buffers)


def random_row_slots(form: Form, random: torch.Generator) -> Tensor:
    """A slot map [B, N] without duplicates; every other sample leaves one packed row empty."""
    slots = torch.full((form.batch, form.tokens), -1, dtype=torch.int32)
    for b in range(form.batch):
        mapped = max(0, min(form.rows, form.tokens) - b % 2)
        tokens = torch.randperm(form.tokens, generator=random)[:mapped]
        slots[b, tokens] = torch.randperm(form.rows, generator=random)[:mapped].int()
    return slots


def unit(dtype: torch.dtype) -> float:
    """Largest relative error of one rounding to a dtype."""
    return torch.finfo(dtype).eps / 2


def step_near_zero(dtype: torch.dtype) -> float:
    """Distance of neighbouring subnormal numbers, the least that one rounding can cost."""
    return torch.finfo(dtype).tiny * torch.finfo(dtype).eps


def sum_bound(exact: Tensor, magnitude: Tensor, terms: int, dtype: torch.dtype) -> Tensor:
    """|x' - exact| of an fp32 sum that is rounded once.

    Every term takes at most four roundings of its own and every partial sum one, each at most
    2^-24 of the sum of magnitudes; then comes the rounding to the dtype of x.
    """
    return 1.01 * (
        (terms + 4) * unit(torch.float32) * magnitude + unit(dtype) * exact.abs()
    ) + step_near_zero(dtype)


def modulated_bound(x: Tensor, h: Tensor, call: Call) -> Tensor:
    """|h - exact| per element [B, N, D], for x the rounded stream in float64.

    The roundings of a sum of D numbers add like a random walk: 8 + sqrt(D) units of 2^-24. They
    act on the parts of h, and through the mean on |x| / deviation, which a large offset makes large.
    """
    a, D = call.arguments, x.shape[-1]
    weight = 1.0 if a["norm_weight"] is None else a["norm_weight"].double().abs()
    bias = 0.0 if a["norm_bias"] is None else a["norm_bias"].double().abs()
    scale = 0.0 if a["scale"] is None else eager.tokenwise(a["scale"], x).abs()
    shift = 0.0 if a["shift"] is None else eager.tokenwise(a["shift"], x).abs()
    centred = x - x.mean(-1, keepdim=True) if a["norm"] == Norm.LAYER else x
    inverse = (
        torch.rsqrt(centred.square().mean(-1, keepdim=True) + a["eps"])
        if a["norm"] in (Norm.LAYER, Norm.RMS)
        else 1.0
    )
    offset = (x.abs() + x.abs().mean(-1, keepdim=True)) * inverse if a["norm"] == Norm.LAYER else 0.0
    parts = ((centred * inverse).abs() * weight + bias) * (1 + scale) + shift + offset * weight * (1 + scale)
    return (
        (8 + D**0.5) * unit(torch.float32) * parts
        + 1.01 * unit(h.dtype) * h.double().abs()
        + step_near_zero(h.dtype)
    )


def exact_update(call: Call) -> tuple[Tensor, Tensor]:
    """(x', sum of the magnitudes of its terms) in float64, by the definition."""
    a, terms = call.arguments, call.terms_exact()
    absolute = [None if a[name] is None else a[name].abs() for name in ("gates", "weights")]
    exact = eager.residual_update(a["x"].double(), terms, a["gates"], a["gate_index"], a["weights"])[0]
    magnitude = eager.residual_update(
        a["x"].double().abs(), [term.abs() for term in terms], absolute[0], a["gate_index"], absolute[1]
    )[0]
    return exact, magnitude


def exact_modulated(call: Call, x: Tensor) -> Tensor:
    """h of the stream x in float64, by the definition."""
    a = call.arguments
    return eager.modulated_rows(
        x.double(),
        a["norm"],
        a["shift"],
        a["scale"],
        a["norm_weight"],
        a["norm_bias"],
        a["eps"],
        a["row_slots"],
        a["row_count"],
    )


def exact_errors(call: Call) -> Tensor:
    """Error sums of the newest feature in float64."""
    a, terms = call.arguments, call.terms_exact()
    newest = terms[a["position"] if call.scatter else -1]
    return eager.error_sums(newest, a["reference"].double()).double()


def assert_within(found: Tensor, exact: Tensor, bound: Tensor, what: str) -> None:
    """Assert |found - exact| <= bound element by element, and say where it is not."""
    assert found.shape == exact.shape, f"{what}: shape {list(found.shape)}, expected {list(exact.shape)}"
    excess = (found.double() - exact).abs() - bound
    wrong = ~(excess <= 0)
    if bool(wrong.any()):
        place = tuple(wrong.nonzero()[0].tolist())
        raise AssertionError(
            f"{what}: {int(wrong.sum())} of {found.numel()} elements off, first at {place}:"
            f" {found[place].item()}, expected {exact[place].item()} +-"
            f" {bound.expand_as(exact)[place].item():.3g}"
        )


def assert_outputs(call: Call, result: ResidualUpdate, updated: Tensor) -> None:
    """Assert that a result lies within the bounds; `updated` is x' of the same call in the same backend."""
    a, dtype = call.arguments, call.arguments["x"].dtype
    exact, magnitude = exact_update(call)
    assert (result.x is not None, result.h is not None, result.errors is not None) == (
        a["need_x"],
        a["norm"] != 0,
        a["reference"] is not None,
    )
    if result.x is not None:
        assert result.x.dtype == dtype
        assert_within(result.x, exact, sum_bound(exact, magnitude, len(call.terms_exact()), dtype), "x")
    if result.h is not None:
        assert result.h.dtype == dtype
        h = exact_modulated(call, updated)
        bound = modulated_bound(
            updated.double(), exact_modulated(call.without("row_slots"), updated).to(dtype), call
        )
        if a["row_slots"] is not None:
            index = eager.packed_index(a["row_slots"], a["row_count"])
            bound = eager.take_rows(bound, index) * (index >= 0)[..., None]
        assert_within(result.h, h, bound, "h")
    if result.errors is not None:
        assert result.errors.dtype == torch.float32
        errors = exact_errors(call)
        assert_within(
            result.errors, errors, 8 * unit(torch.float32) * errors.sum(1, keepdim=True) + 1e-30, "errors"
        )


def verify(form: Form, backend: str, prepare: Callable[[Call], None] = lambda call: None) -> ResidualUpdate:
    """Run a form on a backend; assert its outputs, what it stored, and that it wrote nowhere else.

    prepare: edits the values of a freshly built call in place.
    """

    def ready(form: Form) -> Call:
        call = build(form)
        prepare(call)
        return call

    call = ready(form)
    before = call.snapshot()
    result = call.run(backend)
    if call.scatter:
        # the definition writes into equal memory: every byte must agree, the sentinels included
        twin = ready(form)
        eager.store_rows_(
            twin.arguments["slot"],
            twin.arguments["fresh"],
            twin.arguments["fresh_slots"],
            twin.arguments["slot_scale"],
        )
        before |= {name: bytes_ for name, bytes_ in twin.snapshot().items() if name in ("slot", "slot_scale")}
    for name, bytes_ in call.snapshot().items():
        assert torch.equal(bytes_, before[name]), (
            f"{name}: bytes differ from what they should be after the call"
        )
    updated = result.x if result.x is not None else ready(replace(form, need_x=True)).run(backend).x
    assert_outputs(call, result, updated)
    return result


def assert_same_bits(found: object, expected: object) -> None:
    """Assert that tensors, or results of the operators, are equal in every bit."""
    if isinstance(expected, Tensor):
        assert found.dtype == expected.dtype and found.shape == expected.shape
        assert torch.equal(found.reshape(-1).view(torch.uint8), expected.reshape(-1).view(torch.uint8)), (
            f"differ by up to {(found.double() - expected.double()).abs().max()}"
        )
        return
    assert (found is None) == (expected is None)
    if expected is not None:
        for one, other in zip(found, expected, strict=True):
            assert_same_bits(one, other)
