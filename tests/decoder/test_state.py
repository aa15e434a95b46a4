"""O6 and the laws of state: a patch leaves nothing behind, keeps to its model and thread, and stays out of copies."""

import copy
import gc
import pickle
import queue
import sys
import threading
import weakref
from collections.abc import Callable
from pathlib import Path
from typing import Any, ClassVar

import pytest
import torch
from families import EVEN, FAMILIES, RAGGED, batch, fresh, generate, implementations, tiny
from oracle import check_steps
from states import Interrupt, Same, hook_counts, in_threads, logits, same_run, snapshot
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle
from transformers import DynamicCache, StaticCache
from transformers.generation import CompileConfig
from upstream import cache_of, with_cache

import tokenprune
from tokenprune import Method
from tokenprune.reduction import Keep

FEW = ("llava", "qwen3_vl", "gemma3", "idefics3")
EVERY = [(family, implementation) for family in FAMILIES for implementation in implementations(family)]
LATER: tuple = ((2, (3, 4), 9), (4, (2, 2), 6, (2, 2), 1), (1, (4, 3), 3))


class Moody(Method):
    """Keeps the first tokens, unless `broken` is set."""

    name: ClassVar[str] = "moody"
    broken: ClassVar[bool] = False

    def before_llm(self, signals: Any, budget: Any) -> Keep:
        if self.broken:
            raise ZeroDivisionError("no mood")
        return Keep(torch.arange(budget.high).expand(len(signals.features), -1))


# --- taking a patch out again ---------------------------------------------------------------------


@pytest.mark.parametrize("family", FEW)
def test_unpatching_leaves_the_model_as_it_was(family):
    model, prompt = tiny(family, implementations(family)[0]), batch(family)
    wanted = generate(model, prompt.inputs, 3)
    before = snapshot(model)
    session = tokenprune.patch(model, "divprune", keep=0.5)
    assert snapshot(model) != before
    assert not same_run(generate(model, prompt.inputs, 3), wanted)
    tokenprune.unpatch(model)
    assert snapshot(model) == before
    assert not session.installed
    assert same_run(generate(model, prompt.inputs, 3), wanted)
    assert snapshot(model) == before


@pytest.mark.matrix
@pytest.mark.parametrize("family", FAMILIES)
def test_unpatching_leaves_a_model_of_every_family_as_it_was(family):
    test_unpatching_leaves_the_model_as_it_was(family)


def test_a_patch_adds_four_hooks_and_nothing_else():
    model = tiny("llava")
    before, classes = snapshot(model), [type(module) for module in model.modules()]
    tokenprune.patch(model, "divprune", keep=0.5)
    after = snapshot(model)
    changed = {key for key in after if key not in before or after[key] != before[key]}
    hooks = {key for key in changed if key[2:] == ("items",) and "hooks" in key[1]}
    assert changed == hooks
    assert {key[0] for key in hooks} == {"model", "model.language_model"}
    assert [type(module) for module in model.modules()] == classes


def test_a_patched_forward_leaves_nothing_on_the_modules():
    model, prompt = tiny("qwen3_vl"), batch("qwen3_vl")
    tokenprune.patch(model, "divprune", keep=0.5)
    generate(model, prompt.inputs, 2)
    before = snapshot(model)
    generate(model, prompt.inputs, 2)
    assert snapshot(model) == before


def test_no_class_of_another_library_is_touched():
    model, prompt = tiny("qwen3_vl"), batch("qwen3_vl")
    generate(model, prompt.inputs, 2)
    instances = [*model.modules(), model.config, *DynamicCache(config=model.config).layers]
    classes = {cls for instance in instances for cls in type(instance).__mro__} | {DynamicCache, StaticCache}
    classes |= set(DynamicCache.__mro__)
    before = {cls: {name: Same(value) for name, value in vars(cls).items()} for cls in classes}
    session = tokenprune.patch(model, "divprune", keep=0.5)
    out = generate(model, prompt.inputs, 2)
    assert type(cache_of(out)) is not DynamicCache
    for moment in ("patched", "unpatched"):
        after = {cls: {name: Same(value) for name, value in vars(cls).items()} for cls in classes}
        assert after == before, moment
        session.remove()
    assert type(DynamicCache()) is DynamicCache


def test_the_session_as_a_context_manager_unpatches():
    model, prompt = tiny("llava"), batch("llava")
    wanted, before = logits(model, prompt.inputs), snapshot(model)
    with tokenprune.patch(model, "divprune", keep=0.5) as session:
        assert session.installed
        assert not torch.equal(logits(model, prompt.inputs), wanted)
    assert not session.installed
    assert snapshot(model) == before
    assert torch.equal(logits(model, prompt.inputs), wanted)


def test_leaving_the_context_by_an_exception_unpatches_and_lets_it_through():
    model = tiny("llava")
    before = snapshot(model)
    with pytest.raises(KeyError, match="mine"), tokenprune.patch(model, "divprune", keep=0.5):
        raise KeyError("mine")
    assert snapshot(model) == before


def test_unpatching_twice_and_unpatching_a_model_that_was_never_patched_do_nothing():
    model = tiny("llava")
    before = snapshot(model)
    tokenprune.unpatch(model)
    assert snapshot(model) == before
    session = tokenprune.patch(model, "divprune")
    tokenprune.unpatch(model)
    tokenprune.unpatch(model)
    session.remove()
    assert snapshot(model) == before


def test_hooks_of_others_stay_in_place_and_in_order():
    model, prompt = tiny("llava"), batch("llava")
    seen: list[str] = []
    decoder = model.get_decoder()
    decoder.register_forward_pre_hook(lambda module, args: seen.append("before"))
    tokenprune.patch(model, "divprune", keep=0.5)
    decoder.register_forward_hook(lambda module, args, output: seen.append("after"))
    logits(model, prompt.inputs)
    tokenprune.unpatch(model)
    logits(model, prompt.inputs)
    assert seen == ["before", "after"] * 2
    assert len(decoder._forward_pre_hooks) == len(decoder._forward_hooks) == 1


def test_hooks_that_transformers_adds_while_the_model_is_patched_outlive_the_patch():
    dense, prompt = tiny("llava"), batch("llava")
    with torch.no_grad():
        wanted = dense(**fresh(prompt.inputs), output_hidden_states=True)
    model = tiny("llava")
    tokenprune.patch(model, "divprune", keep=0.5)
    with torch.no_grad():
        pruned = model(**fresh(prompt.inputs), output_hidden_states=True)
        assert len(pruned.hidden_states) == len(wanted.hidden_states)
        tokenprune.unpatch(model)
        out = model(**fresh(prompt.inputs), output_hidden_states=True)
    assert hook_counts(model) == hook_counts(dense)
    assert torch.equal(out.logits, wanted.logits)
    for one, other in zip(out.hidden_states, wanted.hidden_states, strict=True):
        assert torch.equal(one, other)


def test_a_patched_model_that_nobody_holds_is_freed():
    model = tiny("llava")
    session = tokenprune.patch(model, "divprune", keep=0.5)
    generate(model, batch("llava").inputs, 1)
    watched = weakref.ref(model), weakref.ref(session)
    del model, session
    gc.collect()
    assert [ref() for ref in watched] == [None, None]


def test_an_unpatched_model_does_not_hold_its_session():
    model = tiny("llava")
    session = tokenprune.patch(model, "divprune", keep=0.5)
    generate(model, batch("llava").inputs, 1)
    watched = weakref.ref(session)
    tokenprune.unpatch(model)
    del session
    gc.collect()
    assert watched() is None


# --- patching again, and several models -----------------------------------------------------------


def test_patching_again_replaces_the_first_patch():
    model, prompt = tiny("llava"), batch("llava", EVEN)
    before = snapshot(model)
    first = tokenprune.patch(model, "divprune", keep=0.5)
    counts = hook_counts(model)
    second = tokenprune.patch(model, "random", keep=3)
    assert not first.installed
    assert second.installed
    assert hook_counts(model) == counts
    logits(model, prompt.inputs)
    assert first.traces == ()
    assert [(trace.method, trace.n_out) for trace in second.traces] == [("random", (3, 3))]
    first.remove()
    assert hook_counts(model) == counts
    tokenprune.unpatch(model)
    assert snapshot(model) == before


def test_leaving_the_context_of_a_replaced_patch_leaves_its_successor_alone():
    model, prompt = tiny("llava"), batch("llava", EVEN)
    with tokenprune.patch(model, "divprune", keep=0.5):
        second = tokenprune.patch(model, "uniform", keep=2)
    assert second.installed
    logits(model, prompt.inputs)
    assert second.traces[0].n_out == (2, 2)


@pytest.mark.parametrize("order", [("top", "base"), ("base", "top")])
def test_a_patch_of_the_base_model_and_one_of_the_whole_replace_each_other(order):
    model, prompt = tiny("llava"), batch("llava", EVEN)
    before = snapshot(model)
    parts = {"top": model, "base": model.model}
    first = tokenprune.patch(parts[order[0]], "divprune", keep=6)
    second = tokenprune.patch(parts[order[1]], "divprune", keep=3)
    assert (first.installed, second.installed) == (False, True)
    logits(model, prompt.inputs)
    assert second.traces[0].n_in == (12, 12)
    assert second.traces[0].n_out == (3, 3)
    tokenprune.unpatch(parts[order[0]])
    assert snapshot(model) == before


def test_the_base_model_alone_can_be_patched():
    model, prompt = tiny("llava"), batch("llava")
    tokenprune.patch(model, "divprune", keep=0.5)
    wanted = logits(model, prompt.inputs)
    session = tokenprune.patch(model.model, "divprune", keep=0.5)
    with torch.no_grad():
        hidden = model.model(**fresh(prompt.inputs)).last_hidden_state
        assert torch.equal(model.lm_head(hidden), wanted)
    assert session.traces[0].n_out == (8, 6, 4)


@pytest.mark.parametrize("families", [("llava", "llava"), ("llava", "qwen3_vl")])
@pytest.mark.parametrize("first_out", [0, 1])
def test_two_patched_models_do_not_know_of_each_other(families, first_out):
    models, prompts = [tiny(family) for family in families], [batch(family) for family in families]
    dense = [generate(model, prompt.inputs, 2) for model, prompt in zip(models, prompts, strict=True)]
    before = list(map(snapshot, models))
    sessions = [tokenprune.patch(model, "divprune", keep=keep) for model, keep in zip(models, (0.25, 0.5), strict=True)]
    pruned = [generate(model, prompt.inputs, 2) for model, prompt in zip(models, prompts, strict=True)]
    assert [session.traces[0].n_out for session in sessions] == [(4, 3, 2), (8, 6, 4)]
    last = 1 - first_out
    tokenprune.unpatch(models[first_out])
    assert snapshot(models[first_out]) == before[first_out]
    assert same_run(generate(models[first_out], prompts[first_out].inputs, 2), dense[first_out])
    assert same_run(generate(models[last], prompts[last].inputs, 2), pruned[last])
    tokenprune.unpatch(models[last])
    assert snapshot(models[last]) == before[last]
    assert same_run(generate(models[last], prompts[last].inputs, 2), dense[last])


def test_a_patched_model_may_run_within_the_forward_of_another_one():
    outer, inner = tiny("llava"), tiny("qwen3_vl")
    prompts = batch("llava"), batch("qwen3_vl", EVEN)
    sessions = tokenprune.patch(outer, "divprune", keep=0.5), tokenprune.patch(inner, "divprune", keep=3)
    wanted = generate(outer, prompts[0].inputs, 2), generate(inner, prompts[1].inputs, 2)
    nested: list[Any] = []
    for module in (outer.model.multi_modal_projector, outer.get_decoder().layers[1], outer.get_decoder()):
        module.register_forward_pre_hook(lambda module, args: nested.append(generate(inner, prompts[1].inputs, 2)))
    out = generate(outer, prompts[0].inputs, 2)
    assert same_run(out, wanted[0])
    assert len(nested) >= 4
    assert all(same_run(one, wanted[1]) for one in nested)
    assert [session.traces[0].n_out for session in sessions] == [(8, 6, 4), (3, 3)]


def test_a_patched_model_may_run_within_its_own_forward():
    model, prompts = tiny("llava"), (batch("llava"), batch("llava", EVEN, seeds=(7, 8)))
    session = tokenprune.patch(model, "divprune", keep=0.5)
    wanted = [generate(model, prompt.inputs, 2) for prompt in prompts]
    nested: list[Any] = []

    def run(module: nn.Module, args: Any) -> None:
        if not nested:
            nested.append(None)
            nested[0] = generate(model, prompts[1].inputs, 2)

    model.get_decoder().layers[1].register_forward_pre_hook(run)
    assert same_run(generate(model, prompts[0].inputs, 2), wanted[0])
    assert same_run(nested[0], wanted[1])
    assert session.traces[0].n_out == (8, 6, 4)


# --- exceptions -----------------------------------------------------------------------------------


@pytest.mark.parametrize("where", ["layer of the prefill", "layer of a decoding step", "head", "vision"])
@pytest.mark.parametrize("error", [RuntimeError, KeyboardInterrupt])
def test_an_exception_inside_a_forward_leaves_nothing_behind(where, error):
    model, prompt = tiny("llava"), batch("llava")
    session = tokenprune.patch(model, "divprune", keep=0.5)
    wanted = generate(model, prompt.inputs, 3)
    traces = session.traces
    module, calls = {
        "layer of the prefill": (model.get_decoder().layers[1], 0),
        "layer of a decoding step": (model.get_decoder().layers[1], 1),
        "head": (model.lm_head, 0),
        "vision": (model.get_decoder(), 0),
    }[where]
    interrupt = Interrupt(module, error, calls=calls)
    before = snapshot(model)
    with pytest.raises(error, match="interrupted"):
        generate(model, batch("llava", LATER).inputs, 3)
    interrupt.armed = False
    assert snapshot(model) == before
    if where in ("layer of the prefill", "vision"):
        assert session.traces is traces, "the traces are those of the last forward that went well"
    assert same_run(generate(model, prompt.inputs, 3), wanted)
    assert [trace.n_out for trace in session.traces] == [(8, 6, 4)]


@pytest.mark.parametrize("error", [RuntimeError, KeyboardInterrupt])
def test_after_an_exception_the_decoder_by_itself_is_not_pruned(error):
    model, prompt = tiny("llava"), batch("llava")
    decoder = model.get_decoder()
    embeds = torch.randn(*prompt.inputs["input_ids"].shape, 32)
    with torch.no_grad():
        wanted = decoder(inputs_embeds=embeds).last_hidden_state
        session = tokenprune.patch(model, "divprune", keep=0.5)
        logits(model, prompt.inputs)
        traces, interrupt = session.traces, Interrupt(decoder.layers[0], error)
        for _ in range(2):
            interrupt.armed = True
            with pytest.raises(error):
                logits(model, prompt.inputs)
            interrupt.armed = False
            out = decoder(inputs_embeds=embeds)
            assert torch.equal(out.last_hidden_state, wanted)
            assert type(cache_of(out)) is DynamicCache
            assert session.traces is traces


@pytest.mark.parametrize("error", [RuntimeError, KeyboardInterrupt])
def test_after_an_exception_no_input_is_held(error):
    model = tiny("llava")
    tokenprune.patch(model, "divprune", keep=0.5)
    interrupt = Interrupt(model.get_decoder().layers[0], error)
    inputs = batch("llava").inputs
    watched = weakref.ref(inputs["input_ids"])
    with pytest.raises(error), torch.no_grad():
        model(**inputs)
    interrupt.armed = False
    del inputs
    gc.collect()
    assert watched() is None


def test_a_method_that_raises_leaves_nothing_behind(monkeypatch):
    model, prompt = tiny("llava"), batch("llava")
    session = tokenprune.patch(model, Moody(keep=3))
    wanted, first = generate(model, prompt.inputs, 2), logits(model, prompt.inputs)
    traces, before = session.traces, snapshot(model)
    cache = DynamicCache(config=model.config)
    monkeypatch.setattr(Moody, "broken", True)
    with pytest.raises(ZeroDivisionError, match="no mood"):
        logits(model, prompt.inputs, **with_cache(cache))
    assert session.traces is traces
    assert snapshot(model) == before
    assert type(cache) is DynamicCache
    assert cache.get_seq_length() == 0
    monkeypatch.setattr(Moody, "broken", False)
    assert same_run(generate(model, prompt.inputs, 2), wanted)
    assert torch.equal(logits(model, prompt.inputs, **with_cache(cache)), first)


def test_the_second_of_two_methods_raising_leaves_the_traces_alone(monkeypatch):
    model, prompt = tiny("llava"), batch("llava")
    session = tokenprune.patch(model, [tokenprune.Random(keep=0.5), Moody(keep=2)])
    wanted = logits(model, prompt.inputs)
    traces = session.traces
    monkeypatch.setattr(Moody, "broken", True)
    with pytest.raises(ZeroDivisionError):
        logits(model, prompt.inputs)
    assert session.traces is traces
    monkeypatch.setattr(Moody, "broken", False)
    assert torch.equal(logits(model, prompt.inputs), wanted)


def test_a_pruned_cache_goes_on_after_an_exception_in_the_next_turn():
    model, prompt = tiny("llava"), batch("llava")
    tokenprune.patch(model, "divprune", keep=0.5)
    step = torch.tensor([[7], [8], [9]])

    def turns(interrupt: Interrupt | None) -> Tensor:
        cache = DynamicCache(config=model.config)
        logits(model, prompt.inputs, **with_cache(cache))
        length = cache.get_seq_length()
        mask = torch.cat([prompt.inputs["attention_mask"], torch.ones_like(step)], 1)
        if interrupt is not None:
            interrupt.armed = True
            with pytest.raises(RuntimeError), torch.no_grad():
                model(input_ids=step, attention_mask=mask, **with_cache(cache))
            interrupt.armed = False
        assert cache.get_seq_length() == length == prompt.inputs["input_ids"].shape[1]
        with torch.no_grad():
            return model(input_ids=step, attention_mask=mask, **with_cache(cache)).logits

    wanted = turns(None)
    interrupt = Interrupt(model.get_decoder().layers[0])
    interrupt.armed = False
    assert torch.equal(turns(interrupt), wanted)


# --- copies ---------------------------------------------------------------------------------------

COPIES: dict[str, Callable[[nn.Module, Any], nn.Module]] = {
    "deepcopy": lambda model, path: copy.deepcopy(model),
    "pickle": lambda model, path: pickle.loads(pickle.dumps(model)),
    "torch.save": lambda model, path: _saved(model, path / "model.pt"),
    "save_pretrained": lambda model, path: (model.save_pretrained(path), type(model).from_pretrained(path).eval())[1],
    "state_dict": lambda model, path: _loaded(tiny("llava"), model.state_dict()),
}


def _saved(model: nn.Module, path: Path) -> nn.Module:
    torch.save(model, path)
    return torch.load(path, weights_only=False)


def _loaded(model: nn.Module, weights: dict[str, Tensor]) -> nn.Module:
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.zero_()
    model.load_state_dict(weights)
    return model


@pytest.mark.filterwarnings("ignore:this .* is a copy of a patched one")
@pytest.mark.parametrize("way", COPIES)
def test_a_copy_of_a_patched_model_is_unpatched_and_the_original_stays_patched(way, tmp_path):
    model, prompt = tiny("llava"), batch("llava")
    model.save_pretrained(tmp_path / "first")  # writes something into the configuration, patched or not
    dense = generate(model, prompt.inputs, 3)
    config, names = model.config.to_dict(), list(model.state_dict())
    session = tokenprune.patch(model, "divprune", keep=0.5)
    pruned = generate(model, prompt.inputs, 3)
    before = snapshot(model)
    twin = COPIES[way](model, tmp_path)
    assert snapshot(model) == before
    traces = session.traces
    twin.generation_config = copy.deepcopy(model.generation_config)
    assert same_run(generate(twin, prompt.inputs, 3), dense)
    assert session.traces is traces, "a forward of the copy left a trace on the original's session"
    assert type(twin) is type(model)
    assert list(twin.state_dict()) == names
    assert set(twin.config.to_dict()) == set(config)
    assert same_run(generate(model, prompt.inputs, 3), pruned)
    tokenprune.unpatch(model)
    assert same_run(generate(model, prompt.inputs, 3), dense)
    assert same_run(generate(twin, prompt.inputs, 3), dense)


@pytest.mark.parametrize("way", COPIES)
def test_a_copy_of_a_patched_model_can_be_patched_by_itself(way, tmp_path):
    model, prompt = tiny("llava"), batch("llava")
    session = tokenprune.patch(model, "divprune", keep=0.5)
    pruned = generate(model, prompt.inputs, 3)
    twin = COPIES[way](model, tmp_path)
    twin.generation_config = copy.deepcopy(model.generation_config)
    again = tokenprune.patch(twin, "divprune", keep=0.25)
    generate(twin, prompt.inputs, 3)
    assert session.installed
    assert [trace.n_out for trace in again.traces] == [(4, 3, 2)]
    assert [trace.n_out for trace in session.traces] == [(8, 6, 4)]
    tokenprune.unpatch(model)
    generate(twin, prompt.inputs, 3)
    assert again.installed
    tokenprune.patch(twin, "divprune", keep=0.5)
    assert same_run(generate(twin, prompt.inputs, 3), pruned)


@pytest.mark.parametrize("way", COPIES)
def test_unpatching_a_copy_leaves_no_hook_on_it(way, tmp_path):
    model = tiny("llava")
    before = hook_counts(model)
    tokenprune.patch(model, "divprune", keep=0.5)
    twin = COPIES[way](model, tmp_path)
    tokenprune.unpatch(twin)
    assert hook_counts(twin) == before


def test_hooks_do_not_pile_up_over_generations_of_copies():
    model = tiny("llava")
    tokenprune.patch(model, "divprune", keep=0.5)
    wanted = hook_counts(model)
    for _ in range(3):
        model = copy.deepcopy(model)
        tokenprune.patch(model, "divprune", keep=0.5)
    assert hook_counts(model) == wanted


@pytest.mark.filterwarnings("ignore:this .* is a copy of a patched one")
def test_hooks_that_are_added_to_a_model_loaded_in_a_new_process_are_called_as_they_were_registered(monkeypatch):
    model, prompt = tiny("llava"), batch("llava")
    tokenprune.patch(model, "divprune", keep=0.5)
    saved, first = pickle.dumps(model), min(model.model._forward_pre_hooks)
    seen: list[int] = []
    monkeypatch.setattr(RemovableHandle, "next_id", first)  # a new process counts from 0
    twin = pickle.loads(saved)
    for module in (twin.model, twin.get_decoder()):
        for _ in range(4):
            module.register_forward_pre_hook(lambda module, args: seen.append(len(args)))
            module.register_forward_hook(lambda module, args, output: seen.append(len(args)))
    logits(twin, prompt.inputs)
    assert seen == [0] * 16


def test_a_pruned_cache_can_be_copied_and_each_copy_goes_on():
    model, prompt = tiny("llava"), batch("llava")
    tokenprune.patch(model, "divprune", keep=0.5)
    cache = DynamicCache(config=model.config)
    logits(model, prompt.inputs, **with_cache(cache))
    step = torch.tensor([[7], [8], [9]])
    mask = torch.cat([prompt.inputs["attention_mask"], torch.ones_like(step)], 1)

    def steps(some: Any, ids: Tensor) -> Tensor:
        with torch.no_grad():
            return model(input_ids=ids, attention_mask=mask, **with_cache(some)).logits

    twin, third = copy.deepcopy(cache), pickle.loads(pickle.dumps(cache))
    wanted = steps(cache, step)
    steps(twin, step + 1)
    assert torch.equal(steps(third, step), wanted)
    assert type(twin) is type(third) is type(cache)
    assert twin.get_seq_length() == third.get_seq_length() == cache.get_seq_length()


# --- pausing --------------------------------------------------------------------------------------


@pytest.mark.parametrize("family", FEW)
def test_a_paused_session_runs_dense_bit_for_bit(family):
    model, prompt = tiny(family), batch(family)
    dense = generate(model, prompt.inputs, 3)
    session = tokenprune.patch(model, "divprune", keep=0.5)
    pruned = generate(model, prompt.inputs, 3)
    traces = session.traces
    with session.pause():
        assert not session.active
        with session.pause():
            assert same_run(generate(model, prompt.inputs, 3), dense)
        assert same_run(generate(model, prompt.inputs, 3), dense)
        assert type(cache_of(generate(model, prompt.inputs, 1))) is DynamicCache
    assert session.active
    assert session.traces is traces
    assert same_run(generate(model, prompt.inputs, 3), pruned)


def test_a_pause_ends_with_an_exception_too():
    model, prompt = tiny("llava"), batch("llava")
    session = tokenprune.patch(model, "divprune", keep=0.5)
    pruned = logits(model, prompt.inputs)
    interrupt = Interrupt(model.get_decoder().layers[1])
    with pytest.raises(RuntimeError, match="interrupted"), session.pause():
        logits(model, prompt.inputs)
    interrupt.armed = False
    assert session.active
    assert torch.equal(logits(model, prompt.inputs), pruned)


def test_a_pause_of_all_threads_reaches_those_that_run_already():
    """As one that generates while this one reads what it streams."""
    model, prompt = tiny("llava"), batch("llava")
    dense = logits(model, prompt.inputs)
    session = tokenprune.patch(model, "divprune", keep=0.5)
    asked, answers = queue.Queue(), queue.Queue()

    def work() -> None:
        while asked.get():
            answers.put((session.active, logits(model, prompt.inputs)))

    def other_thread() -> tuple[bool, Tensor]:
        asked.put(True)
        return answers.get(timeout=60)

    thread = threading.Thread(target=work)
    thread.start()
    try:
        pruned = other_thread()[1]
        with session.pause():
            assert other_thread()[0]
            with session.pause(all_threads=True), session.pause(all_threads=True):
                assert not session.active
                active, out = other_thread()
                assert not active
                assert torch.equal(out, dense)
            assert other_thread()[0]
            assert not session.active
        with pytest.raises(RuntimeError, match="stop"), session.pause(all_threads=True):
            raise RuntimeError("stop")
        assert session.active
        assert torch.equal(other_thread()[1], pruned)
        assert not torch.equal(pruned, dense)
    finally:
        asked.put(False)
        thread.join()


def test_a_pause_holds_for_its_own_session_only():
    model, other, prompt = tiny("llava"), tiny("llava"), batch("llava", EVEN)
    session, running = tokenprune.patch(model, "divprune", keep=3), tokenprune.patch(other, "divprune", keep=2)
    with session.pause():
        logits(model, prompt.inputs)
        logits(other, prompt.inputs)
        assert running.active
    assert session.traces == ()
    assert running.traces[0].n_out == (2, 2)


def test_a_pruned_cache_goes_on_while_the_session_is_paused():
    model, prompt = tiny("llava"), batch("llava")
    session = tokenprune.patch(model, "divprune", keep=0.5)
    ids = torch.tensor([[7, 8], [8, 9], [9, 10]])

    def chat(pause: bool) -> list[Tensor]:
        cache = DynamicCache(config=model.config)
        logits(model, prompt.inputs, **with_cache(cache))
        mask, out = prompt.inputs["attention_mask"], []
        for turn in range(2):
            mask = torch.cat([mask, torch.ones_like(ids)], 1)
            with torch.no_grad():
                if pause:
                    with session.pause():
                        out.append(model(input_ids=ids + turn, attention_mask=mask, **with_cache(cache)).logits)
                else:
                    out.append(model(input_ids=ids + turn, attention_mask=mask, **with_cache(cache)).logits)
        assert cache.get_seq_length() == mask.shape[1]
        return out

    for one, other in zip(chat(pause=True), chat(pause=False), strict=True):
        assert torch.equal(one, other)


def test_an_image_that_comes_while_paused_is_kept_whole_on_a_pruned_cache():
    model, first, second = tiny("llava"), batch("llava", EVEN), batch("llava", EVEN, seeds=(5, 6))
    session = tokenprune.patch(model, "divprune", keep=3)
    cache = DynamicCache(config=model.config)
    logits(model, first.inputs, **with_cache(cache))
    length = first.inputs["input_ids"].shape[1]
    physical = cache.layers[0].keys.shape[2]
    mask = torch.cat([first.inputs["attention_mask"], second.inputs["attention_mask"]], 1)
    with session.pause():
        logits(model, {**second.inputs, "attention_mask": mask}, **with_cache(cache))
    assert cache.layers[0].keys.shape[2] == physical + length
    assert cache.get_seq_length() == 2 * length
    assert session.traces[0].n_out == (3, 3)


# --- threads --------------------------------------------------------------------------------------


def test_two_threads_generate_on_one_patched_model():
    model, prompts = tiny("llava"), (batch("llava"), batch("llava", LATER, seeds=(7, 8, 9)))
    tokenprune.patch(model, "divprune", keep=0.5)
    wanted = [generate(model, prompt.inputs, 4) for prompt in prompts]
    assert wanted[0].sequences.shape != wanted[1].sequences.shape
    interval = sys.getswitchinterval()
    sys.setswitchinterval(1e-5)
    try:
        for _ in range(5):
            for out, right in zip(
                in_threads(*(lambda p=p: generate(model, p.inputs, 4) for p in prompts)), wanted, strict=True
            ):
                assert same_run(out, right)
    finally:
        sys.setswitchinterval(interval)


@pytest.mark.parametrize("stop", ["root", "before the decoder", "layer", "decoding"])
def test_forwards_of_two_threads_that_overlap_do_not_mix(stop):
    model, prompts = tiny("llava"), (batch("llava"), batch("llava", LATER, seeds=(7, 8, 9)))
    tokenprune.patch(model, "divprune", keep=0.5)
    wanted = [generate(model, prompt.inputs, 3) for prompt in prompts]
    inside, finished, own = (threading.Event(), threading.Event()), threading.Event(), threading.local()

    def wait(module: nn.Module, args: Any) -> None:
        left = getattr(own, "left", None)
        if left is not None:
            own.left -= 1
            if left == 0:  # the first to enter leaves while the second one is inside
                inside[own.number].set()
                assert (finished if own.number else inside[1]).wait(timeout=60)

    decoder = model.get_decoder()
    module = {"root": model.model, "before the decoder": decoder}.get(stop, decoder.layers[2])
    module.register_forward_pre_hook(wait)

    def run(number: int) -> Any:
        own.number, own.left = number, 1 if stop == "decoding" else 0
        assert number == 0 or inside[0].wait(timeout=60)
        try:
            return generate(model, prompts[number].inputs, 3)
        finally:
            (inside[1], finished)[1 - number].set()

    for out, right in zip(in_threads(lambda: run(0), lambda: run(1)), wanted, strict=True):
        assert same_run(out, right)


def test_one_thread_pauses_while_another_prunes():
    model, prompts = tiny("llava"), (batch("llava"), batch("llava", LATER, seeds=(7, 8, 9)))
    dense = generate(model, prompts[0].inputs, 3)
    session = tokenprune.patch(model, "divprune", keep=0.5)
    pruned = generate(model, prompts[1].inputs, 3)
    paused, done = threading.Event(), threading.Event()

    def pausing() -> Any:
        with session.pause():
            paused.set()
            out = generate(model, prompts[0].inputs, 3)
            assert done.wait(timeout=60)
            return out, generate(model, prompts[0].inputs, 3)

    def pruning() -> Any:
        assert paused.wait(timeout=60)
        try:
            assert session.active
            return generate(model, prompts[1].inputs, 3)
        finally:
            done.set()

    (before, after), out = in_threads(pausing, pruning)
    assert same_run(before, dense)
    assert same_run(after, dense)
    assert same_run(out, pruned)


# --- keeping everything ---------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("family", "implementation", "method"),
    [
        pytest.param(*case, method, marks=() if method == "divprune" and case[0] in FEW else pytest.mark.matrix)
        for case in EVERY
        for method in ("divprune", "random", "uniform")
    ],
)
def test_keeping_everything_changes_no_bit_of_any_logit(family, implementation, method):
    model, prompt = tiny(family, implementation), batch(family)
    wanted, ids = logits(model, prompt.inputs), generate(model, prompt.inputs, 2).sequences
    uncached = logits(model, prompt.inputs, use_cache=False)
    session = tokenprune.patch(model, method, keep=1.0)
    for forced in (False, True):
        session.forced = forced
        assert torch.equal(logits(model, prompt.inputs), wanted)
        assert torch.equal(logits(model, prompt.inputs, use_cache=False), uncached)
        assert torch.equal(generate(model, prompt.inputs, 2).sequences, ids)
    assert session.traces[0].n_out == session.traces[0].n_in == (16, 12, 8)


# --- compiling ------------------------------------------------------------------------------------


@pytest.fixture
def dynamo():
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


@pytest.mark.usefixtures("dynamo")
@pytest.mark.parametrize("how", ["torch.compile", pytest.param("module.compile", marks=pytest.mark.matrix)])
def test_a_patched_model_can_be_compiled_and_paused_and_unpatched_then(how):
    model, prompt = tiny("llava", text_config={"num_hidden_layers": 1}), batch("llava")
    dense = logits(model, prompt.inputs)
    session = tokenprune.patch(model, "divprune", keep=0.5)
    wanted = logits(model, prompt.inputs)
    session.publish(())
    if how == "torch.compile":
        compiled = torch.compile(model, backend="eager")
    else:
        compiled = model
        model.compile(backend="eager")
    torch.testing.assert_close(logits(compiled, prompt.inputs), wanted)
    assert [trace.n_out for trace in session.traces] == [(8, 6, 4)]
    with session.pause():
        torch.testing.assert_close(logits(compiled, prompt.inputs), dense)
    torch.testing.assert_close(logits(compiled, prompt.inputs), wanted)
    tokenprune.unpatch(model)
    torch.testing.assert_close(logits(compiled, prompt.inputs), dense)


@pytest.mark.matrix
@pytest.mark.usefixtures("dynamo")
def test_a_compiled_patched_model_generates_as_it_does_uncompiled():
    model = tiny("llava", text_config={"num_hidden_layers": 1})
    tokenprune.patch(model, "divprune", keep=0.5)
    prompts = [batch("llava", rows) for rows in (RAGGED, EVEN, LATER)]
    wanted = [generate(model, prompt.inputs, 3) for prompt in prompts]
    model.compile(backend="eager")
    for prompt, right in zip(prompts, wanted, strict=True):
        out = generate(model, prompt.inputs, 3)
        assert torch.equal(out.sequences, right.sequences)
        for step, step_right in zip(out.logits, right.logits, strict=True):
            torch.testing.assert_close(step, step_right)


@pytest.mark.matrix
@pytest.mark.usefixtures("dynamo")
@pytest.mark.parametrize("before", ["patched first", "compiled first"])
def test_generation_that_compiles_itself_for_a_static_cache_stays_right(before):
    dense, prompt = tiny("llava", text_config={"num_hidden_layers": 1}), batch("llava")
    automatic = CompileConfig(backend="eager", mode=None)
    automatic._compile_all_devices = True
    static = {"cache_implementation": "static"}

    def check(model: nn.Module, right: Any) -> None:
        out = generate(model, prompt.inputs, 3, **static, compile_config=automatic)
        for step, step_right in zip(out.logits, right.logits, strict=True):
            torch.testing.assert_close(step, step_right, atol=1e-4, rtol=1e-4)

    unpruned = generate(dense, prompt.inputs, 3, **static)
    other = copy.deepcopy(dense)
    tokenprune.patch(other, "divprune", keep=0.5)
    pruned = generate(other, prompt.inputs, 3, **static)
    model = copy.deepcopy(dense)
    if before == "compiled first":
        check(model, unpruned)
    tokenprune.patch(model, "divprune", keep=0.5)
    check(model, pruned)
    tokenprune.unpatch(model)
    check(model, unpruned)


def test_right_answers_survive_all_of_this_in_one_session():
    dense = tiny("llava")
    model, prompt = copy.deepcopy(dense), batch("llava")
    session = tokenprune.patch(model, "uniform", keep=2)
    session = tokenprune.patch(model, "divprune", keep=0.5)
    with session.pause():
        generate(model, prompt.inputs, 1)
    copy.deepcopy(model)
    interrupt = Interrupt(model.get_decoder().layers[1])
    with pytest.raises(RuntimeError):
        generate(model, batch("llava", RAGGED[::-1]).inputs, 2)
    interrupt.armed = False
    out = generate(model, prompt.inputs, 3)
    check_steps(dense, "llava", out, session.traces, prompt, 3)
