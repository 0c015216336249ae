"""Slots: borrowed and owned, accounted and freed."""

import gc
import weakref

import pytest
import torch

from fastcache.engine.features import FeatureStore
from fastcache.errors import SessionError


def test_a_borrowed_slot_is_the_tensor_itself() -> None:
    store, feature = FeatureStore(), torch.randn(2, 3, 4)
    store.borrow(0, feature, step=5)
    assert store.feature(0) is feature and store.age(0, 7) == 2


def test_a_borrowed_slot_that_was_written_is_refused() -> None:
    store, feature = FeatureStore(), torch.randn(2, 3, 4)
    store.borrow(0, feature, 0)
    feature.add_(1)
    with pytest.raises(SessionError, match="modified in place"):
        store.feature(0)


def test_owning_a_borrowed_slot_copies_it_once_and_never_writes_the_original() -> None:
    store, feature = FeatureStore(), torch.randn(2, 3, 4)
    store.borrow(0, feature, 0)
    slot = store.own(0)
    assert slot.owned and torch.equal(slot.tensor, feature)
    slot.tensor.zero_()
    assert feature.abs().sum() > 0
    assert store.own(0).tensor is slot.tensor and store.age(0, 2) == 2


def test_a_buffer_is_taken_again_for_the_next_feature_of_the_same_shape() -> None:
    store, feature = FeatureStore(), torch.randn(2, 3, 4)
    first = store.buffer(0, feature, 0)
    again = store.buffer(0, feature, 4)
    assert again.tensor is first.tensor and again.owned and store.steps(0) == [4]


@pytest.mark.parametrize("like", [torch.randn(1, 3, 4), torch.randn(2, 3, 4, dtype=torch.float64)])
def test_a_buffer_of_another_shape_or_dtype_starts_the_history_again(like) -> None:
    store = FeatureStore(depth=2)
    before = store.buffer(0, torch.randn(2, 3, 4), 0).tensor
    after = store.buffer(0, like, 1).tensor
    assert (
        after is not before
        and after.shape == like.shape
        and after.dtype == like.dtype
        and store.steps(0) == [1]
    )


def test_a_history_keeps_the_newest_features_and_takes_the_oldest_buffer_again() -> None:
    store, features = FeatureStore(depth=3), [torch.full((1, 2, 2), float(k)) for k in range(5)]
    for step, feature in enumerate(features):
        store.borrow(0, feature, step)
        store.buffer(1, feature, step).tensor.copy_(feature)
    for branch in (0, 1):
        assert store.steps(branch) == [4, 3, 2]
        assert [int(kept[0, 0, 0]) for kept in store.history(branch)] == [4, 3, 2]
    assert len({kept.data_ptr() for kept in store.history(1)}) == 3
    assert store.nbytes == 6 * 16


def test_a_feature_of_another_shape_is_not_usable() -> None:
    store = FeatureStore()
    store.borrow(0, torch.randn(2, 3, 4), 0)
    assert store.usable(0, torch.empty(2, 3, 4, dtype=torch.bfloat16))
    assert not store.usable(0, torch.empty(1, 3, 4)) and not store.usable(1, torch.empty(2, 3, 4))


def test_bytes_count_every_storage_once() -> None:
    store, pair = FeatureStore(), torch.randn(2, 2, 3, 4)
    store.borrow(0, pair[0], 0)
    store.borrow(1, pair[1], 0)
    assert store.nbytes == pair.numel() * 4


def test_clearing_frees_what_we_own() -> None:
    store = FeatureStore()
    kept = weakref.ref(store.buffer(0, torch.randn(2, 3, 4), 0).tensor)
    store.clear()
    gc.collect()
    assert kept() is None and store.nbytes == 0 and 0 not in store
