"""The operators as PyTorch knows them: schemas, fake kernels, compile, export, loading."""

import re
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from cases import (
    FLOAT8,
    FORMS,
    PRECISIONS,
    Call,
    Form,
    Precision,
    assert_same_bits,
    build,
    each_form,
    each_layout,
)
from processes import copied_package, fails, succeeds
from tiers import thinned
from torch import Tensor
from torch._dynamo.testing import CompileCounter
from torch._inductor.utils import run_and_get_code
from torch._subclasses import FakeTensorMode
from torch.library import opcheck

from fastcache.backends import library
from fastcache.ops import Norm, residual_update, residual_update_scatter_

BUILT = pytest.mark.skipif(
    not (library.PACKAGE / "lib" / "libfastcache_cpu.so").exists(),
    reason="no compiled library: fastcache/lib/libfastcache_cpu.so is not built",
)
CHECKED = {
    name: FORMS[name]
    for name in (
        "copy",
        "gated-per-frame",
        "weighted-gates",
        "packed-rows-only",
        "errors-only",
        "all",
        "store",
        "refresh-between",
        "refresh-all",
        "store-alone",
    )
}
FLOAT8_FORMS = {name: form for name, form in FORMS.items() if FLOAT8 in (form.feature, form.slot)}


@pytest.fixture(autouse=True)
def _fresh_compiler() -> Iterator[None]:
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


# --- schemas and fake kernels -----------------------------------------------------------------


@pytest.mark.parametrize("layout", thinned(["contiguous", "wide", "swapped"], ["swapped"]))
@pytest.mark.parametrize(
    "precision",
    [PRECISIONS["fp32"], PRECISIONS["bf16"], PRECISIONS["autocast"]],
    ids=["fp32", "bf16", "autocast"],
)
@pytest.mark.parametrize(
    "form",
    [form for name, form in CHECKED.items() if name not in FLOAT8_FORMS],
    ids=[name for name in CHECKED if name not in FLOAT8_FORMS],
)
def test_opcheck_passes(form: Form, precision: Precision, layout: str) -> None:
    call = build(replace(form, layout=layout, vector_layout="chunk").of(precision))
    opcheck(call.operator, (), call.arguments)


@pytest.mark.parametrize("layout", ["contiguous", "wide"])
@pytest.mark.parametrize("form", FLOAT8_FORMS.values(), ids=FLOAT8_FORMS)
def test_opcheck_passes_as_far_as_it_can_compare_float8(form: Form, layout: str) -> None:
    call = build(replace(form, layout=layout))
    opcheck(call.operator, (), call.arguments, test_utils=("test_faketensor", "test_autograd_registration"))


@each_layout
@each_form
def test_fake_outputs_have_the_sizes_strides_and_dtypes_of_real_ones(form: Form, layout: str) -> None:
    call = build(replace(form, layout=layout))
    with FakeTensorMode() as mode:
        fake = Call(
            form,
            {
                name: mode.from_tensor(value) if isinstance(value, Tensor) else value
                for name, value in call.arguments.items()
            },
        )
        fake.arguments["features"] = [mode.from_tensor(feature) for feature in call.arguments["features"]]
        imagined = fake.call_registered()
    for one, other in zip(imagined, call.call_registered(), strict=True):
        assert (one.shape, one.stride(), one.dtype) == (other.shape, other.stride(), other.dtype)


@each_form
def test_meta_tensors_give_meta_outputs(form: Form) -> None:
    call = build(form)
    real = call.call_registered()
    meta = call.given(
        **{name: value.to("meta") for name, value in call.arguments.items() if isinstance(value, Tensor)},
        features=[feature.to("meta") for feature in call.arguments["features"]],
    )
    for one, other in zip(meta.call_registered(), real, strict=True):
        assert one.is_meta and one.shape == other.shape


@pytest.mark.parametrize("name", library.OPERATORS)
def test_only_slots_and_ages_are_declared_as_written(name: str) -> None:
    schema = getattr(torch.ops.fastcache, name).default._schema
    written = [
        argument.name
        for argument in schema.arguments
        if argument.alias_info is not None and argument.alias_info.is_write
    ]
    assert written == {"residual_update_scatter_": ["slot", "slot_scale"], "select_tokens_": ["age"]}.get(
        name, []
    )
    assert all(result.alias_info is None for result in schema.returns)


def test_the_schema_file_and_the_registered_schemas_agree() -> None:
    registered = [str(getattr(torch.ops.fastcache, name).default._schema) for name in library.OPERATORS]
    assert registered == [f"fastcache::{torch._C.parse_schema(text)}" for text in library.schemas()]


# --- torch.compile ----------------------------------------------------------------------------


@each_form
def test_compiled_calls_give_the_same_bits(form: Form) -> None:
    eager, compiled = build(form), build(form)
    function = torch.compile(lambda call: call.call_public(), fullgraph=True, backend="aot_eager")
    assert_same_bits(function(compiled), eager.call_public())
    if form.slot:
        assert_same_bits(compiled.arguments["slot"], eager.arguments["slot"])
        assert_same_bits(compiled.arguments["slot_scale"], eager.arguments["slot_scale"])


def block(
    x: Tensor,
    feature: Tensor,
    slot: Tensor,
    fresh: Tensor,
    fresh_slots: Tensor,
    modulation: Tensor,
    norm: Norm = Norm.LAYER,
) -> tuple[Tensor, Tensor]:
    """Two launches of a block with pointwise work around them."""
    shift, scale, gate = modulation.chunk(3, 1)
    first = residual_update(x * 2, [feature, x], gate, norm=norm, shift=shift, scale=scale)
    second = residual_update_scatter_(
        first.x, slot, fresh + 1, fresh_slots, [first.h.sin()], gates=gate, norm=norm, need_x=True
    )
    return second.x, second.h


def block_arguments(batch: int = 2, tokens: int = 6, rows: int = 3) -> tuple[Tensor, ...]:
    random = torch.Generator().manual_seed(batch * 1000 + tokens)
    x, feature, slot = (torch.randn(batch, tokens, 24, generator=random) for _ in range(3))
    fresh = torch.randn(batch, rows, 24, generator=random)
    return (
        x,
        feature,
        slot,
        fresh,
        torch.randint(-1, rows, (batch, tokens), generator=random, dtype=torch.int32),
        torch.randn(batch, 72, generator=random),
    )


@pytest.mark.parametrize("layout", ["contiguous", "swapped"])
@pytest.mark.slow
def test_an_inductor_graph_around_the_operators_gives_the_same_values(layout: str) -> None:
    def arguments() -> tuple[Tensor, ...]:
        x, *rest = block_arguments()
        return (x if layout == "contiguous" else x.transpose(0, 1).contiguous().transpose(0, 1), *rest)

    plain, compiled = arguments(), arguments()
    expected = block(*plain)
    found = torch.compile(block, fullgraph=True)(*compiled)
    torch.testing.assert_close(found, expected)
    torch.testing.assert_close(compiled[2], plain[2])


def test_five_batch_sizes_and_token_counts_compile_once() -> None:
    counter = CompileCounter()
    function = torch.compile(block, fullgraph=True, dynamic=True, backend=counter)
    for batch, tokens, rows in ((2, 6, 3), (3, 6, 3), (2, 16, 5), (5, 9, 2), (4, 64, 40)):
        plain, compiled = block_arguments(batch, tokens, rows), block_arguments(batch, tokens, rows)
        assert_same_bits(function(*compiled), block(*plain))
        assert_same_bits(compiled[2], plain[2])
    assert counter.frame_count == 1


@pytest.mark.slow
def test_dynamic_shapes_compile_once_in_inductor_too() -> None:
    function = torch.compile(block, fullgraph=True, dynamic=True)
    torch._dynamo.utils.counters.clear()
    for batch, tokens, rows in ((2, 6, 3), (3, 16, 5), (5, 9, 2)):
        plain, compiled = block_arguments(batch, tokens, rows), block_arguments(batch, tokens, rows)
        torch.testing.assert_close(function(*compiled), block(*plain))
        torch.testing.assert_close(compiled[2], plain[2])
    assert torch._dynamo.utils.counters["stats"]["unique_graphs"] == 1


def test_the_number_of_packed_rows_is_dynamic() -> None:
    counter = CompileCounter()

    def packed(x: Tensor, slots: Tensor, count: int) -> Tensor:
        return residual_update(x, [], norm=Norm.LAYER, row_slots=slots, row_count=count, need_x=False).h

    function = torch.compile(packed, fullgraph=True, dynamic=True, backend=counter)
    x = torch.randn(2, 16, 24)
    for count in (3, 4, 7, 9, 16):
        slots = torch.where(torch.arange(16) < count, torch.arange(16), -1).int().expand(2, 16)
        assert_same_bits(function(x, slots, count), packed(x, slots, count))
    assert counter.frame_count == 1


def body_of(code: str) -> str:
    """The part of Inductor's output that runs at every call."""
    return code[code.index("def call(self, args):") : code.index("runner = Runner(")]


def slots_passed(code: str) -> list[str]:
    """What Inductor passes as the slot, call by call."""
    return re.findall(r"fastcache\.residual_update_scatter_\.default\(\w+, (.+?), ", code)


@pytest.mark.parametrize("dynamic", [False, True])
def test_inductor_passes_the_slot_itself_and_copies_nothing(dynamic: bool) -> None:
    def thrice(x: Tensor, slot: Tensor, fresh: Tensor, fresh_slots: Tensor) -> Tensor:
        for _ in range(3):
            x = residual_update_scatter_(x, slot, fresh, fresh_slots).x
        return x

    x, _, slot, fresh, fresh_slots, _ = block_arguments()
    place = slot.data_ptr()
    _, codes = run_and_get_code(
        torch.compile(thrice, fullgraph=True, dynamic=dynamic), x, slot, fresh, fresh_slots
    )
    body = body_of(codes[-1])
    passed = slots_passed(body)
    assert len(passed) == 3 and len(set(passed)) == 1 and re.fullmatch(r"arg\d+_1", passed[0])
    assert not re.search(r"clone|copy_|empty_strided", body)
    assert slot.data_ptr() == place


def test_inductor_writes_a_module_buffer_and_a_float8_slot_in_place() -> None:
    class Store(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.register_buffer("slot", torch.zeros(2, 6, 24, dtype=torch.float8_e4m3fn))
            self.register_buffer("slot_scale", torch.ones(2, 6))

        def forward(self, x: Tensor, fresh: Tensor) -> Tensor:
            return residual_update_scatter_(x, self.slot, fresh, slot_scale=self.slot_scale).x

    store, plain = Store(), Store()
    x, fresh, *_ = block_arguments()
    found, codes = run_and_get_code(torch.compile(store, fullgraph=True), x, fresh)
    assert_same_bits(found, plain(x, fresh))
    assert_same_bits(store.slot, plain.slot)
    assert_same_bits(store.slot_scale, plain.slot_scale)
    assert not re.search(r"clone|copy_|empty_strided", body_of(codes[-1]))


def test_a_wrong_shape_is_named_while_tracing() -> None:
    function = torch.compile(
        lambda x, feature: residual_update(x, [feature]).x, fullgraph=True, backend="aot_eager"
    )
    with pytest.raises(Exception, match=r"features\[0\]: expected \[2, 6, 24\], got \[2, 5, 24\]"):
        function(torch.ones(2, 6, 24), torch.ones(2, 5, 24))


def test_an_input_that_requires_grad_is_refused_in_a_compiled_function() -> None:
    function = torch.compile(lambda x: residual_update(x, [x]).x, fullgraph=True, backend="aot_eager")
    x = torch.ones(2, 6, 24, requires_grad=True)
    with pytest.raises(Exception, match="forward-only: an input requires grad"):
        function(x)
    with torch.no_grad():
        assert_same_bits(function(x), x.detach() * 2)


def test_a_compiled_call_sees_new_contents_of_its_weights() -> None:
    function = torch.compile(lambda x, weights: residual_update(x, [x, x], weights=weights).x, fullgraph=True)
    x, weights = torch.ones(2, 6, 24), torch.tensor([1.0, 2.0])
    assert function(x, weights)[0, 0, 0] == 4
    x.fill_(2.0)
    weights.fill_(0.25)
    assert function(x, weights)[0, 0, 0] == 3


# --- torch.export -----------------------------------------------------------------------------


class Exported(torch.nn.Module):
    def forward(
        self, x: Tensor, feature: Tensor, slot: Tensor, fresh: Tensor, fresh_slots: Tensor, modulation: Tensor
    ) -> tuple[Tensor, Tensor]:
        return block(x, feature, slot, fresh, fresh_slots, modulation)


def test_an_exported_program_runs_other_sizes_and_writes_its_slot() -> None:
    B, N, K = (
        torch.export.Dim("B", min=2, max=64),
        torch.export.Dim("N", min=2, max=4096),
        torch.export.Dim("K", min=2, max=4096),
    )
    shapes = ({0: B, 1: N}, {0: B, 1: N}, {0: B, 1: N}, {0: B, 1: K}, {0: B, 1: N}, {0: B})
    program = torch.export.export(Exported(), block_arguments(3, 8, 4), dynamic_shapes=shapes)
    assert "residual_update_scatter_" in str(program.graph)
    plain, exported = block_arguments(4, 10, 5), block_arguments(4, 10, 5)
    assert_same_bits(program.module()(*exported), block(*plain))
    assert_same_bits(exported[2], plain[2])


# --- loading ----------------------------------------------------------------------------------

ONE_CALL = (
    "import torch, fastcache; x = torch.ones(1, 2, 4); assert fastcache.ops.residual_update(x,"
    " [x]).x.eq(2).all(); "
)


@pytest.mark.slow
def test_a_second_copy_of_the_package_and_reloads_do_not_crash(tmp_path: Path) -> None:
    other = copied_package(tmp_path)
    succeeds(f"""
import importlib, sys
{ONE_CALL}
for name in [name for name in sys.modules if name.split(".")[0] == "fastcache"]:
    del sys.modules[name]
sys.path.insert(0, {str(other)!r})
first = fastcache.__file__
{ONE_CALL}
assert fastcache.__file__ != first
from fastcache.backends import library, native
library.register()
for module in (library, native, fastcache.backends, fastcache.ops, fastcache):
    importlib.reload(module)
{ONE_CALL}
assert torch.ops.fastcache.residual_update(x, [x])[0].eq(2).all()
""")


@BUILT
@pytest.mark.slow
def test_loading_the_same_library_again_does_not_crash() -> None:
    succeeds(f"""
{ONE_CALL}
from fastcache.backends import library
path = library.PACKAGE / "lib" / "libfastcache_cpu.so"
for _ in range(3):
    torch.ops.load_library(str(path))
    assert library.load("cpu").loaded
{ONE_CALL}
assert torch.ops.fastcache.residual_update(x, [x])[0].eq(2).all()
""")


@BUILT
@pytest.mark.slow
def test_a_library_of_another_schema_is_refused_with_the_way_out(tmp_path: Path) -> None:
    folder = copied_package(tmp_path)
    schema = folder / "fastcache" / "backends" / "schema.def"
    schema.write_text(schema.read_text() + "// edited\n")
    error = fails("import fastcache", folder)
    assert (
        "ImportError" in error
        and "was built from another operator schema" in error
        and "pip install --no-build-isolation" in error
    )


@BUILT
@pytest.mark.slow
def test_a_library_of_another_schema_is_refused_by_every_later_import_too(tmp_path: Path) -> None:
    folder = copied_package(tmp_path)
    schema = folder / "fastcache" / "backends" / "schema.def"
    schema.write_text(schema.read_text() + "// edited\n")
    error = fails(
        """
try:
    import fastcache
except ImportError:
    import fastcache
""",
        folder,
    )
    assert error.count("was built from another operator schema") == 2


@pytest.mark.parametrize(
    "content", thinned([b"", b"not a library"], [b"not a library"]), ids=["empty", "text"]
)
@pytest.mark.slow
def test_a_broken_library_is_refused_with_its_reason(content: bytes, tmp_path: Path) -> None:
    folder = copied_package(tmp_path, compiled=False)
    broken = folder / "fastcache" / "lib" / "libfastcache_cpu.so"
    broken.parent.mkdir(exist_ok=True)
    broken.write_bytes(content)
    error = fails("import fastcache", folder)
    assert "ImportError" in error and re.search(
        r"libfastcache_cpu.so is there but cannot be loaded: .*(file too short|invalid ELF header)", error
    )
    succeeds(ONE_CALL, folder, FASTCACHE_NO_COMPILED="1")


@pytest.mark.slow
def test_without_a_library_the_package_runs_in_eager_and_says_why(tmp_path: Path) -> None:
    folder = copied_package(tmp_path, compiled=False)
    succeeds(
        ONE_CALL
        + """
status = fastcache.backends_status()["cpp"]
assert not status.available and "absent" in status.reason and "pip install" in status.reason, status
assert fastcache.backends.chosen_name(torch.device("cpu")) == "eager"
assert torch.ops.fastcache.residual_update(x, [x])[0].eq(2).all()
""",
        folder,
    )


@pytest.mark.slow
def test_compiled_libraries_can_be_switched_off_and_the_operators_stay_complete() -> None:
    succeeds(
        ONE_CALL
        + """
import sys
sys.path.insert(0, "tests")
from torch.library import opcheck
from cases import BACKENDS, FORMS, build
assert BACKENDS == ["eager"], BACKENDS
assert fastcache.backends_status()["cpp"].reason == "switched off by FASTCACHE_NO_COMPILED=1"
for name in ("all", "gated-per-frame", "refresh-all"):
    call = build(FORMS[name])
    opcheck(call.operator, (), call.arguments)
""",
        FASTCACHE_NO_COMPILED="1",
    )
