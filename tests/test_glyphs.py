"""Glyphs-36: the pictures, the shipped weights and the classifier that judges them."""

from pathlib import Path

import numpy as np
import pytest
import torch

pytest.importorskip("PIL")
pytest.importorskip("safetensors")

from fastcache.glyphs import DIFFUSION, dataset, load_classifier, load_glyph_dit, weights_path
from fastcache.models import DiT
from fastcache.models.checkpoint import read_checkpoint
from fastcache.workshop.glyphs.classifier import augment, held_out_accuracy, read
from fastcache.workshop.glyphs.train import CONFIG, Run, learning_rate, loss_of, train_step, write_average
from fastcache.workshop.schedulers import Diffusion, make_scheduler

REPOSITORY = Path(__file__).parents[1]


def test_the_pictures_are_a_function_of_the_seed():
    pictures, labels = dataset.make(1, seed=7)
    again, _ = dataset.make(1, seed=7)
    others, _ = dataset.make(1, seed=8)
    assert pictures.shape == (36, 32, 32, 3) and pictures.dtype == np.uint8
    assert sorted(labels) == list(range(36))
    assert np.array_equal(pictures, again) and not np.array_equal(pictures, others)


def test_pixels_survive_the_way_to_the_model_and_back():
    pictures, _ = dataset.make(1, seed=7)
    tensor = dataset.to_model_range(pictures)
    assert tensor.shape == (36, 3, 32, 32) and tensor.min() >= -1 and tensor.max() <= 1
    assert np.array_equal(dataset.to_pixels(tensor), pictures)


def test_values_out_of_range_are_clipped_to_pixels():
    assert dataset.to_pixels(torch.tensor([-3.0, 3.0]).view(1, 1, 1, 2)).ravel().tolist() == [0, 255]


def test_the_shipped_dit_is_the_trained_configuration_and_says_how_to_sample_it():
    model = load_glyph_dit()
    assert model.config == CONFIG
    assert (
        Diffusion.from_metadata(read_checkpoint(weights_path("glyph-dit.safetensors")).metadata) == DIFFUSION
    )


@pytest.mark.slow
def test_the_shipped_dit_predicts_the_velocity_of_unseen_pictures():
    """Its error is far below that of predicting zero: t and the largest share of the squared error that may
    be left.
    """
    pictures, labels = dataset.make(1, seed=7)
    model, x, y = load_glyph_dit(), dataset.to_model_range(pictures), torch.from_numpy(labels)
    alpha_bar = make_scheduler("ddpm", 1, DIFFUSION).alphas_cumprod
    noise = torch.randn(x.shape, generator=torch.Generator().manual_seed(0))
    for t, largest in ((300, 0.05), (600, 0.1), (900, 0.3)):
        signal, spread = alpha_bar[t].sqrt(), (1 - alpha_bar[t]).sqrt()
        wanted = signal * noise - spread * x
        with torch.inference_mode():
            found = model(signal * x + spread * noise, torch.full((36,), t), y)
        assert (found - wanted).square().mean() < largest * wanted.square().mean()


def test_the_shipped_classifier_reads_unseen_glyphs_and_its_file_says_how_well():
    from safetensors import safe_open

    with safe_open(weights_path("glyph-classifier.safetensors"), "pt") as file:
        stated = float(file.metadata()["accuracy"])
    assert stated > 0.99
    assert held_out_accuracy(load_classifier(), per_class=5) > 0.97


def test_the_classifier_still_reads_spoilt_glyphs():
    torch.manual_seed(0)
    pictures, labels = dataset.make(5, seed=7)
    _, logits = read(load_classifier(), augment(dataset.to_model_range(pictures)))
    assert np.mean(logits.argmax(axis=1) == labels) > 0.9


def test_features_are_64_numbers_and_lead_to_the_scores():
    model, pictures = load_classifier(), torch.zeros(3, 3, 32, 32)
    features, logits = read(model, pictures, batch_size=2)
    assert features.shape == (3, 64) and logits.shape == (3, 36)
    np.testing.assert_allclose(logits, model(pictures).detach().numpy(), rtol=1e-5, atol=1e-5)


def test_weights_are_looked_for_in_the_folder_that_the_environment_names(monkeypatch, tmp_path):
    monkeypatch.setenv("FASTCACHE_WEIGHTS", str(REPOSITORY / "weights"))
    assert weights_path("glyph-dit.safetensors") == REPOSITORY / "weights" / "glyph-dit.safetensors"
    monkeypatch.setenv("FASTCACHE_WEIGHTS", str(tmp_path))
    with pytest.raises(
        FileNotFoundError,
        match="set FASTCACHE_WEIGHTS to the folder .* python -m fastcache.workshop.glyphs.train",
    ):
        load_glyph_dit()


def small_run(monkeypatch) -> Run:
    config = dict(
        input_size=32,
        patch_size=8,
        in_channels=3,
        hidden_size=32,
        depth=1,
        num_heads=2,
        num_classes=36,
        learn_sigma=False,
    )
    monkeypatch.setattr("fastcache.workshop.glyphs.train.CONFIG", DiT(**config).config)
    return Run.start("cpu")


def steps_of(run: Run, count: int) -> list[float]:
    pictures, labels = dataset.make(1, seed=7)
    alpha_bar = make_scheduler("ddpm", 1, DIFFUSION).alphas_cumprod
    losses = []
    for _ in range(count):
        loss = loss_of(run.model, dataset.to_model_range(pictures), torch.from_numpy(labels), alpha_bar)
        train_step(run, loss, 0.5)
        losses.append(loss.item())
    return losses


@pytest.mark.slow
def test_training_lowers_the_loss(monkeypatch):
    losses = steps_of(small_run(monkeypatch), 150)
    assert np.mean(losses[-20:]) < 0.8 * np.mean(losses[:5])


def test_an_interrupted_training_goes_on_with_the_same_weights(monkeypatch, tmp_path):
    run = small_run(monkeypatch)
    steps_of(run, 3)
    run.save(tmp_path / "run.resume.pt")
    resumed = small_run(monkeypatch)
    resumed.load(tmp_path / "run.resume.pt")
    for current in (run, resumed):
        torch.manual_seed(1)
        steps_of(current, 2)
    assert resumed.step == run.step == 5
    for name, tensor in run.average.state_dict().items():
        assert torch.equal(tensor, resumed.average.state_dict()[name]), name


def test_the_saved_average_loads_as_a_model(monkeypatch, tmp_path):
    run = small_run(monkeypatch)
    write_average(run, tmp_path / "dit.safetensors")
    loaded = DiT.from_checkpoint(tmp_path / "dit.safetensors")
    torch.testing.assert_close(loaded.state_dict(), run.average.state_dict(), rtol=1e-3, atol=1e-6)


def test_the_learning_rate_rises_holds_and_falls_to_zero():
    assert learning_rate(0, 0.0) < 1e-5
    assert learning_rate(1000, 0.3) == learning_rate(1000, 0.5) == 1e-3
    assert learning_rate(1000, 1.0) == 0
