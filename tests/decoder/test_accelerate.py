"""Models dispatched by accelerate: offloading and pruning do not get into each other's way, in either order."""

import copy
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from families import batch, fresh, generate, tiny
from states import hook_counts, logits, same_run
from torch import nn

import tokenprune

accelerate = pytest.importorskip("accelerate")

FAMILIES = ("llava", "qwen3_vl", "gemma3")


def dispatched(model: nn.Module, folder: Path) -> nn.Module:
    """Hooks on everything, weights in memory."""
    return accelerate.dispatch_model(model, {"": "cpu"}, main_device="cpu", force_hooks=True)


def half_on_disk(model: nn.Module, folder: Path) -> nn.Module:
    """Some decoder layers and the head on disk, the rest in memory."""
    decoder = "model.language_model"
    layers = [f"{decoder}.layers.{i}" for i in range(len(model.get_decoder().layers))]
    rest = [name for name, _ in model.named_children() if name != "model"]
    inner = [f"model.{name}" for name, _ in model.model.named_children() if name != "language_model"]
    inner += [f"{decoder}.{name}" for name, _ in model.get_decoder().named_children() if name != "layers"]
    device_map = dict.fromkeys([*inner, *rest, *layers], "cpu")
    device_map |= dict.fromkeys([*layers[1:3], *rest], "disk")
    return accelerate.dispatch_model(model, device_map, main_device="cpu", offload_dir=folder, force_hooks=True)


def on_disk(model: nn.Module, folder: Path) -> nn.Module:
    """All weights on disk."""
    return accelerate.disk_offload(model, folder, execution_device=torch.device("cpu"), offload_buffers=True)


def in_memory(model: nn.Module, folder: Path) -> nn.Module:
    """All weights in a state dict in memory, brought in layer by layer."""
    return accelerate.cpu_offload(model, execution_device=torch.device("cpu"), offload_buffers=True)


WAYS: dict[str, Callable[[nn.Module, Path], nn.Module]] = {
    "dispatched": dispatched,
    "half on disk": half_on_disk,
    "on disk": on_disk,
    "in memory": in_memory,
}
CASES = [
    pytest.param(family, way, id=f"{family}-{way}", marks=() if family == "llava" else pytest.mark.matrix)
    for family in FAMILIES
    for way in WAYS
]


def accelerate_hooks(model: nn.Module) -> dict[str, tuple[int, int]]:
    """The hook of accelerate on each module and the forward that it stands before, by identity."""
    return {
        name: (id(vars(module).get("_hf_hook")), id(vars(module).get("forward")))
        for name, module in model.named_modules()
        if "_hf_hook" in vars(module)
    }


@pytest.mark.parametrize("patched_first", [True, False], ids=["patched first", "dispatched first"])
@pytest.mark.parametrize(("family", "way"), CASES)
def test_a_dispatched_model_is_pruned_like_a_plain_one(family, way, patched_first, tmp_path):
    dense, prompt = tiny(family), batch(family)
    plain = copy.deepcopy(dense)
    tokenprune.patch(plain, "divprune", keep=0.5)
    wanted, pruned = generate(dense, prompt.inputs, 3), generate(plain, prompt.inputs, 3)
    model = copy.deepcopy(dense)
    if patched_first:
        session = tokenprune.patch(model, "divprune", keep=0.5)
        model = WAYS[way](model, tmp_path)
    else:
        model = WAYS[way](model, tmp_path)
        hooks = accelerate_hooks(model)
        session = tokenprune.patch(model, "divprune", keep=0.5)
        assert accelerate_hooks(model) == hooks
    assert accelerate_hooks(model)
    assert same_run(generate(model, prompt.inputs, 3), pruned)
    assert [trace.n_out for trace in session.traces] == [(8, 6, 4)]
    with session.pause():
        assert same_run(generate(model, prompt.inputs, 3), wanted)
    hooks = accelerate_hooks(model)
    tokenprune.unpatch(model)
    assert accelerate_hooks(model) == hooks
    assert hook_counts(model) == {}
    assert same_run(generate(model, prompt.inputs, 3), wanted)


@pytest.mark.parametrize("way", ["dispatched", "half on disk"])
@pytest.mark.parametrize("patched_first", [True, False], ids=["patched first", "dispatched first"])
def test_removing_the_hooks_of_accelerate_leaves_the_patch_in_place(way, patched_first, tmp_path):
    model, prompt = tiny("llava"), batch("llava")
    if patched_first:
        session = tokenprune.patch(model, "divprune", keep=0.5)
        counts = hook_counts(model)
        model = WAYS[way](model, tmp_path)
    else:
        model = WAYS[way](model, tmp_path)
        session = tokenprune.patch(model, "divprune", keep=0.5)
        counts = hook_counts(model)
    pruned = generate(model, prompt.inputs, 2)
    accelerate.hooks.remove_hook_from_submodules(model)
    assert accelerate_hooks(model) == {}
    assert hook_counts(model) == counts
    assert session.installed
    if way == "dispatched":  # weights that were on disk do not come back by themselves
        assert same_run(generate(model, prompt.inputs, 2), pruned)
        assert [trace.n_out for trace in session.traces] == [(8, 6, 4)]


def test_a_prompt_given_as_embeddings_is_pruned_in_a_model_whose_embedding_is_on_disk(tmp_path):
    model, prompt = tiny("llava"), batch("llava")
    tokenprune.patch(model, "divprune", keep=0.5)
    wanted = logits(model, prompt.inputs)
    inputs = fresh(prompt.inputs)
    with torch.no_grad():
        inputs["inputs_embeds"] = model.get_input_embeddings()(inputs.pop("input_ids"))
    model = on_disk(model, tmp_path)
    assert torch.equal(logits(model, inputs), wanted)


def test_patching_a_dispatched_model_again_replaces_the_first_patch(tmp_path):
    model, prompt = half_on_disk(tiny("llava"), tmp_path), batch("llava")
    first = tokenprune.patch(model, "divprune", keep=0.5)
    counts = hook_counts(model)
    second = tokenprune.patch(model, "uniform", keep=2)
    assert hook_counts(model) == counts
    logits(model, prompt.inputs)
    assert first.traces == ()
    assert second.traces[0].n_out == (4, 2, 4)


def test_an_exception_in_a_dispatched_model_leaves_nothing_behind(tmp_path):
    model, prompt = tiny("llava"), batch("llava")
    session = tokenprune.patch(model, "divprune", keep=0.5)
    model = half_on_disk(model, tmp_path)
    pruned = generate(model, prompt.inputs, 2)
    traces = session.traces

    def fail(module, args):
        raise RuntimeError("interrupted")

    handle = model.get_decoder().layers[2].register_forward_pre_hook(fail)
    with pytest.raises(RuntimeError, match="interrupted"):
        generate(model, prompt.inputs, 2)
    handle.remove()
    assert session.traces is traces
    assert same_run(generate(model, prompt.inputs, 2), pruned)
