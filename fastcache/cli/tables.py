"""Tables that fit 80 columns: numbers are never cut, text is broken between words only."""

from collections.abc import Sequence
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from rich.table import Table


def plain_table(
    title: str,
    caption: str,
    columns: Sequence[str],
    *,
    text: Sequence[str] = (),
    whole: Sequence[str] = (),
) -> "Table":
    """A table without vertical lines. The columns of `text`, and the first one, are to the left and may
    break between words, but for those of `whole`; the others are numbers.
    """
    from rich import box
    from rich.table import Table

    table = Table(
        title=title,
        caption=caption or None,
        title_justify="left",
        caption_justify="left",
        box=box.SIMPLE_HEAD,
        pad_edge=False,
        padding=(0, 1),
        collapse_padding=True,
    )
    for index, heading in enumerate(columns):
        if index == 0 or heading in text:
            table.add_column(heading, overflow="fold", no_wrap=heading in whole)
        else:
            table.add_column("\n".join(heading.rsplit(" ", 1)), justify="right", no_wrap=True)
    return table
