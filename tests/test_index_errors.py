"""Bad indices on a GPU: the sticky flag of a device, and the session that reads it when it closes."""

import sys

import pytest
import torch
from hosts import run, small_dit

from fastcache import FORA, SessionError, accelerate
from fastcache.backends import index_errors, index_flags, take_index_errors
from fastcache.engine.index_check import devices_of

CPU = torch.device("cpu")


class Library:
    """A CUDA library with a flag."""

    def __init__(self, bits: int) -> None:
        self.bits, self.asked = bits, []

    def fastcache_cuda_error_flag(self, device: int) -> int:
        self.asked.append(device)
        bits, self.bits = self.bits, self.bits if self.bits < 0 else 0
        return bits


@pytest.fixture
def triton_flag(monkeypatch: pytest.MonkeyPatch) -> torch.Tensor:
    """The flag of a device on which Triton kernels have run: here the CPU."""
    monkeypatch.setattr(index_errors, "FLAGS", {})
    monkeypatch.setattr(index_flags, "FLAGS", index_errors.FLAGS)
    return index_flags.error_flag(CPU)


@pytest.mark.parametrize(
    ("bits", "names"),
    [
        (0, ""),
        (1, "gate_index"),
        (2, "fresh_slots or row_slots"),
        (3, "gate_index and fresh_slots or row_slots"),
        (4, "counts"),
        (8, "index"),
    ],
)
def test_bits_are_named_by_their_arguments_and_cleared(
    triton_flag: torch.Tensor, bits: int, names: str
) -> None:
    triton_flag.fill_(bits)
    assert take_index_errors(CPU) == names
    assert triton_flag.item() == 0 and take_index_errors(CPU) == ""


def test_both_gpu_backends_are_asked(triton_flag: torch.Tensor, monkeypatch: pytest.MonkeyPatch) -> None:
    library = Library(1)
    monkeypatch.setattr(index_errors, "loaded_cuda", lambda: library)
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: False)
    assert take_index_errors(torch.device("cuda", 1)) == "gate_index" and library.asked == [1]


def test_a_device_that_cannot_be_asked_is_an_error(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(index_errors, "loaded_cuda", lambda: Library(-1))
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: False)
    with pytest.raises(RuntimeError, match="device: the index-error flag of cuda:0 cannot be read"):
        take_index_errors(torch.device("cuda", 0))


def test_nothing_is_read_while_a_graph_is_captured(monkeypatch: pytest.MonkeyPatch) -> None:
    library = Library(1)
    monkeypatch.setattr(index_errors, "loaded_cuda", lambda: library)
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: True)
    assert take_index_errors(torch.device("cuda", 0)) == "" and not library.asked


def test_asking_does_not_import_triton() -> None:
    before = "fastcache.backends.triton" in sys.modules
    assert take_index_errors(CPU) == ""
    assert ("fastcache.backends.triton" in sys.modules) == before


# --- the session ----------------------------------------------------------------------------------


@pytest.mark.parametrize(("bits", "name"), [(1, "gate_index"), (2, "fresh_slots or row_slots")])
def test_a_session_whose_kernels_met_a_bad_index_raises_when_it_closes(
    triton_flag: torch.Tensor, bits: int, name: str
) -> None:
    model = small_dit()
    with pytest.raises(SessionError, match=f"^{name}: a kernel on cpu met an index out of range"):
        with accelerate(model, FORA(interval=2), num_steps=8):
            run(model)
            triton_flag.fill_(bits)
    assert triton_flag.item() == 0
    with accelerate(model, FORA(interval=2), num_steps=8):  # the model was given back, and the flag is clear
        run(model)


def test_the_flag_is_read_when_the_session_closes_and_never_in_the_loop(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    asked = []
    monkeypatch.setattr(index_errors, "_taken_from_flag", lambda device: asked.append(device) or 0)
    model = small_dit()
    with accelerate(model, FORA(interval=2), num_steps=8) as session:
        assert asked == [CPU]  # what was set before is told to those whom it belongs to
        run(model)
        session.reset()
        run(model)
        assert asked == [CPU]
    assert asked == [CPU, CPU]


def test_an_exception_in_the_session_is_the_one_that_is_seen_and_the_bad_index_is_logged(
    triton_flag: torch.Tensor, caplog: pytest.LogCaptureFixture
) -> None:
    model = small_dit()
    with pytest.raises(ZeroDivisionError), accelerate(model, FORA(interval=2), num_steps=8):
        triton_flag.fill_(1)
        raise ZeroDivisionError
    assert triton_flag.item() == 0
    assert caplog.messages and caplog.messages[0].startswith(
        "gate_index: a kernel on cpu met an index out of range"
    )


def test_a_model_on_several_devices_has_each_of_them_asked() -> None:
    model = torch.nn.ModuleList(
        [torch.nn.Linear(1, 1), torch.nn.Linear(1, 1, device="meta"), torch.nn.Linear(1, 1)]
    )
    assert devices_of(model) == [CPU, torch.device("meta")]
