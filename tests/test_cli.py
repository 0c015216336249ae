"""The command line: what each command writes, and what it says when an option is wrong."""

import json
import re
import sys
from pathlib import Path

import pytest
import torch

pytest.importorskip("typer")
pytest.importorskip("diffusers")

from typer.testing import CliRunner

import fastcache.cli.main
from fastcache import backends
from fastcache.cli.app import app
from fastcache.models import DiT
from fastcache.models.checkpoint import Checkpoint, write_checkpoint
from fastcache.ops.verify import FORMS, verify
from fastcache.policies import FORA
from fastcache.schedule import Schedule
from fastcache.workshop.studies.comparison import SETTINGS, Sampler
from fastcache.workshop.studies.demo import run_demo
from fastcache.workshop.studies.quality import run_quality

pytestmark = pytest.mark.filterwarnings("ignore:__array__ implementation:DeprecationWarning")


def run(*arguments: object) -> str:
    result = CliRunner().invoke(app, [str(argument) for argument in arguments])
    assert result.exit_code == 0, result.output
    return result.output


def refused(*arguments: object) -> str:
    result = CliRunner().invoke(app, [str(argument) for argument in arguments])
    assert result.exit_code == 2, result.output
    return " ".join(result.output.replace("│", " ").split())


@pytest.fixture
def checkpoint(tmp_path: Path) -> Path:
    """A tiny pixel model with random weights."""
    torch.manual_seed(0)
    model = DiT(8, 4, 3, hidden_size=32, depth=2, num_heads=2, num_classes=5, learn_sigma=False)
    torch.nn.init.normal_(model.final_layer.linear.weight, std=0.1)
    write_checkpoint(tmp_path / "tiny.safetensors", Checkpoint(model.state_dict(), model.config, {}))
    return tmp_path / "tiny.safetensors"


def test_plan_counts_steps_and_writes_what_it_drew_and_saved(tmp_path):
    output = run(
        "plan",
        "--policy",
        "fora",
        "--set",
        "interval=5",
        "--steps",
        50,
        "--draw",
        tmp_path / "p.png",
        "--save",
        tmp_path / "p.json",
    )
    assert "FORA(interval=5) on DiT-XL/2, 50 steps" in output
    schedule = Schedule.load(tmp_path / "p.json")
    assert schedule.kinds() == {"full": 11, "reuse": 39}
    assert f"{schedule.ideal_speedup():.2f}x" in output
    assert (tmp_path / "p.png").stat().st_size > 0


def test_plan_shows_tokens_by_step_and_the_authors_flops(tmp_path):
    output = run(
        "plan",
        "--policy",
        "toca",
        "--set",
        "fresh_threshold=3",
        "--set",
        "reproduce_reference=true",
        "--steps",
        50,
        "--draw",
        tmp_path / "p.png",
    )
    assert "10,232,809,588,736 FLOPs by the authors' own formula" in output
    lines = [re.split(r"\s{2,}", line.strip()) for line in output.splitlines()]
    assert (
        ["12", "partial", "1-2"] in lines
        and ["17", "mixed", "16-23"] in lines
        and ["48", "partial", "104-156"] in lines
    )
    assert ["1-3, 6-8, 10-11", "partial", "0"] in lines
    assert "skip" in run("plan", "--policy", "duca", "--model", "glyphs")
    assert "refreshed of" not in run("plan", "--policy", "fora")


def test_plan_knows_the_glyph_model():
    assert "on glyphs, 10 steps" in run("plan", "--model", "glyphs", "--steps", 10)


@pytest.mark.parametrize(
    "arguments, message",
    [
        (["--policy", "nothing"], "--policy: expected one of fora"),
        (["--set", "intervall=3"], "--set: expected field=value with a field of interval, got 'intervall=3'"),
        (["--set", "interval"], "--set: expected field=value"),
        (["--set", "interval=0"], "--set: interval: expected a whole number >= 1"),
        (["--set", "interval=x"], "--set: interval: expected a whole number >= 1"),
        (
            ["--policy", "toca", "--set", "ratio_scheduler=ToCa"],
            "--set: ratio_scheduler: expected one of constant",
        ),
        (
            ["--policy", "duca", "--input-size", 30],
            "--set: layout.tokens: the spatial bonus on DiT needs a square grid",
        ),
        (["--model", "DiT-H/2"], "--model: expected glyphs or one of DiT-S/2"),
    ],
)
def test_plan_refuses_what_it_does_not_know(arguments, message):
    assert message in refused("plan", *arguments)


def test_sample_writes_a_picture_for_each_class_and_resumes(tmp_path, checkpoint):
    out = tmp_path / "out"
    options = [
        "sample",
        "--checkpoint",
        checkpoint,
        "--classes",
        "0,2-3",
        "--steps",
        4,
        "--out",
        out,
        "--policy",
        "fora",
        "--set",
        "interval=2",
    ]
    assert "3 pictures made, 0 were there" in run(*options).replace("\n", " ")
    names = ["00000-class-0.png", "00001-class-2.png", "00002-class-3.png"]
    assert sorted(path.name for path in out.glob("*.png")) == names
    before = (out / names[1]).read_bytes()
    (out / names[1]).unlink()
    assert "1 pictures made, 2 were there" in run(*options).replace("\n", " ")
    assert (out / names[1]).read_bytes() == before


def test_sample_does_not_mix_pictures_of_different_settings(tmp_path, checkpoint):
    options = ["sample", "--checkpoint", checkpoint, "--classes", 0, "--steps", 2, "--out", tmp_path / "out"]
    run(*options)
    assert "holds pictures of other settings" in refused(*options, "--seed", 1)


def test_sample_decodes_latents_with_the_vae_that_is_named(tmp_path):
    from diffusers import AutoencoderKL
    from PIL import Image

    model = DiT(8, 4, 4, hidden_size=32, depth=1, num_heads=2, num_classes=5)
    torch.save({"ema": model.state_dict()}, tmp_path / "latent.pt")
    AutoencoderKL(
        down_block_types=("DownEncoderBlock2D",) * 2,
        up_block_types=("UpDecoderBlock2D",) * 2,
        block_out_channels=(32, 32),
        latent_channels=4,
        norm_num_groups=8,
    ).save_pretrained(tmp_path / "vae")
    options = [
        "sample",
        "--checkpoint",
        tmp_path / "latent.pt",
        "--num-heads",
        2,
        "--classes",
        1,
        "--steps",
        2,
        "--out",
        tmp_path / "out",
    ]
    assert "--vae: this model makes latents of 4 channels" in refused(*options)
    run(*options, "--vae", tmp_path / "vae")
    assert Image.open(tmp_path / "out" / "00000-class-1.png").size == (16, 16)


@pytest.mark.parametrize(
    "arguments, message",
    [
        (["--classes", "0-x"], "--classes: expected numbers and ranges"),
        (["--classes", "5"], "--classes: expected numbers in 0..4"),
        (["--scheduler", "plms"], "--scheduler: expected one of ddim"),
        (["--dtype", "float8"], "--dtype: expected one of float32"),
        (["--set", "interval=3"], "--set needs --policy"),
    ],
)
def test_sample_refuses_what_it_does_not_know(tmp_path, checkpoint, arguments, message):
    assert message in refused("sample", "--checkpoint", checkpoint, "--out", tmp_path / "out", *arguments)


@pytest.mark.slow
def test_demo_writes_pictures_plans_and_numbers(tmp_path, monkeypatch):
    monkeypatch.setattr("fastcache.workshop.studies.demo.PICTURES", range(6))
    report = run_demo(tmp_path, rounds=1, sampler=Sampler(steps=8, batch_size=3))
    assert {path.name for path in tmp_path.iterdir()} == {
        "grid.png",
        "steps.png",
        "tokens.png",
        "report.json",
    }
    written = json.loads((tmp_path / "report.json").read_text())
    assert [row["setting"] for row in written["rows"]] == [setting.name for setting in SETTINGS]
    uncached, *cached = report.rows
    assert uncached.speedup == 1 and uncached.psnr_db is None and uncached.feature_bytes == 0
    for row in cached:
        assert len(row.batch_seconds) == 2
        assert len(row.steps) > 1
        assert row.feature_bytes > 0 and row.psnr_db > 10
        assert row.quotient == pytest.approx(row.speedup / row.ideal_speedup)
    steps = {row.setting: row.steps for row in cached}
    assert (
        {"full", "partial", "skip"} == set(steps["DuCa interval 3"])
        and "partial" in steps["ToCa interval 3"]
        and "forecast" in steps["TaylorSeer interval 5"]
    )
    for name, kind in (
        ("FORA interval 3", "reuse"),
        ("DuCa interval 3", "skip"),
        ("TaylorSeer interval 5", "forecast"),
    ):
        assert steps[name][kind].ops < steps[name]["full"].ops


@pytest.mark.full
def test_quality_keeps_the_pictures_of_finished_settings(tmp_path, monkeypatch):
    settings = (SETTINGS[0], SETTINGS[2])
    monkeypatch.setattr("fastcache.workshop.studies.quality.SETTINGS", settings)
    sampler = Sampler(steps=5, batch_size=36)
    first = run_quality(tmp_path, per_class=2, sampler=sampler)
    calls = []
    monkeypatch.setattr(
        "fastcache.workshop.studies.comparison.sample", lambda *args, **options: calls.append(args)
    )
    second = run_quality(tmp_path, per_class=2, sampler=sampler)
    assert calls == []
    for row, again in zip(first.rows, second.rows, strict=True):
        assert (again.psnr_db, again.seconds_per_picture) == (row.psnr_db, row.seconds_per_picture)
        assert again.frechet_distance == pytest.approx(row.frechet_distance, rel=1e-3)
    assert first.pictures == 72
    assert first.real_accuracy > 0.95
    assert all(row.frechet_distance > first.floor > 0 for row in first.rows)


def test_a_policy_on_the_command_line_is_the_policy_of_the_library():
    from fastcache.cli.policy_options import policy_from

    assert policy_from("FORA", ["interval=4"]) == FORA(interval=4)
    assert policy_from(None, None) is None


def test_a_missing_package_is_named_with_the_command_that_brings_it(monkeypatch, capsys):
    monkeypatch.setitem(sys.modules, "typer", None)
    for module in [
        name for name in sys.modules if name.startswith("fastcache.cli.") and name != "fastcache.cli.main"
    ]:
        monkeypatch.delitem(sys.modules, module)
    with pytest.raises(SystemExit) as ended:
        fastcache.cli.main.main()
    told = capsys.readouterr().err
    assert ended.value.code == 2 and told.count("\n") == 1
    assert "pip install typer" in told and "pip install --no-build-isolation '.[demo]'" in told


# --- doctor -------------------------------------------------------------------------------------


def test_doctor_says_which_backend_runs_each_operator_and_why_the_others_do_not(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setenv("COLUMNS", "200")
    lines = run("doctor").splitlines()
    for operator in backends.library.OPERATORS:
        row = next(line for line in lines if line.startswith(f" {operator} "))
        cells = [cell for cell in re.split(r"\s{2,}", row.strip()) if cell]
        assert cells[1] == backends.chosen_name(torch.device("cpu"), operator=operator)
        for name, cell in zip(backends.NAMES, cells[-4:], strict=True):
            has, runs = operator in backends.IMPLEMENTS[name], backends.status()[name].available
            assert cell == ("no kernel of it" if not has else "yes" if runs else "cannot run here")


def test_every_operator_has_a_form_that_doctor_verifies() -> None:
    assert {form.operator.__name__ for form in FORMS.values()} == set(backends.library.OPERATORS)


def test_verification_passes_here_and_says_nothing_of_backends_without_a_kernel() -> None:
    verdicts = list(verify(torch.device("cpu")))
    assert verdicts and all(verdict.passed for verdict in verdicts), [
        verdict for verdict in verdicts if not verdict.passed
    ]
    assert all(verdict.operator in backends.IMPLEMENTS[verdict.backend] for verdict in verdicts)
