"""L2C: steps in pairs, and a learned router that says what the second of a pair recomputes.

Method: docs/methods/l2c.md.
"""

import pickle
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from fastcache.errors import ScheduleError
from fastcache.extras import needs_extra
from fastcache.plan.layout import Layout
from fastcache.plan.published import PublishedSchedule, steps_from_rows
from fastcache.plan.schedule import Schedule
from fastcache.policies.base import Policy, positive_steps

CONTAINERS = (
    "a mapping {step index: [2L]}, a list of [2L] per step index, a state dict with keys such as"
    " routers.<index>, or one tensor [T, 2L]"
)


@dataclass(frozen=True, init=False)
class L2C(Policy):
    """Execution steps 0, 2, 4, ... are full; at each step between, the router's active branches are
    recomputed.

    Source: Ma et al., "Learning-to-Cache: Accelerating Diffusion Transformer via Layer Caching".
    """

    published: PublishedSchedule
    threshold: float | None = None

    def __init__(
        self, router: Mapping[str, Any] | str | Path | PublishedSchedule, threshold: float | None = None
    ) -> None:
        """router: a router file, or an indexed JSON schedule (which has no threshold; 0.1 for a router)."""
        path = Path(router) if isinstance(router, (str, Path)) and not _is_json(router) else None
        if path is not None and path.suffix != ".json":
            threshold = 0.1 if threshold is None else threshold
            router = _published(_read(path), threshold, path)
        elif threshold is not None and not isinstance(router, PublishedSchedule):
            raise ValueError(
                f"threshold: an indexed schedule is decided already, expected None, got {threshold!r}"
            )
        published = PublishedSchedule.read(router)
        _require_pairs(published)
        object.__setattr__(self, "published", published)
        object.__setattr__(self, "threshold", threshold)

    @classmethod
    def from_router(cls, path: str | Path, threshold: float = 0.1) -> "L2C":
        """Read a published router: per respaced step index s, 2L numbers; 2l is attn of layer l, 2l + 1 its
        mlp.

        A branch is recomputed if sigmoid(number) > threshold. Only even s are looked at: they are the
        second steps of the pairs, executed at T - 1 - s. Files: what torch.save wrote (tensors alone
        are loaded, no code), or .safetensors.
        Raises FileNotFoundError, ValueError naming what was expected, ScheduleError for odd T.
        """
        return cls(_published(_read(Path(path)), threshold, Path(path)), threshold)

    @classmethod
    def from_json(cls, path: str | Path) -> "L2C":
        """Read the indexed JSON form, such as SmoothCache's 50-N-2-l2c.json."""
        return cls(PublishedSchedule.read(Path(path)))

    def schedule(self, num_steps: int, layout: Layout) -> Schedule:
        num_steps = positive_steps(num_steps)
        if num_steps % 2:
            raise ScheduleError(f"num_steps: L2C pairs steps, expected an even number, got {num_steps}")
        rows = self.published.rows(layout, num_steps)
        absent = [
            f"{branch.name}-{branch.block}"
            for branch in layout.branches
            if self.published.flags(branch.name, branch.block) is None
        ]
        if absent:
            raise ScheduleError(
                f"router: it was trained for another number of layers: the model's {absent[0]} and"
                f" {len(absent) - 1} other branches are not in it"
            )
        return Schedule(layout, steps_from_rows(layout, rows), "L2C", self.fields())

    def fields(self) -> dict[str, Any]:
        fields: dict[str, Any] = {"router": self.published.describe()}
        return fields if self.threshold is None else {**fields, "threshold": self.threshold}


def _is_json(router: str | Path) -> bool:
    return str(router).lstrip().startswith("{")


def _require_pairs(published: PublishedSchedule) -> None:
    if published.num_steps % 2:
        raise ScheduleError(
            f"router: L2C pairs steps, expected an even number of steps, got {published.num_steps}"
        )
    for key, flags in published.entries:
        if 0 in flags[::2]:
            raise ScheduleError(
                f"router[{key!r}]: step {2 * flags[::2].index(0)} reuses, but in L2C steps 0, 2, 4, ... are"
                " full; use fastcache.SmoothCache for other schedules"
            )


def _published(routers: dict[int, Tensor], threshold: float, path: Path) -> PublishedSchedule:
    if not 0.0 <= threshold < 1.0:
        raise ValueError(
            f"threshold: expected 0 <= threshold < 1 (it is compared with a sigmoid), got {threshold!r}"
        )
    num_steps = _num_steps(sorted(routers), path)
    width = len(routers[0])
    rows = []
    for k in range(num_steps):
        active = (
            [True] * width
            if k % 2 == 0
            else (routers[num_steps - 1 - k].float().sigmoid() > threshold).tolist()
        )
        rows.append([int(flag) for flag in active])
    entries = tuple(
        (f"{('attn', 'mlp')[row % 2]}-{row // 2}", tuple(step[row] for step in rows)) for row in range(width)
    )
    return PublishedSchedule(entries)


def _num_steps(indices: list[int], path: Path) -> int:
    """T of a router that has either every step index 0..T-1, or the even ones."""
    if indices == list(range(len(indices))) and len(indices) > 1:
        if len(indices) % 2:
            raise ScheduleError(
                f"router: {path} is for {len(indices)} steps; L2C pairs steps, expected an even number"
            )
        return len(indices)
    if indices == list(range(0, 2 * len(indices), 2)):
        return 2 * len(indices)
    raise ValueError(f"router: {path}: expected step indices 0, 1, ..., T-1 or 0, 2, ..., T-2, got {indices}")


def _read(path: Path) -> dict[int, Tensor]:
    if not path.is_file():
        raise FileNotFoundError(f"router: no such file: {path}")
    if path.suffix == ".safetensors":
        with needs_extra("demo"):
            from safetensors import SafetensorError
            from safetensors.torch import load_file
        try:
            return _routers(load_file(path), path)
        except SafetensorError as error:
            raise ValueError(f"router: {path} is cut or damaged; get it again") from error
    try:
        content = torch.load(path, map_location="cpu", weights_only=True)
    except pickle.UnpicklingError as error:
        if "GLOBAL" not in str(error):  # no name of a class or function: not a file of this kind at all
            raise ValueError(f"router: {path} is no .pt file, or is damaged; get it again") from error
        raise ValueError(f"router: {path} holds more than tensors; save {CONTAINERS}") from error
    except Exception as error:  # a cut or garbled archive ends in errors of every kind
        raise ValueError(f"router: {path} is no .pt file, or is cut or damaged; get it again") from error
    return _routers(content, path)


def _routers(content: object, path: Path) -> dict[int, Tensor]:
    if isinstance(content, Tensor) and content.dim() == 2:
        content = list(content)
    if isinstance(content, Mapping) and len(content) == 1:
        (inner,) = content.values()
        if not isinstance(inner, Tensor) or inner.dim() == 2:  # {"routers": ...}, {"state_dict": ...}
            return _routers(inner, path)
    if isinstance(content, Sequence) and not isinstance(content, str):
        content = dict(enumerate(content))
    if not isinstance(content, Mapping) or not content:
        raise ValueError(f"router: {path}: expected {CONTAINERS}, got {type(content).__name__}")
    routers: dict[int, Tensor] = {}
    for key, value in content.items():
        index = _index(key, path)
        if index in routers:
            raise ValueError(f"router: {path}: two entries for step index {index}, the second is {key!r}")
        if (
            not isinstance(value, Tensor)
            or not value.is_floating_point()
            or value.dim() != 1
            or len(value) == 0
            or len(value) % 2
        ):
            got = f"{value.dtype} {list(value.shape)}" if isinstance(value, Tensor) else type(value).__name__
            raise ValueError(f"router[{key!r}]: {path}: expected a float tensor [2L], got {got}")
        routers[index] = value
    widths = {len(value) for value in routers.values()}
    if len(widths) > 1:
        raise ValueError(
            f"router: {path}: expected [2L] of one L at every step, got lengths {sorted(widths)}"
        )
    return routers


def _index(key: object, path: Path) -> int:
    """12, "12", "routers.12" and "module.routers.12.prob" are step index 12."""
    if isinstance(key, int) and not isinstance(key, bool):
        return key
    numbers = [part for part in str(key).split(".") if re.fullmatch(r"\d+", part)]
    if len(numbers) != 1:
        raise ValueError(f"router: {path}: expected {CONTAINERS}; the key {key!r} names no step index")
    return int(numbers[0])
