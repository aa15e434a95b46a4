"""Hidden states of a patched model are part of the graph: their gradients are those of an independent dense run."""

import copy
from typing import Any

import pytest
import torch
import vits
from families import DIM, FAMILIES, MROPE, Batch, batch, fresh, implementations, tiny
from oracle_layers import alive_by_layer, hidden_by_layer
from states import hook_counts
from test_layers import FEW, N_LAYERS, halved
from torch import Tensor, nn
from upstream import MASK, POSITIONS, USE_CACHE, turn_on_checkpointing
from vits import answer

import tokenprune

METHODS = {"divprune": lambda family: tokenprune.DivPrune(keep=0.5), "halved": halved}


def states_of(model: nn.Module, inputs: dict[str, Any], weight: Tensor) -> tuple[list[Tensor], Tensor]:
    """Hidden states with the gradients of a loss, the logits `[B, L, V]` by `weight` `[B, L, V]`, and the logits."""
    output = model(**fresh(inputs, dtype=torch.float64), output_hidden_states=True)
    for state in output.hidden_states:
        state.retain_grad()
    (output.logits * weight).sum().backward()
    return list(output.hidden_states), output.logits.detach()


def check(family: str, name: str, implementation: str, prompt: Batch) -> None:
    dense = tiny(family, implementation).double()
    model = copy.deepcopy(dense)
    session = tokenprune.patch(model, METHODS[name](family))
    with torch.no_grad():
        logits = model(**fresh(prompt.inputs, dtype=torch.float64)).logits
    length, n_rows = prompt.inputs["input_ids"].shape[1], len(prompt.rows)
    alive = [alive_by_layer(session.traces, row, pad, length - pad, N_LAYERS) for row, pad in enumerate(prompt.pads)]
    assert not all(bool(layer.all()) for row in alive for layer in row)
    weight = torch.randn(logits.shape, generator=torch.Generator().manual_seed(7), dtype=torch.float64)
    for row, pad in enumerate(prompt.pads):
        weight[row, :pad] = 0
        weight[row, pad:][~alive[row][-1]] = 0  # a dropped token repeats the logits of another one
    found, recorded = states_of(model, prompt.inputs, weight)
    assert torch.equal(recorded, logits)
    for row in range(n_rows):
        single, pad = batch(family, (prompt.rows[row],), seeds=(row,)), prompt.pads[row]
        inputs = {**single.inputs, USE_CACHE: False}
        if family not in MROPE:
            first = int(family.startswith("paligemma"))  # what it counts positions from
            inputs[POSITIONS] = inputs[MASK].cumsum(-1) - 1 + first
        with hidden_by_layer(dense, alive[row]):
            wanted, _ = states_of(dense, inputs, weight[row : row + 1, pad:])
        assert len(found) == len(wanted) == N_LAYERS + 1
        for i, (one, other) in enumerate(zip(found, wanted, strict=True)):
            assert one.grad is not None, f"state {i}"
            scale = other.grad.abs().max()
            torch.testing.assert_close(one.grad[row, pad:] / scale, other.grad[0] / scale, atol=1e-4, rtol=1e-4)
            left = alive[row][max(0, i - 1)]
            torch.testing.assert_close(one[row, pad:][left], other[0][left], atol=1e-4, rtol=1e-4)
            assert one.grad[row, pad:][left].abs().max() > 1e-3
            assert not one.grad[row, pad:][~left].any()


@pytest.mark.parametrize("name", METHODS)
@pytest.mark.parametrize(
    "family", [one if one in FEW[:3] else pytest.param(one, marks=pytest.mark.matrix) for one in FAMILIES]
)
def test_gradients_of_hidden_states_are_those_of_a_dense_run(family, name):
    check(family, name, implementations(family)[0], batch(family))


def bare(model: nn.Module, inputs: dict[str, Any], **options: Any) -> Any:
    """What the model around the decoder returns, without its head."""
    return model.model(**fresh(inputs), output_hidden_states=True, **options)


def test_the_last_hidden_states_are_one_object_and_gradients_can_be_asked_for_without_retaining_them():
    model, inputs = tiny("llava"), batch("llava").inputs
    tokenprune.patch(model, "divprune", keep=0.5)
    output = bare(model, inputs)
    assert output.hidden_states[-1] is output.last_hidden_state
    assert all(one.any() for one in torch.autograd.grad(output.last_hidden_state.square().sum(), output.hidden_states))


@pytest.mark.parametrize("method", METHODS)
def test_weights_get_the_same_gradients_whether_hidden_states_are_asked_for_or_not(method):
    inputs, found = batch("llava").inputs, []
    for options in ({}, {"output_hidden_states": True}):
        model = tiny("llava")
        tokenprune.patch(model, METHODS[method]("llava"))
        model(**fresh(inputs), **options).logits.square().sum().backward()
        found.append([one.grad for one in model.parameters() if one.grad is not None])
    assert all(map(torch.equal, *found))


def test_layers_get_hooks_when_gradients_of_hidden_states_can_be_asked_for_and_lose_them_again():
    model, inputs = tiny("llava"), batch("llava").inputs
    bare(model, inputs)  # transformers adds its own
    dense = hook_counts(model)
    session = tokenprune.patch(model, "divprune", keep=0.5)
    patched = hook_counts(model)
    with torch.no_grad():
        bare(model, inputs)
    model(**fresh(inputs))
    with session.pause():
        bare(model, inputs)
    assert hook_counts(model) == patched
    for _ in range(2):
        bare(model, inputs)
        added = sum(hook_counts(model).values()) - sum(patched.values())
        assert added == 3 * N_LAYERS + 2  # one behind each layer and one before the first, with their flags
    tokenprune.unpatch(model)
    assert hook_counts(model) == dense


def test_chosen_hidden_states_have_the_unpruned_length_too():
    model, inputs = tiny("llava"), batch("llava").inputs
    tokenprune.patch(model, "divprune", keep=0.5)
    states = model(**fresh(inputs), output_hidden_states=[2]).hidden_states  # before transformers 5.24 all of them
    assert states[2].shape == (*inputs["input_ids"].shape, DIM)
    assert {state.shape for state in states if state is not None} == {states[2].shape}


def test_with_gradient_checkpointing_hidden_states_are_copies_and_weights_get_their_gradients():
    inputs, found = batch("llava").inputs, []
    for checkpointing in (False, True):
        model = tiny("llava").train()
        if checkpointing:
            turn_on_checkpointing(model)
        tokenprune.patch(model, "divprune", keep=0.5)
        output = model(**fresh(inputs), output_hidden_states=True)
        assert {state.shape for state in output.hidden_states} == {(*inputs["input_ids"].shape, DIM)}
        output.hidden_states[2].retain_grad()
        output.logits.square().sum().backward()
        assert (output.hidden_states[2].grad is None) == checkpointing
        found.append([one.grad for one in model.parameters() if one.grad is not None])
    for one, other in zip(*found, strict=True):
        torch.testing.assert_close(one, other)


# --- vision encoders ------------------------------------------------------------------------------


@pytest.mark.filterwarnings("ignore:Converting a tensor with requires_grad")  # the paper counts with floats
def test_gradients_of_hidden_states_of_an_encoder_are_those_of_the_paper_written_out():
    model, given = vits.tiny("hf vit"), vits.inputs("hf vit")
    tokenprune.patch(model, "tome", r=3)
    output = model(**given, output_hidden_states=True)
    for state in output.hidden_states:
        state.retain_grad()
    weight = torch.randn(output.logits.shape, generator=torch.Generator().manual_seed(7))
    (output.logits * weight).sum().backward()
    x = output.hidden_states[0].detach().requires_grad_()
    written_out = vits.merged.__wrapped__  # with gradients
    rows = written_out("hf vit", model, given, x, [3] * vits.DEPTH)
    for row, after in enumerate(rows):
        logits = model.classifier(model.vit.layernorm(after[-1].x)[0])
        states = [one.x for one in after[:-1]]
        first, *wanted = torch.autograd.grad((logits * weight[row]).sum(), [x, *states])
        torch.testing.assert_close(output.hidden_states[0].grad[row], first[row], atol=1e-5, rtol=1e-4)
        for number, (one, grad) in enumerate(zip(after, wanted, strict=False)):
            whole = torch.zeros_like(first[row])
            whole[one.places] = grad  # where a group stands; the others only repeat its state
            torch.testing.assert_close(output.hidden_states[number + 1].grad[row], whole, atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize("name", [name for name in vits.NAMES if name.startswith("hf")])
@pytest.mark.parametrize(("method", "options"), [("tome", {"r": 3}), ("spatten", {"tokens": 0.6})])
def test_hidden_states_of_every_encoder_get_gradients(name, method, options):
    found = []
    for patched in (False, True):
        model, given = vits.tiny(name), vits.inputs(name)
        if patched:
            tokenprune.patch(model, method, **options)
        output = model(**given, output_hidden_states=True)
        for state in output.hidden_states:
            state.retain_grad()
        answer(output).square().sum().backward()
        found.append([state.grad is not None and bool(state.grad.any()) for state in output.hidden_states])
    assert found[1] == found[0]
