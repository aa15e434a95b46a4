"""O6 and the laws of state for pruning inside the decoder: hooks on its layers, and what its attention modules see as
their configuration, leave nothing behind."""

import copy

import pytest
import torch
from families import EVEN, FAMILIES, RAGGED, batch, generate, implementations, tiny
from states import Interrupt, Same, hook_counts, in_threads, logits, same_run, snapshot
from test_accelerate import accelerate_hooks, half_on_disk
from test_layers import N_LAYERS, check_layers, first_cut, pair, progressive
from test_state import COPIES, LATER
from torch import nn
from transformers import DynamicCache, StaticCache
from transformers.cache_utils import QuantizedLayer
from upstream import cache_of, with_cache

import tokenprune
from tokenprune import AIM, DivPrune, FastV, InputError, PyramidDrop, UnsupportedModelError

FEW = ("llava", "qwen3_vl", "gemma3", "idefics3")


def attentions(model):
    """The attention modules of the decoder."""
    return [module for name, module in model.get_decoder().named_modules() if name.endswith("self_attn")]


def method_of(family="llava"):
    return AIM(merge=0.5, prune=(first_cut(family), 3))


# --- taking a patch out again ---------------------------------------------------------------------


@pytest.mark.parametrize(
    "family", [family if family in FEW else pytest.param(family, marks=pytest.mark.matrix) for family in FAMILIES]
)
def test_unpatching_leaves_the_model_as_it_was(family):
    model, prompt = tiny(family, implementations(family)[0]), batch(family)
    wanted, before = generate(model, prompt.inputs, 2), snapshot(model)
    configs = [Same(module.config) for module in attentions(model)]
    assert len(configs) == N_LAYERS
    session = tokenprune.patch(model, [FastV(layer=first_cut(family) + 1, keep=0.5), AIM(merge=0.5, prune=None)])
    assert [Same(module.config) for module in attentions(model)] != configs
    assert not same_run(generate(model, prompt.inputs, 2), wanted)
    tokenprune.unpatch(model)
    assert [Same(module.config) for module in attentions(model)] == configs
    assert snapshot(model) == before
    assert not session.installed
    assert same_run(generate(model, prompt.inputs, 2), wanted)


def test_only_layers_and_probed_attentions_are_touched():
    model = tiny("llava")
    before, config = snapshot(model), model.get_decoder().config
    tokenprune.patch(model, FastV(layer=2))
    after = snapshot(model)
    changed = {key for key in after if key not in before or after[key] != before[key]}
    decoder = "model.language_model"
    hooked = {key[0] for key in changed if "hooks" in key[1]}
    assert hooked == {"", "model", decoder, *(f"{decoder}.layers.{i}" for i in range(2, N_LAYERS))}
    rest = {key[:2] for key in changed if "hooks" not in key[1]}
    assert rest == {(f"{decoder}.layers.1.self_attn", "config")}
    assert model.get_decoder().config is config
    assert config._attn_implementation == "sdpa"
    probed = attentions(model)[1].config
    assert (probed.hidden_size, probed.original) == (config.hidden_size, config)


def test_a_patched_forward_leaves_nothing_on_the_modules():
    model, prompt = tiny("qwen3_vl"), batch("qwen3_vl")
    tokenprune.patch(model, method_of("qwen3_vl"))
    generate(model, prompt.inputs, 2)
    before = snapshot(model)
    generate(model, prompt.inputs, 2)
    assert snapshot(model) == before


def test_patching_with_another_method_replaces_the_first():
    model, prompt = tiny("llava"), batch("llava")
    before = snapshot(model)
    fresh_model = tiny("llava")
    wanted = []
    for method in (method_of(), DivPrune(keep=0.5), FastV(layer=1), PyramidDrop(stages=(2,))):
        with tokenprune.patch(fresh_model, method):
            wanted.append(generate(fresh_model, prompt.inputs, 2))
    sessions = []
    for method, right in zip(
        (method_of(), DivPrune(keep=0.5), FastV(layer=1), PyramidDrop(stages=(2,))), wanted, strict=True
    ):
        sessions.append(tokenprune.patch(model, method))
        assert [session.installed for session in sessions] == [False] * (len(sessions) - 1) + [True]
        assert same_run(generate(model, prompt.inputs, 2), right)
        for session in sessions[:-1]:
            session.remove()
        assert same_run(generate(model, prompt.inputs, 2), right)
    tokenprune.unpatch(model)
    assert snapshot(model) == before


def test_a_refused_patch_leaves_the_one_before_it_in_force():
    model, prompt = tiny("llava"), batch("llava")
    session = tokenprune.patch(model, method_of())
    wanted, before = generate(model, prompt.inputs, 2), snapshot(model)
    with pytest.raises(tokenprune.OptionError):
        tokenprune.patch(model, FastV(layer=9))
    assert session.installed
    assert snapshot(model) == before
    assert same_run(generate(model, prompt.inputs, 2), wanted)


@pytest.mark.parametrize("first_out", [0, 1])
def test_two_patched_models_do_not_know_of_each_other(first_out):
    families = ("llava", "qwen3_vl")
    models, prompts = [tiny(family) for family in families], [batch(family) for family in families]
    dense = [generate(model, prompt.inputs, 2) for model, prompt in zip(models, prompts, strict=True)]
    before = list(map(snapshot, models))
    for family, model in zip(families, models, strict=True):
        tokenprune.patch(model, method_of(family))
    pruned = [generate(model, prompt.inputs, 2) for model, prompt in zip(models, prompts, strict=True)]
    for i in (first_out, 1 - first_out):
        assert same_run(generate(models[i], prompts[i].inputs, 2), pruned[i])
        tokenprune.unpatch(models[i])
        assert snapshot(models[i]) == before[i]
        assert same_run(generate(models[i], prompts[i].inputs, 2), dense[i])


# --- exceptions -----------------------------------------------------------------------------------


@pytest.mark.parametrize("calls", [0, 1], ids=["prefill", "decoding step"])
@pytest.mark.parametrize("layer", [1, 2, 3])
@pytest.mark.parametrize("error", [RuntimeError, KeyboardInterrupt])
def test_an_exception_between_layers_leaves_nothing_behind(error, layer, calls):
    model, prompt = tiny("llava"), batch("llava")
    session = tokenprune.patch(model, method_of())
    wanted, traces = generate(model, prompt.inputs, 3), session.traces
    interrupt = Interrupt(model.get_decoder().layers[layer], error, calls=calls)
    before = snapshot(model)
    with pytest.raises(error, match="interrupted"):
        generate(model, batch("llava", LATER).inputs, 3)
    interrupt.armed = False
    assert snapshot(model) == before
    if not calls:
        assert session.traces is traces
    assert same_run(generate(model, prompt.inputs, 3), wanted)


# --- copies ---------------------------------------------------------------------------------------


@pytest.mark.filterwarnings("ignore:this .* is a copy of a patched one")
@pytest.mark.parametrize("way", COPIES)
def test_a_copy_of_a_patched_model_is_unpatched_and_can_be_patched_by_itself(way, tmp_path):
    model, prompt = tiny("llava"), batch("llava")
    dense = generate(model, prompt.inputs, 2)
    tokenprune.patch(model, method_of())
    pruned, before = generate(model, prompt.inputs, 2), snapshot(model)
    twin = COPIES[way](model, tmp_path)
    twin.generation_config = copy.deepcopy(model.generation_config)
    if way != "save_pretrained":  # which writes something into the configuration, patched or not
        assert snapshot(model) == before
    decoder = twin.get_decoder()
    assert all(module.config is decoder.config for module in attentions(twin))
    assert type(decoder.config) is type(model.get_decoder().config)
    assert same_run(generate(twin, prompt.inputs, 2), dense)
    tokenprune.patch(twin, method_of())
    tokenprune.unpatch(model)
    assert same_run(generate(twin, prompt.inputs, 2), pruned)
    assert same_run(generate(model, prompt.inputs, 2), dense)
    tokenprune.unpatch(twin)
    assert hook_counts(twin) == hook_counts(model)
    assert all(module.config is decoder.config for module in attentions(twin))


# --- pausing, threads, dispatch -------------------------------------------------------------------


@pytest.mark.parametrize("family", FEW)
def test_a_paused_session_runs_dense_bit_for_bit(family):
    model, prompt = tiny(family), batch(family)
    dense = generate(model, prompt.inputs, 2)
    session = tokenprune.patch(model, method_of(family))
    pruned, traces = generate(model, prompt.inputs, 2), session.traces
    with session.pause():
        assert same_run(generate(model, prompt.inputs, 2), dense)
        assert type(cache_of(generate(model, prompt.inputs, 1))) is DynamicCache
    assert session.traces is traces
    assert same_run(generate(model, prompt.inputs, 2), pruned)


def test_two_threads_generate_on_one_patched_model():
    model, prompts = tiny("llava"), (batch("llava"), batch("llava", LATER, seeds=(7, 8, 9)))
    tokenprune.patch(model, method_of())
    wanted = [generate(model, prompt.inputs, 3) for prompt in prompts]
    for _ in range(3):
        found = in_threads(*(lambda p=p: generate(model, p.inputs, 3) for p in prompts))
        assert all(same_run(out, right) for out, right in zip(found, wanted, strict=True))


def test_a_patched_model_may_run_between_the_layers_of_another_and_of_its_own():
    model, other = tiny("llava"), tiny("qwen3_vl")
    prompts = batch("llava"), batch("llava", EVEN, seeds=(7, 8)), batch("qwen3_vl", EVEN)
    tokenprune.patch(model, method_of())
    tokenprune.patch(other, method_of("qwen3_vl"))
    runs = ((model, prompts[0]), (model, prompts[1]), (other, prompts[2]))
    wanted = [generate(one, prompt.inputs, 2) for one, prompt in runs]
    nested = []

    def run(module, args):
        if not nested:
            nested.append(None)
            nested[:] = [generate(one, prompt.inputs, 2) for one, prompt in runs[1:]]

    model.get_decoder().layers[3].register_forward_pre_hook(run)
    assert same_run(generate(model, prompts[0].inputs, 2), wanted[0])
    assert all(same_run(out, right) for out, right in zip(nested, wanted[1:], strict=True))


@pytest.mark.parametrize("patched_first", [True, False], ids=["patched first", "dispatched first"])
def test_a_dispatched_model_is_pruned_like_a_plain_one(patched_first, tmp_path):
    dense, prompt = tiny("llava"), batch("llava")
    plain = copy.deepcopy(dense)
    tokenprune.patch(plain, method_of())
    wanted, pruned = generate(dense, prompt.inputs, 2), generate(plain, prompt.inputs, 2)
    model = copy.deepcopy(dense)
    if patched_first:
        tokenprune.patch(model, method_of())
        model = half_on_disk(model, tmp_path)
    else:
        model = half_on_disk(model, tmp_path)
        tokenprune.patch(model, method_of())
    assert same_run(generate(model, prompt.inputs, 2), pruned)
    hooks = accelerate_hooks(model)
    tokenprune.unpatch(model)
    assert accelerate_hooks(model) == hooks
    assert hook_counts(model) == {}
    assert same_run(generate(model, prompt.inputs, 2), wanted)


@pytest.mark.matrix
def test_a_patched_model_can_be_compiled():
    torch._dynamo.reset()
    model, prompt = tiny("llava"), batch("llava")
    dense = logits(model, prompt.inputs)
    session = tokenprune.patch(model, method_of())
    wanted = logits(model, prompt.inputs)
    model.compile(backend="eager")
    torch.testing.assert_close(logits(model, prompt.inputs), wanted)
    assert session.traces[-1].n_out == (0, 0, 0)
    with session.pause():
        torch.testing.assert_close(logits(model, prompt.inputs), dense)
    tokenprune.unpatch(model)
    torch.testing.assert_close(logits(model, prompt.inputs), dense)
    torch._dynamo.reset()


# --- caches that layers share no length of --------------------------------------------------------


def turn(model, cache, prompt):
    """Logits of one more token on `cache`."""
    step = torch.full((len(prompt.rows), 1), 7)
    mask = torch.cat([prompt.inputs["attention_mask"], torch.ones_like(step)], 1)
    with torch.no_grad():
        return model(input_ids=step, attention_mask=mask, **with_cache(cache)).logits


def filled(model, prompt, make=DynamicCache):
    cache = make(config=model.config) if make is DynamicCache else make(config=model.config, max_cache_len=40)
    logits(model, prompt.inputs, **with_cache(cache))
    return cache


@pytest.mark.parametrize("make", [DynamicCache, StaticCache])
def test_a_cache_pruned_layer_by_layer_needs_a_model_that_is_patched_so(make):
    model, prompt = tiny("llava"), batch("llava")
    tokenprune.patch(model, method_of())
    wanted = turn(model, filled(model, prompt, make), prompt)
    cache = filled(model, prompt, make)
    state = {name: Same(value) for name, value in vars(cache).items()}
    for change in (lambda: tokenprune.patch(model, "divprune", keep=0.5), lambda: tokenprune.unpatch(model)):
        change()
        with pytest.raises(InputError, match=r"pruned layer by layer.*patch it as it was when the cache was made"):
            turn(model, cache, prompt)
        assert {name: Same(value) for name, value in vars(cache).items()} == state
    session = tokenprune.patch(model, PyramidDrop(stages=(1, 2, 3)))  # other cuts, which only the next image sees
    assert torch.equal(turn(model, copy.deepcopy(cache), prompt), wanted)
    with session.pause():
        assert torch.equal(turn(model, cache, prompt), wanted)


def test_a_cache_pruned_before_the_decoder_goes_on_with_any_patch():
    model, prompt = tiny("llava"), batch("llava")
    tokenprune.patch(model, "divprune", keep=0.5)
    wanted, cache = turn(model, filled(model, prompt), prompt), filled(model, prompt)
    tokenprune.patch(model, method_of())
    torch.testing.assert_close(turn(model, cache, prompt), wanted, atol=1e-5, rtol=1e-5)


def test_a_pruned_cache_can_be_copied_pickled_and_reordered():
    model, prompt = tiny("llava"), batch("llava", EVEN)
    tokenprune.patch(model, AIM(merge=0.5, prune=(1, 3), size_bias=True))
    cache = filled(model, prompt)
    twin = copy.deepcopy(cache)
    assert twin.get_seq_length() == prompt.inputs["input_ids"].shape[1]
    wanted = turn(model, cache, prompt)
    assert torch.equal(turn(model, copy.deepcopy(twin), prompt), wanted)
    twin.reorder_cache(torch.tensor([1, 0]))
    torch.testing.assert_close(turn(model, twin, prompt).flip(0), wanted, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("method", [DivPrune(keep=0.5), FastV(layer=1), PyramidDrop(stages=(1, 3))])
def test_a_crop_may_take_padding_of_short_rows_along(method):
    model, prompt = tiny("llava"), batch("llava", ((2, (3, 4), 6), (4, (2, 2), 5), (3,)))
    tokenprune.patch(model, method)
    cache, shorter = filled(model, prompt), filled(model, prompt)
    before = [layer.keys.clone() for layer in cache.layers]
    cache.crop(-4)
    assert cache.get_seq_length() == prompt.inputs["input_ids"].shape[1] - 4
    assert all(torch.equal(layer.keys, keys[:, :, :-4]) for layer, keys in zip(cache.layers, before, strict=True))
    again = {"input_ids": prompt.inputs["input_ids"][:, -4:], "attention_mask": prompt.inputs["attention_mask"]}
    logits(model, again, **with_cache(cache))
    torch.testing.assert_close(turn(model, cache, prompt), turn(model, shorter, prompt), atol=1e-5, rtol=1e-5)


class Coarse(QuantizedLayer):
    """A layer of a quantized cache that rounds."""

    def _quantize(self, tensor, axis):
        return tensor.to(torch.bfloat16)

    def _dequantize(self, tensor):
        return tensor.float()


class Boxed(nn.Module):
    """No cache of layers."""

    def get_seq_length(self, layer_idx=0):
        return 0


def test_a_cache_that_cannot_differ_by_layer_is_refused_before_anything_is_stored():
    model, prompt = tiny("llava"), batch("llava")
    wanted = generate(model, prompt.inputs, 2)
    session = tokenprune.patch(model, method_of())
    before = snapshot(model)
    cache = DynamicCache(config=model.config)
    cache.layers = [Coarse(axis_key=0, axis_value=0) for _ in range(N_LAYERS)]
    with pytest.raises(UnsupportedModelError, match=r"between decoder layers.*quantized.*DynamicCache or StaticCache"):
        logits(model, prompt.inputs, **with_cache(cache))
    assert type(cache) is DynamicCache
    assert not any(layer.is_initialized for layer in cache.layers)
    with pytest.raises(UnsupportedModelError, match="cache of type Boxed"):
        logits(model, prompt.inputs, **with_cache(Boxed()))
    assert session.traces == ()
    assert snapshot(model) == before
    with session.pause():
        assert same_run(generate(model, prompt.inputs, 2), wanted)


def test_attention_that_is_not_finite_is_refused_by_layer():
    model, prompt = tiny("llava"), batch("llava")
    session = tokenprune.patch(model, FastV(layer=2))
    right, before = logits(model, prompt.inputs), snapshot(model)
    traces, cache = session.traces, DynamicCache(config=model.config)
    handle = model.get_decoder().layers[1].self_attn.q_proj.register_forward_hook(lambda *args: args[-1] * torch.nan)
    with pytest.raises(InputError, match=r"llm_layer: the attention of layer 1 holds NaN"):
        logits(model, prompt.inputs, **with_cache(cache))
    handle.remove()
    assert snapshot(model) == before
    assert session.traces is traces
    assert type(cache) is DynamicCache
    assert torch.equal(logits(model, prompt.inputs), right)


def test_right_answers_survive_all_of_this_in_one_session():
    dense, model, _ = pair("llava", method=FastV(layer=1))
    session = tokenprune.patch(model, progressive("llava"))
    prompt = batch("llava")
    with session.pause():
        generate(model, prompt.inputs, 1)
    copy.deepcopy(model)
    interrupt = Interrupt(model.get_decoder().layers[3])
    with pytest.raises(RuntimeError):
        generate(model, batch("llava", RAGGED[::-1]).inputs, 2)
    interrupt.armed = False
    out = generate(model, prompt.inputs, 3)
    check_layers(dense, "llava", out, session.traces, prompt, 3)
    text = str(session.report())
    assert "aim" in text


def test_a_cache_pruned_before_early_layers_is_continued_by_a_method_that_prunes_later():
    model, prompt = tiny("llava"), batch("llava")
    token = torch.full((len(prompt.inputs["attention_mask"]), 1), 7)
    mask = torch.cat([prompt.inputs["attention_mask"], torch.ones_like(token)], dim=1)

    def step(cache):
        with torch.no_grad():
            return model(input_ids=token, attention_mask=mask, **with_cache(copy.deepcopy(cache))).logits

    tokenprune.patch(model, FastV(layer=1, keep=1))
    with torch.no_grad():
        cache = cache_of(model(**prompt.inputs))
    wanted = step(cache)
    tokenprune.patch(model, FastV(layer=3))
    assert torch.equal(step(cache), wanted)
