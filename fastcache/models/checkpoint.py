"""Reading and writing DiT weights: the family's `.pt` files, and `.safetensors` with its configuration."""

import contextlib
import json
import math
import pickle
from collections.abc import Mapping
from dataclasses import asdict, dataclass, fields
from pathlib import Path

import torch
from torch import Tensor

from fastcache.extras import needs_extra
from fastcache.files.json_text import parse_json
from fastcache.files.whole import write_whole
from fastcache.models.config import PRESETS, DiTConfig


@dataclass(frozen=True)
class Checkpoint:
    """A state dict with the DiT family's keys, the size that it fits, and the file's other metadata."""

    state: Mapping[str, Tensor]
    config: DiTConfig
    metadata: Mapping[str, str]


def read_checkpoint(path: str | Path, *, num_heads: int | None = None) -> Checkpoint:
    """Read a `.safetensors` file, or a `.pt` file with a state dict, bare or under `ema` or `model`.

    `num_heads` is needed where the file has no `config` and its size is not one of `PRESETS`.
    Nothing in the file is executed. Raises FileNotFoundError; IsADirectoryError; ValueError, naming the file,
    if it is damaged, holds more than tensors, is no DiT, does not fit its own `config`, or contradicts
    `num_heads`.
    """
    path = Path(path)
    if path.is_dir():
        raise IsADirectoryError(f"path: {path} is a folder, expected a .pt or .safetensors file")
    if not path.is_file():
        raise FileNotFoundError(f"path: no such file: {path}")
    if path.stat().st_size == 0:
        raise ValueError(f"path: {path} is empty; get the file again")
    state, metadata = _read_safetensors(path) if path.suffix == ".safetensors" else (_read_pickle(path), {})
    found = config_from_shapes(state, num_heads or _saved_heads(metadata), path)
    if "config" in metadata:
        config = _saved_config(metadata["config"], path)
        if num_heads not in (None, config.num_heads):
            raise ValueError(f"num_heads: {path} was saved with {config.num_heads} heads, got {num_heads}")
        _require_same(config, found, path)
        found = config
    return Checkpoint(state, found, metadata)


def require_finite(checkpoint: Checkpoint, path: str | Path) -> None:
    """Raises ValueError naming the first tensor of a checkpoint that holds NaN or infinity."""
    for name, tensor in checkpoint.state.items():
        if tensor.is_floating_point() and not tensor.isfinite().all():
            bad = int((~tensor.isfinite()).sum())
            raise ValueError(
                f"path: {path}: {name} holds {bad} of {tensor.numel()} values that are NaN or infinite; get"
                " or train the weights again"
            )


def write_checkpoint(path: str | Path, checkpoint: Checkpoint) -> None:
    """Write `checkpoint` as `.safetensors`, in the dtypes of its state, with `config` as JSON metadata."""
    with needs_extra("demo"):
        from safetensors.torch import save_file
    tensors = {name: tensor.detach().cpu().contiguous() for name, tensor in checkpoint.state.items()}
    metadata = {**checkpoint.metadata, "config": json.dumps(asdict(checkpoint.config))}
    write_whole(path, lambda partial: save_file(tensors, partial, metadata=metadata))


def _read_safetensors(path: Path) -> tuple[dict[str, Tensor], dict[str, str]]:
    with needs_extra("demo"):
        from safetensors import safe_open
    try:
        with safe_open(path, "pt") as file:
            names = file.keys()  # no mapping: it cannot be iterated itself
            return {name: file.get_tensor(name) for name in names}, file.metadata() or {}
    except Exception as error:  # the library's own kind, and whatever a garbled header leads to
        raise ValueError(
            f"path: {path} is no whole .safetensors file ({_short(error)}); get it again"
        ) from error


def _read_pickle(path: Path) -> Mapping[str, Tensor]:
    try:
        content = torch.load(path, map_location="cpu", weights_only=True)
    except pickle.UnpicklingError as error:
        if "GLOBAL" in str(error):  # a name of a class or function
            raise ValueError(
                f"path: {path} holds more than tensors, which is not executed; save its state dict alone"
            ) from error
        raise ValueError(f"path: {path} is no .pt file, or a damaged one; get it again") from error
    except Exception as error:  # a cut or garbled archive ends in errors of every kind
        raise ValueError(f"path: {path} is no .pt file, or is cut or damaged; get it again") from error
    for key in ("ema", "model"):
        if isinstance(content, Mapping) and isinstance(content.get(key), Mapping):
            content = content[key]
            break
    if not isinstance(content, Mapping):
        raise ValueError(f"path: {path} is not a DiT state dict (it holds a {type(content).__name__})")
    other = [name for name, value in content.items() if not isinstance(value, Tensor)]
    if other:
        raise ValueError(f"path: {path} is not a DiT state dict (its entry {other[0]!r} is no tensor)")
    return content


def _short(error: Exception) -> str:
    """The first line of an error, or its kind."""
    line = (str(error).strip() or type(error).__name__).splitlines()[0]
    return line if len(line) <= 100 else line[:97] + "..."


def _saved_config(text: str, path: Path) -> DiTConfig:
    found = parse_json(text, f"path: {path}: config")
    try:
        return DiTConfig(**found)  # type: ignore[arg-type]
    except TypeError:
        names = ", ".join(field.name for field in fields(DiTConfig))
        raise ValueError(f"path: {path}: config: expected a mapping of {names}") from None
    except ValueError as error:
        raise ValueError(f"path: {path}: config: {error}") from None


def _saved_heads(metadata: Mapping[str, str]) -> int | None:
    """The heads that a file's own configuration names; what is wrong with it is told when it is read."""
    with contextlib.suppress(ValueError, TypeError, AttributeError):
        heads = json.loads(metadata.get("config", "")).get("num_heads")
        return heads if isinstance(heads, int) and heads > 0 else 1
    return 1 if "config" in metadata else None


def _require_same(config: DiTConfig, found: DiTConfig, path: Path) -> None:
    """The saved sizes are those of the tensors: a model is never built from a number that nothing backs."""
    for name, expected in asdict(found).items():
        value = getattr(config, name)
        if name == "mlp_ratio":  # a ratio is rounded to whole channels
            value, expected = (int(config.hidden_size * ratio) for ratio in (value, expected))
        if name != "num_heads" and value != expected:
            raise ValueError(
                f"path: {path}: its config says {name} {value!r}, its tensors have {expected!r}; one of them"
                " was changed: get or save the file again"
            )


def config_from_shapes(state: Mapping[str, Tensor], num_heads: int | None, path: Path) -> DiTConfig:
    """The sizes that tensors of the family's names imply, all of which must be there and fit together.

    Raises ValueError naming the file and the first tensor that is missing or has another shape.
    """
    try:
        hidden_size, in_channels, patch_size, _ = state["x_embedder.proj.weight"].shape
        tokens = state["pos_embed"].shape[1]
        inner_size = state["blocks.0.mlp.fc1.weight"].shape[0]
        labels = state["y_embedder.embedding_table.weight"].shape[0]
        patch_outputs = state["final_layer.linear.weight"].shape[0]
    except KeyError as error:
        raise ValueError(f"path: {path} is not a DiT state dict (looked for {error})") from error
    except (TypeError, ValueError, AttributeError, IndexError) as error:
        raise ValueError(
            f"path: {path} is not a DiT state dict (its tensors have other shapes: {error})"
        ) from error
    depth = len({name.split(".")[1] for name in state if name.startswith("blocks.")})
    try:
        config = DiTConfig(
            input_size=math.isqrt(tokens) * patch_size,
            patch_size=patch_size,
            in_channels=in_channels,
            hidden_size=hidden_size,
            depth=depth,
            num_heads=num_heads or _published_heads(depth, hidden_size, path),
            mlp_ratio=inner_size / hidden_size,
            num_classes=labels - 1,
            learn_sigma=patch_outputs == 2 * in_channels * patch_size**2,
        )
    except (ZeroDivisionError, ValueError) as error:
        if str(error).startswith("num_heads"):
            raise
        raise ValueError(f"path: {path} is not a DiT state dict (its tensors imply {error})") from error
    return config


def _published_heads(depth: int, hidden_size: int, path: Path) -> int:
    for preset in PRESETS.values():
        if (preset.depth, preset.hidden_size) == (depth, hidden_size):
            return preset.num_heads
    raise ValueError(
        f"num_heads: {path} has depth {depth} and hidden_size {hidden_size}, which is no published size; pass"
        " num_heads"
    )
