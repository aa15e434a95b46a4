"""SpAtten where attention caps its logits (Gemma 2), against the unpatched model: its eager attention written out, with
fewer values in steps, zeros before its output projections, and a cache that rounds."""

import copy

import pytest
import torch
from families import batch, generate, tiny
from test_spatten import planes_layer
from transformers import AttentionInterface, DynamicCache
from transformers.cache_utils import DynamicLayer
from transformers.models.gemma2 import modeling_gemma2
from upstream import with_cache

import tokenprune

CAP = 0.5  # Most logits of the tiny model are above it.
HEADS = (1.0, 0.75, 0.5, 0.25)
STEPS = 5


def capped(cap=CAP, implementation="eager"):
    return tiny("paligemma2", implementation, text_config={"attn_logit_softcapping": cap, "sliding_window": 4096})


def run(model, **inputs):
    return torch.stack(generate(model, {**batch("paligemma2").inputs, **inputs}, STEPS).logits)


def pruned(model, **options):
    model = copy.deepcopy(model)
    session = tokenprune.patch(model, tokenprune.SpAtten(tokens=1.0, **options))
    return run(model), session


def written_out(share):
    """Eager attention of Gemma 2, in whose steps a head takes only the values with the largest probabilities."""

    def attend(module, query, key, value, attention_mask, scaling=None, softcap=None, **kwargs):
        groups = query.shape[1] // key.shape[1]
        key, value = (x.repeat_interleave(groups, dim=1) for x in (key, value))
        logits = query @ key.transpose(2, 3) * scaling
        if softcap is not None:
            logits = softcap * (logits / softcap).tanh()
        weights = (logits + attention_mask).softmax(-1)
        if query.shape[2] == 1:
            for row, of_heads in zip(attention_mask[:, 0, 0], weights, strict=True):
                n = max(1, int(int((row == 0).sum()) * share + 1e-6))
                order = of_heads.argsort(dim=-1, descending=True, stable=True)
                of_heads.scatter_(2, order[:, :, n:], 0.0)
        return (weights @ value).transpose(1, 2), weights

    return attend


def zero_heads(model, kept):
    """Lets each forward of `model` keep the heads that had the largest outputs in the layers and tokens before."""
    n_heads = model.get_decoder().config.num_attention_heads
    state = {"scores": torch.zeros(3, n_heads)}

    def hook(module, args, layer):
        heads = args[0].unflatten(-1, (n_heads, -1))
        if layer == 0:
            state["alive"] = torch.ones(3, n_heads, dtype=torch.bool)
        n_keep = max(1, int(n_heads * kept[layer] + 1e-6))
        among = state["scores"].masked_fill(~state["alive"], -1.0)
        state["alive"] = torch.zeros(3, n_heads).scatter(1, among.topk(n_keep, dim=1).indices, 1.0).bool()
        heads = heads * state["alive"][:, None, :, None]
        real = torch.ones(heads.shape[:2])
        if heads.shape[1] > 1:
            real = batch("paligemma2").inputs["attention_mask"].float()
        state["scores"] = state["scores"] + (heads.abs().sum(-1) * real[:, :, None]).sum(1)
        return (heads.flatten(2),)

    for i, layer in enumerate(model.get_decoder().layers):
        layer.self_attn.o_proj.register_forward_pre_hook(lambda module, args, i=i: hook(module, args, i))


def test_the_cap_matters():
    assert (run(capped()) - run(capped(None))).abs().amax() > 0.1


@pytest.mark.parametrize("share", [0.3, 0.6])
def test_steps_with_fewer_values_cap_their_logits(share, monkeypatch):
    found, session = pruned(capped(), values=share)
    dense = capped()
    everything = run(dense)
    monkeypatch.setattr(modeling_gemma2, "eager_attention_forward", written_out(1.0))
    torch.testing.assert_close(run(dense), everything)
    monkeypatch.setattr(modeling_gemma2, "eager_attention_forward", written_out(share))
    torch.testing.assert_close(found, run(dense), atol=1e-4, rtol=1e-4)
    assert session.traffic.values < session.traffic.dense


def test_steps_with_fewer_heads_cap_their_logits():
    dense = capped()
    found, session = pruned(dense, heads=HEADS)
    zero_heads(dense, HEADS)
    torch.testing.assert_close(found, run(dense), atol=1e-4, rtol=1e-4)
    assert session.traffic.heads < session.traffic.dense


@pytest.mark.parametrize("threshold", [0.0, 1.0])
def test_steps_on_planes_cap_their_logits(threshold):
    dense = capped()
    found, session = pruned(dense, quantize="4+4", threshold=threshold)
    rounding, cache = planes_layer(low_in_steps=threshold == 1.0), DynamicCache()
    # Layers with a window do not round. It is wider than all there is.
    kinds = dense.get_decoder().config.layer_types
    cache.layers = [rounding() if kind == "full_attention" else DynamicLayer() for kind in kinds]
    torch.testing.assert_close(found, run(dense, **with_cache(cache)), atol=1e-4, rtol=1e-4)
    assert session.traffic.recomputed == threshold * kinds.count("full_attention") / len(kinds)


def test_all_of_it_together_differs_from_doing_it_without_a_cap():
    options = {"heads": HEADS, "values": 0.5, "quantize": "4+4", "threshold": 0.1}
    found, _ = pruned(capped(), **options)
    assert (found - pruned(capped(None), **options)[0]).abs().amax() > 0.1
    assert (found - pruned(capped(1e6), **options)[0]).abs().amax() > 0.1


@pytest.mark.parametrize("options", [{"values": 0.5}, {"heads": HEADS}, {"quantize": "4+4", "threshold": 0.5}])
def test_steps_cap_nothing_where_the_attention_function_does_not(options, monkeypatch):
    """As with sdpa in transformers 5.17, which takes the cap and leaves it; later ones refuse it."""
    real = AttentionInterface._global_mapping["sdpa"]

    def leaving(module, query, key, value, attention_mask, scaling=None, **kwargs):
        return real(module, query, key, value, attention_mask, scaling=scaling)

    monkeypatch.setitem(AttentionInterface._global_mapping, "sdpa", leaving)
    monkeypatch.setattr(modeling_gemma2.Gemma2PreTrainedModel, "_supports_sdpa", True)
    model = capped(implementation="sdpa")
    assert model.get_decoder().config._attn_implementation == "sdpa"
    torch.testing.assert_close(run(model), run(capped(None)), atol=1e-4, rtol=1e-4)
    found, wanted = pruned(model, **options)[0], pruned(capped(None), **options)[0]
    torch.testing.assert_close(found, wanted, atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize(
    "method", [tokenprune.FastV(layer=1, keep=0.5), tokenprune.SpAtten(tokens=(1.0, 0.5, 0.5, 0.5))]
)
def test_what_leaves_a_prompt_goes_by_capped_logits(method):
    dense, inputs = capped(), batch("paligemma2").inputs
    with torch.no_grad():
        attention = dense(**inputs, output_attentions=True).attentions  # [B, H, L, L] each
    model = copy.deepcopy(dense)
    session = tokenprune.patch(model, method)
    with torch.no_grad():
        model(**inputs)
    trace = next(one for one in session.traces if one.site == "llm_layer")
    real = inputs["attention_mask"].bool()
    for row, (before, kept) in enumerate(zip(trace.visual_indices, trace.kept_indices, strict=True)):
        queries = [-1] if isinstance(method, tokenprune.FastV) else real[row].nonzero()[:, 0]
        received = attention[trace.layer][row].double()[:, queries].sum((0, 1))[before]
        assert kept.tolist() == before[received.topk(len(kept)).indices.sort().values].tolist()
        assert 0 < len(kept) < len(before)
