"""O4: every way of generating is right on a pruned model."""

import copy

import pytest
import torch
from families import (
    DIM,
    FAMILIES,
    IMAGE,
    MROPE,
    RAGGED,
    STACKED,
    Batch,
    batch,
    features_of,
    fresh,
    generate,
    implementations,
    twins,
)
from oracle import check_steps, check_tokens, kept_of_row, reference_logits
from torch.nn import functional
from transformers import DynamicCache, StaticCache
from upstream import CACHE, FEATURES, accepted_caches, cache_of, with_cache, with_features

import tokenprune

# What transformers itself gets wrong or refuses without any pruning is left out, with the reason where it is left out.
NO_EMBEDS = ("gemma3", "paligemma", "paligemma2")  # generate() takes no inputs_embeds
ONE_SIZE = (*STACKED, "glm4v")  # beams repeat stacked features by image; glm4v mixes up two images a row
FEW = ("llava", "qwen3_vl", "gemma3", "idefics3", "mistral3")


ONE_IMAGE = ((3, (3, 4), 4), (6, (3, 4), 5), (2, (3, 4), 2))


def spread(families=FAMILIES):
    """All families; those beyond a representative few belong to the wide matrix."""
    return [family if family in FEW else pytest.param(family, marks=pytest.mark.matrix) for family in families]


def pair(family, **options):
    dense, model = twins(family, implementations(family)[0])
    return dense, model, tokenprune.patch(model, "divprune", **{"keep": 0.5, **options})


@pytest.mark.parametrize(
    "family", spread(f for f in FAMILIES if f != "paligemma2")
)  # dense raises: its mask dict has no ndim
def test_static_cache(family):
    dense, model, session = pair(family)
    ragged = batch(family)
    out = generate(model, ragged.inputs, 4, cache_implementation="static")
    assert isinstance(cache_of(out), StaticCache)
    check_steps(dense, family, out, session.traces, ragged, 4)


@pytest.mark.parametrize("family", spread(("gemma3", "aya_vision", "mistral3")))
def test_static_cache_with_a_short_window(family):
    dense, model = twins(family, implementations(family)[0], text_config={"sliding_window": 9})
    session = tokenprune.patch(model, "divprune", keep=0.5)
    ragged = batch(family)
    out = generate(model, ragged.inputs, 6, cache_implementation="static")
    check_steps(dense, family, out, session.traces, ragged, 6)


@pytest.mark.parametrize("family", spread())
def test_without_a_cache(family):
    dense, model, session = pair(family)
    ragged = batch(family)
    out = generate(model, ragged.inputs, 3, use_cache=False)
    check_steps(dense, family, out, session.traces, ragged, 3)


@pytest.mark.parametrize("family", spread())
def test_every_returned_beam_scores_as_a_dense_run_scores_it(family):
    dense, model, session = pair(family)
    prompt = batch(family, ONE_IMAGE if family in ONE_SIZE else RAGGED)
    out = generate(model, prompt.inputs, 4, num_beams=3, num_return_sequences=2, output_scores=True, length_penalty=1.0)
    length = prompt.inputs["input_ids"].shape[1]
    for i, ids in enumerate(out.sequences):
        row = i // 2
        new = ids[length:]
        single = batch(family, (prompt.rows[row],), seeds=(row,), extra=new[None, :-1])
        # The traces are those of the expanded batch: three beams for each row.
        kept = kept_of_row(session.traces, row * 3, prompt.pads[row], single.inputs["input_ids"].shape[1])
        scores = reference_logits(dense, family, single, kept)[-len(new) :].log_softmax(-1)
        wanted = scores.gather(1, new[:, None]).sum() / len(new)
        torch.testing.assert_close(out.sequences_scores[i], wanted, atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("family", spread())
def test_sampling_draws_from_the_dense_distribution(family):
    dense, model, session = pair(family)
    ragged = batch(family)
    torch.manual_seed(0)
    out = generate(model, ragged.inputs, 3, do_sample=True, top_k=5)
    check_steps(dense, family, out, session.traces, ragged, 3)


def collect(session):
    """Traces of every forward from here on."""
    calls = []
    publish = session.publish
    session.publish = lambda traces: (calls.append(traces), publish(traces))
    return calls


@pytest.mark.parametrize(
    "family", spread(f for f in FAMILIES if f not in ("gemma3", "paligemma", "paligemma2", "molmo2", "ovis2"))
)
def test_chunked_prefill(family):
    dense, model, session = pair(family)
    calls = collect(session)
    single = batch(family, (RAGGED[0],))
    out = generate(model, single.inputs, 3, prefill_chunk_size=9)
    length = single.inputs["input_ids"].shape[1]
    dropped: set[int] = set()
    for chunk, traces in enumerate(calls):
        for trace in traces:
            if trace.status == "applied":
                seen, kept = set(trace.visual_indices[0].tolist()), set(trace.kept_indices[0].tolist())
                dropped |= {9 * chunk + i for i in seen - kept}
    assert dropped
    for step in range(3):
        row = batch(family, (RAGGED[0],), extra=out.sequences[:, length : length + step])
        kept = torch.tensor([i for i in range(length + step) if i not in dropped])
        torch.testing.assert_close(
            out.logits[step][0], reference_logits(dense, family, row, kept)[-1], atol=1e-4, rtol=1e-4
        )


@pytest.mark.parametrize("family", spread())
def test_assisted_decoding_gives_the_greedy_tokens(family):
    _, model, _ = pair(family)
    single = batch(family, (RAGGED[2],))
    wanted = generate(model, single.inputs, 8)
    out = generate(model, single.inputs, 8, prompt_lookup_num_tokens=3)
    assert torch.equal(out.sequences, wanted.sequences)
    helper = copy.deepcopy(model)
    tokenprune.unpatch(helper)
    with torch.no_grad():
        for parameter in helper.lm_head.parameters():
            parameter.add_(0.05 * torch.randn(parameter.shape, generator=torch.Generator().manual_seed(5)))
    out = generate(model, single.inputs, 8, assistant_model=helper)
    assert torch.equal(out.sequences, wanted.sequences)


@pytest.mark.parametrize("family", spread())
def test_a_manual_loop(family):
    dense, model, session = pair(family)
    ragged = batch(family)
    inputs = fresh(ragged.inputs)
    mask, sequences, logits = inputs["attention_mask"], inputs["input_ids"], []
    if family not in MROPE:
        inputs["position_ids"] = (mask.cumsum(-1) - 1).clamp(min=0)
    with torch.no_grad():
        out = model(**inputs, use_cache=True)
        for _ in range(3):
            logits.append(out.logits[:, -1])
            new = out.logits[:, -1, :IMAGE].argmax(-1, keepdim=True)
            sequences, mask = torch.cat([sequences, new], 1), torch.cat([mask, torch.ones_like(new)], 1)
            extra = {"position_ids": mask.sum(-1, keepdim=True) - 1}
            if (
                family in MROPE
            ):  # left to itself with a mask, the dense model makes positions for the whole sequence and raises
                extra = {"position_ids": (extra["position_ids"] + model.model.rope_deltas).expand(3, -1, -1)}
            out = model(input_ids=new, attention_mask=mask, **with_cache(cache_of(out)), use_cache=True, **extra)
    result = type("Out", (), {"sequences": sequences, "logits": logits})
    check_steps(dense, family, result, session.traces, ragged, 3)


@pytest.mark.parametrize("family", spread())
def test_a_manual_loop_without_mask_and_positions(family):
    dense, model, session = pair(family)
    single = batch(family, (RAGGED[0],))
    inputs = fresh(single.inputs)
    del inputs["attention_mask"]
    sequences, logits = inputs["input_ids"], []
    with torch.no_grad():
        out = model(**inputs, use_cache=True)
        for _ in range(3):
            logits.append(out.logits[:, -1])
            new = out.logits[:, -1, :IMAGE].argmax(-1, keepdim=True)
            sequences = torch.cat([sequences, new], 1)
            out = model(input_ids=new, **with_cache(cache_of(out)), use_cache=True)
    result = type("Out", (), {"sequences": sequences, "logits": logits})
    check_steps(dense, family, result, session.traces, single, 3)


@pytest.mark.parametrize("family", spread())
def test_forward_with_labels_keeps_the_unpruned_length(family):
    dense, model, session = pair(family)
    ragged = batch(family)
    inputs = fresh(ragged.inputs)
    if family not in MROPE:
        inputs["position_ids"] = (inputs["attention_mask"].cumsum(-1) - 1).clamp(min=0)
    if family in ("paligemma", "paligemma2"):
        inputs["token_type_ids"] = torch.zeros_like(inputs["input_ids"])
    labels = inputs["input_ids"].masked_fill((inputs["attention_mask"] == 0) | (inputs["input_ids"] == IMAGE), -100)
    with torch.no_grad():
        out = model(**inputs, labels=labels, output_hidden_states=True)
    length = inputs["input_ids"].shape[1]
    assert out.logits.shape[:2] == labels.shape
    assert {tuple(state.shape) for state in out.hidden_states} == {(3, length, DIM)}
    wanted = functional.cross_entropy(out.logits[:, :-1].flatten(0, 1).float(), labels[:, 1:].flatten())
    torch.testing.assert_close(out.loss, wanted, atol=1e-4, rtol=1e-4)
    for row, parts in enumerate(RAGGED):
        single = batch(family, (parts,), seeds=(row,))
        pad = ragged.pads[row]
        kept = kept_of_row(session.traces, row, pad, length - pad)
        reference = reference_logits(dense, family, single, kept)
        torch.testing.assert_close(out.logits[row, kept + pad], reference, atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("family", spread(f for f in FAMILIES if f not in (*MROPE, *NO_EMBEDS)))
def test_embeddings_in_place_of_ids(family):
    _, model, session = pair(family)
    ragged = batch(family)
    wanted = generate(model, ragged.inputs, 3)
    traces = session.traces
    inputs = fresh(ragged.inputs)
    ids = inputs.pop("input_ids")
    with torch.no_grad():
        embeds = model.get_input_embeddings()(ids)
    out = generate(model, {**inputs, "inputs_embeds": embeds}, 3)
    assert session.traces[0].n_out == traces[0].n_out
    assert torch.equal(out.sequences, wanted.sequences[:, ids.shape[1] :])
    for step in range(3):
        torch.testing.assert_close(out.logits[step], wanted.logits[step], atol=1e-5, rtol=1e-5)


def second_turn(family, prompt, out, n_text, image):
    """The conversation so far followed by text (and an image), with what the model has to be given for it."""
    rows = len(prompt.rows)
    generator = torch.Generator().manual_seed(9)
    text = torch.randint(5, 95, (rows, n_text), generator=generator)
    parts = [text]
    if image is not None:
        parts += [torch.full((rows, image[0] * image[1]), IMAGE), torch.randint(5, 95, (rows, 2), generator=generator)]
    return torch.cat(parts, 1)


@pytest.mark.parametrize("family", spread())
def test_a_second_turn_of_text_goes_on_with_the_pruned_cache(family):
    dense, model, session = pair(family)
    ragged = batch(family)
    first = generate(model, ragged.inputs, 3)
    traces = session.traces
    length = ragged.inputs["input_ids"].shape[1]
    turn = second_turn(family, ragged, first, 4, None)
    ids = torch.cat([first.sequences, turn], 1)
    mask = torch.cat([ragged.inputs["attention_mask"], torch.ones(3, 7, dtype=torch.long)], 1)
    inputs = {
        "input_ids": ids,
        "attention_mask": mask,
        **with_cache(cache_of(first)),
        **with_features(),
    }
    if family in ("paligemma", "paligemma2", "gemma3"):
        inputs["token_type_ids"] = torch.ones_like(ids) if "pali" in family else (ids == IMAGE).long()
    out = generate(model, inputs, 3)
    assert session.later_traces[-1][0].status == "skipped"
    assert "no image" in session.later_traces[-1][0].reason
    for row, parts in enumerate(RAGGED):
        single = batch(family, (parts,), seeds=(row,), extra=out.sequences[row : row + 1, length:-1])
        kept = kept_of_row(traces, row, ragged.pads[row], single.inputs["input_ids"].shape[1])
        check_tokens(out, row, 3, reference_logits(dense, family, single, kept))


@pytest.mark.parametrize("packed", [False, True])
@pytest.mark.parametrize("cache", ["dynamic", "static"])
@pytest.mark.parametrize(
    "family", spread(f for f in FAMILIES if f not in (*MROPE, "ovis2", "paligemma", "paligemma2", "molmo2"))
)
def test_a_second_turn_with_a_new_image_prunes_that_image_too(family, cache, packed):
    if family == "gemma3" and cache == "static":
        pytest.skip("transformers' own dense run is wrong here: the image blocks of the mask start at the wrong column")
    dense, model, session = pair(family, positions="packed" if packed else "original")
    ragged = batch(family)
    length = ragged.inputs["input_ids"].shape[1]
    store = with_cache(StaticCache(config=model.config, max_cache_len=64)) if cache == "static" else {}
    first = generate(model, ragged.inputs, 3, **store)
    traces = session.traces
    turn = second_turn(family, ragged, first, 2, (2, 3))
    ids = torch.cat([first.sequences, turn], 1)
    mask = torch.cat([ragged.inputs["attention_mask"], torch.ones(3, ids.shape[1] - length, dtype=torch.long)], 1)
    images = [features_of(((2, 3),), seed=50 + row)[0] for row in range(3)]
    inputs = {
        "input_ids": ids,
        "attention_mask": mask,
        **with_cache(cache_of(first)),
        FEATURES: batch(family, (((2, 3), 1),) * 3, seeds=(50, 51, 52)).inputs[FEATURES],
    }
    if family == "gemma3":
        inputs["token_type_ids"] = (ids == IMAGE).long()
    out = generate(model, inputs, 3)
    assert session.traces[0].n_out == (3, 3, 3)
    start = length + 2  # the last generated token of the first turn was not in the cache yet
    for row, parts in enumerate(RAGGED):
        pad, trace = ragged.pads[row], session.traces[0]
        whole = out.sequences[row, pad:-1]
        kept = kept_of_row(traces, row, pad, length - pad).tolist()
        gone = set(trace.visual_indices[row].tolist()) - set(trace.kept_indices[row].tolist())
        kept += [i for i in range(length - pad, len(whole)) if i + pad - start not in gone]
        single = conversation(family, parts, row, whole, images[row])
        check_tokens(out, row, 3, reference_logits(dense, family, single, torch.tensor(kept), packed=packed))


def conversation(family, parts, row, whole, image):
    """All of one row's conversation as one unpadded prompt with all its images."""
    from families import _encoded

    images = [*features_of(parts, seed=row), image]
    inputs = {
        "input_ids": whole[None],
        "attention_mask": torch.ones_like(whole)[None],
        **with_features(_encoded(family, images, [row])),
    }
    if family == "gemma3":
        inputs["token_type_ids"] = (whole[None] == IMAGE).long()
    return Batch(inputs, (0,), (parts,))


@pytest.mark.parametrize("family", ["llava", "qwen3_vl", "idefics3"])
def test_right_padded_rows_are_right_too(family):
    dense, model, session = pair(family)
    left = batch(family)
    inputs = fresh(left.inputs)
    length = inputs["input_ids"].shape[1]
    for name, value in inputs.items():
        if isinstance(value, torch.Tensor) and value.shape == (3, length):
            inputs[name] = torch.stack([row.roll(-pad) for row, pad in zip(value, left.pads, strict=True)])
    with torch.no_grad():
        out = model(**inputs)
    for row, parts in enumerate(RAGGED):
        single = batch(family, (parts,), seeds=(row,))
        kept = kept_of_row(session.traces, row, 0, single.inputs["input_ids"].shape[1])
        wanted = reference_logits(dense, family, single, kept)
        torch.testing.assert_close(out.logits[row, kept], wanted, atol=1e-4, rtol=1e-4)


# --- both names of the cache are accepted: what users write goes on working, and prunes the same ----------------------

# transformers tells users of the old name about the new one.
renamed = pytest.mark.filterwarnings("ignore:.*is deprecated and will be removed:FutureWarning")
names = pytest.mark.parametrize("name", accepted_caches())


def test_the_name_of_the_cache_is_accepted():
    assert CACHE in accepted_caches()


@renamed
@names
@pytest.mark.parametrize("kind", [DynamicCache, StaticCache])
@pytest.mark.parametrize("family", ["llava", "qwen3_vl", "gemma3"])
def test_a_forward_takes_a_cache_by_either_name(family, kind, name):
    dense, model, session = pair(family)
    ragged = batch(family)
    cache = kind(config=model.config, **({"max_cache_len": 64} if kind is StaticCache else {}))
    mask = ragged.inputs["attention_mask"]
    inputs = fresh(ragged.inputs)
    if family not in MROPE:
        inputs["position_ids"] = (mask.cumsum(-1) - 1).clamp(min=0)
    with torch.no_grad():
        out = model(**inputs, **{name: cache}, use_cache=True)
        assert cache_of(out) is cache
        logits, ids = [out.logits[:, -1]], out.logits[:, -1, :IMAGE].argmax(-1, keepdim=True)
        positions = mask.sum(-1, keepdim=True)
        if family in MROPE:
            positions = (positions + model.model.rope_deltas).expand(3, -1, -1)
        mask = torch.cat([mask, torch.ones_like(ids)], 1)
        step = model(input_ids=ids, attention_mask=mask, position_ids=positions, **{name: cache}, use_cache=True)
    logits.append(step.logits[:, -1])
    sequences = torch.cat([ragged.inputs["input_ids"], ids, ids], 1)
    result = type("Out", (), {"sequences": sequences, "logits": logits})
    check_steps(dense, family, result, session.traces, ragged, 2)


@renamed
@names
@pytest.mark.parametrize("family", ["llava", "qwen3_vl", "gemma3"])
def test_generate_takes_a_cache_by_either_name(family, name):
    dense, model, session = pair(family)
    ragged = batch(family)
    wanted = generate(model, ragged.inputs, 3)
    for cache in (DynamicCache(config=model.config), StaticCache(config=model.config, max_cache_len=64)):
        out = generate(model, ragged.inputs, 3, **{name: cache})
        assert cache_of(out) is cache
        assert torch.equal(out.sequences, wanted.sequences)
        check_steps(dense, family, out, session.traces, ragged, 3)


@renamed
@names
def test_a_second_turn_goes_on_with_a_cache_of_either_name(name):
    _, model, session = pair("llava")
    ragged = batch("llava")
    ids, mask = ragged.inputs["input_ids"], ragged.inputs["attention_mask"]
    turn, outs = torch.full((3, 4), 7), []
    for given in (CACHE, name):
        first = generate(model, ragged.inputs, 3)
        held = [layer.keys.shape[2] for layer in cache_of(first).layers]
        assert max(held) < ids.shape[1]
        inputs = {
            "input_ids": torch.cat([first.sequences, turn], 1),
            "attention_mask": torch.cat([mask, torch.ones(3, 7, dtype=torch.long)], 1),
            given: cache_of(first),
            **with_features(),
        }
        outs.append(generate(model, inputs, 3))
        assert session.later_traces[-1][0].status == "skipped"
    assert torch.equal(outs[0].sequences, outs[1].sequences)
    assert all(map(torch.equal, outs[0].logits, outs[1].logits))
