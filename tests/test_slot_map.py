"""slot_map: from token indices to the form that kernels read; bad indices are never silent."""

import pytest
import torch

from fastcache.ops import slot_map
from fastcache.ops.slots import BAD_INDEX, SlotMap, flag_bad_index


def indices(*rows: list[int], dtype: torch.dtype = torch.int64) -> torch.Tensor:
    return torch.tensor(rows, dtype=dtype)


@pytest.mark.parametrize("dtype", [torch.int32, torch.int64])
def test_a_slot_names_the_row_of_its_token_in_any_order(dtype: torch.dtype) -> None:
    found = slot_map(indices([3, 0, -1], [1, 4, 2], dtype=dtype), 5)
    assert found.count == 3 and found.slots.dtype == torch.int32
    assert found.slots.tolist() == [[1, -1, -1, 0, -1], [-1, 0, 2, -1, 1]]


@pytest.mark.parametrize(
    ("index", "message"),
    [
        (indices([0, 5]), r"expected tokens in -1..4, got 0..5"),
        (indices([-2, 1]), r"got -2..1"),
        (indices([2, 2]), "named twice"),
    ],
)
def test_a_bad_index_on_a_cpu_is_an_error(index: torch.Tensor, message: str) -> None:
    with pytest.raises(IndexError, match=message):
        slot_map(index, 5)


@pytest.mark.parametrize(
    "index", [torch.zeros(3, dtype=torch.int64), torch.zeros(1, 3), torch.zeros(1, 3, dtype=torch.int16)]
)
def test_a_bad_shape_or_dtype_is_an_error(index: torch.Tensor) -> None:
    with pytest.raises(ValueError, match=r"index: expected \[B, K\] int32 or int64"):
        slot_map(index, 5)


@pytest.mark.parametrize(
    ("index", "bad"),
    [
        (indices([0, 4, -1]), False),
        (indices([0, 5, -1]), True),
        (indices([-2, 1, 0]), True),
        (indices([2, 2, 0]), True),
    ],
)
def test_where_values_cannot_be_read_a_bad_index_sets_the_sticky_flag(index: torch.Tensor, bad: bool) -> None:
    tokens, flag = 5, torch.tensor([1], dtype=torch.int32)
    named = (index >= 0) & (index < tokens)
    slots = torch.full((1, tokens + 1), -1, dtype=torch.int32).scatter_(
        1, torch.where(named, index, tokens), torch.arange(3, dtype=torch.int32)[None]
    )
    flag_bad_index(index, named, SlotMap(slots[:, :tokens], 3), flag)
    assert flag.item() == (1 | BAD_INDEX if bad else 1)
