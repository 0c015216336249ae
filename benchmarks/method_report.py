"""Tables of the part `methods`: speedups against what FLOPs promise, and what the steps between full ones wait for."""

from collections.abc import Sequence

from benchmarks.methods import UNCACHED, KindRow, MethodRow
from benchmarks.tables import milliseconds, table, times

NEAR = 2.0  # times its largest floor up to which a step is limited by it


def method_sections(rows: Sequence[MethodRow]) -> list[str]:
    """Generations, then kinds of steps."""
    if not rows:
        return []
    headings = (
        "model",
        "method",
        "way",
        "plan",
        "generation ms",
        "typical ms",
        "begin ms",
        "measured x",
        "ideal x",
        "measured / ideal",
        "error",
    )
    cells = [
        (
            row.model,
            row.method,
            row.way,
            row.plan,
            milliseconds(row.generation),
            f"{row.typical_us / 1e3:.2f}",
            milliseconds(row.begin),
            times(row.speedup),
            times(row.ideal),
            times(row.quotient),
            "-" if row.error is None else f"{row.error:.0e}",
        )
        for row in rows
    ]
    return [
        "## Methods: generations of random float32 DiTs", "",
        "Typical: every step at its own median over the rounds; measured: uncached over this, both typical. Ideal: uncached FLOPs over planned ones. `original` executes the method as its authors do, `begun` announces timesteps and labels.", "", *table(headings, cells),
        "## Methods: steps, and what limits them", "",
        "Floors in ms, each alone: arithmetic at the rate of this run's uncached steps, weights at its read bandwidth, features and stream at its copy bandwidth. "
        f"A step beyond {NEAR:.0f} times its largest floor is limited by its operators and the host.", "",
        *(f"- {row.model}: a body of fewer than {row.ridge_rows:.0f} rows (B K) waits for its weights, not for its arithmetic." for row in rows if row.method == UNCACHED and row.ridge_rows is not None), "", *_steps(rows),
    ]  # fmt: skip


def _steps(rows: Sequence[MethodRow]) -> list[str]:
    full = {row.model: row.kinds[0].timing.median_us for row in rows if row.method == UNCACHED}
    headings = (
        "model",
        "method",
        "way",
        "step",
        "steps",
        "ms",
        "operators",
        "of uncached",
        "arithmetic",
        "weights",
        "stream",
        "limited by",
    )
    cells = [
        (row.model, row.method, row.way, kind.kind, kind.steps, milliseconds(kind.timing), kind.operators, f"{kind.timing.median_us / full[row.model]:.2f}", *_floors(kind))
        for row in rows for kind in row.kinds
    ]  # fmt: skip
    return table(headings, cells)


def _floors(kind: KindRow) -> tuple[str, ...]:
    floors = kind.floors
    if floors is None:
        return ("-",) * 4
    largest = max(floors.arithmetic, floors.weights, floors.stream)
    limit = floors.limit if kind.timing.median_us / 1e3 <= NEAR * largest else "operators and host"
    return (*(f"{value:.2f}" for value in (floors.arithmetic, floors.weights, floors.stream)), limit)
