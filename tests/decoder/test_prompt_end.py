"""The last token of the prompt ranks, whatever comes behind it in the same call: drafts, or tokens that were generated
without a cache."""

import contextlib
import copy
import functools
import gc
import weakref

import pytest
import torch
from families import RAGGED, batch, fresh, generate, tiny
from test_layers import pair, progressive, spread
from transformers import LlamaConfig, LlamaForCausalLM
from upstream import FEATURES, USE_CACHE

import tokenprune

TEXT = {
    "vocab_size": 128,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "pad_token_id": 0,
    "bos_token_id": 1,
}


CASES = spread(
    [
        (family, name)
        for family in ("llava", "qwen3_vl", "gemma3", "idefics3")
        for name in ("fastv", "aim", "spatten")
        if (family, name) != ("qwen3_vl", "spatten")  # it prunes from the first layer on, where DeepStack adds features
    ]
)


def kept(session):
    return [one.tolist() for trace in session.traces for one in trace.kept_indices]


def methods_inside(family):
    return {
        "fastv": tokenprune.FastV(layer=3, keep=0.5),
        "aim": progressive(family),
        "spatten": tokenprune.SpAtten(tokens=0.5, heads=1.0),
    }


@functools.cache
def assistant():
    torch.manual_seed(3)
    model = LlamaForCausalLM(LlamaConfig(**TEXT)).eval()
    model.generation_config.eos_token_id = None
    return model


def drafter(dense):
    """An assistant that is often wrong."""
    helper = copy.deepcopy(dense)
    with torch.no_grad():
        for parameter in helper.lm_head.parameters():
            parameter.add_(0.05 * torch.randn(parameter.shape, generator=torch.Generator().manual_seed(5)))
    return helper


@contextlib.contextmanager
def lengths_of_calls(decoder):
    lengths = []
    watch = decoder.register_forward_hook(lambda *call: lengths.append(call[2][0].shape[1]))
    yield lengths
    watch.remove()


@pytest.mark.parametrize(("family", "name"), CASES)
def test_drafts_change_neither_what_is_kept_nor_the_answer(family, name):
    dense, model, session = pair(family, method=methods_inside(family)[name])
    row = (6, (2, 2), 1, (3, 4), 5)
    single = batch(family, (row,))
    ids = single.inputs["input_ids"]
    ids[:, -2:] = ids[:, :2]  # so that a lookup finds what came after them
    alone, wanted = generate(model, single.inputs, 6), kept(session)
    for options in ({"assistant_model": drafter(dense)}, {"prompt_lookup_num_tokens": 3}):
        with lengths_of_calls(model.get_decoder()) as lengths:
            out = generate(model, single.inputs, 6, **options)
        assert lengths[0] > ids.shape[1]  # drafts came with the prompt
        assert kept(session) == wanted
        assert torch.equal(out.sequences, alone.sequences)
        torch.testing.assert_close(torch.stack(out.logits), torch.stack(alone.logits), atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("name", ["fastv", "aim", "spatten"])
def test_logits_that_are_asked_for_tell_where_the_prompt_ends(name):
    """In a padded batch, too, as scores of a given answer are computed."""
    family = "llava"
    _, model, session = pair(family, method=methods_inside(family)[name])
    answer = torch.tensor([[7, 8, 9], [9, 8, 7], [5, 6, 7]])
    with torch.no_grad():
        model(**fresh(batch(family).inputs))
        wanted = kept(session)
        model(**fresh(batch(family, extra=answer).inputs), logits_to_keep=4)
        assert kept(session) == wanted
        model(**fresh(batch(family, extra=answer).inputs))
        assert kept(session) != wanted
        model(**fresh(batch(family, extra=answer).inputs), logits_to_keep=torch.tensor([3, 4]))
        assert kept(session) != wanted


@pytest.mark.parametrize(("family", "name"), CASES)
def test_without_a_cache_the_first_choice_holds(family, name):
    _, model, session = pair(family, method=methods_inside(family)[name])
    ragged = batch(family)
    cached, wanted = generate(model, ragged.inputs, 5), kept(session)
    for _ in range(2):
        out = generate(model, ragged.inputs, 5, **{USE_CACHE: False})
        assert kept(session) == wanted
        assert torch.equal(out.sequences, cached.sequences)
        torch.testing.assert_close(torch.stack(out.logits), torch.stack(cached.logits), atol=1e-4, rtol=1e-4)


def test_beams_without_a_cache_hold_the_first_choice():
    _, model, _ = pair("llava", method=tokenprune.FastV(layer=3, keep=0.5))
    ragged, options = batch("llava"), {"num_beams": 3, "output_scores": True}
    cached, out = (generate(model, ragged.inputs, 5, **options, **{USE_CACHE: caches}) for caches in (True, False))
    assert torch.equal(out.sequences, cached.sequences)
    torch.testing.assert_close(out.sequences_scores, cached.sequences_scores, atol=1e-4, rtol=1e-4)


def test_another_image_or_text_is_another_prompt():
    model = tiny("llava")
    session = tokenprune.patch(model, tokenprune.FastV(layer=3, keep=0.5))
    row = (RAGGED[0],)
    more = torch.tensor([[7]])

    def run(one):
        with torch.no_grad():
            model(**fresh(one.inputs), **{USE_CACHE: False})
        return kept(session)

    other_image = batch("llava", row, extra=more)
    other_image.inputs[FEATURES] = batch("llava", row, seeds=(5,)).inputs[FEATURES]
    other_text = batch("llava", row, extra=more)
    other_text.inputs["input_ids"][0, 0] += 1
    longer = batch("llava", row, extra=torch.tensor([[7, 8]]))
    for one in (other_image, other_text, longer):
        wanted = run(one)
        run(batch("llava", row))
        assert run(one) == wanted
    first = run(batch("llava", row))
    assert run(batch("llava", row, extra=more)) == first
    run(longer)
    assert run(batch("llava", row, extra=more)) != first  # nothing goes on from a longer call


def test_a_text_model_holds_its_first_choice_too():
    torch.manual_seed(0)
    model = LlamaForCausalLM(LlamaConfig(**TEXT)).eval()
    model.generation_config.eos_token_id = None
    session = tokenprune.patch(model, tokenprune.SpAtten(tokens=0.5, heads=1.0, protect_text=False))
    ids = torch.arange(5, 37)[None]
    generate(model, {"input_ids": ids}, 1)
    wanted = kept(session)
    generate(model, {"input_ids": ids}, 4, **{USE_CACHE: False})
    assert kept(session) == wanted
    generate(model, {"input_ids": ids}, 6, assistant_model=copy.deepcopy(assistant()))
    assert session.traces[0].visual_indices[0].tolist() == list(wanted_candidates(session, ids))


def wanted_candidates(session, ids):
    guard = session.methods[0].text
    return range(guard.first, ids.shape[1] - guard.recent)


def test_the_memory_of_a_prompt_does_not_hold_the_model():
    model = tiny("llava")
    session = tokenprune.patch(model, tokenprune.FastV(layer=3, keep=0.5))
    with torch.no_grad():
        model(**fresh(batch("llava").inputs), **{USE_CACHE: False})
    gone = weakref.ref(session)
    tokenprune.unpatch(model)
    del model, session
    gc.collect()
    assert gone() is None


def test_a_model_that_is_not_told_about_logits_has_it_said_in_the_report():
    model = tiny("llava")
    session = tokenprune.patch(model.model, tokenprune.FastV(layer=3, keep=0.5))
    assert "the last draft ranks" in str(session.report())
    session = tokenprune.patch(model, tokenprune.FastV(layer=3, keep=0.5))
    assert "draft" not in str(session.report())
