"""Random calls of both operators against float64, and a ledger of calls that are always replayed.

A failure is printed as a Form and as a hypothesis blob, shrunk, and appended to fuzz_ledger.json;
commit the ledger with the fix. FASTCACHE_FUZZ_SECONDS sets the time (default 15).
"""

import json
import os
import time
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path

import pytest
from cases import BACKENDS, FLOAT8, FORMS, VECTOR_LAYOUTS, VECTOR_SHAPES, Form, each_backend, verify
from hypothesis import HealthCheck, Phase, given, settings, strategies as st

LEDGER = Path(__file__).with_name("fuzz_ledger.json")
SECONDS = float(os.environ.get("FASTCACHE_FUZZ_SECONDS", "15"))
ROUND = 100  # examples between two looks at the clock
STREAM = st.sampled_from(["float32", "float16", "bfloat16"])
VECTOR = st.sampled_from(["", "", *VECTOR_SHAPES])
SIZE = st.sampled_from([*range(9), 12, 16, 17, 33])
WIDTH = st.sampled_from([*range(1, 41), 48, 63, 64, 65, 96, 111, 127, 128, 129, 160, 257, 769, 1152])
# strides for which equal values mean equal sums; "expanded" and "repeated" share rows
LAYOUT = st.sampled_from(["contiguous", "wide", "alternate", "swapped", "expanded", "repeated"])


@st.composite
def forms(draw: st.DrawFn) -> Form:
    """Any form that the operators accept."""
    norm = draw(st.integers(0, 3))
    slot = draw(st.sampled_from(["", "float32", "float16", "bfloat16", FLOAT8]))
    terms = draw(st.one_of(st.integers(0, 4), st.integers(5, 20)))
    gate = draw(VECTOR)
    return Form(
        batch=draw(st.integers(0, 3)),
        tokens=draw(SIZE),
        channels=draw(WIDTH),
        terms=terms,
        x=draw(STREAM),
        feature=draw(st.one_of(STREAM, st.just(FLOAT8))),
        vector=draw(STREAM),
        gate=gate,
        packed=bool(gate) and draw(st.booleans()),
        weights=draw(st.booleans()),
        scales=draw(st.booleans()),
        norm=norm,
        shift=draw(VECTOR) if norm else "",
        scale=draw(VECTOR) if norm else "",
        affine=norm in (1, 2) and draw(st.booleans()),
        rows=draw(st.one_of(st.none(), st.integers(0, 9))) if norm else None,
        reference=bool(terms or slot) and draw(st.booleans()),
        need_x=draw(st.booleans()),
        slot=slot,
        fresh=draw(STREAM),
        fresh_rows=draw(st.one_of(st.none(), st.integers(0, 9))) if slot else None,
        position=draw(st.integers(-1, terms)) if slot else -1,
        layout=draw(LAYOUT),
        vector_layout=draw(st.sampled_from(VECTOR_LAYOUTS)),
        offset=draw(st.integers(0, 17)),
        eps=draw(st.sampled_from([1e-6, 1e-5, 1e-3])),
        seed=draw(st.integers(0, 2**16)),
    )


def ledger() -> list[Form]:
    """The calls that are replayed at every run."""
    return [Form(**entry) for entry in json.loads(LEDGER.read_text())]


def append_to_ledger(form: Form, path: Path = LEDGER) -> None:
    """Add a form to the ledger unless it is there, one line each."""
    entries = json.loads(path.read_text())
    if asdict(form) not in entries:
        entries.append(asdict(form))
        path.write_text("[\n" + ",\n".join(json.dumps(entry) for entry in entries) + "\n]\n")


def verify_everywhere(form: Form) -> None:
    """Verify a form on every backend of this machine."""
    for backend in BACKENDS:
        verify(form, backend)


def search(check: Callable[[Form], None], seconds: float) -> Form | None:
    """Run `check` on random forms; return the simplest that fails, printed with its blob, or None."""
    failed: list[Form] = []

    @settings(
        max_examples=ROUND,
        deadline=None,
        print_blob=True,
        database=None,
        phases=[Phase.generate, Phase.shrink],
        suppress_health_check=list(HealthCheck),
    )
    @given(forms())
    def run(form: Form) -> None:
        try:
            check(form)
        except Exception:
            failed.append(form)
            raise

    end = time.monotonic() + seconds
    while time.monotonic() < end:
        try:
            run()
        except Exception as error:
            notes = "\n".join(getattr(error, "__notes__", []))
            print(
                f"simplest failing form: {failed[-1]}\n{type(error).__name__}: {error}\n{notes}"
            )  # hypothesis runs the simplest one last
            return failed[-1]
    return None


@each_backend
@pytest.mark.parametrize("form", ledger(), ids=str)
def test_every_call_of_the_ledger_is_right(form: Form, backend: str) -> None:
    verify(form, backend)


@pytest.mark.slow
def test_random_calls_are_right() -> None:
    failing = search(verify_everywhere, SECONDS)
    if failing is not None:
        append_to_ledger(failing)
    assert failing is None, f"appended to {LEDGER.name}: {failing}"


def test_the_search_finds_and_simplifies_a_fault(tmp_path: Path) -> None:
    def faulty(form: Form) -> None:
        assert not (form.channels > 16 and form.slot == FLOAT8), "wrong in the tail of a float8 slot"

    found = search(faulty, seconds=60)
    assert found is not None and (found.channels, found.slot) == (17, FLOAT8)
    book = tmp_path / "ledger.json"
    book.write_text("[]")
    append_to_ledger(found, book)
    append_to_ledger(found, book)
    assert [Form(**entry) for entry in json.loads(book.read_text())] == [found]


def test_every_named_form_can_be_kept_in_the_ledger() -> None:
    for form in FORMS.values():
        assert Form(**json.loads(json.dumps(asdict(form)))) == form
