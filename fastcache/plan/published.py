"""SmoothCache's published schedule form, {"attn": [1, 0, ...], "mlp-3": [...]} with 1 = compute.

Method: docs/methods/smoothcache.md, "Schedule form".

A key is a branch name, or a name and a block index, which wins; a branch without a key always
computes. SmoothCache's own reader looks keys up by component name and never lists them, so the
extra entry `FINGERPRINT`, which says what a schedule was made for, is invisible to it.
"""

import hashlib
import json
import numbers
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

from fastcache.errors import ScheduleError
from fastcache.files.json_text import parse_json, read_json
from fastcache.files.whole import write_text_whole
from fastcache.plan.actions import COMPUTE, REUSE, Action, Kind
from fastcache.plan.layout import Layout
from fastcache.plan.step import StepPlan

FINGERPRINT = "fastcache"


@dataclass(frozen=True)
class Fingerprint:
    """What a schedule was calibrated for. `threshold` and `version` are for people to read."""

    family: str
    layers: int
    names: tuple[str, ...]
    num_steps: int
    scheduler: str | None = None
    threshold: float | None = None
    lookahead: int | None = None
    version: str = ""

    @staticmethod
    def from_dict(found: object) -> "Fingerprint":
        """From JSON values. ScheduleError if a field is missing or of another type."""
        try:
            fields = dict(found)  # type: ignore[call-overload]
            _check_fingerprint(fields)
            return Fingerprint(**{**fields, "names": tuple(fields["names"])})
        except (TypeError, ValueError, KeyError) as error:
            raise ScheduleError(
                f"schedule: the entry {FINGERPRINT!r} is not a fingerprint ({error}); remove it to use the"
                " schedule unchecked"
            ) from None

    def check(self, layout: Layout, num_steps: int, scheduler: str | None = None) -> None:
        """ScheduleError naming every way in which a model and sampler differ from those calibrated."""
        pairs = [
            ("family", self.family, layout.family),
            ("layers", self.layers, layout.depth),
            ("branches", self.names, layout.names),
            ("steps", self.num_steps, num_steps),
        ]
        if scheduler is not None and self.scheduler is not None:
            pairs.append(("scheduler", self.scheduler, scheduler))
        differing = [
            f"{name} {_text(made)}, used with {_text(used)}" for name, made, used in pairs if made != used
        ]
        if differing:
            raise ScheduleError(
                f"schedule: it was calibrated for {'; '.join(differing)}. Calibrate again with"
                " fastcache.calibrate"
            )


@dataclass(frozen=True)
class PublishedSchedule:
    """The entries of a file in the published form, checked: 0 and 1 only, all of one length."""

    entries: tuple[tuple[str, tuple[int, ...]], ...]
    fingerprint: Fingerprint | None = None

    @staticmethod
    def read(source: "Mapping[str, Any] | str | Path | PublishedSchedule") -> "PublishedSchedule":
        """From a mapping, JSON text (starts with a brace) or the path of a JSON file."""
        if isinstance(source, PublishedSchedule):
            return source
        content: object = _parsed(source) if isinstance(source, (str, Path)) else source
        if not isinstance(content, Mapping):
            raise ScheduleError(
                'schedule: expected {"attn": [1, 0, ...], ...}, JSON of it or a path, got'
                f" {type(content).__name__}"
            )
        entries = tuple(
            (str(key), _flags(key, values)) for key, values in content.items() if key != FINGERPRINT
        )
        if not entries:
            raise ScheduleError(
                "schedule: expected at least one key such as 'attn' or 'attn-0', got none: nothing would be"
                " cached"
            )
        lengths = {len(flags) for _, flags in entries}
        if len(lengths) > 1 or 0 in lengths:
            raise ScheduleError(
                "schedule: expected lists of one length, the number of steps, got lengths"
                f" {', '.join(f'{key}: {len(flags)}' for key, flags in entries)}"
            )
        fingerprint = Fingerprint.from_dict(content[FINGERPRINT]) if FINGERPRINT in content else None
        return PublishedSchedule(entries, fingerprint)

    @property
    def num_steps(self) -> int:
        """Length of every list."""
        return len(self.entries[0][1])

    @cached_property
    def _by_key(self) -> dict[str, tuple[int, ...]]:
        return dict(self.entries)

    def flags(self, name: str, block: int | str) -> tuple[int, ...] | None:
        """The list of a branch: indexed key, else bare key, else None (always compute)."""
        return self._by_key.get(f"{name}-{block}", self._by_key.get(name))

    def require_branches(self, branches: Iterable[tuple[str, int | str]], host: str) -> None:
        """ScheduleError if a key fits none of the (name, block) pairs of `host`."""
        pairs = list(branches)
        allowed = {name for name, _ in pairs} | {f"{name}-{block}" for name, block in pairs}
        unknown = [key for key in self._by_key if key not in allowed]
        if unknown:
            names = ", ".join(dict.fromkeys(name for name, _ in pairs))
            shown = ", ".join(repr(key) for key in unknown[:4]) + (
                f" and {len(unknown) - 4} more" if len(unknown) > 4 else ""
            )
            first, last = (f"{pairs[index][0]}-{pairs[index][1]}" for index in (0, -1))
            raise ScheduleError(
                f"schedule: key {shown} matches no branch of {host}, which has {names} ({first} to {last});"
                " rename the key or remove it"
            )

    def rows(self, layout: Layout, num_steps: int) -> list[tuple[int, ...]]:
        """0 or 1 per step for every branch of a layout. Step 0 is 1 whatever the file says: nothing is stored
        yet.
        """
        if self.fingerprint is not None:
            self.fingerprint.check(layout, num_steps)
        if num_steps != self.num_steps:
            raise ScheduleError(
                f"num_steps: the schedule has {self.num_steps} steps, got {num_steps}; use one that was made"
                f" for {num_steps} steps"
            )
        self.require_branches(
            ((branch.name, branch.block) for branch in layout.branches), f"this {layout.family}"
        )
        return [
            (1, *(self.flags(branch.name, branch.block) or (1,) * num_steps)[1:])
            for branch in layout.branches
        ]

    def describe(self) -> str:
        """Short text that tells schedules apart: computed steps per key, and a digest."""
        digest = hashlib.sha256(json.dumps(self.entries).encode()).hexdigest()[:8]
        counts = ", ".join(f"{key} {sum(flags)}/{len(flags)}" for key, flags in self.entries)
        if len(self.entries) > 4:
            counts = (
                f"{len(self.entries)} keys"
                f" {sum(sum(flags) for _, flags in self.entries)}/{len(self.entries) * self.num_steps}"
            )
        return f"{counts} ({digest})"

    def to_dict(self) -> dict[str, Any]:
        """The published form; with a fingerprint, one entry more."""
        entries: dict[str, Any] = {key: list(flags) for key, flags in self.entries}
        if self.fingerprint is not None:
            entries[FINGERPRINT] = {**asdict(self.fingerprint), "names": list(self.fingerprint.names)}
        return entries

    def to_json(self) -> str:
        """`to_dict` as JSON text, a line per key."""
        lines = [f"  {json.dumps(key)}: {json.dumps(value)}" for key, value in self.to_dict().items()]
        return "{\n" + ",\n".join(lines) + "\n}\n"

    def save(self, path: str | Path) -> None:
        """Write `to_json` to a file, whole or not at all."""
        write_text_whole(path, self.to_json())


def steps_from_rows(layout: Layout, rows: Sequence[Sequence[int]]) -> tuple[StepPlan, ...]:
    """The steps that compute branch b at step s where rows[b][s] is 1, and reuse elsewhere."""
    return tuple(
        StepPlan(layout, tuple(COMPUTE if flag else REUSE for flag in column))
        for column in zip(*rows, strict=True)
    )


def publish(steps: Sequence[StepPlan]) -> PublishedSchedule:
    """Steps of COMPUTE and REUSE in the published form: a key per name whose blocks agree, else one per
    block.
    """
    rows: dict[str, dict[int, tuple[int, ...]]] = {}
    for index, branch in enumerate(steps[0].layout.branches):
        flags = tuple(_flag(step, index, number) for number, step in enumerate(steps))
        if rows.setdefault(branch.name, {}).setdefault(branch.block, flags) != flags:
            raise ScheduleError(
                f"schedule: block {branch.block} has several branches {branch.name} that differ, which the"
                " published form cannot say"
            )
    entries: list[tuple[str, tuple[int, ...]]] = []
    for name, blocks in rows.items():
        distinct = set(blocks.values())
        entries += (
            [(name, distinct.pop())]
            if len(distinct) == 1
            else [(f"{name}-{block}", flags) for block, flags in blocks.items()]
        )
    return PublishedSchedule(tuple(entries))


def fora_pattern(num_steps: int, n: int) -> list[int]:
    """1 at steps 0, n, 2n, ... and at the last one: FORA as in SmoothCache's files.

    As many computed steps as FORA's own rule for n = 2, at other positions (fastcache.FORA has that rule).
    """
    for name, value in (("num_steps", num_steps), ("n", n)):
        if isinstance(value, bool) or not isinstance(value, numbers.Integral) or value < 1:
            raise ValueError(f"{name}: expected a whole number >= 1, got {value!r}")
    return [int(step % n == 0 or step == num_steps - 1) for step in range(num_steps)]


def fora_file(num_steps: int, n: int = 2, names: Sequence[str] = ("attn", "mlp")) -> dict[str, list[int]]:
    """The content of SmoothCache's files {30,50,70}-N-2-fora.json."""
    return {name: fora_pattern(num_steps, n) for name in names}


def _parsed(source: str | Path) -> object:
    try:
        if isinstance(source, str) and source.lstrip().startswith("{"):
            return parse_json(source, "schedule")
        return read_json(source, "schedule")
    except ValueError as error:
        raise ScheduleError(str(error)) from None


def _check_fingerprint(fields: Mapping[str, Any]) -> None:
    """Entries that are compared have the type of what they are compared with."""
    for name, kind, expected in (
        ("family", str, "text"),
        ("layers", int, "a whole number"),
        ("num_steps", int, "a whole number"),
        ("names", list | tuple, "a list of branch names"),
        ("scheduler", str | None, "text or null"),
    ):
        value = fields.get(name)
        if isinstance(value, bool) or not isinstance(value, kind):
            raise ValueError(f"{name}: expected {expected}, got {value!r}")


def _flags(key: object, values: object) -> tuple[int, ...]:
    if not isinstance(key, str) or isinstance(values, str) or not isinstance(values, Sequence):
        raise ScheduleError(
            f"schedule[{key!r}]: expected a list of 0 and 1, one per step, got {type(values).__name__}"
        )
    for step, value in enumerate(values):
        if isinstance(value, bool) or not isinstance(value, numbers.Integral) or value not in (0, 1):
            raise ScheduleError(
                f"schedule[{key!r}][{step}]: expected 0 (reuse) or 1 (compute), got {value!r}"
            )
    return tuple(int(value) for value in values)


def _flag(step: StepPlan, index: int, number: int) -> int:
    action: Action = step.actions[index]
    if step.skip or action.kind not in (Kind.COMPUTE, Kind.REUSE):
        raise ScheduleError(
            f"steps[{number}]: the published form has COMPUTE and REUSE, not"
            f" {'a skipped trunk' if step.skip else action.kind.name}"
        )
    return int(action.kind is Kind.COMPUTE)


def _text(value: object) -> str:
    return ", ".join(value) if isinstance(value, tuple) else str(value)
