"""What a run found: bench.json holds all of it, bench.md the tables."""

import json
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

from benchmarks.cases import Form
from benchmarks.contest import Absence, Row
from benchmarks.dispatch import DispatchRow
from benchmarks.generations import UNCACHED, MethodRow
from benchmarks.machine import Bandwidth, Machine
from benchmarks.roofline import draw_roofline
from benchmarks.tables import (
    NOISY,
    absences,
    case_notes,
    is_noisy,
    lost,
    method_notes,
    microseconds,
    notes,
    section,
    shown,
    table,
)

BUSY = 0.2  # share of noisy timings beyond which a run is not to be quoted
NEAR = 2.0  # times its largest floor up to which a step is limited by it
BARS = (("naive", "vs_naive", 2.6), ("naive (aim)", "vs_naive", 3.5), ("torch.compile", "vs_compile", 1.9))
RATIOS = ("x naive", "x best eager", "x torch.compile")
CASE = (
    "size",
    "dtype",
    "contender",
    "MB",
    "cache",
    "us",
    "p10",
    "p90",
    "best",
    "CPU us",
    "rounds",
    "GB/s",
    "of copy",
)
SUMMARY = ("form", "size", "dtype", "cache", "MB", "us", "GB/s", "of copy")
OPERATOR = ("form", "size", "dtype", "contender", "MB", "us", "p10", "p90", "CPU us", "rounds", "GB/s")
CHOICE = ("size", "contender", "operators", "MB", "us", "CPU us", "of copy", *RATIOS, "error")
GENERATION = (
    "model",
    "method",
    "way",
    "plan",
    "generation ms",
    "typical ms",
    "CPU ms",
    "begin ms",
    "measured x",
)
PROMISE = ("by CPU time", "ideal x", "measured / ideal", "error")


@dataclass(frozen=True)
class Flagship:
    """The trunk of DiT-XL/2 on one thread, and what one thread copies and reads."""

    rows: tuple[Row, ...]
    bandwidth: Bandwidth


@dataclass(frozen=True)
class Report:
    """The whole of bench.json. Parts that were not asked for are None or empty.

    load_after: as `machine.load`, at the end. copy_gbps, read_gbps: the best of the run, which shares refer
    to.
    """

    machine: Machine
    quick: bool
    heap_kept: bool
    seconds: float
    load_after: float
    bandwidths: tuple[Bandwidth, ...]
    copy_gbps: float
    read_gbps: float
    absent: tuple[Absence, ...]
    flagship: Flagship | None = None
    forms: tuple[Row, ...] = ()
    dispatch: tuple[DispatchRow, ...] = ()
    session: tuple[MethodRow, ...] = ()
    operators: tuple[Row, ...] = ()
    choices: tuple[Row, ...] = ()
    blocks: tuple[Row, ...] = ()
    methods: tuple[MethodRow, ...] = ()


def write_report(report: Report, out: Path) -> None:
    """bench.json, bench.md and roofline.png in `out`."""
    out.mkdir(parents=True, exist_ok=True)
    found = asdict(report)
    (out / "bench.json").write_text(json.dumps(found, indent=1) + "\n")
    (out / "bench.md").write_text("\n".join(markdown(found)) + "\n")
    where = found["machine"]["environment"]
    software = f"torch {where['torch']}, FastCache {where['fastcache']} ({where['backend']})"
    subtitle = (
        f"{where['processor']}, {where['threads']} threads, {software}, {found['machine']['date'][:10]}"
    )
    draw_roofline(found["forms"], report.copy_gbps, report.read_gbps, subtitle, out / "roofline.png")


def markdown(found: dict) -> list[str]:
    """All sections, in the order in which a reader asks."""
    ours = [row for row in found["forms"] if row["contender"] == "fastcache"]
    lines = [*_head(found), *_flagship(found["flagship"])]
    bold = "Bold: FastCache is the slower one."
    lines += section("Operators: FastCache in every case", (*SUMMARY, *RATIOS), ours, bold)
    measured = [row for part in ("forms", "operators", "choices", "blocks") for row in found[part]]
    lines += lost(measured)
    lines += notes(
        case_notes(measured, found["read_gbps"])
        + method_notes(found["session"])
        + method_notes(found["methods"])
    )
    for form in Form:
        rows = [row for row in found["forms"] if row["form"] == form.value]
        lines += section(f"{form.value}: {form.meaning}", (*CASE, *RATIOS, "error"), rows)
    heading = "Operators on tokens: scores and errors of calibration"
    lines += section(heading, (*OPERATOR, *RATIOS), found["operators"])
    lines += _dispatch(found["dispatch"])
    for part, heading in (("session", "Session: FORA"), ("methods", "Methods")):
        lines += _generations(heading, found[part]) + _steps(heading, found[part])
    for form in (Form.STREAM, Form.BLOCK):
        lines += _blocks(form, [row for row in found["blocks"] if row["form"] == form.value])
    lines += section("Choice of tokens for 28 layers of a step, float32 scores", CHOICE, found["choices"])
    return lines + absences((one["provider"], one["reason"], one["case"]) for one in found["absent"])


def _head(found: dict) -> list[str]:
    machine, where = found["machine"], found["machine"]["environment"]
    timings = [*_timings(found)]
    noisy = sum(map(is_noisy, timings))
    quick = "**A quick run, on sizes that mean nothing.**" if found["quick"] else ""
    busy = "**The machine was busy: too many timings are noisy for ratios to be quoted. Repeat the run.**"
    kept = "Freed memory is kept by the process."
    returned = "Freed memory may go back to the system, and page faults are part of the times."
    cache = f"last-level cache {machine['last_level_cache_bytes'] / 2**20:.0f} MiB"
    torch_ = f"torch {where['torch']} ({machine['torch_cpu_capability']}), Python {where['python']}"
    own = (
        f"FastCache {where['fastcache']}, backend {where['backend']} ({machine['fastcache_cpu_capability']})"
    )
    load = f"load {machine['load']:.1f} at the start, {found['load_after']:.1f} at the end"
    noise = f"{noisy} of {len(timings)} timings are noisy (p90 beyond {NOISY} x p10), marked ~"
    text = [
        quick,
        busy if noisy > BUSY * len(timings) else "",
        f"{where['processor']}, {where['device']}, {where['threads']} threads, {cache}; {torch_}, {own}; "
        f"{machine['date']}.",
        f"{found['seconds']:.0f} s; {load}; {noise}. {kept if found['heap_kept'] else returned}",
        "Times are medians. GB/s counts the least bytes that a form can move; its share is of the best copy "
        "bandwidth below. `x naive` and the like: times faster than that contender. CPU time is the thread's "
        "(the process's, with several threads), which a neighbour on the machine does not move.",
    ]
    columns = {
        "threads": lambda burst: burst["threads"],
        "copy GB/s": lambda burst: f"{burst['copy_gbps']:.1f}{'~' * is_noisy(burst['copy'])}",
        "read GB/s": lambda burst: f"{burst['read_gbps']:.1f}{'~' * is_noisy(burst['read'])}",
        "buffer MB": lambda burst: f"{burst['buffer_bytes'] / 1e6:.0f}",
    }
    paragraphs = [line for one in text if one for line in (one, "")]
    return ["# FastCache benchmarks", "", *paragraphs, *table(columns, found["bandwidths"])]


def _flagship(found: dict | None) -> list[str]:
    """The bars to hold: how many times faster FastCache is to be, and is."""
    if found is None:
        return []
    row = next(row for row in found["rows"] if row["contender"] == "fastcache")
    verdicts = []
    for name, key, bar in BARS:
        verdict = (
            "not measured"
            if row[key] is None
            else f"{'held' if row[key] >= bar else '**missed**'}, {row[key]:.2f}x"
        )
        verdicts.append(f"- bar of {bar}x against {name}: {verdict}")
    copied = f"One thread copies {found['bandwidth']['copy_gbps']:.1f} GB/s"
    text = ("\n".join(verdicts), f"{copied} and reads {found['bandwidth']['read_gbps']:.1f} GB/s.")
    heading = f"Flagship: {row['case']}, one thread"
    return section(heading, (*CASE, *RATIOS, "error"), found["rows"], *text)


def _dispatch(rows: Sequence[dict]) -> list[str]:
    found = {(row["call"], row["mode"]): row["timing"] for row in rows}
    calls = [{"call": f"`{call}`", "of": call} for call in dict.fromkeys(row["call"] for row in rows)]
    columns = {"call": lambda row: row["call"]}
    for mode in dict.fromkeys(row["mode"] for row in rows):
        columns[mode] = lambda row, mode=mode: microseconds(found[row["of"], mode], ".2f")
        columns[f"{mode}, CPU"] = lambda row, mode=mode: shown(found[row["of"], mode]["cpu_us"])
    return section("Dispatch: microseconds of one gated update of 256 float32 numbers", columns, calls)


def _blocks(form: Form, rows: Sequence[dict]) -> list[str]:
    alone = {row["case"]: row["timing"]["median_us"] for row in rows if row["contender"] == "MLP alone"}
    rows = [
        row
        | {"beside the MLP us": f"{row['timing']['median_us'] - alone[row['case']]:.0f}" if alone else None}
        for row in rows
    ]
    beside = ("GFLOP/s", "beside the MLP us") if alone else ()
    columns = (
        "size",
        "K",
        "dtype",
        "contender",
        "MB",
        "cache",
        "us",
        "CPU us",
        "GB/s",
        "of copy",
        *beside,
        *RATIOS,
    )
    return section(f"Partial block, {form.value}: {form.meaning}", (*columns, "error"), rows)


def _generations(heading: str, rows: Sequence[dict]) -> list[str]:
    text = (
        "Typical: every step at its own median over the rounds; measured: uncached over this, both typical. "
        "Ideal: uncached FLOPs over planned ones. `original` executes the method as its authors do, `begun` "
        "announces timesteps and labels."
    )
    return section(f"{heading}, generations of random float32 DiTs", (*GENERATION, *PROMISE), rows, text)


def _steps(heading: str, rows: Sequence[dict]) -> list[str]:
    full = {row["model"]: row["kinds"][0]["timing"]["median_us"] for row in rows if row["method"] == UNCACHED}
    cells = []
    for row in rows:
        for kind in row["kinds"]:
            floors, spent = kind["floors"], kind["timing"]["median_us"]
            limit = max(floors, key=floors.__getitem__)
            cell = {name: row[name] for name in ("model", "method", "way")} | kind
            cell |= {"of uncached": f"{spent / full[row['model']]:.2f}", "step": kind["kind"]}
            cell |= {name: f"{floor:.2f}" for name, floor in floors.items()}
            near = spent / 1e3 <= NEAR * floors[limit]
            cells.append(cell | {"limited by": limit if near else "operators and host"})
    ridges = {row["model"]: row["ridge_rows"] for row in rows}
    waits = [
        f"- {model}: a body of fewer than {count:.0f} rows (B K) waits for its weights"
        for model, count in ridges.items()
    ]
    text = (
        "Floors in ms, each alone: arithmetic at the rate of this run's uncached steps, weights at its read "
        "bandwidth, features and stream at its copy bandwidth. "
        f"A step beyond {NEAR:.0f} times its largest floor is limited by its operators and the host."
    )
    columns = ("model", "method", "way", "step", "steps", "ms", "CPU us", "operators", "of uncached")
    floors = ("arithmetic", "weights", "stream", "limited by")
    return section(
        f"{heading}, steps, and what limits them", (*columns, *floors), cells, text, "\n".join(waits)
    )


def _timings(found: dict) -> Iterator[dict]:
    parts = ("forms", "operators", "choices", "blocks", "dispatch")
    flagship = found["flagship"]["rows"] if found["flagship"] else []
    yield from (row["timing"] for row in (*flagship, *(row for part in parts for row in found[part])))
    for row in (*found["session"], *found["methods"]):
        yield from (row["generation"], *(kind["timing"] for kind in row["kinds"]))
