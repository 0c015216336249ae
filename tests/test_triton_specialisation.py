"""How often Triton compiles: once per form, width, dtype and tile, never for another batch, number of tokens
or of terms.
"""

import os
from dataclasses import replace

import pytest
import torch

triton = pytest.importorskip("triton", reason="triton is not installed (extra `triton`)")
if os.environ.get("TRITON_INTERPRET") == "1":
    pytest.skip("the interpreter is on: kernels are not specialised", allow_module_level=True)

from cases import SCATTERS, UPDATES, Form, build  # noqa: E402
from triton.backends.compiler import GPUTarget  # noqa: E402
from triton.compiler import make_backend  # noqa: E402
from triton.runtime.jit import create_function_from_signature  # noqa: E402

from fastcache.backends import triton as backend  # noqa: E402
from fastcache.backends.triton_config import SUM_CONFIGS  # noqa: E402
from fastcache.backends.tuning import only  # noqa: E402
from fastcache.backends.tuning_key import Key, row_bucket, term_bucket  # noqa: E402

TARGET = make_backend(GPUTarget("cuda", 90, 32))
CALLS = [
    (B, N, terms) for B in (1, 2, 3, 16) for N, terms in ((1, 1), (16, 2), (19, 3), (256, 17), (250, 56))
]  # 1 and multiples of 16 are what Triton would compile in


class Keys:
    """Stands for a kernel: collects the keys under which launches would be compiled."""

    def __init__(self, kernel: object) -> None:
        self._bind = create_function_from_signature(kernel.signature, kernel.params, TARGET)
        self.found: set[str] = set()
        self.tiles: set[tuple] = set()

    def __getitem__(self, grid: tuple[int, ...]):
        def launch(*args: object, **kwargs: object) -> None:
            _, specialisation, options = self._bind(*args, **kwargs)
            self.found.add(f"{specialisation}{options}")
            self.tiles.add(tuple(kwargs.get(name) for name in ("ROWS", "COLUMNS", "STAGES", "num_warps")))

        return launch


@pytest.fixture
def keys(monkeypatch: pytest.MonkeyPatch) -> dict[str, Keys]:
    made = {name: Keys(getattr(backend, name)) for name in ("sum_kernel", "row_kernel")}
    for name, kernel in made.items():
        monkeypatch.setattr(backend, name, kernel)
    return made


def launch(form: Form) -> None:
    call = build(form)
    getattr(backend, call.operator._opname)(**call.arguments)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("channels", [64, 72])
@pytest.mark.parametrize(
    ("name", "kernel"),
    [
        ("packed-gates", "sum_kernel"),
        ("refresh-after-terms", "sum_kernel"),
        ("modulated", "row_kernel"),
        ("refresh-modulated", "row_kernel"),
    ],
)
def test_batch_tokens_and_terms_compile_nothing_new(
    name: str, kernel: str, channels: int, dtype: str, keys: dict[str, Keys]
) -> None:
    form = replace((UPDATES | SCATTERS)[name], channels=channels, x=dtype, feature=dtype, vector=dtype)
    for batch, tokens, terms in CALLS:
        launch(replace(form, batch=batch, tokens=tokens, terms=terms))
    found = keys[kernel]
    assert len(CALLS) == 20 and len(found.found) == len(found.tiles), (
        f"{len(found.found)} compilations for {len(found.tiles)} tiles"
    )
    assert len(found.tiles) <= 4


def test_small_tables_may_start_anywhere(keys: dict[str, Keys]) -> None:
    """A row of a table of weights, one per step, starts at any multiple of 4 bytes."""
    call = build(Form(terms=3, gate="BD", packed=True, weights=True))
    for start in range(4):
        shifted = {
            name: torch.cat([call.arguments[name].new_zeros(start), call.arguments[name]])[start:]
            for name in ("weights", "gate_index")
        }
        backend.residual_update(**(call.arguments | shifted))
    assert len(keys["sum_kernel"].found) == 1


def test_the_tile_of_a_table_is_the_one_that_is_launched(keys: dict[str, Keys]) -> None:
    form, tile = Form(batch=2, tokens=16, channels=64, terms=5), SUM_CONFIGS[5]
    key = Key("triton.sum", "cpu", 64, "float32", term_bucket(5), row_bucket(32))
    launch(form)
    with only({key: tile}, torch.device("cpu")):
        launch(form)
    launch(form)
    expected = (tile.rows, tile.columns, tile.stages, tile.warps)
    assert expected in keys["sum_kernel"].tiles and len(keys["sum_kernel"].tiles) == 2


@pytest.mark.parametrize(
    "change",
    [
        {"channels": 80},
        {"x": "float16", "feature": "float16", "vector": "float16"},
        {"weights": True},
        {"offset": 1},
    ],
    ids=["width", "dtype", "form", "alignment"],
)
def test_width_dtype_form_and_alignment_are_compiled_in(change: dict, keys: dict[str, Keys]) -> None:
    form = Form(terms=3, gate="BD", packed=True, channels=64)
    launch(form)
    launch(replace(form, **change))
    assert len(keys["sum_kernel"].found) == 2
