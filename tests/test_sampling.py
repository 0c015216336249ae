"""Sampling: pictures depend on seed and index alone, guidance and schedulers do what they say."""

import pytest
import torch

import fastcache
from fastcache.models import DiT
from fastcache.workshop.sampling import PictureNoise, sample
from fastcache.workshop.schedulers import SCHEDULERS, Diffusion, make_scheduler

pytest.importorskip("diffusers")
pytestmark = pytest.mark.filterwarnings(
    "ignore:__array__ implementation:DeprecationWarning"
)  # diffusers under numpy 2


def small_model(learn_sigma: bool = False) -> DiT:
    """A DiT of 2 blocks with random weights everywhere."""
    torch.manual_seed(0)
    model = DiT(8, 4, 3, hidden_size=32, depth=2, num_heads=2, num_classes=5, learn_sigma=learn_sigma)
    for parameter in model.parameters():
        if parameter.requires_grad:
            torch.nn.init.normal_(parameter, std=0.1)
    return model.eval()


def quick(model: DiT, labels: list[int], **options: object) -> torch.Tensor:
    return sample(model, labels, **{"steps": 6, "progress": False, **options}).pictures


@pytest.mark.parametrize("scheduler", SCHEDULERS)
def test_batch_size_and_resuming_do_not_change_a_picture(scheduler):
    model = small_model()
    together = quick(model, [0, 1, 2, 3], scheduler=scheduler)
    in_pairs = quick(model, [0, 1, 2, 3], scheduler=scheduler, batch_size=3)
    resumed = quick(model, [2, 3], scheduler=scheduler, indices=[2, 3])
    scale = together.abs().max()
    torch.testing.assert_close(in_pairs / scale, together / scale, rtol=0, atol=1e-5)
    torch.testing.assert_close(resumed / scale, together[2:] / scale, rtol=0, atol=1e-5)


@pytest.mark.parametrize("scheduler", SCHEDULERS)
def test_seed_index_and_class_change_a_picture(scheduler):
    model = small_model()
    base = quick(model, [0], scheduler=scheduler)
    for changed in (
        quick(model, [0], scheduler=scheduler, seed=1),
        quick(model, [0], scheduler=scheduler, indices=[1]),
        quick(model, [1], scheduler=scheduler),
    ):
        assert not torch.allclose(base, changed, rtol=1e-3)


def test_noise_of_neighbouring_seeds_and_indices_is_unrelated():
    draws = torch.cat([PictureNoise(seed, range(3)).draw((4096,)) for seed in (0, 1)])
    assert (torch.corrcoef(draws) - torch.eye(6)).abs().max() < 0.08  # 5 sigma


def test_ddim_with_the_exact_noise_of_a_known_picture_recovers_it():
    picture = torch.linspace(-1, 1, 3 * 8 * 8).view(1, 3, 8, 8)
    model = small_model()
    alpha_bar = make_scheduler("ddim", 5, Diffusion()).alphas_cumprod

    def noise_of(x, t, y):
        a = alpha_bar[t.long()][:, None, None, None]
        return (x - a.sqrt() * picture) / (1 - a).sqrt()

    model.forward = noise_of
    torch.testing.assert_close(quick(model, [0], steps=5), picture, rtol=0, atol=1e-3)


def test_guidance_of_one_calls_the_model_without_the_unconditional_half():
    model, batches, original = small_model(), [], DiT.forward
    model.forward = lambda x, t, y: batches.append(y.tolist()) or original(model, x, t, y)
    quick(model, [2, 3], guidance=1.0, steps=1)
    quick(model, [2, 3], guidance=1.5, steps=1)
    quick(model, [2, 3], guidance=1.5, steps=1, null_label=0)
    assert batches == [[2, 3], [2, 3, 5, 5], [2, 3, 0, 0]]


@pytest.mark.parametrize("scheduler", SCHEDULERS)
def test_a_model_that_learns_its_variance_is_sampled_too(scheduler):
    pictures = quick(small_model(learn_sigma=True), [0, 1], scheduler=scheduler)
    assert pictures.shape == (2, 3, 8, 8)
    assert pictures.isfinite().all()


def test_finished_batches_are_handed_out_with_their_indices():
    handed = []
    pictures = quick(
        small_model(),
        [0, 1, 2],
        indices=[4, 7, 9],
        batch_size=2,
        on_batch=lambda *batch: handed.append(batch),
    )
    assert [list(indices) for indices, _ in handed] == [[4, 7], [9]]
    assert torch.equal(torch.cat([batch for _, batch in handed]), pictures)


def test_no_labels_give_no_pictures():
    assert quick(small_model(), []).shape == (0, 3, 8, 8)


def test_a_policy_that_recomputes_every_step_changes_nothing_and_reports_itself():
    model = small_model()
    found = sample(model, [0, 1, 2], steps=6, policy=fastcache.FORA(interval=1), batch_size=2, progress=False)
    torch.testing.assert_close(found.pictures, quick(model, [0, 1, 2], batch_size=2))
    assert found.summary.generations == 2
    assert found.schedule.num_steps == 6


@pytest.mark.parametrize("scheduler", SCHEDULERS)
def test_under_a_caching_policy_every_scheduler_gives_finite_pictures_near_the_uncached_ones(scheduler):
    model = small_model()
    found = sample(
        model,
        [0, 1, 2],
        steps=12,
        policy=fastcache.FORA(interval=2),
        scheduler=scheduler,
        batch_size=2,
        progress=False,
    )
    uncached = quick(model, [0, 1, 2], scheduler=scheduler, steps=12, batch_size=2)
    assert 0 < (found.pictures - uncached).norm() < 0.5 * uncached.norm()
    assert found.summary.steps["reuse"].count == 2 * 5


@pytest.mark.parametrize(
    "options, message",
    [
        ({"scheduler": "plms"}, "^scheduler: expected one of ddim, .* got 'plms'"),
        ({"steps": 0}, r"^steps: expected 1\.\.1000, got 0"),
        ({"batch_size": 0}, "^batch_size: expected at least 1, got 0"),
        ({"indices": [1]}, "^indices: expected 2, one for each label, got 1"),
    ],
)
def test_wrong_options_are_named(options, message):
    with pytest.raises(ValueError, match=message):
        quick(small_model(), [0, 1], **options)
