"""CUDA graphs: what was captured computes from what its inputs hold when it is replayed."""

import gc
from dataclasses import replace

import pytest
import torch
from cases import FORMS, PRECISIONS, Form, assert_same_bits
from on_device import available, build, each_kernel_backend, refilled

CAPTURED = (
    "sum",
    "packed-gates",
    "weighted-gates",
    "float8",
    "modulated",
    "packed-rows",
    "reference",
    "all",
    "store",
    "refresh-after-terms",
    "float8-refresh",
    "refresh-all",
)


@each_kernel_backend
@pytest.mark.parametrize("name", CAPTURED)
def test_a_replay_computes_from_changed_inputs_into_dirty_outputs(
    name: str, backend: str, device: torch.device
) -> None:
    form = replace(FORMS[name].of(PRECISIONS["bf16"]), tokens=33, channels=72)
    call = build(form, device)
    graph, outputs = captured(call, available(backend))
    for seed in (1, 2):
        refilled(call, seed)
        direct = build(replace(form, seed=0), device)
        refilled(direct, seed)
        expected = direct.run(backend)
        for output in outputs:
            if output is not None:
                output.fill_(float("nan"))
        graph.replay()
        assert_same_bits(outputs, expected)
        if call.scatter:
            assert_same_bits(call.arguments["slot"], direct.arguments["slot"])


@each_kernel_backend
def test_gates_weights_and_maps_are_read_at_the_replay(backend: str, device: torch.device) -> None:
    form: Form = replace(FORMS["refresh-all"].of(PRECISIONS["bf16"]), tokens=33, channels=72)
    call = build(form, device)
    graph, outputs = captured(call, available(backend))
    refilled(call, 0)
    changes = {
        "gate_index": torch.tensor([2, -1, 1, 0]),
        "fresh_slots": torch.full((2, 33), -1),
        "row_slots": torch.full((2, 33), -1),
    }
    changes["fresh_slots"][:, 5] = 3
    changes["row_slots"][:, 7] = 1
    for name, values in changes.items():
        call.arguments[name].copy_(values)
    direct = build(form, device)
    for name in changes:
        direct.arguments[name].copy_(call.arguments[name])
    expected = direct.run(backend)
    graph.replay()
    assert_same_bits(outputs, expected)


def test_a_triton_graph_keeps_the_addresses_that_it_reads(device: torch.device) -> None:
    call = build(replace(FORMS["sum"].of(PRECISIONS["bf16"]), channels=72), device)
    graph, outputs = captured(call, available("triton"))
    expected = call.run("triton")
    gc.collect()
    garbage = [torch.full((16,), -1, dtype=torch.int64, device=device) for _ in range(256)]
    graph.replay()
    assert_same_bits(outputs, expected)
    del garbage


def captured(call, backend: str) -> tuple[torch.cuda.CUDAGraph, tuple]:
    """A graph of one call and its outputs, after a call to warm up on a side stream."""
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        call.run(backend)
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        outputs = call.run(backend)
    return graph, tuple(outputs)
