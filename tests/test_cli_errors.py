"""Whatever is wrong with the input of a command: one line that names argument, value and fix, status 2."""

import json
import os
import struct
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch

pytest.importorskip("typer")
pytest.importorskip("diffusers")

from typer.testing import CliRunner

import fastcache
from fastcache.cli.app import app
from fastcache.cli.errors import line_of
from fastcache.models import DiT
from fastcache.models.checkpoint import Checkpoint, read_checkpoint, write_checkpoint
from fastcache.plan.layout import Branch, Layout
from fastcache.policies import FORA, DuCa, SmoothCache, TaylorSeer, ToCa
from fastcache.workshop.sampling import sample

ATTACKED = "fastcache_test_attack"


class Attack:
    """Runs a command when it is unpickled."""

    def __reduce__(self):
        return os.putenv, (ATTACKED, "1")


def tiny() -> DiT:
    torch.manual_seed(0)
    return DiT(8, 4, 3, hidden_size=32, depth=2, num_heads=2, num_classes=5, learn_sigma=False)


def unexpected() -> DiT:
    """In the place of a model, where none is to be loaded."""
    raise AssertionError("the work began")


def refused(*arguments: object) -> str:
    """The line that a command ends with."""
    result = CliRunner().invoke(app, [str(argument) for argument in arguments])
    assert result.exit_code == 2, result.output
    assert "Traceback" not in result.output
    lines = result.output.strip().splitlines()
    assert len(lines) <= 3, result.output
    return lines[-1]


def with_config(path: Path, change: Callable[[dict], object]) -> bytes:
    """A .safetensors file whose own configuration is changed."""
    content = path.read_bytes()
    length = struct.unpack("<Q", content[:8])[0]
    header = json.loads(content[8 : 8 + length])
    header["__metadata__"]["config"] = json.dumps(change(json.loads(header["__metadata__"]["config"])))
    text = json.dumps(header).encode()
    return struct.pack("<Q", len(text)) + text + content[8 + length :]


def broken(folder: Path) -> dict[str, tuple[Path, str]]:
    """Files that are no checkpoint, and what the error says of each."""
    good = folder / "good.safetensors"
    write_checkpoint(good, Checkpoint(tiny().state_dict(), tiny().config, {}))
    torch.save(tiny().state_dict(), folder / "good.pt")
    archive, state = (folder / "good.pt").read_bytes(), tiny().state_dict()
    first, gone = next(iter(state)), "blocks.1.attn.qkv.weight"
    config = lambda **change: with_config(good, lambda found: {**found, **change})
    made: dict[str, tuple[object, str]] = {
        "empty.pt": (b"", "is empty"),
        "cut.pt": (archive[: len(archive) // 2], "cut or damaged"),
        "garbage.pt": (bytes(range(256)) * 4, "damaged"),
        "text.pt": (b"hello", "damaged"),
        "attack.pt": ({"ema": Attack()}, "holds more than tensors, which is not executed"),
        "list.pt": ([1, 2], "it holds a list"),
        "numbers.pt": ({"a": 1}, "entry 'a' is no tensor"),
        "missing.pt": ({k: v for k, v in state.items() if k != gone}, f"missing {gone}"),
        "depth.pt": ({k.replace("blocks.1", "blocks.7"): v for k, v in state.items()}, "missing blocks.1"),
        "shape.pt": ({**state, "x_embedder.proj.weight": torch.zeros(3)}, "have other shapes"),
        "wide.pt": ({**state, "blocks.0.mlp.fc2.bias": torch.zeros(3)}, "expected [32], got [3]"),
        "nan.pt": ({**state, first: state[first] * float("nan")}, f"{first} holds"),
        "empty.safetensors": (b"", "is empty"),
        "cut.safetensors": (good.read_bytes()[:-8], "no whole .safetensors file"),
        "header.safetensors": (good.read_bytes()[:90], "no whole .safetensors file"),
        "garbage.safetensors": (bytes(range(256)) * 4, "no whole .safetensors file"),
        "huge.safetensors": (config(depth=10**9), "its config says depth 1000000000"),
        "type.safetensors": (config(depth="2"), "depth: expected a whole number"),
        "field.safetensors": (config(x=2), "config: expected a mapping of"),
        "heads.safetensors": (config(num_heads=3), "a divisor of hidden_size 32"),
    }
    found = {}
    for name, (content, message) in made.items():
        if isinstance(content, bytes):
            (folder / name).write_bytes(content)
        else:
            torch.save(content, folder / name)
        found[name] = (folder / name, message)
    return found | {
        "absent.pt": (folder / "absent.pt", "no such file"),
        "folder": (folder, "is a folder"),
    }


NAMES = (
    "empty.pt", "cut.pt", "garbage.pt", "text.pt", "attack.pt", "list.pt", "numbers.pt", "missing.pt",
    "depth.pt", "shape.pt", "wide.pt", "nan.pt", "empty.safetensors", "cut.safetensors", "header.safetensors",
    "garbage.safetensors", "huge.safetensors", "type.safetensors", "field.safetensors", "heads.safetensors",
    "absent.pt", "folder",
)  # fmt: skip


@pytest.mark.parametrize("name", NAMES)
def test_a_bad_checkpoint_is_named_with_what_is_wrong(name: str, tmp_path: Path) -> None:
    path, message = broken(tmp_path)[name]
    options = ("--checkpoint", path, "--num-heads", 2, "--out", tmp_path / "out")
    said = refused("sample", *options)
    assert said.startswith("fastcache sample: --checkpoint: ") and str(path) in said and message in said
    assert os.environ.get(ATTACKED) is None


def test_calibrate_refuses_weights_that_are_not_finite(tmp_path: Path) -> None:
    path, message = broken(tmp_path)["nan.pt"]
    said = refused(
        "calibrate", "--checkpoint", path, "--num-heads", 2, "--threshold", 0.1, "--out", tmp_path / "s"
    )
    assert message in said and not (tmp_path / "s").exists()


def test_heads_that_do_not_fit_are_named(tmp_path: Path) -> None:
    torch.save(tiny().state_dict(), tmp_path / "t.pt")
    options = ("sample", "--checkpoint", tmp_path / "t.pt", "--out", tmp_path / "out")
    assert "--num-heads: expected a divisor of hidden_size 32, got 3" in refused(*options, "--num-heads", 3)
    assert "which is no published size" in refused(*options)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("sample", "--steps", 1001), "--steps: input should be less than or equal to 1000, got '1001'"),
        (("sample", "--steps=0"), "--steps: input should be greater than or equal to 1, got '0'"),
        (("sample", "--classes", "0-99999999999"), "--classes: expected numbers in 0..35, got 99999999999"),
        (
            ("sample", "--classes", "1" * 9999),
            "--classes: expected numbers in 0..35, got a number of 9999 digits",
        ),
        (("sample", "--classes", "²"), "--classes: expected numbers and ranges such as 0,5,10-19, got '²'"),
        (("sample", "--classes", "٣"), "--classes: expected numbers and ranges"),
        (("sample", "--classes", "9-3"), "--classes: expected ranges that rise"),
        (("sample", "--per-class", 999_999), "--per-class: expected at most 1,000,000 pictures"),
        (("sample", "--device", "cuda:7"), "--device: got 'cuda:7', but"),
        (("sample", "--device", "tpu"), "--device: expected cpu, cuda or cuda:NUMBER, got 'tpu'"),
        (("sample", "--guidance", "nan"), "--guidance: expected a finite number, got nan"),
        (("sample", "--guidance", "inf"), "--guidance: expected a finite number, got inf"),
        (("sample", "--policy", "smoothcache"), "--policy: smoothcache needs --set schedule=FILE"),
        (("sample", "--policy", "l2c"), "--policy: l2c needs --set router=FILE"),
        (("sample", "--policy", "l2c", "--set", f"router={__file__}"), "is no .pt file, or"),
        (("sample", "--policy", "smoothcache", "--set", "schedule=/no/such"), "no such file: /no/such"),
        (
            ("plan", "--input-size", 33),
            "--input-size: expected a multiple of patch_size 2, got 33, for DiT-XL/2",
        ),
        (("plan", "--steps", 100_001), "--steps: input should be less than or equal to 100000"),
        (("plan", "--set", "interval=1", "--set", "interval=2"), "--set: interval is given twice"),
        (("calibrate", "--threshold", "inf"), "--threshold: expected a finite number"),
        (("policies", "fora2"), "name: expected one of fora"),
        (("frontier", "--only", "nothing*"), "--only"),
        (("nonsense",), "No such command 'nonsense'"),
        (("sample", "--nonsense"), "No such option: --nonsense"),
        (("plan", "--steps", "x"), "--steps: input should be a valid integer"),
    ],
    ids=lambda value: " ".join(map(str, value))[:40] if isinstance(value, tuple) else "",
)
def test_a_bad_argument_is_named_with_its_value(
    arguments: tuple, message: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    assert message in refused(*arguments)


@pytest.mark.parametrize(
    "command", ["sample", "calibrate --threshold 0.1", "plan", "demo", "quality", "frontier --tiny"]
)
def test_an_output_place_that_is_a_file_is_refused_before_the_work(
    command: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for place in ("", ".studies.demo", ".studies.quality", ".studies.frontier.plan"):
        monkeypatch.setattr(f"fastcache.workshop{place or '.glyphs'}.load_glyph_dit", unexpected)
    (tmp_path / "file").touch()
    option = "--save" if command == "plan" else "--out"
    said = refused(*command.split(), option, tmp_path / "file" / "inner")
    assert f"{option}: " in said and "is a file, expected a folder" in said and str(tmp_path / "file") in said


@pytest.mark.parametrize("command", ["sample", "calibrate --threshold 0.1", "plan"])
def test_a_place_that_cannot_be_written_is_refused_before_the_work(
    command: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(self: Path, content: bytes) -> None:
        raise PermissionError(13, "Permission denied", str(self))

    monkeypatch.setattr(Path, "write_bytes", refuse)
    monkeypatch.setattr("fastcache.workshop.glyphs.load_glyph_dit", unexpected)
    option = "--save" if command == "plan" else "--out"
    said = refused(*command.split(), option, tmp_path / "new" / "s.json")
    assert "cannot be written: Permission denied; choose another place or change its permissions" in said


def test_calibrate_makes_missing_folders(tmp_path: Path) -> None:
    write_checkpoint(tmp_path / "t.safetensors", Checkpoint(tiny().state_dict(), tiny().config, {}))
    out = tmp_path / "a" / "b" / "s.json"
    result = CliRunner().invoke(
        app, ["calibrate", "--checkpoint", str(tmp_path / "t.safetensors"), "--threshold", "0.1",
              "--steps", "3", "--classes", "0", "--samples", "1", "--out", str(out)],
    )  # fmt: skip
    assert result.exit_code == 0 and out.exists(), result.output


def test_debug_shows_the_traceback() -> None:
    result = CliRunner().invoke(app, ["sample", "--debug", "--policy", "smoothcache"])
    assert result.exit_code == 2 and "Traceback" in result.output
    assert result.output.splitlines()[-1].startswith("fastcache sample: --policy: smoothcache needs")


def test_an_error_of_ours_has_another_status_and_says_how_to_see_more(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def fail(*arguments: object) -> None:
        raise KeyError("surprise")

    monkeypatch.setattr("fastcache.cli.plan.layout_of", fail)
    result = CliRunner().invoke(app, ["plan"])
    assert result.exit_code == 1
    assert result.output == "fastcache plan: internal error: KeyError: 'surprise' (--debug shows where)\n"


@pytest.mark.parametrize(
    "error",
    [
        MemoryError(),
        RuntimeError(
            "[enforce fail] DefaultCPUAllocator: can't allocate memory: you tried to allocate 9 bytes"
        ),
        torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 9 GiB"),
    ],
    ids=lambda error: type(error).__name__,
)
def test_out_of_memory_is_named(error: Exception) -> None:
    text, status = line_of(error)
    assert text.startswith("out of memory: use a smaller --batch-size") and status == 2


def test_nan_stops_with_the_step_at_which_it_began() -> None:
    model, calls = tiny(), []
    original = model.forward_with_cfg

    def forward(x, t, y, scale):
        calls.append(t)
        out = original(x, t, y, scale)
        return out * float("nan") if len(calls) == 3 else out

    model.forward_with_cfg = forward
    written = []
    with pytest.raises(
        fastcache.FastCacheError, match=r"step 2 of 5 \(timestep 599\), in the model's prediction"
    ):
        sample(model, [0], steps=5, progress=False, on_batch=lambda *made: written.append(made))
    assert not written


LAYOUT = Layout(
    "DiT", 16, 8, 2, tuple(Branch(block, name, 10) for block in (0, 1) for name in ("attn", "mlp"))
)
STEPPED = (FORA(), TaylorSeer(), ToCa(), DuCa(), SmoothCache({"attn": [1, 0, 0, 1], "mlp": [1, 0, 1, 1]}))


@pytest.mark.parametrize("policy", STEPPED, ids=lambda policy: type(policy).__name__)
def test_numpys_whole_numbers_are_numbers_of_steps(policy: fastcache.Policy) -> None:
    made, expected = policy.schedule(np.int64(4), LAYOUT), policy.schedule(4, LAYOUT)
    assert made == expected and made.to_json() == expected.to_json()
    for wrong in (True, 4.0, np.float64(4), "4", 0):
        with pytest.raises(ValueError, match="num_steps: expected a whole number"):
            policy.schedule(wrong, LAYOUT)


def test_a_configuration_with_a_ratio_that_is_rounded_is_accepted(tmp_path: Path) -> None:
    model = DiT(8, 4, 3, 32, 1, 2, mlp_ratio=2.7, num_classes=5)
    write_checkpoint(tmp_path / "r.safetensors", Checkpoint(model.state_dict(), model.config, {}))
    assert DiT.from_stored(read_checkpoint(tmp_path / "r.safetensors")).config == model.config
