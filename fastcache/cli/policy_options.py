"""Policies on the command line: `--policy fora --set interval=3`."""

import inspect
import json
from collections.abc import Sequence
from typing import Annotated

from typer import BadParameter, Option

from fastcache.errors import FastCacheError
from fastcache.policies import POLICIES, Policy

PolicyName = Annotated[
    str | None, Option("--policy", help=f"One of: {', '.join(POLICIES)}. Without it nothing is cached.")
]
PolicyFields = Annotated[
    list[str] | None, Option("--set", help="A field of the policy, field=value; may be repeated.")
]


def policy_from(name: str | None, settings: Sequence[str] | None) -> Policy | None:
    """The policy that the options describe, None without a name. Raises BadParameter naming option and fix.

    Values are JSON (3, 0.07, true, null); what is not JSON is taken as text.
    """
    if name is None:
        if settings:
            raise BadParameter("--set needs --policy")
        return None
    if name.lower() not in POLICIES:
        raise BadParameter(f"--policy: expected one of {', '.join(POLICIES)}, got {name!r}")
    kind = POLICIES[name.lower()]
    known = list(inspect.signature(kind).parameters)
    values = {}
    for setting in settings or ():
        field, equals, text = setting.partition("=")
        if not equals or field not in known:
            raise BadParameter(
                f"--set: expected field=value with a field of {', '.join(known)}, got {setting!r}"
            )
        values[field] = _value(text)
    try:
        return kind(**values)
    except (TypeError, ValueError, FastCacheError) as error:
        raise BadParameter(f"--set: {error}") from error


def _value(text: str) -> object:
    try:
        return json.loads(text)
    except json.JSONDecodeError:
        return text
