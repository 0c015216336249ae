"""Markdown tables, and how numbers look in them."""

from collections.abc import Callable, Iterable

from benchmarks.timing import Timing

NOISY = 1.5  # p90 over p10 beyond which a median is marked


def table(headings: Iterable[object], rows: Iterable[Iterable[object]]) -> list[str]:
    """A Markdown table and an empty line."""
    headings = tuple(headings)
    line: Callable[[Iterable[object]], str] = lambda cells: (
        "| " + " | ".join(str(cell) for cell in cells) + " |"
    )  # noqa: E731
    return [line(headings), line("---" for _ in headings), *(line(row) for row in rows), ""]


def is_noisy(timing: Timing) -> bool:
    """True if the middle 80 % of the samples are far apart."""
    return timing.p90_us > NOISY * timing.p10_us


def mark(timing: Timing) -> str:
    """`~` on a noisy median."""
    return "~" if is_noisy(timing) else ""


def microseconds(timing: Timing) -> str:
    """The median."""
    return f"{timing.median_us:.0f}{mark(timing)}"


def milliseconds(timing: Timing | None) -> str:
    """The median."""
    return "-" if timing is None else f"{timing.median_us / 1e3:.2f}{mark(timing)}"


def percent(share: float | None) -> str:
    """A share in percent."""
    return "-" if share is None else f"{share:.0%}"


def times(ratio: float | None) -> str:
    """A ratio, bold if below one."""
    return "-" if ratio is None else f"{ratio:.2f}"


def bold_below_one(ratio: float | None) -> str:
    """A ratio that shows where FastCache lost."""
    return f"**{times(ratio)}**" if ratio is not None and ratio < 1 else times(ratio)
