"""select_tokens_: which tokens are chosen, in what form, and what becomes of their ages."""

import math

import pytest
import torch
from hypothesis import given, settings, strategies as st
from support import available_backends

import fastcache
from fastcache.ops import select_tokens_

NAN = float("nan")


@pytest.fixture(params=available_backends("cpu", "select_tokens_"))
def backend(request):
    with fastcache.use_backend(request.param):
        yield request.param


def counts_of(*counts: int) -> torch.Tensor:
    return torch.tensor(counts, dtype=torch.int32)


def chosen_sets(index: torch.Tensor) -> list[set[int]]:
    return [{int(token) for token in row if token >= 0} for row in index]


def reference(
    score: torch.Tensor,
    age: torch.Tensor,
    counts: list[int],
    age_weight: float,
    normalize: bool,
    width: int,
    cell: int,
    bonus: float,
) -> list[set[int]]:
    """The rule of docs/methods/toca.md, "Which tokens", token by token, in the operator's float32 steps."""
    found = []
    for row, ages, count in zip(score.double(), age, counts, strict=True):
        values = torch.tensor([float(v) for v in row], dtype=torch.float32)
        if normalize:
            values = values / torch.tensor(
                max(math.sqrt(float((row * row).sum())), 1e-12), dtype=torch.float32
            )
        values = values + torch.tensor(age_weight, dtype=torch.float32) * ages.float()
        values = [float(v) for v in values]
        key = lambda token: (
            not math.isnan(values[token]),
            -values[token] if not math.isnan(values[token]) else 0.0,
            token,
        )
        if cell:
            winners = []
            for top in range(len(values) // width // cell):
                for left in range(width // cell):
                    tokens = [
                        (top * cell + i) * width + left * cell + j for i in range(cell) for j in range(cell)
                    ]
                    winners.append(min(tokens, key=key))
            for token in winners:
                own = torch.tensor(values[token], dtype=torch.float32)
                values[token] = float(own + torch.tensor(bonus, dtype=torch.float32) * own)
        found.append(set(sorted(range(len(values)), key=key)[:count]))
    return found


def test_the_worked_example_of_the_method(backend) -> None:
    score = torch.tensor([[4.0, 1, 2, 3, 1, 1, 9, 1, 5, 2, 1, 1, 1, 1, 1, 8]])
    age = torch.zeros(1, 16, dtype=torch.int32)
    age[0, [1, 10, 11]], age[0, 4] = 1, 2
    before = age.clone()
    choice = select_tokens_(score, age, counts_of(4), 4, age_weight=0.25 / 3, width=4, cell=2, bonus=0.6)
    assert choice.index.tolist() == [[0, 6, 8, 15]]
    assert choice.slots[0].tolist() == [0, -1, -1, -1, -1, -1, 1, -1, 2, -1, -1, -1, -1, -1, -1, 3]
    expected = before + 1
    expected[0, [0, 6, 8, 15]] = 0
    assert torch.equal(age, expected)
    again = select_tokens_(
        score, before.clone(), counts_of(6), 6, age_weight=0.25 / 3, width=4, cell=2, bonus=0.6
    )
    assert chosen_sets(again.index) == [{0, 3, 4, 6, 8, 15}]


def test_a_negative_score_is_lowered_by_the_bonus(backend) -> None:
    score = torch.tensor([[-1.0, -1.1, -1.2, -1.3]])
    pick = lambda **options: select_tokens_(
        score, torch.zeros(1, 4, dtype=torch.int32), counts_of(1), 1, normalize=False, **options
    ).index.item()
    assert pick() == 0
    assert pick(width=2, cell=2, bonus=0.8) == 1  # the best of the cell became the worst


@pytest.mark.parametrize(
    ("values", "count", "expected"),
    [
        ([1.0, 1.0, 1.0, 1.0], 2, [0, 1]),
        ([0.5, 2.0, 0.5, 2.0, 0.5], 3, [0, 1, 3]),
        ([0.0, -0.0, 0.0, -0.0], 2, [0, 1]),
        ([1.0, NAN, 9.0, NAN], 2, [1, 3]),
        ([1.0, NAN, 9.0, NAN], 1, [1]),
        ([float("-inf"), float("inf"), 0.0], 2, [1, 2]),
        ([3.0, 1.0, 2.0], 0, []),
        ([3.0, 1.0, 2.0], 3, [0, 1, 2]),
    ],
)
def test_ties_go_to_the_lowest_index_and_nan_comes_first(backend, values, count, expected) -> None:
    age = torch.zeros(1, len(values), dtype=torch.int32)
    choice = select_tokens_(torch.tensor([values]), age, counts_of(count), len(values), normalize=False)
    assert choice.index[0, :count].tolist() == expected and (choice.index[0, count:] == -1).all()
    assert [n for n in range(len(values)) if choice.slots[0, n] >= 0] == expected


def test_rows_have_counts_of_their_own_and_the_index_is_padded(backend) -> None:
    generator = torch.Generator().manual_seed(0)
    score = torch.rand(4, 33, generator=generator)
    age = torch.zeros(4, 33, dtype=torch.int32)
    choice = select_tokens_(score, age, counts_of(0, 5, 33, 12), 40, normalize=False)
    assert choice.index.shape == (4, 40) and choice.slots.dtype == choice.index.dtype == torch.int32
    for row, count in enumerate((0, 5, 33, 12)):
        assert chosen_sets(choice.index)[row] == set(score[row].argsort(descending=True)[:count].tolist())
        kept = choice.index[row, :count]
        assert torch.equal(kept, kept.sort().values) and (choice.index[row, count:] == -1).all()
        assert torch.equal(choice.slots[row][kept.long()], torch.arange(count, dtype=torch.int32))


def test_ages_decide_where_scores_are_equal_until_every_token_had_its_turn(backend) -> None:
    score, age = torch.ones(1, 12), torch.zeros(1, 12, dtype=torch.int32)
    seen: list[int] = []
    for _ in range(4):
        seen += select_tokens_(score, age, counts_of(3), 3, age_weight=0.1, normalize=False).index[0].tolist()
    assert sorted(seen) == list(range(12))


@settings(max_examples=60, deadline=None)
@given(st.data())
def test_the_choice_is_the_specifications_on_random_rows(data) -> None:
    cell = data.draw(st.sampled_from([0, 1, 2, 3]))
    width, lines = data.draw(st.integers(1, 6)) * max(1, cell), data.draw(st.integers(1, 6)) * max(1, cell)
    R, N = data.draw(st.integers(1, 4)), width * lines
    generator = torch.Generator().manual_seed(data.draw(st.integers(0, 2**31)))
    score = torch.randn(R, N, generator=generator)
    if data.draw(st.booleans()):
        score = score.mul(2).round()  # many ties
    age = torch.randint(0, 9, (R, N), generator=generator, dtype=torch.int32)
    counts = [data.draw(st.integers(0, N)) for _ in range(R)]
    options = dict(
        age_weight=data.draw(st.sampled_from([0.0, 0.0625, 0.25])),
        normalize=data.draw(st.booleans()),
        width=width if cell else 0,
        cell=cell,
        bonus=0.5 if cell else 0.0,
    )
    expected = reference(
        score, age, counts, options["age_weight"], options["normalize"], width, cell, options["bonus"]
    )
    for name in available_backends("cpu", "select_tokens_"):
        own = age.clone()
        with fastcache.use_backend(name):
            choice = select_tokens_(score, own, counts_of(*counts), max(counts, default=0), **options)
        assert chosen_sets(choice.index) == expected, name
        for row in range(R):
            assert all(own[row, n] == (0 if n in expected[row] else age[row, n] + 1) for n in range(N))


@pytest.mark.parametrize("N", [1, 255, 256, 257, 4096, 23850])
def test_backends_choose_the_same_tokens_at_every_size(N: int) -> None:
    generator = torch.Generator().manual_seed(N)
    score = torch.rand(3, N, generator=generator)
    age = torch.randint(0, 4, (3, N), generator=generator, dtype=torch.int32)
    counts = counts_of(N // 7, N // 2, N)
    found = []
    for name in available_backends("cpu", "select_tokens_"):
        own = age.clone()
        with fastcache.use_backend(name):
            found.append((*select_tokens_(score, own, counts, N, age_weight=0.25 / 3), own))
    for other in found[1:]:
        assert all(torch.equal(a, b) for a, b in zip(found[0], other, strict=True))


def test_strided_scores_and_ages_are_read_as_they_are(backend) -> None:
    score = torch.rand(10, 3, generator=torch.Generator().manual_seed(1)).t()
    age = torch.zeros(3, 20, dtype=torch.int32)[:, ::2]
    choice = select_tokens_(score, age, counts_of(2, 3, 4), 4)
    assert chosen_sets(choice.index) == [
        set(score[row].argsort(descending=True)[:count].tolist()) for row, count in enumerate((2, 3, 4))
    ]
    assert [int((age[row] == 0).sum()) for row in range(3)] == [2, 3, 4]


@pytest.mark.parametrize("shape", [(0, 5), (3, 0), (0, 0)])
def test_empty_inputs_give_empty_choices(backend, shape) -> None:
    choice = select_tokens_(
        torch.zeros(shape), torch.zeros(shape, dtype=torch.int32), torch.zeros(shape[0], dtype=torch.int32), 0
    )
    assert choice.slots.shape == shape and choice.index.shape == (shape[0], 0)


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"score": torch.zeros(4)}, ValueError, r"score: expected \[R, N\]"),
        ({"score": torch.zeros(2, 4, dtype=torch.float16)}, TypeError, "score: expected float32"),
        ({"age": torch.zeros(2, 5, dtype=torch.int32)}, ValueError, r"age: expected \[2, 4\], got \[2, 5\]"),
        ({"age": torch.zeros(2, 4)}, TypeError, "age: expected torch.int32"),
        ({"counts": counts_of(1)}, ValueError, r"counts: expected \[2\]"),
        ({"counts": counts_of(1, 5)}, IndexError, r"counts: expected 0..4 .*got 1..5"),
        ({"counts": counts_of(-1, 1)}, IndexError, "counts: expected 0"),
        ({"capacity": 1, "counts": counts_of(1, 2)}, IndexError, r"counts: expected 0..1"),
        ({"capacity": -1, "counts": counts_of(0, 0)}, ValueError, "capacity: expected 0 or more"),
        ({"cell": 2, "width": 3, "bonus": 0.5}, ValueError, "width, cell: expected a grid of 2 x 2"),
        ({"bonus": 0.5}, ValueError, "cell: a bonus of 0.5 needs cells"),
    ],
)
def test_bad_arguments_are_named(backend, change: dict, error: type[Exception], message: str) -> None:
    arguments = {
        "score": torch.zeros(2, 4),
        "age": torch.zeros(2, 4, dtype=torch.int32),
        "counts": counts_of(1, 2),
        "capacity": 4,
        **change,
    }
    with pytest.raises((error, RuntimeError), match=message):
        select_tokens_(**arguments)


def test_a_refused_call_leaves_the_ages_alone(backend) -> None:
    age = torch.full((1, 4), 7, dtype=torch.int32)
    with pytest.raises((IndexError, RuntimeError)):
        select_tokens_(torch.rand(1, 4), age, counts_of(9), 9)
    assert (age == 7).all()
