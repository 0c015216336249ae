"""Files that commands write: whole or not there, after a signal, a full disk and damage of any kind."""

import errno
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import torch
from processes import ROOT

pytest.importorskip("typer")
pytest.importorskip("diffusers")

from PIL import Image
from typer.testing import CliRunner

from fastcache.calibration.calibrated import Calibration
from fastcache.calibration.scan import ErrorCurves
from fastcache.cli.app import app
from fastcache.errors import ScheduleError
from fastcache.files.arrays import read_arrays, write_arrays
from fastcache.files.json_text import read_json
from fastcache.files.whole import SUFFIX, remove_leftovers, require_writable, write_text_whole, write_whole
from fastcache.models import DiT
from fastcache.models.checkpoint import Checkpoint, write_checkpoint
from fastcache.plan.layout import Branch, Layout
from fastcache.plan.published import PublishedSchedule
from fastcache.plan.schedule import Schedule
from fastcache.plan.step import full_step
from fastcache.workshop.studies.comparison import SETTINGS, Sampler
from fastcache.workshop.studies.frontier.results import FrontierRow, Store
from fastcache.workshop.studies.quality import _pictures_of

LAYOUT = Layout("DiT", 4, 8, 2, (Branch(0, "attn", 10), Branch(0, "mlp", 10)))


def command(*arguments: object):
    return CliRunner().invoke(app, [str(argument) for argument in arguments])


def checkpoint_in(folder: Path, seed: int = 0, std: float = 0.1) -> Path:
    torch.manual_seed(seed)
    model = DiT(8, 4, 3, hidden_size=32, depth=2, num_heads=2, num_classes=5, learn_sigma=False)
    torch.nn.init.normal_(model.final_layer.linear.weight, std=std)
    folder.mkdir(exist_ok=True)
    write_checkpoint(folder / "tiny.safetensors", Checkpoint(model.state_dict(), model.config, {}))
    return folder / "tiny.safetensors"


@pytest.fixture
def sampling(tmp_path: Path) -> list[object]:
    """The arguments of a run of four pictures, in two batches."""
    return ["sample", "--checkpoint", checkpoint_in(tmp_path), "--classes", "0-3", "--steps", 2,
            "--batch-size", 2, "--out", tmp_path / "out"]  # fmt: skip


def pictures(folder: Path) -> list[Path]:
    return sorted(folder.glob("*.png"))


def are_whole(folder: Path) -> bool:
    for path in pictures(folder):
        with Image.open(path) as picture:
            picture.load()
    return True


# --- one function writes ---------------------------------------------------------------------------


def test_a_file_is_under_its_name_only_when_it_is_complete(tmp_path: Path) -> None:
    target = tmp_path / "made" / "a.txt"
    seen = []

    def write(partial: Path) -> None:
        partial.write_text("all of it")
        seen.append((partial.parent, partial.suffix, target.exists()))

    write_whole(target, write)
    assert seen == [(target.parent, SUFFIX, False)]
    assert target.read_text() == "all of it" and [path.name for path in target.parent.iterdir()] == ["a.txt"]


def test_what_fails_in_the_middle_leaves_the_old_file_and_no_other(tmp_path: Path) -> None:
    target = tmp_path / "a.txt"
    target.write_text("old")

    def write(partial: Path) -> None:
        partial.write_text("ne")
        raise OSError(errno.ENOSPC, "No space left on device")

    with pytest.raises(OSError, match=r"a\.txt: cannot be written: No space left on device") as raised:
        write_whole(target, write)
    assert raised.value.errno == errno.ENOSPC
    assert target.read_text() == "old" and list(tmp_path.iterdir()) == [target]


def test_a_link_is_followed_and_a_device_is_written_directly(tmp_path: Path) -> None:
    (tmp_path / "link").symlink_to(tmp_path / "target")
    write_text_whole(tmp_path / "link", "text")
    assert (tmp_path / "link").is_symlink() and (tmp_path / "target").read_text() == "text"
    write_text_whole("/dev/null", "text")
    require_writable("/dev/null")
    assert not Path("/dev/null").is_file()


def test_temporary_files_of_dead_processes_are_removed_and_of_living_ones_are_not(tmp_path: Path) -> None:
    ended = subprocess.Popen([sys.executable, "-c", ""])
    ended.wait()
    for name in (f"a.png.{ended.pid}{SUFFIX}", f"a.png.{os.getpid()}{SUFFIX}", "a.png", f"mine{SUFFIX}"):
        (tmp_path / name).touch()
    assert [path.name for path in remove_leftovers(tmp_path)] == [f"a.png.{ended.pid}{SUFFIX}"]
    assert len(list(tmp_path.iterdir())) == 3


SAVED = {
    "Schedule.save": lambda path: Schedule(LAYOUT, (full_step(LAYOUT),)).save(path),
    "Schedule.draw": lambda path: Schedule(LAYOUT, (full_step(LAYOUT),)).draw(path),
    "PublishedSchedule.save": lambda path: PublishedSchedule((("attn", (1, 0)),)).save(path),
    "Calibration.save": lambda path: calibration().save(path),
    "Calibration.draw": lambda path: calibration().draw(path),
    "write_checkpoint": lambda path: write_checkpoint(
        path, Checkpoint({"a": torch.zeros(3)}, DiT(8, 4, 3, 32, 1, 2).config, {})
    ),
    "write_arrays": lambda path: write_arrays(path, {"a": np.zeros(3)}),
}


def calibration() -> Calibration:
    return Calibration(ErrorCurves(LAYOUT, (((0.1, 0.2),), ((0.1, 0.3),))), 0.15)


@pytest.mark.parametrize("what", SAVED)
def test_what_is_saved_is_moved_into_place(
    what: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    moved = []
    original = os.replace
    monkeypatch.setattr(os, "replace", lambda source, to: (moved.append((source, to)), original(source, to)))
    target = tmp_path / "new" / "file.png"
    SAVED[what](target)
    assert [str(to) for _, to in moved] == [str(target)] and target.stat().st_size > 0


def test_no_module_writes_a_file_by_another_way() -> None:
    ways = (".write_text(", ".write_bytes(", ".savefig(", "np.savez", "torch.save(", "save_file(")
    allowed = {"files/whole.py", "files/arrays.py"}
    for path in sorted((ROOT / "fastcache").rglob("*.py")):
        if "kernels" in path.parts or path.relative_to(ROOT / "fastcache").as_posix() in allowed:
            continue
        for number, line in enumerate(path.read_text().splitlines(), 1):
            if any(way in line for way in ways):
                assert "partial" in line, f"{path}:{number}: {line.strip()}"


# --- sample ----------------------------------------------------------------------------------------

STOPPED = """
import os, sys, time
from pathlib import Path
from PIL import Image
from fastcache.cli.app import app
original, count = Image.Image.save, 0
def save(self, path, **options):
    global count
    count += 1
    if count == 2:  # half of a picture is on the disk, and the process hangs until its signal comes
        Path(path).write_bytes(bytes.fromhex("89504e470d0a1a0a0000000d49484452"))
        Path(os.environ["REACHED"]).touch()
        time.sleep(60)
    original(self, path, **options)
Image.Image.save = save
app(sys.argv[1:])
"""


@pytest.mark.parametrize("sent", [signal.SIGINT, signal.SIGTERM, signal.SIGKILL], ids=lambda sent: sent.name)
def test_a_signal_while_a_picture_is_written_leaves_no_part_of_it(
    sent: signal.Signals, tmp_path: Path, sampling: list[object]
) -> None:
    reached = tmp_path / "reached"
    process = subprocess.Popen(
        [sys.executable, "-c", STOPPED, *map(str, sampling)],
        cwd=ROOT,
        env=os.environ | {"REACHED": str(reached)},
        stderr=subprocess.PIPE,
        text=True,
    )
    end = time.monotonic() + 120
    while not reached.exists() and process.poll() is None and time.monotonic() < end:
        time.sleep(0.02)
    process.send_signal(sent)
    said = process.communicate(timeout=60)[1]
    if sent is signal.SIGINT:
        assert process.returncode == 130
        assert (
            said.splitlines()[-1]
            .strip()
            .endswith("fastcache sample: interrupted; run the same command again to go on")
        )
    assert len(pictures(tmp_path / "out")) == 1 and are_whole(tmp_path / "out")
    again = command(*sampling)
    assert again.exit_code == 0 and "3 pictures made, 1 were there" in again.output, again.output
    assert len(pictures(tmp_path / "out")) == 4 and are_whole(tmp_path / "out")
    assert not list((tmp_path / "out").glob(f"*{SUFFIX}"))


@pytest.mark.parametrize("left", [0, 33, -5], ids=["empty", "33 bytes", "cut"])
def test_resume_opens_what_it_counts_as_done(left: int, tmp_path: Path, sampling: list[object]) -> None:
    assert command(*sampling).exit_code == 0
    damaged = pictures(tmp_path / "out")[1]
    whole = damaged.read_bytes()
    damaged.write_bytes(whole[:left])
    again = command(*sampling)
    assert f"cannot be opened and made again: {damaged}" in again.output
    assert "1 pictures made, 3 were there" in again.output and damaged.read_bytes() == whole


def test_a_finished_run_says_so_without_a_bar(sampling: list[object]) -> None:
    first = command(*sampling)
    assert "%|" in first.output and "steps of a picture: 2 full" in first.output
    again = command(*sampling)
    assert "finished before: all 4 pictures are in" in again.output and "%|" not in again.output


def test_a_full_disk_is_one_line_and_costs_no_picture(
    tmp_path: Path, sampling: list[object], monkeypatch: pytest.MonkeyPatch
) -> None:
    original = Image.Image.save

    def save(self, path: Path, **options: object) -> None:
        if "00002" in str(path):
            path.write_bytes(b"\x89PNG")
            raise OSError(errno.ENOSPC, "No space left on device")
        original(self, path, **options)

    monkeypatch.setattr(Image.Image, "save", save)
    result = command(*sampling)
    said = result.output.splitlines()[-1]
    assert result.exit_code == 2 and "No space left on device; free some space" in said
    assert len(pictures(tmp_path / "out")) == 2 and are_whole(tmp_path / "out")
    monkeypatch.undo()
    assert "2 pictures made, 2 were there" in command(*sampling).output


def test_another_models_pictures_are_not_taken_as_done(tmp_path: Path, sampling: list[object]) -> None:
    assert command(*sampling).exit_code == 0
    checkpoint_in(tmp_path, seed=1)  # the same file name
    result = command(*sampling)
    assert result.exit_code == 2 and "another weights" in result.output


@pytest.mark.parametrize(
    "more", [("--seed", 1), ("--dtype", "bfloat16"), ("--guidance", 3), ("--policy", "fora")], ids=str
)
def test_every_argument_that_changes_a_picture_is_part_of_the_settings(
    more: tuple[str, object], sampling: list[object]
) -> None:
    assert command(*sampling).exit_code == 0
    result = command(*sampling, *more)
    assert result.exit_code == 2 and "holds pictures of other settings" in result.output


def test_two_schedules_of_one_name_are_two_settings(tmp_path: Path, sampling: list[object]) -> None:
    schedule = tmp_path / "s.json"
    options = ["--policy", "smoothcache", "--set", f"schedule={schedule}", "--steps", 4]
    schedule.write_text(json.dumps({"attn": [1, 0, 1, 1], "mlp": [1, 0, 1, 1]}))
    assert command(*sampling, *options).exit_code == 0
    schedule.write_text(json.dumps({"attn": [1, 1, 0, 1], "mlp": [1, 1, 0, 1]}))
    assert command(*sampling, *options).exit_code == 2


@pytest.mark.parametrize(
    "more", [("--steps", 0), ("--vae", "/nowhere/at/all"), ("--guidance", "nan")], ids=str
)
def test_a_refused_run_does_not_claim_its_folder(
    more: tuple[str, object], tmp_path: Path, sampling: list[object]
) -> None:
    assert command(*sampling, *more).exit_code == 2
    assert not (tmp_path / "out" / "settings.json").exists()


def test_a_failed_run_does_not_claim_its_folder(tmp_path: Path, sampling: list[object]) -> None:
    failing = checkpoint_in(tmp_path / "huge", std=1e38)
    result = command(*sampling, "--checkpoint", failing)
    assert result.exit_code == 2 and "NaN or infinity first appeared at step 0 of 2" in result.output
    assert not list((tmp_path / "out").iterdir())
    assert command(*sampling).exit_code == 0


@pytest.mark.parametrize("content", [b'{"checkpoint": "ti', b"", b"\xff\xfe\x00", b"[" * 9000, b"[1]"])
def test_a_half_written_or_foreign_settings_file_says_what_to_delete(
    content: bytes, tmp_path: Path, sampling: list[object]
) -> None:
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "settings.json").write_bytes(content)
    result = command(*sampling)
    assert result.exit_code == 2 and result.output.count("\n") == 1, result.output
    assert "settings.json" in result.output and "delete" in result.output


def test_pictures_without_settings_are_not_taken_as_done(tmp_path: Path, sampling: list[object]) -> None:
    assert command(*sampling).exit_code == 0
    (tmp_path / "out" / "settings.json").unlink()
    result = command(*sampling)
    assert result.exit_code == 2 and "no settings.json that says of which settings" in result.output


# --- frontier and quality --------------------------------------------------------------------------

ROW = FrontierRow(
    "a", "FORA", 2, True, {}, 2, 1.0, 1.0, None, 1.0, 1.0, 1.0, 1.0, 1.0, 1.0, [1.0], [1.0], {}, 0
)


@pytest.mark.parametrize(
    ("name", "content"),
    [("a.json", b'{"fingerprint": "x", "ro'), ("a.json", b"{}"), ("a.npz", b"PK\x03\x04"), ("a.npz", None)],
    ids=["cut record", "foreign record", "cut arrays", "no arrays"],
)
def test_a_damaged_result_is_named_set_aside_and_made_again(
    name: str, content: bytes | None, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    store = Store(tmp_path)
    store.write("a", "x", ROW, {"features": np.zeros((2, 3), np.float32)})
    assert store.row("a", "x") == ROW
    if content is None:
        (tmp_path / name).unlink()
    else:
        (tmp_path / name).write_bytes(content)
    assert store.row("a", "x") is None and not store.stale("a", "x")
    assert "set aside as" in caplog.text and "a.json" in caplog.text
    assert (tmp_path / "a.json.damaged").exists()
    store.write("a", "x", ROW, {"features": np.zeros((2, 3), np.float32)})
    assert store.row("a", "x") == ROW


def test_the_end_of_an_array_file_is_read_before_it_counts(tmp_path: Path) -> None:
    path = tmp_path / "a.npz"
    write_arrays(path, {"a": np.random.default_rng(0).normal(size=999)})
    whole = path.read_bytes()
    for content in (whole[:-1], whole[:200], whole[:300] + b"\0\0\0\0" + whole[304:], b"", b"text"):
        path.write_bytes(content)
        with pytest.raises(ValueError, match="not an .npz file that can be read to its end"):
            read_arrays(path, ("a",))


def test_quality_makes_a_damaged_setting_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    from fastcache.workshop.sampling import Samples

    made = Samples(torch.zeros(72, 3, 32, 32), (1.0,), None, None)
    monkeypatch.setattr(Sampler, "run", lambda *arguments, **options: made)
    first = _pictures_of(SETTINGS[0], tmp_path, 2, Sampler())
    path = tmp_path / "uncached.npz"
    path.write_bytes(path.read_bytes()[:-40])
    again = _pictures_of(SETTINGS[0], tmp_path, 2, Sampler())
    assert not again.kept and np.array_equal(first.pictures, again.pictures)
    assert "uncached.npz: damaged" in caplog.text and (tmp_path / "uncached.npz.damaged").exists()
    assert _pictures_of(SETTINGS[0], tmp_path, 2, Sampler()).kept


# --- JSON ------------------------------------------------------------------------------------------

DAMAGED = {
    "binary": b"\x00\xff\xfe\x80",
    "cut": b'{"attn": [1, 0',
    "empty": b"",
    "deeply nested": b"[" * 100_000,
    "endless number": b'{"attn": [' + b"1" * 9000 + b"]}",
    "utf-16": '{"attn": [1]}'.encode("utf-16"),
}


@pytest.mark.parametrize("kind", DAMAGED)
def test_damaged_json_is_one_error_that_names_the_file(kind: str, tmp_path: Path) -> None:
    path = tmp_path / "s.json"
    path.write_bytes(DAMAGED[kind])
    with pytest.raises(ValueError, match=r"s\.json: not JSON"):
        read_json(path)
    result = command("plan", "--policy", "smoothcache", "--set", f"schedule={path}")
    assert result.exit_code == 2 and result.output.count("\n") == 1 and "s.json" in result.output


def test_a_byte_order_mark_is_accepted(tmp_path: Path) -> None:
    (tmp_path / "s.json").write_bytes(b"\xef\xbb\xbf" + b'{"attn": [1, 0]}')
    assert PublishedSchedule.read(tmp_path / "s.json").entries == (("attn", (1, 0)),)


def test_a_fingerprint_with_text_for_numbers_says_what_was_expected() -> None:
    made = {"family": "DiT", "layers": 2, "names": ["attn"], "num_steps": "10"}
    with pytest.raises(ScheduleError, match="num_steps: expected a whole number, got '10'") as raised:
        PublishedSchedule.read(json.dumps({"attn": [1] * 10, "fastcache": made}))
    assert "\n" not in str(raised.value)
