"""Image features that the caller has merged into the embeddings: told by the ids of a module around, or by
``tokenprune.visual_tokens``; where neither is there, the trace says what would work."""

import copy
import threading

import pytest
import torch
import transformers
from families import FAMILIES, IMAGE, MROPE, RAGGED, batch, features_of, fresh, generate, implementations, tiny, twins
from oracle import check_tokens, kept_of_row, only_kept
from oracle_layers import alive_by_layer, hidden_by_layer
from transformers import (
    ColPaliConfig,
    ColPaliForRetrieval,
    ColQwen2Config,
    ColQwen2ForRetrieval,
    DynamicCache,
    LlamaConfig,
    LlamaForCausalLM,
    LlavaForConditionalGeneration,
    PaliGemmaConfig,
    Qwen2VLConfig,
    StaticCache,
)
from upstream import EMBEDS, MASK, POSITIONS, USE_CACHE, cache_of, with_cache, with_features

import tokenprune
from tokenprune import AIM, DivPrune, FastV, InputError, visual_tokens

FEW = ("llava", "qwen3_vl", "gemma3")
NO_EMBEDS = ("gemma3", "paligemma", "paligemma2")  # generate() takes no inputs_embeds
INSIDE = [DivPrune(keep=0.5), FastV(layer=2, keep=0.5), AIM(merge=None, prune=(1, 3))]


def spread(families=FAMILIES):
    """All families; those beyond a representative few belong to the wide matrix."""
    return [family if family in FEW else pytest.param(family, marks=pytest.mark.matrix) for family in families]


def pair(method, family="llava"):
    dense, model = twins(family, implementations(family)[0])
    return dense, model, tokenprune.patch(model, method)


def merged(dense, inputs):
    """What the decoder of `dense` is called with for `inputs`: embeddings with image features in them, positions."""
    seen = {}
    handle = dense.get_decoder().register_forward_pre_hook(lambda _, __, given: seen.update(given), with_kwargs=True)
    with torch.no_grad():
        dense(**fresh(inputs))
    handle.remove()
    return seen[EMBEDS], seen.get(POSITIONS)


def by_embeds(family="llava", rows=RAGGED):
    """A batch with merged embeddings in place of ids and features, where visual tokens stand, and its padding."""
    prompt = batch(family, rows)
    embeds, _ = merged(tiny(family, implementations(family)[0]), prompt.inputs)
    return {EMBEDS: embeds, MASK: prompt.inputs[MASK]}, prompt.inputs["input_ids"] == IMAGE, prompt.pads


def run(model, inputs, **more):
    with torch.no_grad():
        return model(**inputs, **more)


def of_row(inputs, row, pad):
    """A row alone, without its padding."""
    return {
        name: value[:, row : row + 1, pad:] if name == POSITIONS and value.ndim == 3 else value[row : row + 1, pad:]
        for name, value in inputs.items()
    }


def grown(model, inputs, row, pad, ids):
    """The embeddings of a row alone, and of what was generated behind it."""
    with torch.no_grad():
        new = model.get_input_embeddings()(ids)[None]
    return torch.cat([inputs[EMBEDS][row : row + 1, pad:], new], 1)


def positions_of(inputs):
    return (inputs[MASK].cumsum(-1) - 1).clamp(min=0)


def check_generated(dense, out, traces, inputs, pads, n=3):
    """Each of `n` tokens of each row against a dense run over the embeddings of that row, which hides from each layer
    what was dropped before it."""
    per_prompt = len(out.sequences) // len(pads)
    for i, row in ((i, i // per_prompt) for i in range(len(out.sequences))):
        embeds = grown(dense, inputs, row, pads[row], out.sequences[i, : n - 1])
        n_layers = dense.get_decoder().config.num_hidden_layers
        with hidden_by_layer(dense, alive_by_layer(traces, i, pads[row], embeds.shape[1], n_layers)):
            check_tokens(out, i, n, run(dense, {EMBEDS: embeds}).logits[0])


# --- said by the caller -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("family", spread())
def test_what_the_caller_says_is_visual_is_pruned(family):
    dense, model, session = pair(DivPrune(keep=0.5), family)
    ragged = batch(family)
    inputs = {name: value for name, value in ragged.inputs.items() if name == MASK or "token_type" in name}
    inputs[EMBEDS], inputs[POSITIONS] = merged(dense, {**ragged.inputs, USE_CACHE: False})
    if family not in MROPE:
        inputs[POSITIONS] = positions_of(inputs)
    with visual_tokens(ragged.inputs["input_ids"] == IMAGE):
        out = run(model, inputs)
    assert session.traces[0].n_in == (16, 12, 8)
    assert session.traces[0].n_out == (8, 6, 4)
    length = inputs[MASK].shape[1]
    for row, pad in enumerate(ragged.pads):
        kept = kept_of_row(session.traces, row, pad, length - pad)
        with only_kept(dense, kept):
            wanted = run(dense, of_row(inputs, row, pad)).logits[0]
        torch.testing.assert_close(out.logits[row, kept + pad], wanted, atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("method", INSIDE, ids=lambda method: method.name)
@pytest.mark.parametrize("family", ["llava", "qwen2_vl", *(pytest.param(f, marks=pytest.mark.matrix) for f in
                                    ("internvl", "qwen3_vl", "idefics3", "mistral3"))])  # fmt: skip
def test_generate_goes_on_from_what_is_left(family, method):
    dense, model, session = pair(method, family)
    inputs, mask, pads = by_embeds(family)
    with visual_tokens(mask):
        out = generate(model, inputs, 3)
    assert session.traces[-1].n_out < session.traces[0].n_in == (16, 12, 8)
    check_generated(dense, out, session.traces, inputs, pads)


def test_merging_is_that_of_the_same_prompt_with_ids():
    _, model, session = pair(AIM(merge=0.5, prune=(1, 3)))
    wanted, traces = generate(model, batch("llava").inputs, 3), session.traces
    inputs, mask, _ = by_embeds()
    with visual_tokens(mask):
        out = generate(model, inputs, 3)
    assert [trace.n_out for trace in session.traces] == [trace.n_out for trace in traces]
    for step in range(3):
        torch.testing.assert_close(out.logits[step], wanted.logits[step], atol=1e-5, rtol=1e-5)


def test_with_all_tokens_kept_nothing_changes():
    dense, model, session = pair(DivPrune(keep=1.0))
    inputs, mask, _ = by_embeds()
    session.forced = True
    with visual_tokens(mask):
        assert torch.equal(run(model, inputs).logits, run(dense, inputs).logits)
    assert session.traces[0].status == "applied"


def test_sequences_of_one_prompt_are_told_by_its_row():
    dense, model, session = pair(DivPrune(keep=0.5))
    inputs, mask, pads = by_embeds()
    torch.manual_seed(0)
    with visual_tokens(mask):
        out = generate(model, inputs, 3, do_sample=True, num_return_sequences=2)
    assert session.traces[0].n_in == (16, 16, 12, 12, 8, 8)
    check_generated(dense, out, session.traces, inputs, pads)


def test_beams_are_those_of_the_same_prompt_with_ids():
    _, model, session = pair(FastV(layer=1, keep=0.5))
    prompt = batch("llava")
    wanted = generate(model, prompt.inputs, 4, num_beams=3).sequences[:, prompt.inputs[MASK].shape[1] :]
    inputs, mask, _ = by_embeds()
    with visual_tokens(mask):
        out = generate(model, inputs, 4, num_beams=3)
    assert len(session.traces[0].n_in) == 9
    assert torch.equal(out.sequences, wanted)


@pytest.mark.parametrize("cuts", [(3, 12), (9, 18), (1,)])
def test_a_prompt_in_chunks_is_told_as_a_whole(cuts):
    dense, model, session = pair(DivPrune(keep=0.5))
    inputs, mask, pads = by_embeds()
    length, cache, dropped = mask.shape[1], DynamicCache(config=model.config), [set(), set(), set()]
    with visual_tokens(mask):
        for first, last in zip((0, *cuts), (*cuts, length), strict=True):
            chunk = {EMBEDS: inputs[EMBEDS][:, first:last], MASK: inputs[MASK][:, :last]}
            out = run(model, chunk, **{POSITIONS: positions_of(inputs)[:, first:last]}, **with_cache(cache))
            trace = session.traces[0]
            if mask[:, first:last].any():
                assert trace.n_in == tuple(mask[:, first:last].sum(1).tolist())
                for row in range(3):
                    gone = set(trace.visual_indices[row].tolist()) - set(trace.kept_indices[row].tolist())
                    dropped[row] |= {first + i for i in gone}
    assert all(dropped)
    for row, pad in enumerate(pads):
        kept = torch.tensor([i for i in range(length - pad) if i + pad not in dropped[row]])
        with only_kept(dense, kept):
            wanted = run(dense, of_row(inputs, row, pad)).logits[0, -1]
        torch.testing.assert_close(out.logits[row, -1], wanted, atol=1e-4, rtol=1e-4)


def test_static_cache():
    dense, model, session = pair(DivPrune(keep=0.5))
    inputs, mask, pads = by_embeds()
    with visual_tokens(mask):
        out = generate(model, inputs, 3, cache_implementation="static")
    assert isinstance(cache_of(out), StaticCache)
    check_generated(dense, out, session.traces, inputs, pads)


@pytest.mark.parametrize("method", INSIDE[:2], ids=lambda method: method.name)
def test_without_a_cache_the_prompt_is_told_at_every_step(method):
    dense, model, session = pair(method)
    inputs, mask, pads = by_embeds()
    new = torch.tensor([[7, 8, 9]] * 3)
    with visual_tokens(mask):
        for step in range(4):
            embeds = torch.cat([inputs[EMBEDS], run(model.get_input_embeddings(), {"input": new[:, :step]})], 1)
            attention = torch.cat([inputs[MASK], torch.ones(3, step, dtype=torch.long)], 1)
            given = {EMBEDS: embeds, MASK: attention}
            logits = run(model, given, **{POSITIONS: positions_of(given), USE_CACHE: False}).logits[:, -1]
            if step == 0:
                first = session.traces
            for mine, before in zip(session.traces, first, strict=True):
                assert [kept.tolist() for kept in mine.kept_indices] == [kept.tolist() for kept in before.kept_indices]
    for row, pad in enumerate(pads):
        embeds = grown(dense, inputs, row, pad, new[row])
        with hidden_by_layer(dense, alive_by_layer(session.traces, row, pad, embeds.shape[1], 4)):
            torch.testing.assert_close(logits[row], run(dense, {EMBEDS: embeds}).logits[0, -1], atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("whole", [False, True])
def test_a_second_turn_brings_another_image(whole):
    dense, model, session = pair(DivPrune(keep=0.5))
    (first, mask, _), cache = by_embeds(rows=((3, (3, 4), 2),)), DynamicCache(config=model.config)
    with visual_tokens(mask):
        run(model, first, **with_cache(cache))
    one = session.traces[0]
    image = features_of(((2, 4),), seed=5)[0]
    with torch.no_grad():
        text = model.get_input_embeddings()(torch.tensor([5, 6, 7, 8]))
    turn = torch.cat([text[:2], image, text[2:]])[None]
    new = torch.tensor([[False] * 2 + [True] * 8 + [False] * 2])
    with visual_tokens(torch.cat([mask, new], 1) if whole else new):
        out = run(model, {EMBEDS: turn}, **with_cache(cache))
    two = session.traces[0]
    assert two.n_in == (8,)
    dropped = set(one.visual_indices[0].tolist()) - set(one.kept_indices[0].tolist())
    dropped |= {17 + i for i in set(two.visual_indices[0].tolist()) - set(two.kept_indices[0].tolist())}
    assert len(dropped) == 10
    with only_kept(dense, torch.tensor([i for i in range(29) if i not in dropped])):
        wanted = run(dense, {EMBEDS: torch.cat([first[EMBEDS], turn], 1)}).logits[0, -1]
    torch.testing.assert_close(out.logits[0, -1], wanted, atol=1e-4, rtol=1e-4)


def test_each_prompt_of_a_block_and_each_block_has_its_own():
    _, model, session = pair(DivPrune(keep=0.5))
    inputs, mask, _ = by_embeds()
    single, other, _ = by_embeds(rows=(RAGGED[1],))
    with visual_tokens(mask):
        wanted = run(model, inputs).logits
        with visual_tokens(other):
            run(model, single)
            assert session.traces[0].n_in == (12,)
        assert torch.equal(run(model, inputs).logits, wanted)
        assert session.traces[0].n_in == (16, 12, 8)
    run(model, inputs)
    assert session.traces[0].status == "skipped"


def test_an_exception_and_other_threads_see_nothing_of_it():
    _, model, session = pair(DivPrune(keep=0.5))
    inputs, mask, _ = by_embeds()
    with pytest.raises(ZeroDivisionError), visual_tokens(mask):
        raise ZeroDivisionError
    with visual_tokens(mask):
        thread = threading.Thread(target=run, args=(model, inputs))
        thread.start()
        thread.join()
        assert session.traces[0].status == "skipped"
        run(model, inputs)
        assert session.traces[0].status == "applied"
    run(model, inputs)
    assert session.traces[0].status == "skipped"


def test_a_pause_and_an_unpatched_model_do_not_ask():
    dense, model, session = pair(DivPrune(keep=0.5))
    inputs, mask, _ = by_embeds()
    wanted = run(dense, inputs).logits
    with visual_tokens(mask), session.pause():
        assert torch.equal(run(model, inputs).logits, wanted)
    tokenprune.unpatch(model)
    with visual_tokens(mask[:, 1:]):
        assert torch.equal(run(model, inputs).logits, wanted)


def test_a_report_measures_what_the_block_says():
    session = pair(DivPrune(keep=0.5))[2]
    inputs, mask, _ = by_embeds(rows=(RAGGED[0],))
    with visual_tokens(mask):
        report = session.report(inputs, max_new_tokens=2, repeats=1)
    assert "16" in str(report)
    assert session.traces[0].n_out == (8,)


# --- what does not fit ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("rows", "columns", "words"),
    [
        (3, 25, r"\[3, 25\] for a call of 3 rows of 26 tokens after 0 others.*fits is \[3, 26\]"),
        (2, 26, r"\[2, 26\] for a call of 3 rows"),
        (6, 26, r"\[6, 26\] for a call of 3 rows"),
        (3, 27, r"27 columns, and only 26 tokens of the prompt came"),
    ],
)
def test_a_mask_of_another_shape_raises(rows, columns, words):
    _, model, _ = pair(DivPrune(keep=0.5))
    inputs, _, _ = by_embeds()
    with pytest.raises(InputError, match=words), visual_tokens(torch.ones(rows, columns, dtype=torch.bool)):
        run(model, inputs)


def test_a_longer_mask_raises_before_anything_is_pruned_where_no_chunk_can_follow():
    _, model, session = pair(DivPrune(keep=0.5))
    inputs, _, _ = by_embeds()
    with (
        pytest.raises(InputError, match="for a call of 3 rows of 26 tokens"),
        visual_tokens(torch.ones(3, 27, dtype=torch.bool)),
    ):
        run(model, inputs, **{USE_CACHE: False})
    assert session.traces == ()


@pytest.mark.parametrize(
    "mask", [torch.ones(3, 26), torch.ones(26, dtype=torch.bool), [[True]], torch.ones(0, 0).bool()]
)
def test_what_is_no_mask_raises_at_once(mask):
    with pytest.raises(InputError, match=r"takes a bool tensor \[B, L\]"), visual_tokens(mask):
        raise AssertionError


def test_calls_with_ids_have_no_use_for_a_mask():
    _, model, _ = pair(DivPrune(keep=0.5))
    prompt = batch("llava")
    mask = prompt.inputs["input_ids"] == IMAGE
    with pytest.raises(InputError, match="calls that bring ids"), visual_tokens(mask):
        generate(model, prompt.inputs, 2)


def test_the_decoder_alone_is_no_place_for_a_mask():
    _, model, _ = pair(DivPrune(keep=0.5))
    inputs, mask, _ = by_embeds()
    with pytest.raises(InputError, match=r"around a call of LlamaModel.*model around it"), visual_tokens(mask):
        run(model.get_decoder(), inputs)


def test_without_a_mask_the_trace_says_what_would_work():
    dense, model, session = pair([DivPrune(keep=0.5), FastV(layer=1)])
    inputs, _, _ = by_embeds()
    assert torch.equal(run(model, inputs).logits, run(dense, inputs).logits)
    for trace in session.traces:
        assert trace.status == "skipped"
        assert trace.reason.startswith("embeddings without ids do not tell which tokens are visual")
        assert "tokenprune.visual_tokens(mask)" in trace.reason
    assert "tokenprune.visual_tokens(mask)" in str(session.report())
    with visual_tokens(torch.zeros(3, 26, dtype=torch.bool)):
        run(model, inputs)
    assert {trace.reason for trace in session.traces} == {"no image in this call"}
    run(model, {"input_ids": torch.tensor([[5, 6, 7]]), **with_features()})
    assert {trace.reason for trace in session.traces} == {"no image in this call"}


# --- told by the ids of a module around -------------------------------------------------------------------------------

TEXT = {
    "vocab_size": 128, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 4, "num_attention_heads": 4,
    "num_key_value_heads": 2, "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 127,
}  # fmt: skip


def shaken(model):
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if parameter.ndim >= 2:
                parameter.copy_(
                    torch.randn(parameter.shape, generator=generator) * (1.0 if "embed_t" in name else 0.25)
                )
    return model.eval()


def colqwen2():
    rope = {"rope_type": "default", "mrope_section": [1, 1, 2], "rope_theta": 1e4}
    vision = {
        "depth": 2, "embed_dim": 16, "hidden_size": 32, "num_heads": 2, "patch_size": 4, "spatial_merge_size": 2,
        "temporal_patch_size": 2, "mlp_ratio": 2,
    }  # fmt: skip
    vlm = Qwen2VLConfig(
        image_token_id=IMAGE,
        video_token_id=101,
        vision_start_token_id=102,
        vision_end_token_id=103,
        text_config={**TEXT, "rope_parameters": rope},
        vision_config=vision,
    )
    return shaken(ColQwen2ForRetrieval(ColQwen2Config(vlm_config=vlm, embedding_dim=8)))


GRIDS = ((6, 8), (4, 4), (8, 8))
PADS = (3, 13, 0)


def pages():
    """Three left-padded pages of 12, 4 and 16 tokens."""
    generator = torch.Generator().manual_seed(2)
    ids, length = torch.zeros(3, 24, dtype=torch.long), 24
    for row, ((h, w), pad) in enumerate(zip(GRIDS, PADS, strict=True)):
        ids[row, pad:] = torch.randint(5, 95, (length - pad,), generator=generator)
        ids[row, pad + 3 : pad + 3 + h * w // 4] = IMAGE
    return {
        "input_ids": ids,
        MASK: (torch.arange(length) >= torch.tensor(PADS)[:, None]).long(),
        "pixel_values": torch.randn(3, 64, 3 * 2 * 16, generator=generator),
        "image_grid_thw": torch.tensor([(1, h, w) for h, w in GRIDS]),
    }


@pytest.mark.parametrize("method", INSIDE, ids=lambda method: method.name)
def test_the_ids_of_a_module_that_merges_features_itself_tell(method):
    dense = colqwen2()
    model, inputs = copy.deepcopy(dense), pages()
    session = tokenprune.patch(model, method)
    out = run(model, inputs)
    assert session.traces[-1].n_out < session.traces[0].n_in == (12, 4, 16)
    for row, pad in enumerate(PADS):
        single = {name: value[row : row + 1, pad:] for name, value in inputs.items() if name in ("input_ids", MASK)}
        single |= {name: inputs[name][row : row + 1] for name in ("pixel_values", "image_grid_thw")}
        alive = alive_by_layer(session.traces, row, pad, 24 - pad, 4)
        with hidden_by_layer(dense, alive):
            wanted = run(dense, single).embeddings[0]
        kept = alive[-1].nonzero()[:, 0]
        torch.testing.assert_close(out.embeddings[row, kept + pad], wanted[kept], atol=1e-4, rtol=1e-4)
    tokenprune.unpatch(model)
    assert torch.equal(run(model, inputs).embeddings, run(dense, inputs).embeddings)
    assert not any(module._forward_pre_hooks or module._forward_hooks for module in model.modules())


def test_grids_come_with_the_ids():
    model = colqwen2()
    session = tokenprune.patch(model, "uniform", keep=0.5)
    run(model, pages())
    assert session.traces[0].grids == (((3, 4),), ((2, 2),), ((4, 4),))


def test_ids_beside_embeddings_tell_too():
    model, inputs = colqwen2(), pages()
    embeds, _ = merged(model, inputs)
    session = tokenprune.patch(model, "divprune", keep=0.5)
    wanted = run(model, inputs).embeddings
    out = run(model, {"input_ids": inputs["input_ids"], EMBEDS: embeds, MASK: inputs[MASK]})
    assert session.traces[0].n_out == (6, 2, 8)
    assert torch.equal(out.embeddings, wanted)


def test_a_query_has_no_image():
    dense = colqwen2()
    model = copy.deepcopy(dense)
    session = tokenprune.patch(model, "divprune", keep=0.25)
    query = {"input_ids": torch.tensor([[5, 6, 7, 8]])}
    assert torch.equal(run(model, query).embeddings, run(dense, query).embeddings)
    assert session.traces[0].reason == "no image in this call"


def test_what_lies_inside_of_such_a_module_takes_a_mask():
    model, inputs = colqwen2(), pages()
    session = tokenprune.patch(model, "divprune", keep=0.5)
    wanted = run(model, inputs).embeddings
    session = tokenprune.patch(model.vlm, "divprune", keep=0.5)
    run(model, inputs)
    assert "embeddings without ids" in session.traces[0].reason
    with visual_tokens(inputs["input_ids"] == IMAGE):
        assert torch.equal(run(model, inputs).embeddings, wanted)


def test_an_interrupt_leaves_no_ids_for_a_later_call():
    model, inputs = colqwen2(), pages()
    session = tokenprune.patch(model, "divprune", keep=0.5)

    def interrupt(*_):
        raise KeyboardInterrupt

    for place in (model.vlm.visual, model.vlm.language_model.layers[0]):
        handle = place.register_forward_pre_hook(interrupt)
        with pytest.raises(KeyboardInterrupt):
            run(model, inputs)
        handle.remove()
        later = {EMBEDS: torch.randn(3, 24, 32), MASK: inputs[MASK]}
        run(model if place is model.vlm.visual else model.vlm, later)
        assert "embeddings without ids" in session.traces[0].reason


class Merging(LlavaForConditionalGeneration):
    """A model that computes its image features in its own way."""

    def forward(self, input_ids=None, patches=None, attention_mask=None, **kwargs):
        kwargs[MASK] = attention_mask
        if patches is None:
            return super().forward(input_ids=input_ids, **kwargs)
        embeds = self.get_input_embeddings()(input_ids)
        where = (input_ids == IMAGE)[..., None].expand_as(embeds)
        return super().forward(inputs_embeds=embeds.masked_scatter(where, patches), **kwargs)

    def prepare_inputs_for_generation(self, *args, is_first_iteration=False, patches=None, **kwargs):
        prepared = super().prepare_inputs_for_generation(*args, is_first_iteration=is_first_iteration, **kwargs)
        return {**prepared, "patches": patches if is_first_iteration else None}


def test_a_subclass_that_merges_features_itself_generates():
    dense = tiny("llava")
    merging = Merging(dense.config).eval()
    merging.load_state_dict(dense.state_dict())
    merging.generation_config = dense.generation_config
    session = tokenprune.patch(merging, FastV(layer=1, keep=0.5))
    inputs, _, pads = by_embeds()
    prompt = batch("llava").inputs
    features = torch.cat([image for row, parts in enumerate(RAGGED) for image in features_of(parts, seed=row)])
    given = {"input_ids": prompt["input_ids"], MASK: prompt[MASK], "patches": features}
    out = generate(merging, given, 3)
    assert session.traces[0].n_in == (16, 12, 8)
    out.sequences = out.sequences[:, prompt[MASK].shape[1] :]
    check_generated(dense, out, session.traces, inputs, pads)


def test_a_wrapper_that_hands_its_ids_on_is_pruned_as_ever():
    vision = {
        "hidden_size": 32, "intermediate_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2, "image_size": 32,
        "patch_size": 8, "projection_dim": 32,
    }  # fmt: skip
    vlm = PaliGemmaConfig(
        vision_config={"model_type": "siglip_vision_model", **vision},
        text_config={"model_type": "gemma", **TEXT, "head_dim": 8},
        image_token_id=IMAGE,
        projection_dim=32,
    )
    model = shaken(ColPaliForRetrieval(ColPaliConfig(vlm_config=vlm, embedding_dim=8)))
    session = tokenprune.patch(model, "divprune", keep=0.25)
    ids = torch.tensor([[IMAGE] * 16 + [5, 6, 7]])
    run(model, {"input_ids": ids, MASK: torch.ones_like(ids), "pixel_values": torch.randn(1, 3, 32, 32)})
    assert session.traces[0].n_out == (4,)


@pytest.mark.matrix
@pytest.mark.parametrize(
    ("name", "lacks"), [("ColModernVBertForRetrieval", "KV cache"), ("NeoMMEForRetrieval", "embeddings")]
)
def test_a_retriever_whose_decoder_sees_both_ways_is_refused(name, lacks):
    cls = getattr(transformers, name, None)
    if cls is None:
        pytest.skip("this version of transformers does not have it")
    with torch.device("meta"):
        model = cls(cls.config_class())
    with pytest.raises(tokenprune.UnsupportedModelError, match=f"no argument for (the )?{lacks}"):
        tokenprune.patch(model, "divprune")


# --- a decoder of text ------------------------------------------------------------------------------------------------


def test_a_model_of_text_is_taken_once_it_names_a_placeholder():
    torch.manual_seed(0)
    model = shaken(LlamaForCausalLM(LlamaConfig(**TEXT)))
    model.generation_config.eos_token_id = None
    with pytest.raises(tokenprune.OptionError, match=r"no visual tokens.*config\.image_token_id"):
        tokenprune.patch(model, "divprune")
    dense = copy.deepcopy(model)
    model.config.image_token_id = IMAGE
    inputs, mask, pads = by_embeds()
    for method in INSIDE:
        with visual_tokens(mask):
            session = tokenprune.patch(model, method)
            out = generate(model, inputs, 3)
        with session:
            assert session.traces[-1].n_out < session.traces[0].n_in == (16, 12, 8)
            check_generated(dense, out, session.traces, inputs, pads)
            generate(model, {"input_ids": torch.tensor([[5, 6, 7]])}, 2)
            assert session.traces[0].reason == "no image in this call"
