"""Tiers of tests: `make test` runs rows that stand for the others, `make test-full` the others."""

from collections.abc import Collection, Iterable
from typing import Any

import pytest


def thinned(rows: Iterable[Any], kept: Collection[Any]) -> list[Any]:
    """Rows of pytest.mark.parametrize for one argument; those that are not in `kept` are in the tier full."""
    return [row if row in kept else pytest.param(row, marks=pytest.mark.full) for row in rows]
