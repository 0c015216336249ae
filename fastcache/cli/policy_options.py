"""Policies on the command line: `--policy fora --set interval=3`."""

import inspect
import json
from collections.abc import Sequence
from typing import TYPE_CHECKING, Annotated

from typer import BadParameter, Option

if TYPE_CHECKING:
    from fastcache.plan.layout import Layout
    from fastcache.plan.schedule import Schedule
    from fastcache.policies import Policy

# fastcache.policies.POLICIES has them too, but imports torch, which a help text need not wait for
NAMES = ("fora", "toca", "duca", "smoothcache", "l2c", "taylorseer")
MAKING = {
    "schedule": "a file that fastcache calibrate wrote, such as out/schedule.json",
    "router": "a published L2C router, such as DDIM50_router.pt",
}

PolicyName = Annotated[
    str | None,
    Option(
        "--policy",
        help=f"One of: {', '.join(NAMES)}. Without it nothing is cached. See: fastcache policies.",
    ),
]
PolicyFields = Annotated[
    list[str] | None, Option("--set", help="A field of the policy, field=value; may be repeated.")
]


def policy_from(name: str | None, settings: Sequence[str] | None) -> "Policy | None":
    """The policy that the options describe, None without a name. Raises BadParameter naming option and fix.

    Values are JSON (3, 0.07, true, null); what is not JSON is taken as text.
    """
    if name is None:
        if settings:
            raise BadParameter("--set needs --policy")
        return None
    if name.lower() not in NAMES:
        raise BadParameter(f"--policy: expected one of {', '.join(NAMES)}, got {name!r}")
    from fastcache.policies import POLICIES

    kind = POLICIES[name.lower()]
    parameters = inspect.signature(kind).parameters
    values: dict[str, object] = {}
    for setting in settings or ():
        field, equals, text = setting.partition("=")
        if not equals or field not in parameters:
            raise BadParameter(
                f"--set: expected field=value with a field of {', '.join(parameters)}, got {setting!r}"
            )
        if field in values:
            raise BadParameter(f"--set: {field} is given twice")
        values[field] = _value(text)
    needed = [field for field, found in parameters.items() if found.default is inspect.Parameter.empty]
    absent = [field for field in needed if field not in values]
    if absent:
        raise BadParameter(
            f"--policy: {name} needs --set {absent[0]}=FILE, {MAKING.get(absent[0], 'its file')}"
        )
    try:
        return kind(**values)
    except (TypeError, ValueError, RuntimeError, OSError) as error:
        raise BadParameter(f"--set: {error}") from error


def plan_of(policy: "Policy", steps: int, layout: "Layout") -> "Schedule":
    """The policy's plan. Raises BadParameter naming what does not fit."""
    try:
        return policy.schedule(steps, layout)
    except (ValueError, RuntimeError) as error:
        raise BadParameter(f"--set: {error}") from error


def _value(text: str) -> object:
    try:
        return json.loads(text)
    except (ValueError, RecursionError):
        return text
