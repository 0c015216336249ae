"""Slots: buffers of ours at fixed addresses, accounted and freed."""

import gc
import weakref

import pytest
import torch

from fastcache.engine.features import FeatureStore


def test_what_is_kept_is_a_copy() -> None:
    store, feature = FeatureStore(), torch.randn(2, 3, 4)
    expected = feature.clone()
    store.keep(0, feature, step=5)
    feature.zero_()
    assert torch.equal(store.feature(0), expected) and store.age(0, 7) == 2


def test_a_buffer_is_taken_again_for_the_next_feature_of_the_same_shape() -> None:
    store, feature = FeatureStore(), torch.randn(2, 3, 4)
    first = store.buffer(0, feature, 0)
    assert store.buffer(0, feature, 4) is first and store.steps(0) == [4]


@pytest.mark.parametrize("like", [torch.randn(1, 3, 4), torch.randn(2, 3, 4, dtype=torch.float64)])
def test_a_buffer_of_another_shape_or_dtype_starts_the_history_again(like) -> None:
    store = FeatureStore(depth=2)
    before = store.buffer(0, torch.randn(2, 3, 4), 0)
    after = store.buffer(0, like, 1)
    assert after is not before and after.shape == like.shape and after.dtype == like.dtype
    assert store.steps(0) == [1]


def test_a_history_keeps_the_newest_features_and_takes_the_oldest_buffer_again() -> None:
    store = FeatureStore(depth=3)
    for step in range(5):
        store.keep(0, torch.full((1, 2, 2), float(step)), step)
    assert store.steps(0) == [4, 3, 2]
    assert [int(kept[0, 0, 0]) for kept in store.history(0)] == [4, 3, 2]
    assert len({kept.data_ptr() for kept in store.history(0)}) == 3 and store.nbytes == 3 * 16


def test_features_of_later_steps_are_forgotten_when_a_sampler_goes_back() -> None:
    store = FeatureStore(depth=3)
    for step in (0, 3, 6, 2):
        store.keep(0, torch.full((1, 2, 2), float(step)), step)
    assert store.steps(0) == [2, 0]


def test_a_feature_is_there_for_steps_after_the_one_that_computed_it() -> None:
    store = FeatureStore()
    store.keep(0, torch.randn(2, 3, 4), 3)
    assert store.has(0) and store.has(0, before=4) and not store.has(0, before=3) and not store.has(1)


def test_buffers_made_in_inference_mode_can_be_written_outside() -> None:
    store = FeatureStore()
    with torch.inference_mode():
        store.keep(0, torch.randn(2, 3, 4), 0)
    store.feature(0).zero_()


def test_clearing_frees_what_we_own() -> None:
    store = FeatureStore()
    kept = weakref.ref(store.buffer(0, torch.randn(2, 3, 4), 0))
    store.clear()
    gc.collect()
    assert kept() is None and store.nbytes == 0 and 0 not in store
