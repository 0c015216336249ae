"""What was found, as tables: bench.json holds all of a run, bench.md a page that the gate shares."""

import json
from collections.abc import Sequence
from pathlib import Path

from benchmarks.cases import Form
from benchmarks.contest import Row
from benchmarks.roofline import draw_roofline
from benchmarks.tables import (
    NOISY,
    OURS,
    RATIOS,
    absences,
    case_notes,
    is_noisy,
    listing,
    lost,
    method_notes,
    section,
)

BUSY = 0.2  # share of noisy timings beyond which a run is not to be quoted
BARS = (("naive", "vs_naive", 2.6), ("naive (aim)", "vs_naive", 3.5), ("torch.compile", "vs_compile", 1.9))
SUMMARY = ("form", "size", "dtype", "contender", "cache", "MB", "us", "GB/s", "of copy", *RATIOS)
CASE = (
    "size", "K", "dtype", "contender", "MB", "cache", "us", "p10", "p90", "best", "CPU us", "rounds", "GB/s",
    "of copy", "of datasheet", "GFLOP/s", "beside the MLP us", "host us", "launches", "operators",
    *RATIOS, "error",
)  # fmt: skip
WAY = (
    "model", "method", "way", "plan", "generation ms", "typical ms", "CPU ms", "begin ms", "measured x",
    "by CPU time", "ideal x", "measured / ideal", "peak GB", "error",
)  # fmt: skip
STEP = (
    "model", "method", "way", "kind", "steps", "ms", "CPU us", "operators", "launches", "of uncached",
    "of FLOPs",
)  # fmt: skip
MEANINGS = {form.value: form.meaning for form in Form} | {
    "choice": "tokens for 28 layers of a step, float32 scores",
    "dispatch": "a gated update of 256 float32 numbers, 100 times",
}


def write_report(found: dict, out: Path) -> None:
    """bench.json, bench.md and roofline.png in `out`."""
    out.mkdir(parents=True, exist_ok=True)
    (out / "bench.json").write_text(json.dumps(found, indent=1) + "\n")
    (out / "bench.md").write_text("\n".join([*head(found), *flagship(found), *page(found)]) + "\n")
    where = found["machine"]["environment"]
    software = f"torch {where['torch']}, FastCache {where['fastcache']} ({where['backend']})"
    machine = f"{where['processor']}, {where['threads']} threads"
    draw_roofline(found, f"{machine}, {software}, {found['machine']['date'][:10]}", out / "roofline.png")


def page(found: dict) -> list[str]:
    """Everything that was measured, in the order in which a reader asks."""
    rows, methods = [row for row in found["rows"] if row["part"] != "flagship"], found["methods"]
    ours = [row for row in rows if row["contender"] in OURS and row["part"] == "forms"]
    bold = f"Bold: FastCache is the slower one. ~: p90 beyond {NOISY} x p10."
    lines = section("Operators: FastCache in every case", SUMMARY, ours, bold) + lost(rows)
    apart = "Wall and CPU ratios that are more than 15 % apart, and results as far beyond their ideal."
    lines += listing("Notes", case_notes(rows, found["read_gbps"]) + method_notes(methods), apart)
    for form in dict.fromkeys(row["form"] for row in rows):
        own = [row for row in rows if row["form"] == form]
        lines += section(f"{form}: {MEANINGS.get(form, 'of tokens')}", CASE, own)
    for part in dict.fromkeys(row["part"] for row in methods):
        lines += _generations(part.capitalize(), [row for row in methods if row["part"] == part])
    return lines + absences(found["absent"])


def head(found: dict) -> list[str]:
    """Where and when a run was made, and whether it is to be trusted."""
    machine, where = found["machine"], found["machine"]["environment"]
    timings = [row["timing"] for row in found["rows"]] + [row["generation"] for row in found["methods"]]
    noisy = sum(map(is_noisy, timings))
    cache = f"last-level cache {machine['last_level_cache_bytes'] / 2**20:.0f} MiB"
    torch_ = f"torch {where['torch']} ({machine['torch_cpu_capability']}), Python {where['python']}"
    backend = f"backend {where['backend']} ({machine['fastcache_cpu_capability']})"
    load = f"load {machine['load']:.1f} at the start, {found['load_after']:.1f} at the end"
    noise = f"{noisy} of {len(timings)} timings are noisy (p90 beyond {NOISY} x p10), marked ~"
    kept = "Freed memory is kept by the process."
    returned = "Freed memory may go back to the system, and page faults are part of the times."
    busy = "**The machine was busy: too many timings are noisy for ratios to be quoted. Repeat the run.**"
    text = [
        "# FastCache benchmarks",
        "**A quick run, on sizes that mean nothing.**" if found["quick"] else "",
        busy if noisy > BUSY * len(timings) else "",
        f"{where['processor']}, {where['device']}, {where['threads']} threads, {cache}; {torch_}, "
        f"FastCache {where['fastcache']}, {backend}; {machine['date']}.",
        f"{found['seconds']:.0f} s; {load}; {noise}. {kept if found['heap_kept'] else returned}",
        "Times are medians. GB/s counts the least bytes that a form can move; its share is of the best copy "
        "bandwidth below. `x naive` and the like: times faster than that contender. CPU time is the thread's "
        "(the process's, with several threads), which a neighbour on the machine does not move.",
    ]
    columns = ("threads", "copy GB/s", "read GB/s", "buffer MB")
    lines = [line for one in text if one for line in (one, "")]
    return lines + section("Bandwidth", columns, found["bandwidths"])


def flagship(found: dict) -> list[str]:
    """The bars to hold: how many times faster FastCache is to be on one thread, and is."""
    rows = [row for row in found["rows"] if row["part"] == "flagship"]
    verdicts = []
    for row in (row for row in rows if row["contender"] == "fastcache"):
        for name, key, bar in BARS:
            held = f"{'held' if row[key] >= bar else '**missed**'}, {row[key]:.2f}x" if key in row else ""
            verdicts.append(f"- bar of {bar}x against {name}: {held or 'not measured'}")
    heading = f"Flagship: {rows[0]['case'] if rows else ''}, one thread"
    return section(heading, CASE, rows, "\n".join(verdicts))


def _generations(part: str, rows: Sequence[Row]) -> list[str]:
    text = (
        "Typical: every step at its own median over the rounds; measured: uncached over this, both typical. "
        "Ideal: uncached FLOPs over planned ones. `original` executes the method as its authors do, `begun` "
        "announces timesteps and labels."
    )
    lines = section(f"{part}: generations of random DiTs", WAY, rows, text)
    steps = [row | kind for row in rows for kind in row["kinds"]]
    text = "Shares of an uncached step: its time, and its FLOPs."
    return lines + section(f"{part}: steps", STEP, steps, text)
