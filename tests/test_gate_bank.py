"""Gates of a whole step from one matrix multiply, and never from weights that are no longer the host's."""

import pytest
import torch
from hosts import STEPS, assert_close, inputs, reference, run, small_dit

import fastcache
from fastcache.engine.modulation import gate_bank
from fastcache.engine.modulation.gate_bank import GateBank
from fastcache.hosts import recognise

POLICY = fastcache.FORA(interval=3)
FULL = POLICY.full_steps(STEPS)


def expected_gates(model, condition: torch.Tensor) -> torch.Tensor:
    host = recognise(model)
    return torch.stack([gate for block in host.blocks for gate in host.gates(block, condition, {})])


def test_every_gate_is_the_hosts_own() -> None:
    model, condition = small_dit(), torch.randn(4, 32)
    torch.testing.assert_close(GateBank(recognise(model)).gates(condition), expected_gates(model, condition))


@pytest.mark.parametrize("change", ["write", "replace", "to"])
def test_a_changed_weight_is_noticed_at_the_next_step(change: str) -> None:
    model, condition = small_dit(), torch.randn(4, 32)
    bank = GateBank(recognise(model))
    bank.gates(condition)
    linear = model.blocks[1].adaLN_modulation[1]
    with torch.no_grad():
        if change == "write":
            linear.weight.mul_(2)
        elif change == "replace":
            model.load_state_dict(
                {name: value * 2 for name, value in model.state_dict().items()}, assign=True
            )
        else:
            model.to(torch.float64)
            condition = condition.double()
    torch.testing.assert_close(bank.gates(condition), expected_gates(model, condition))


def test_weights_that_change_between_generations_are_followed() -> None:
    model = small_dit()
    with fastcache.accelerate(model, POLICY, STEPS):
        run(model)
        with torch.no_grad():
            for block in model.blocks:
                block.adaLN_modulation[1].weight.mul_(-0.5)
        found = run(model)
    assert_close(found, reference(model, FULL))


@pytest.mark.parametrize("reason", ["hook", "wrapped", "inference", "autocast", "large"])
def test_what_cannot_be_copied_is_computed_block_by_block(reason: str, monkeypatch) -> None:
    model, condition = small_dit(), torch.randn(4, 32)
    bank = GateBank(recognise(model))
    if reason == "hook":
        model.blocks[0].adaLN_modulation[1].register_forward_hook(lambda module, args, out: out * 2)
    elif reason == "wrapped":
        model.blocks[0].adaLN_modulation[1] = torch.nn.Sequential(model.blocks[0].adaLN_modulation[1])
    elif reason == "inference":
        with torch.inference_mode():
            model.blocks[0].adaLN_modulation[1].weight = torch.nn.Parameter(
                torch.randn(192, 32), requires_grad=False
            )
    elif reason == "large":
        monkeypatch.setattr(gate_bank, "MOST_BYTES", 100)
    with torch.autocast("cpu", enabled=reason == "autocast"):
        assert bank.gates(condition) is None and bank.nbytes == 0


def test_blocks_with_conditions_of_their_own_get_their_own_gates() -> None:
    model = small_dit()
    for number, block in enumerate(model.blocks):
        block.register_forward_pre_hook(lambda module, args, number=number: (args[0], args[1] * (1 + number)))
    expected = run(model)
    with fastcache.accelerate(model, fastcache.FORA(interval=STEPS), STEPS) as session, torch.no_grad():
        first = model(*inputs(0))
        conditions: list[torch.Tensor] = []
        for block in model.blocks:
            block.register_forward_pre_hook(lambda module, args: conditions.append(args[1]))
        x, t, y = inputs(1)
        found = model(x, t, y)
        host = recognise(model)
        kept = session._trunk.history()
        stream = model.x_embedder(x) + model.pos_embed
        for number, block in enumerate(model.blocks):
            for gate, feature in zip(
                host.gates(block, conditions[number], {}), kept[2 * number : 2 * number + 2], strict=True
            ):
                stream = stream + gate[:, None] * feature[0]
        session.reset()
    assert_close([first], expected[:1])
    assert_close(
        [found], [model._unpatch(model.final_layer(stream, model.t_embedder(t) + model.y_embedder(y)))]
    )


def test_weights_written_past_their_counters_within_a_generation_are_an_error_at_the_close() -> None:
    model = small_dit()
    with pytest.raises(fastcache.SessionError, match="weights: those of the modulations were written within"):
        with fastcache.accelerate(model, POLICY, STEPS), torch.no_grad():
            for step in range(STEPS):
                if step == 6:
                    model.blocks[1].adaLN_modulation[1].weight.data.mul_(1.5)
                model(*inputs(step))


def test_weights_written_between_generations_are_no_error() -> None:
    model = small_dit()
    with fastcache.accelerate(model, POLICY, STEPS):
        for _ in range(2):
            run(model)
            model.blocks[1].adaLN_modulation[1].weight.data.mul_(1.5)
