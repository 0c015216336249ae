"""The metrics give the values that theory gives."""

import numpy as np
import pytest
import torch

from fastcache.workshop.metrics import accuracy, frechet_distance, psnr


def gaussian(count: int, mean: np.ndarray, root: np.ndarray, seed: int = 0) -> np.ndarray:
    """Samples whose mean and covariance are exactly `mean` and root @ root.T."""
    white = np.random.default_rng(seed).standard_normal((count, len(mean)))
    white -= white.mean(axis=0)
    white = white @ np.linalg.inv(np.linalg.cholesky(np.cov(white, rowvar=False))).T
    return white @ root.T + mean


def test_psnr_of_a_constant_error_is_that_of_the_formula():
    a = np.zeros((2, 3, 4, 4))
    b = a + np.array([0.1, 0.2])[:, None, None, None]
    np.testing.assert_allclose(psnr(a, b, value_range=2), [20 * np.log10(2 / 0.1), 20 * np.log10(2 / 0.2)])


def test_psnr_does_not_wrap_around_in_uint8():
    a, b = np.full((1, 2, 2, 3), 3, np.uint8), np.full((1, 2, 2, 3), 5, np.uint8)
    np.testing.assert_allclose(psnr(a, b, value_range=255), 20 * np.log10(255 / 2))


def test_psnr_of_identical_pictures_is_infinite():
    assert psnr(torch.ones(1, 3, 2, 2), torch.ones(1, 3, 2, 2), value_range=1).tolist() == [np.inf]


@pytest.mark.parametrize(
    "shape, value_range, message", [((2, 4), 1, "^b: expected the shape of a"), ((2, 3), 0, "^value_range")]
)
def test_psnr_names_the_argument_that_is_wrong(shape, value_range, message):
    with pytest.raises(ValueError, match=message):
        psnr(np.zeros((2, 3)), np.zeros(shape), value_range=value_range)


def test_frechet_distance_of_known_gaussians_is_the_closed_form():
    spread_a, spread_b = np.array([1.0, 2.0, 3.0]), np.array([2.0, 2.0, 0.5])
    a = gaussian(50, np.zeros(3), np.diag(spread_a))
    b = gaussian(70, np.array([1.0, -2.0, 0.5]), np.diag(spread_b), seed=1)
    expected = 1 + 4 + 0.25 + np.square(spread_a - spread_b).sum()  # commuting covariances
    assert frechet_distance(a, b) == pytest.approx(expected, rel=1e-9)


def test_frechet_distance_of_covariances_that_do_not_commute_matches_the_product_form():
    rng = np.random.default_rng(2)
    a = gaussian(100, np.zeros(5), rng.standard_normal((5, 5)))
    b = gaussian(100, np.ones(5), rng.standard_normal((5, 5)), seed=3)
    cov_a, cov_b = np.cov(a, rowvar=False), np.cov(b, rowvar=False)
    overlap = np.sqrt(np.linalg.eigvals(cov_a @ cov_b).real).sum()
    assert frechet_distance(a, b) == pytest.approx(5 + np.trace(cov_a + cov_b) - 2 * overlap, rel=1e-9)


def test_frechet_distance_is_symmetric_and_invariant_to_rotation():
    rng = np.random.default_rng(4)
    a, b = rng.standard_normal((60, 4)), rng.standard_normal((60, 4)) * [1, 2, 3, 4] + 1
    rotation = np.linalg.qr(rng.standard_normal((4, 4)))[0]
    assert frechet_distance(a, b) == pytest.approx(frechet_distance(b, a), rel=1e-9)
    assert frechet_distance(a, b) == pytest.approx(frechet_distance(a @ rotation, b @ rotation), rel=1e-9)


@pytest.mark.parametrize("count", [200, 20], ids=["full rank", "fewer samples than features"])
def test_frechet_distance_of_a_set_to_itself_is_zero(count):
    features = np.random.default_rng(5).standard_normal((count, 64)).astype(np.float32)
    assert frechet_distance(features, features) == pytest.approx(0, abs=1e-6)


def test_frechet_distance_takes_a_single_feature():
    assert frechet_distance([[0.0], [2.0]], [[5.0], [7.0]]) == pytest.approx(25)


@pytest.mark.parametrize(
    "a, b, message",
    [((1, 4), (9, 4), "^features_a"), ((9, 4), (9, 5), "^features_b"), ((9,), (9, 1), "^features_a")],
)
def test_frechet_distance_names_the_argument_that_is_wrong(a, b, message):
    with pytest.raises(ValueError, match=message):
        frechet_distance(np.zeros(a), np.zeros(b))


def test_accuracy_is_the_share_of_rows_whose_largest_score_is_at_the_label():
    assert accuracy(torch.tensor([[1.0, 2.0], [3.0, 1.0], [0.0, 1.0], [2.0, 0.0]]), [1, 0, 0, 0]) == 0.75


@pytest.mark.parametrize("scores, labels", [((2, 3), 3), ((0, 3), 0), ((2,), 2)])
def test_accuracy_refuses_labels_that_do_not_fit(scores, labels):
    with pytest.raises(ValueError, match="^labels: expected"):
        accuracy(np.zeros(scores), np.zeros(labels))
