"""The one progress bar of a command: what runs, and which kinds of step ran."""

from collections import Counter
from collections.abc import Mapping
from contextlib import AbstractContextManager
from types import TracebackType
from typing import Any

from fastcache.extras import needs_extra

# no rate and no time gone: with them the kinds of step would not fit 80 columns
FORMAT = "{desc}: {percentage:3.0f}%|{bar}| {n_fmt}/{total_fmt} [{remaining} left{postfix}]"


class Progress(AbstractContextManager["Progress"]):
    """A bar of `total` units on standard error; none if there is nothing to do, or it is not `shown`."""

    def __init__(self, total: int, title: str, unit: str, *, shown: bool = True) -> None:
        with needs_extra("demo"):
            from tqdm import tqdm
        self._kinds: Counter[str] = Counter()
        self._bar: Any = tqdm(
            total=total,
            desc=title,
            unit=unit,
            disable=not shown or total == 0,
            leave=False,
            bar_format=FORMAT,
            dynamic_ncols=True,
        )

    def begin(self, title: str) -> None:
        """What runs from now on; the kinds of step are counted anew."""
        self._kinds.clear()
        self._bar.set_description_str(title, refresh=False)
        self._bar.set_postfix_str("")

    def ran(self, kinds: Mapping[str, int]) -> None:
        """One unit is done, in which steps of these kinds ran."""
        self._kinds.update(kinds)
        self._bar.set_postfix_str(
            ", ".join(f"{count} {kind}" for kind, count in self._kinds.items()), refresh=False
        )
        self._bar.update()

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, place: TracebackType | None
    ) -> None:
        self._bar.close()
