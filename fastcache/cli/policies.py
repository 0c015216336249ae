"""`fastcache policies`."""

import inspect
import json
from dataclasses import dataclass
from typing import TYPE_CHECKING, Annotated

from typer import Argument, BadParameter

from fastcache.cli.policy_options import NAMES
from fastcache.cli.tables import plain_table

if TYPE_CHECKING:
    from rich.table import Table

    from fastcache.policies import Policy

PAGES = "docs/methods"
TOKENS = {
    "fresh_threshold": "steps from one full step to the next, before the authors' adaption",
    "fresh_ratio": "share of the tokens that a partial step refreshes; 0 refreshes none",
    "cache_type": "how tokens are scored: attention, kv-norm, similarity, norm or random",
    "ratio_scheduler": "how the share changes over steps and layers",
    "soft_fresh_weight": "what a token's score gains while it is left out",
    "force_fresh": "global, or with reproduce_reference local",
    "reproduce_reference": "repeat the original's change of mind in the middle of a step",
}


@dataclass(frozen=True)
class Description:
    """A policy in the words of the table. fields: the meaning of each, by name."""

    summary: str
    fields: dict[str, str]


DESCRIPTIONS = {
    "fora": Description(
        "a cached step reuses every feature",
        {"interval": "steps from one full step to the next; 1 computes every step"},
    ),
    "toca": Description("a cached step reuses attention and refreshes the MLP of a few tokens", TOKENS),
    "duca": Description("cached steps are ToCa's and skipped ones in turns", TOKENS),
    "smoothcache": Description(
        "every branch reuses where a calibrated schedule says so",
        {"schedule": "JSON file; fastcache calibrate writes one"},
    ),
    "l2c": Description(
        "every second step recomputes what a learned router says",
        {
            "router": "router file (.pt or .safetensors), or indexed JSON schedule",
            "threshold": "a branch is recomputed if its score is above; 0.1 for a router",
        },
    ),
    "taylorseer": Description(
        "a cached step forecasts every feature from computed ones",
        {
            "interval": "steps from one full step to the next",
            "max_order": "highest power of the Taylor series; 0 is plain reuse",
            "first_enhance": "full steps at the start",
        },
    ),
}


def policies(
    name: Annotated[str | None, Argument(help=f"One of: {', '.join(NAMES)}. Without it all.")] = None,
) -> None:
    """Show every policy with its fields: default, meaning, and the page that says more."""
    if name is not None and name.lower() not in NAMES:
        raise BadParameter(f"name: expected one of {', '.join(NAMES)}, got {name!r}")

    from rich.console import Console

    console = Console(highlight=False)
    for shown in NAMES if name is None else (name.lower(),):
        console.print(table_of(shown))
    console.print("use one:\n  fastcache sample --policy fora --set interval=3")


def table_of(name: str) -> "Table":
    """The fields of a policy."""
    from fastcache.policies import POLICIES

    kind, described = POLICIES[name], DESCRIPTIONS[name]
    table = plain_table(
        f"{name}: {described.summary}",
        f"fastcache.{kind.__name__}, {PAGES}/{name}.md",
        ("field", "default", "meaning"),
        text=("default", "meaning"),
    )
    for field, default in fields_of(kind).items():
        table.add_row(field, default, described.fields.get(field, ""))
    return table


def fields_of(kind: "type[Policy]") -> dict[str, str]:
    """The fields that `--set` takes, with their defaults as they are typed."""
    return {name: _typed(found.default) for name, found in inspect.signature(kind).parameters.items()}


def _typed(default: object) -> str:
    if default is inspect.Parameter.empty:
        return "needed"
    return default if isinstance(default, str) else json.dumps(default)
