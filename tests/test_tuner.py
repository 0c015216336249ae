"""The tuner: what it measures, what it keeps, and that a limit loses nothing that was found. Nothing here is
a speed."""

import sys
from pathlib import Path

import pytest
import torch

sys.path.insert(0, str(Path(__file__).parents[1]))

from benchmarks.timing import Effort
from benchmarks.tune import HEURISTIC, TERMS, case_of, graph_clock, keys, main, tune
from fastcache.backends import tuning
from fastcache.backends.triton_config import SUM_CONFIGS, SumConfig, legal_row_configs, row_config
from fastcache.backends.tuning import decoded, encoded, legal_configs
from fastcache.backends.tuning_key import Key, row_bucket, term_bucket

CPU = torch.device("cpu")
KEYS = [Key("triton.sum", "cpu", 64, "float32", terms, 2) for terms in (0, 1, 2)]


def pretended(times: dict[str, float], heuristic: float = 10.0):
    """A clock without a GPU: 20 us for every configuration that is not named."""
    of = lambda name, config: heuristic if config is None else times.get(name, 20.0)
    return lambda key, configs: {name: of(name, config) for name, config in configs.items()}


def test_the_fastest_configuration_is_kept_with_both_times() -> None:
    best, saved = SUM_CONFIGS[3], []
    clock = pretended({str(best): 7.0, str(SUM_CONFIGS[4]): 8.0})
    entries = tune(KEYS, None, clock, lambda found: saved.append(len(found)))
    found = [(entry.key, entry.config, entry.median_us, entry.heuristic_us) for entry in entries]
    assert found == [(key, best, 7.0, 10.0) for key in KEYS] and saved == [1, 2, 3]


@pytest.mark.parametrize("median", [9.9, 10.0, 11.0])
def test_what_is_not_clearly_faster_than_the_heuristic_is_not_kept(median: float) -> None:
    assert tune(KEYS, None, pretended({str(SUM_CONFIGS[3]): median}), lambda found: None) == []


def test_every_legal_configuration_is_measured_beside_the_heuristic() -> None:
    seen: list[set] = []
    tune(KEYS[:1], None, lambda key, configs: seen.append(set(configs.values())) or {}, lambda found: None)
    assert seen == [{None, *legal_configs(KEYS[0], None)}] and len(seen[0]) == len(SUM_CONFIGS) + 1


def test_a_limit_keeps_what_was_found_and_says_what_is_left(capsys: pytest.CaptureFixture) -> None:
    assert tune(KEYS, None, pretended({}), lambda found: None, deadline=0.0) == []
    assert capsys.readouterr().out == "the budget was used up before 3 of 3 keys\n"


def test_a_written_table_is_one_that_is_read() -> None:
    entries = tune(KEYS, None, pretended({str(SUM_CONFIGS[3]): 7.0}), lambda found: None)
    table = encoded(entries, tuning.kernel_versions(None))
    assert decoded(table, "table", None) == {entry.key: entry.config for entry in entries}


def test_keys_come_small_before_large_and_fit_into_memory() -> None:
    found = keys(("triton.sum", "triton.row"), (1152, 5120), ("bfloat16",), "cpu")
    assert [key.rows for key in found] == sorted(key.rows for key in found)
    assert {key.terms for key in found if key.kernel == "triton.row"} == {0, 1}
    assert {key.terms for key in found if key.kernel == "triton.sum"} == {0, 1, 2, 3}
    for key in found:
        case = case_of(key)
        buckets = term_bucket(case.terms), row_bucket(case.size.batch * case.size.tokens)
        assert (*buckets, case.size.channels) == (key.terms, key.rows, key.channels)
        assert case.tensor_bytes * (case.terms + 2) <= 24e9
    assert all(term_bucket(features) == bucket for bucket, features in TERMS.items())


@pytest.mark.parametrize("kernel", ["triton.sum", "triton.row"])
def test_the_clock_runs_every_configuration_on_the_same_buffers(kernel: str) -> None:
    key = Key(kernel, "cpu", 64, "bfloat16", 1, 2)
    configs = {HEURISTIC: None, **{str(config): config for config in legal_configs(key, None)[:2]}}
    with torch.no_grad():
        found = graph_clock(CPU, Effort(0.0, 1, 1), backend="eager")(key, configs)
    assert found.keys() == configs.keys() and all(time > 0 for time in found.values())


def test_only_the_given_entries_apply_while_they_are_measured(monkeypatch: pytest.MonkeyPatch) -> None:
    key, tile = KEYS[0], SumConfig(16, 128, 8, 3)
    look_up = lambda: tuning.tuned("triton.sum", CPU, 64, torch.float32, 0, 2)
    assert look_up() is None
    with tuning.only({key: tile}, CPU):
        assert look_up() == tile
        with tuning.only({}, CPU):
            assert look_up() is None
        assert look_up() == tile
    assert look_up() is None


@pytest.mark.parametrize("width", [64, 1152, 3072, 8192])
def test_the_heuristics_choose_among_what_the_tuner_measures(width: int) -> None:
    assert row_config(width) in legal_row_configs(width)


def test_without_a_gpu_it_says_so() -> None:
    if torch.cuda.is_available():
        pytest.skip("there is a GPU")
    with pytest.raises(SystemExit, match="PyTorch sees no GPU"):
        main(["--out", "table.json"])
