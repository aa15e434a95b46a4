"""What a row of the batch may hold beside one prompt: tokens that its mask hides, and a second prompt."""

import pytest
import torch
from families import IMAGE, _encoded, batch, features_of, fresh, tiny
from oracle import reference_logits
from oracle_layers import alive_by_layer, layered_logits
from test_layers import N_LAYERS
from transformers import ContinuousBatchingConfig, GenerationConfig, LlamaConfig, LlamaForCausalLM
from upstream import MASK, POSITIONS, USE_CACHE, with_features

import tokenprune

HIDDEN = ("llava", "idefics3", "mistral3", "gemma3")
PROMPTS = ((3, (3, 4), 4), (2, (3, 4), 5))


def with_hidden(family, n_hidden=(3, 11, 0)):
    """A padded batch whose rows hide some of the tokens of their first image."""
    ragged = batch(family)
    for row, n in enumerate(n_hidden):
        ragged.inputs[MASK][row, (ragged.inputs["input_ids"][row] == IMAGE).nonzero()[:n, 0]] = 0
    ragged.inputs[POSITIONS] = (ragged.inputs[MASK].cumsum(-1) - 1).clamp(min=0)
    return ragged


def alone(family, ragged, row):
    single = batch(family, (ragged.rows[row],), seeds=(row,))
    single.inputs[MASK] = ragged.inputs[MASK][row : row + 1, ragged.pads[row] :]
    return single


@pytest.mark.parametrize("family", HIDDEN)
def test_hidden_tokens_do_not_compete_before_the_decoder(family):
    dense, model, ragged = tiny(family), tiny(family), with_hidden(family)
    session = tokenprune.patch(model, "divprune", keep=0.25)
    with torch.no_grad():
        logits = model(**fresh(ragged.inputs)).logits
    (trace,) = session.traces
    assert trace.n_out == (3 + 1, 1, 2)  # a quarter of 12 and of 4; of 12, of which one is seen; of 4 and 4
    for row, pad in enumerate(ragged.pads):
        seen = ragged.inputs[MASK][row].nonzero()[:, 0].tolist()
        visual = [i for i in seen if ragged.inputs["input_ids"][row, i] == IMAGE]
        assert trace.visual_indices[row].tolist() == visual
        kept = torch.tensor([i for i in seen if i not in visual or i in trace.kept_indices[row].tolist()])
        wanted = reference_logits(dense, family, alone(family, ragged, row), kept - pad)
        torch.testing.assert_close(logits[row, kept], wanted, atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("family", HIDDEN)
def test_hidden_tokens_do_not_compete_between_layers(family):
    dense, model, ragged = tiny(family), tiny(family), with_hidden(family)
    session = tokenprune.patch(model, tokenprune.FastV(layer=2, keep=0.25))
    with torch.no_grad():
        logits = model(**fresh(ragged.inputs)).logits
    (trace,) = session.traces
    assert trace.n_out == (4, 1, 2)  # of 16, of 12 and of 8
    for row, pad in enumerate(ragged.pads):
        single = alone(family, ragged, row)
        seen = single.inputs[MASK][0].bool()
        assert bool(seen[trace.kept_indices[row] - pad].all())
        alive = [one & seen for one in alive_by_layer(session.traces, row, pad, len(seen), N_LAYERS)]
        wanted = layered_logits(dense, family, single, alive)
        torch.testing.assert_close(logits[row, pad:][alive[-1]], wanted[alive[-1]], atol=1e-4, rtol=1e-4)


def test_a_row_whose_mask_hides_all_visual_tokens_is_run_as_it_is():
    model, ragged = tiny("llava"), with_hidden("llava", (16, 12, 8))
    with torch.no_grad():
        dense = model(**fresh(ragged.inputs)).logits
        session = tokenprune.patch(model, [tokenprune.DivPrune(keep=0.25), tokenprune.FastV(layer=2)])
        assert torch.equal(model(**fresh(ragged.inputs)).logits, dense)
    assert {trace.reason for trace in session.traces} == {"the attention mask hides all visual tokens"}
    assert [trace.site for trace in session.traces] == ["before_llm", "llm_layer"]


def packed(family="llava"):
    singles = [batch(family, (row,), seeds=(i,)).inputs["input_ids"] for i, row in enumerate(PROMPTS)]
    images = [image for i, row in enumerate(PROMPTS) for image in features_of(row, seed=i)]
    return {
        "input_ids": torch.cat(singles, 1),
        POSITIONS: torch.cat([torch.arange(ids.shape[1]) for ids in singles])[None],
        **with_features(_encoded(family, images, [0, 1])),
    }


@pytest.mark.parametrize(
    "method",
    [
        tokenprune.DivPrune(keep=0.5),
        tokenprune.FastV(layer=2),
        tokenprune.AIM(),
        tokenprune.SpAtten(tokens=0.5),
        tokenprune.SpAtten(heads=0.5, tokens=1.0),
    ],
    ids=["divprune", "fastv", "aim", "spatten", "heads"],
)
def test_two_prompts_in_a_row_are_refused(method):
    model = tiny("llava")
    session = tokenprune.patch(model, method)
    with torch.no_grad():
        with pytest.raises(tokenprune.InputError, match=r"row 0 jump from 18 to 0, at token 19.*packed"):
            model(**fresh(packed()), **{USE_CACHE: False})
        assert session.traces == ()
        dense = tiny("llava")(**fresh(batch("llava").inputs)).logits
        assert not torch.equal(model(**fresh(batch("llava").inputs)).logits, dense)  # it goes on pruning


def test_two_prompts_in_a_row_of_which_everything_is_kept_are_run_as_they_are():
    model = tiny("llava")
    with torch.no_grad():
        dense = model(**fresh(packed()), **{USE_CACHE: False}).logits
        tokenprune.patch(model, "divprune", keep=1.0)
        assert torch.equal(model(**fresh(packed()), **{USE_CACHE: False}).logits, dense)


def test_two_prompts_in_a_row_that_a_mask_keeps_apart_stay_apart():
    """The mask is the caller's own: a block for each prompt."""
    model, both = tiny("llava"), packed()
    session = tokenprune.patch(model, "divprune", keep=0.5)
    starts = (both[POSITIONS][0] == 0).cumsum(0)
    length = len(starts)
    seen = (starts[:, None] == starts) & torch.ones(length, length, dtype=torch.bool).tril()
    with torch.no_grad():
        together = model(**fresh(both), **{MASK: seen[None, None], USE_CACHE: False}).logits[0]
        assert session.traces[0].n_out == (12,)
        for i, row in enumerate(PROMPTS):
            logits = model(**fresh(batch("llava", (row,), seeds=(i,)).inputs)).logits[0]
            torch.testing.assert_close(together[(starts == i + 1)][-1], logits[-1], atol=1e-4, rtol=1e-4)


def test_continuous_batching_is_refused_by_name():
    config = {"vocab_size": 64, "hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 4}
    model = LlamaForCausalLM(LlamaConfig(**config, num_attention_heads=2, pad_token_id=0)).eval()
    settings = GenerationConfig(max_new_tokens=3, do_sample=False, eos_token_id=-1, pad_token_id=0)
    small = ContinuousBatchingConfig(num_blocks=4, max_batch_tokens=32)  # else it takes all memory there is
    tokenprune.patch(model, "spatten", tokens=0.5, protect_text=False)
    given = {"inputs": [list(range(5, 29))], "generation_config": settings, "continuous_batching_config": small}
    (refused,) = model.generate_batch(**given).values()
    assert "continuous batching" in refused.error
    assert "unpatch" in refused.error
    tokenprune.unpatch(model)
    (served,) = model.generate_batch(**given).values()
    assert len(served.generated_tokens) == 3
