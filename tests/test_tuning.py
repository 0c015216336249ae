"""Measured launch configurations: what a table may say, and that calls follow it. The CUDA launcher runs in
the emulator.
"""

import json
from dataclasses import replace
from pathlib import Path

import cases
import emulated
import pytest
import torch
from cases import PRECISIONS, UPDATES, Form, build
from processes import fails, succeeds

from fastcache.backends import triton_config, tuning
from fastcache.backends.cuda_config import CudaKernels, RowConfig, SumConfig
from fastcache.backends.tuning import Entry, TuningError, decoded, encoded, read_table
from fastcache.backends.tuning_key import Key, row_bucket, term_bucket

CPU = torch.device("cpu")
CPU_INDEX = -1  # as PyTorch numbers the CPU
SUM = Key("triton.sum", "cpu", 1152, "bfloat16", 2, 5)
TILE = triton_config.SUM_CONFIGS[0]


@pytest.fixture(scope="module")
def emulator() -> emulated.Emulated:
    return emulated.build()


@pytest.fixture
def kernels(emulator: emulated.Emulated):
    found = CudaKernels(emulator.library)
    yield found
    found.forget()
    emulator.multiprocessors(1)


def table_of(*entries: Entry, **changes: object) -> dict:
    return json.loads(json.dumps(encoded(list(entries), tuning.kernel_versions(None)))) | changes


def entry(key: Key = SUM, config: tuning.Config = TILE) -> Entry:
    return Entry(key, config, 10.0, 12.0)


# --- tables -----------------------------------------------------------------------------------


def test_what_the_tuner_writes_is_what_is_read() -> None:
    other = Entry(
        Key("triton.row", "NVIDIA H200", 3072, "float16", 0, 6),
        triton_config.legal_row_configs(3072)[0],
        1.0,
        1.0,
    )
    assert decoded(table_of(entry(), other), "table", None) == {SUM: TILE, other.key: other.config}


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        (
            {"kernel": "triton.conv"},
            "kernel: expected one of triton.sum, triton.row, cuda.sum, cuda.row, got 'triton.conv'",
        ),
        ({"dtype": "int8"}, "dtype: expected one of float32, float16, bfloat16, got 'int8'"),
        ({"terms": 9}, "terms: expected 0..3, got 9"),
        (
            {"config": {"rows": 2, "columns": 128, "warps": 4, "stages": 1}},
            "rows, columns, warps: expected 8 elements a thread or more",
        ),
        ({"config": {"rows": 64, "columns": 128, "warps": 4, "stages": 9}}, "is not legal for"),
        ({"config": {"tile": 3}}, "TypeError"),
    ],
    ids=["kernel", "dtype", "bucket", "impossible", "illegal", "fields"],
)
def test_a_bad_entry_is_left_out_with_a_warning_and_the_others_are_used(
    change: dict, reason: str, caplog: pytest.LogCaptureFixture
) -> None:
    table = table_of(entry(), entry(replace(SUM, rows=6)))
    table["entries"][0] |= change
    assert decoded(table, "my-table", None) == {replace(SUM, rows=6): TILE}
    (message,) = caplog.messages
    assert (
        message.startswith("my-table: entries 0 are not used, the heuristic decides there: ")
        and reason in message
    )


def test_a_table_of_other_kernels_is_stale_and_one_warning_says_so(caplog: pytest.LogCaptureFixture) -> None:
    table = table_of(entry(), entry(replace(SUM, rows=6)), kernels={"triton": "0123456789abcdef"})
    assert decoded(table, "my-table", None) == {}
    (message,) = caplog.messages
    assert (
        "entries 0, 1 are not used" in message
        and "measured with other triton kernels (0123456789abcdef, these are " in message
        and "python -m benchmarks.tune" in message
    )


@pytest.mark.parametrize(
    "table", [[], {}, {"format": 99, "kernels": {}, "entries": []}, {"format": 1, "entries": []}]
)
def test_what_is_no_table_is_an_error(table: object) -> None:
    with pytest.raises(TuningError, match="my-table: expected a tuning table of format 1"):
        decoded(table, "my-table", None)


@pytest.mark.parametrize("content", [None, "{", "[]"], ids=["absent", "no-json", "no-table"])
def test_a_named_file_that_cannot_be_used_is_an_error(
    content: str | None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "table.json"
    if content is not None:
        path.write_text(content)
    monkeypatch.setenv("FASTCACHE_TUNING", str(path))
    with pytest.raises(TuningError, match="FASTCACHE_TUNING=.*table.json: "):
        read_table(None)


def test_a_table_can_be_named_and_switched_off(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "table.json"
    path.write_text(json.dumps(table_of(entry())))
    monkeypatch.setattr(tuning, "SHIPPED", path)
    assert read_table(None) == {SUM: TILE}
    monkeypatch.setenv("FASTCACHE_TUNING", "0")
    assert read_table(None) == {}
    monkeypatch.setattr(tuning, "SHIPPED", tmp_path / "none.json")
    monkeypatch.setenv("FASTCACHE_TUNING", str(path))
    assert read_table(None) == {SUM: TILE}
    monkeypatch.delenv("FASTCACHE_TUNING")
    assert read_table(None) == {}


CALL = "import torch, fastcache; fastcache.backends.tuning.ready(torch.device('cpu'))"


@pytest.mark.slow
def test_a_process_reads_the_table_that_its_environment_names(tmp_path: Path) -> None:
    (tmp_path / "table.json").write_text(json.dumps(table_of(entry())))
    code = (
        CALL
        + "; print(fastcache.backends.tuning.tuned('triton.sum', torch.device('cpu'), 1152, torch.bfloat16,"
        f" 2, 5) == fastcache.backends.triton_config.{TILE!r})"
    )
    assert succeeds(code, FASTCACHE_TUNING=str(tmp_path / "table.json")).split() == ["True"]
    assert "TuningError: FASTCACHE_TUNING=" in fails(CALL, FASTCACHE_TUNING=str(tmp_path / "none.json"))


@pytest.mark.parametrize(
    ("features", "bucket"), [(0, 0), (2, 0), (3, 1), (16, 1), (17, 2), (64, 2), (65, 3), (1024, 3)]
)
def test_buckets_of_terms(features: int, bucket: int) -> None:
    assert term_bucket(features) == bucket


@pytest.mark.parametrize(
    ("rows", "bucket"), [(0, 0), (1, 0), (2, 1), (4, 1), (5, 2), (512, 5), (1024, 5), (1025, 6), (2**30, 15)]
)
def test_buckets_of_rows(rows: int, bucket: int) -> None:
    assert row_bucket(rows) == bucket


# --- CUDA, in the emulator ------------------------------------------------------------------------


def threads_of(emulator: emulated.Emulated, form: Form) -> tuple[int, int]:
    """(thread blocks, threads of one) of the launch of a form, whose values are checked."""
    cases.verify(form, "emulated")
    build(form).run("emulated")
    launch = (torch.zeros(2, dtype=torch.int64)).numpy()
    emulator.library.emulator_last_launch(launch.ctypes.data_as(emulated.ctypes.c_void_p))
    return tuple(launch.tolist())


@pytest.fixture(autouse=True)
def backend(emulator: emulated.Emulated, monkeypatch: pytest.MonkeyPatch) -> None:
    run = cases.Call.run
    monkeypatch.setattr(
        cases.Call, "run", lambda call, name: emulator.call(call) if name == "emulated" else run(call, name)
    )


@pytest.mark.slow
def test_the_launcher_takes_the_rows_of_a_table_for_calls_of_that_bucket_alone(
    emulator: emulated.Emulated, kernels: CudaKernels
) -> None:
    form = replace(UPDATES["packed-gates"].of(PRECISIONS["bf16"]), batch=1, tokens=64, channels=1152)
    emulator.multiprocessors(1000)
    assert (
        threads_of(emulator, form)[0] == 64 * 1152 // 8 // 256
    )  # the heuristic: too few blocks, one row a thread
    key = Key("cuda.sum", "cpu", 1152, "bfloat16", term_bucket(5), row_bucket(64))
    for rows in (4, 2, 1):
        kernels.use(key, SumConfig(8, rows), CPU_INDEX)
        assert threads_of(emulator, form)[0] == 64 // rows * 1152 // 8 // 256
    kernels.use(key, SumConfig(8, 4), CPU_INDEX)
    for other in (
        replace(form, tokens=65),
        replace(form, terms=17),
        replace(form, channels=2304),
        form.of(PRECISIONS["fp16"]),
    ):
        rows = -(-other.batch * other.tokens * other.channels // 8 // 256)
        assert threads_of(emulator, other)[0] in (rows, rows + 1), "one row a thread, by the heuristic"
    kernels.forget()
    assert threads_of(emulator, form)[0] == 64 * 1152 // 8 // 256


@pytest.mark.slow
def test_every_legal_configuration_of_rows_computes_the_same_bits(
    emulator: emulated.Emulated, kernels: CudaKernels
) -> None:
    form = replace(UPDATES["modulated"].of(PRECISIONS["bf16"]), batch=1, tokens=3, channels=1152)
    key = Key("cuda.row", "cpu", 1152, "bfloat16", 0, row_bucket(3))
    legal = kernels.legal(key)
    assert RowConfig(32, 9, 4) in legal and RowConfig(1024, 8, 1) in legal and len(legal) >= 6
    assert all(config.threads * config.vectors * config.width >= 1152 for config in legal)
    threads = {
        config: threads_of(emulator, form)[1]
        for config in legal
        if kernels.use(key, config, CPU_INDEX) is None
    }
    assert threads == {config: config.threads * (4 if config.threads == 32 else 1) for config in legal}


@pytest.mark.slow
def test_a_call_that_cannot_use_an_entry_is_left_to_the_heuristic(
    emulator: emulated.Emulated, kernels: CudaKernels
) -> None:
    form = replace(
        UPDATES["packed-gates"].of(PRECISIONS["bf16"]), batch=1, tokens=64, channels=1152, offset=1
    )
    before = threads_of(emulator, form)
    kernels.use(
        Key("cuda.sum", "cpu", 1152, "bfloat16", term_bucket(5), row_bucket(64)), SumConfig(8, 4), CPU_INDEX
    )
    assert threads_of(emulator, form) == before


@pytest.mark.parametrize(
    ("key", "config"),
    [
        (Key("cuda.sum", "cpu", 1152, "bfloat16", 0, 5), SumConfig(8, 3)),
        (Key("cuda.sum", "cpu", 1155, "bfloat16", 0, 5), SumConfig(8, 4)),
        (Key("cuda.sum", "cpu", 1152, "float32", 0, 5), SumConfig(8, 4)),
        (Key("cuda.row", "cpu", 3072, "bfloat16", 0, 5), RowConfig(32, 9, 4)),
        (Key("cuda.row", "cpu", 1152, "bfloat16", 3, 5), RowConfig(32, 9, 4)),
    ],
    ids=["rows", "alignment", "width", "too-narrow", "many-terms"],
)
@pytest.mark.slow
def test_an_illegal_configuration_is_refused_with_the_legal_ones(
    key: Key, config: tuning.Config, kernels: CudaKernels
) -> None:
    with pytest.raises(ValueError, match="^config: expected one of .*Config.*, got "):
        kernels.use(key, config, -1)


@pytest.mark.slow
def test_a_table_of_cuda_entries_is_checked_against_the_kernels_of_this_process(
    kernels: CudaKernels, caplog: pytest.LogCaptureFixture
) -> None:
    key = Key("cuda.sum", "NVIDIA H200", 1152, "bfloat16", 2, 5)
    versions = tuning.kernel_versions(kernels)
    table = json.loads(
        json.dumps(
            encoded([entry(key, SumConfig(8, 2)), entry(replace(key, rows=6), SumConfig(8, 3))], versions)
        )
    )
    assert decoded(table, "my-table", kernels) == {key: SumConfig(8, 2)}
    assert decoded(table | {"kernels": versions | {"cuda": "0"}}, "my-table", kernels) == {}
    assert (
        "SumConfig(width=8, rows=3) is not legal" in caplog.messages[0]
        and "measured with other cuda kernels (0, these are " in caplog.messages[1]
    )


@pytest.mark.slow
def test_entries_reach_the_launcher_of_the_device_that_they_name(
    kernels: CudaKernels, monkeypatch: pytest.MonkeyPatch
) -> None:
    used = []
    key = Key("cuda.sum", "cpu", 1152, "bfloat16", 2, 5)
    monkeypatch.setattr(
        tuning,
        "table",
        lambda: {key: SumConfig(8, 2), replace(key, device="NVIDIA H200"): SumConfig(8, 4), SUM: TILE},
    )
    monkeypatch.setattr(tuning, "loaded_cuda", lambda: kernels._library)
    monkeypatch.setattr(
        CudaKernels, "use", lambda self, key, config, device: used.append((key, config, device))
    )
    tuning.ready.__wrapped__(CPU)
    assert used == [(key, SumConfig(8, 2), 0)]
