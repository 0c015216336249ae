"""Reading and writing DiT weights: the family's `.pt` files, and `.safetensors` with its configuration."""

import json
import math
import pickle
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
from torch import Tensor

from fastcache.extras import needs_extra
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
    Raises FileNotFoundError; ValueError, naming the file, if it holds no DiT or contradicts `num_heads`.
    """
    path = Path(path)
    if not path.is_file():
        raise FileNotFoundError(f"path: no such file: {path}")
    state, metadata = _read_safetensors(path) if path.suffix == ".safetensors" else (_read_pickle(path), {})
    if "config" not in metadata:
        return Checkpoint(state, _config_from_shapes(state, num_heads, path), metadata)
    config = DiTConfig(**json.loads(metadata["config"]))
    if num_heads not in (None, config.num_heads):
        raise ValueError(f"num_heads: {path} was saved with {config.num_heads} heads, got {num_heads}")
    return Checkpoint(state, config, metadata)


def write_checkpoint(path: str | Path, checkpoint: Checkpoint) -> None:
    """Write `checkpoint` as `.safetensors`, in the dtypes of its state, with `config` as JSON metadata."""
    with needs_extra("demo"):
        from safetensors.torch import save_file
    tensors = {name: tensor.detach().cpu().contiguous() for name, tensor in checkpoint.state.items()}
    save_file(
        tensors, path, metadata={**checkpoint.metadata, "config": json.dumps(asdict(checkpoint.config))}
    )


def _read_safetensors(path: Path) -> tuple[dict[str, Tensor], dict[str, str]]:
    with needs_extra("demo"):
        from safetensors import safe_open
    with safe_open(path, "pt") as file:
        return {name: file.get_tensor(name) for name in file.keys()}, file.metadata() or {}  # noqa: SIM118 (no mapping)


def _read_pickle(path: Path) -> dict[str, Tensor]:
    try:
        content = torch.load(path, map_location="cpu", weights_only=True)
    except pickle.UnpicklingError as error:
        raise ValueError(f"path: {path} holds more than tensors; save its state dict alone") from error
    for key in ("ema", "model"):
        if isinstance(content, dict) and isinstance(content.get(key), dict):
            return content[key]
    return content


def _config_from_shapes(state: Mapping[str, Tensor], num_heads: int | None, path: Path) -> DiTConfig:
    try:
        hidden_size, in_channels, patch_size, _ = state["x_embedder.proj.weight"].shape
        tokens = state["pos_embed"].shape[1]
        inner_size = state["blocks.0.mlp.fc1.weight"].shape[0]
        labels = state["y_embedder.embedding_table.weight"].shape[0]
        patch_outputs = state["final_layer.linear.weight"].shape[0]
    except (KeyError, TypeError) as error:
        raise ValueError(f"path: {path} is not a DiT state dict (looked for {error})") from error
    depth = len({name.split(".")[1] for name in state if name.startswith("blocks.")})
    return DiTConfig(
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


def _published_heads(depth: int, hidden_size: int, path: Path) -> int:
    for preset in PRESETS.values():
        if (preset.depth, preset.hidden_size) == (depth, hidden_size):
            return preset.num_heads
    raise ValueError(
        f"num_heads: {path} has depth {depth} and hidden_size {hidden_size}, which is no published size; pass"
        " num_heads"
    )
