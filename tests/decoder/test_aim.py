"""AIM, FastV and PyramidDrop: what they decide, and AIM's merging against plain means put in place by hand."""

from itertools import pairwise

import pytest
import torch
from families import FAMILIES, IMAGE, MROPE, RAGGED, alone, batch, features_of, generate, tiny, twins
from hypothesis import given, settings
from hypothesis import strategies as st
from oracle import check_tokens, generated
from oracle_layers import Merged, alive_by_layer, layered_logits, naive_groups, spans_of
from test_errors import refused
from test_generation import ONE_IMAGE, ONE_SIZE, conversation, second_turn
from test_layers import N_LAYERS, first_cut, pair, spread
from test_pixels import CASES as PIXELS
from test_pixels import pixel_batch
from upstream import FEATURES, cache_of, with_cache

import tokenprune
from tokenprune import AIM, DivPrune, FastV, OptionError, PyramidDrop, ops
from tokenprune.signals import Signals

# --- what the methods decide ----------------------------------------------------------------------


def merged_features(method, features):
    signals = Signals(features, None, tuple(range(len(features))))
    return method.before_llm(signals, method.budget(features.shape[1]))


@settings(database=None, deadline=None, max_examples=60)
@given(
    n_tokens=st.integers(1, 40),
    keep=st.one_of(st.floats(0.02, 1.0), st.integers(1, 45)),
    weighted=st.booleans(),
    seed=st.integers(0, 2**31),
)
def test_merging_follows_the_rule(n_tokens, keep, weighted, seed):
    features = torch.randn(2, n_tokens, 7, generator=torch.Generator().manual_seed(seed))
    method = AIM(merge=keep, prune=None, size_weighted=weighted)
    merge = merged_features(method, features)
    means = merge.apply(features)
    n_left = tokenprune.schedule.count(keep, n_tokens)
    assert merge.index.shape == (2, n_left)
    for row in range(2):
        groups = naive_groups(features[row], n_left, weighted=weighted)
        assert merge.index[row].tolist() == sorted(groups)
        for group, (place, weights) in enumerate(sorted(groups.items())):
            assert (merge.assign[row] == group).nonzero()[:, 0].tolist() == sorted(weights)
            wanted = sum(weight * features[row, i].double() for i, weight in weights.items())
            torch.testing.assert_close(means[row, group].double(), wanted, atol=1e-5, rtol=1e-5)
            assert merge.index[row, group] == place
    if weighted:  # then a mean is that of all tokens of the group, however many rounds it took
        plain = tokenprune.reduction.Merge(merge.index, merge.assign)
        torch.testing.assert_close(means, plain.apply(features), atol=1e-5, rtol=1e-5)


def test_equal_tokens_merge_from_the_left():
    merge = merged_features(AIM(merge=0.75, prune=None), torch.ones(1, 8, 3))
    assert merge.index.tolist() == [[1, 3, 4, 5, 6, 7]]
    assert merge.assign.tolist() == [[0, 0, 0, 1, 2, 3, 4, 5]]


@pytest.mark.parametrize(("depth", "layers"), [(32, range(13, 21)), (28, range(11, 18)), (4, (2,)), (2, (0,))])
def test_the_published_schedule_for_images_is_relative_to_the_depth(depth, layers):
    stages = AIM().schedule(depth)
    assert [stage.layer for stage in stages] == list(layers)
    assert stages[-1].keep == 0
    steps = [one.keep - other.keep for one, other in pairwise(stages)]
    assert steps == pytest.approx([1 / len(stages)] * len(steps))


def test_the_published_schedule_for_video():
    method = AIM.for_video()
    assert method.merge == 0.25
    assert method.budget(196).high == 49
    stages = method.schedule(28)
    assert [(stage.layer, stage.keep) for stage in stages] == [(14 + i, 1 - (i + 1) / 8) for i in range(8)]
    assert AIM().budget(576).high == 72


def test_fastv_and_pyramiddrop_cut_where_their_papers_do():
    assert [(stage.layer, stage.keep) for stage in FastV(layer=2, keep=0.5).schedule(32)] == [(1, 0.5)]
    assert [(s.layer, s.keep) for s in PyramidDrop().schedule(32)] == [(7, 0.5), (15, 0.25), (23, 0.125)]
    assert [(s.layer, s.keep) for s in PyramidDrop(stages=(2, 3), keep=0.25).schedule(4)] == [(1, 0.25), (2, 0.0625)]


@pytest.mark.parametrize("method", [FastV, PyramidDrop, AIM])
def test_the_most_important_tokens_stay(method):
    scores = torch.tensor([[0.1, 0.7, 0.7, 0.2, 0.7], [5.0, 4.0, 3.0, 2.0, 1.0]])
    signals = tokenprune.signals.LayerSignals(3, scores)
    keep = method().llm_layer(signals, tokenprune.signals.Budget(2, 2))
    assert keep.index.tolist() == [[1, 2], [0, 1]]


# --- merging before the decoder -------------------------------------------------------------------


def check_merged(dense, family, out, traces, prompt, n, method, *, row_of=lambda row: row):
    """Compare the logits of each of `n` generated tokens of each row with a full computation over plain means."""
    for row, parts in enumerate(prompt.rows):
        merged = Merged(
            dense, family, batch(family, (parts,), seeds=(row,)), spans_of(parts), method.merge,
            weighted=method.size_weighted,
        )  # fmt: skip
        pad = prompt.pads[row]
        assert (traces[0].kept_indices[row_of(row)] - pad).tolist() == sorted(merged.groups)
        single = alone(family, prompt.rows, row)(generated(out, row, n))
        wanted = merged_logits(dense, family, single, merged, traces[1:], row_of(row), pad, method)
        check_tokens(out, row, n, wanted)


def merged_logits(dense, family, single, merged, later, row, pad, method):
    """Logits of one row's tokens, from what is merged of its images and what later sites dropped."""
    n_tokens = single.inputs["input_ids"].shape[1]
    alive = [one & merged.alive(n_tokens) for one in alive_by_layer(later, row, pad, n_tokens, N_LAYERS)]
    sizes = merged.sizes(n_tokens) if method.size_bias else None
    return layered_logits(dense, family, single, alive, merge=merged, sizes=sizes)


VARIANTS = {
    "half": AIM(merge=0.5, prune=None),
    "quarter": AIM(merge=0.25, prune=None),
    "weighted": AIM(merge=0.25, prune=None, size_weighted=True),
    "biased": AIM(merge=0.25, prune=None, size_bias=True),
    "both": AIM(merge=0.25, prune=None, size_weighted=True, size_bias=True),
}


@pytest.mark.parametrize("variant", VARIANTS)
@pytest.mark.parametrize(("family", "implementation"), spread())
def test_merged_tokens_are_the_means_of_their_groups(family, implementation, variant):
    method = VARIANTS[variant]
    dense, model, session = pair(family, implementation, method)
    ragged = batch(family)
    out = generate(model, ragged.inputs, 3)
    n_out = (8, 6, 4) if method.merge == 0.5 else (4, 3, 2)
    assert [(trace.site, trace.n_out) for trace in session.traces] == [("before_llm", n_out)]
    check_merged(dense, family, out, session.traces, ragged, 3, method)


@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("importance", ["pagerank", "last_query"])
@pytest.mark.parametrize(("family", "implementation"), spread())
def test_merging_and_pruning_together(family, implementation, importance, bias):
    method = AIM(merge=0.5, prune=(first_cut(family), 3), importance=importance, size_bias=bias)
    dense, model, session = pair(family, implementation, method)
    ragged = batch(family)
    out = generate(model, ragged.inputs, 3)
    cuts = [(4, 3, 2), (0, 0, 0)] if first_cut(family) == 1 else [(0, 0, 0)]
    assert [trace.n_out for trace in session.traces] == [(8, 6, 4), *cuts]
    check_merged(dense, family, out, session.traces, ragged, 3, method)


@pytest.mark.parametrize("name", ["video_llava-video", "qwen2_vl-video", "qwen3_vl-video", "llava_onevision-video"])
def test_a_video_is_merged_frame_by_frame(name):
    case, method = PIXELS[name], AIM(merge=0.5, prune=None, size_bias=True)
    dense, model = twins(case.family)
    session = tokenprune.patch(model, method)
    ragged = pixel_batch(case, (0, 1, 2))
    out = generate(model, ragged.inputs, 2)
    length = ragged.inputs["input_ids"].shape[1]
    for row in range(3):
        single = pixel_batch(case, (row,))
        spans = (single.inputs["input_ids"][0] == case.token).nonzero()[:, 0].split(case.counts)
        merged = Merged(dense, case.family, single, list(spans), 0.5)
        kept = (session.traces[0].kept_indices[row] - ragged.pads[row]).tolist()
        assert kept == sorted(merged.groups)
        for step in range(2):
            single = pixel_batch(case, (row,), extra=out.sequences[row : row + 1, length : length + step])
            wanted = merged_logits(dense, case.family, single, merged, (), row, ragged.pads[row], method)[-1]
            torch.testing.assert_close(out.logits[step][row], wanted, atol=1e-4, rtol=1e-4)


# --- in a list with another method ----------------------------------------------------------------


def test_groups_can_be_pruned():
    method = AIM(merge=0.5, prune=None, size_bias=True)
    dense, model, session = pair("llava", method=[method, DivPrune(keep=0.5)])
    ragged = batch("llava")
    out = generate(model, ragged.inputs, 3)
    assert [trace.n_out for trace in session.traces] == [(8, 6, 4), (4, 3, 2)]
    check_merged(dense, "llava", out, session.traces, ragged, 3, method)
    features = features_of(RAGGED[1], seed=1)[0]
    groups = sorted(naive_groups(features, 6).items())
    means = torch.stack([sum(weight * features[i] for i, weight in weights.items()) for _, weights in groups])
    chosen = ops.max_min_select(means[None], k=3).index[0].sort().values
    kept = session.traces[1].kept_indices[1] - ragged.pads[1] - 5
    assert kept.tolist() == [groups[i][0] for i in chosen.tolist()]


def test_what_is_left_after_pruning_can_be_merged():
    method = AIM(merge=0.5, prune=(1, 3), size_bias=True)
    dense, model, session = pair("llava", method=[DivPrune(keep=0.5), method])
    ragged = batch("llava")
    out = generate(model, ragged.inputs, 2)
    first, second, *later = session.traces
    assert [trace.n_out for trace in session.traces] == [(8, 6, 4), (4, 3, 2), (2, 2, 1), (0, 0, 0)]
    length = ragged.inputs["input_ids"].shape[1]
    for row, parts in enumerate(RAGGED):
        pad = ragged.pads[row]
        left = (first.kept_indices[row] - pad).tolist()
        spans = [torch.tensor([i for i in span.tolist() if i in left]) for span in spans_of(parts)]
        merged = Merged(dense, "llava", batch("llava", (parts,), seeds=(row,)), spans, 0.5)
        assert (second.kept_indices[row] - pad).tolist() == sorted(merged.groups)
        for step in range(2):
            extra = out.sequences[row : row + 1, length : length + step]
            single = batch("llava", (parts,), seeds=(row,), extra=extra)
            wanted = merged_logits(dense, "llava", single, merged, (first, *later), row, pad, method)[-1]
            torch.testing.assert_close(out.logits[step][row], wanted, atol=1e-4, rtol=1e-4)


# --- the size bias outlives the prefill -----------------------------------------------------------

BIASED = AIM(merge=0.25, prune=None, size_bias=True)


@pytest.mark.parametrize("cuts", [None, (2, 3)])
@pytest.mark.parametrize("family", spread(f for f in FAMILIES if f != "paligemma2"))
def test_the_size_bias_goes_on_with_a_static_cache(family, cuts):
    method = AIM(merge=0.25, prune=cuts, size_bias=True)
    dense, model, session = pair(family, method=method)
    ragged = batch(family)
    out = generate(model, ragged.inputs, 3, cache_implementation="static")
    check_merged(dense, family, out, session.traces, ragged, 3, method)


@pytest.mark.parametrize("family", spread(("gemma3", "aya_vision", "mistral3")))
@pytest.mark.parametrize("cache", ["dynamic", "static"])
def test_the_size_bias_goes_on_within_a_window(family, cache):
    method = AIM(merge=0.5, prune=(2, 3), size_bias=True)
    dense, model, session = pair(family, method=method, text_config={"sliding_window": 9})
    ragged = batch(family)
    options = {"cache_implementation": "static"} if cache == "static" else {}
    out = generate(model, ragged.inputs, 5, **options)
    check_merged(dense, family, out, session.traces, ragged, 5, method)


@pytest.mark.parametrize("family", spread(FAMILIES))
def test_the_size_bias_goes_on_in_beams(family):
    method = AIM(merge=0.5, prune=(2, 3), size_bias=True)
    dense, model, session = pair(family, method=method)
    prompt = batch(family, ONE_IMAGE if family in ONE_SIZE else RAGGED)
    out = generate(model, prompt.inputs, 3, num_beams=3, num_return_sequences=2, output_scores=True, length_penalty=1.0)
    length = prompt.inputs["input_ids"].shape[1]
    for i, ids in enumerate(out.sequences):
        row, new = i // 2, ids[length:]
        parts, pad = prompt.rows[row], prompt.pads[row]
        merged = Merged(dense, family, batch(family, (parts,), seeds=(row,)), spans_of(parts), 0.5)
        single = batch(family, (parts,), seeds=(row,), extra=new[None, :-1])
        found = merged_logits(dense, family, single, merged, session.traces[1:], row * 3, pad, method)
        wanted = found[-len(new) :].log_softmax(-1).gather(1, new[:, None]).sum() / len(new)
        torch.testing.assert_close(out.sequences_scores[i], wanted, atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("cache", ["dynamic", "static"])
@pytest.mark.parametrize(
    "family", spread(f for f in FAMILIES if f not in (*MROPE, "ovis2", "paligemma", "paligemma2", "molmo2"))
)
def test_a_second_turn_sees_the_groups_of_both(family, cache):
    if family == "gemma3" and cache == "static":
        pytest.skip("transformers' own dense run is wrong here: the image blocks of the mask start at the wrong column")
    method = AIM(merge=0.5, prune=(2, 3), size_bias=True)
    dense, model, session = pair(family, method=method)
    ragged = batch(family)
    length = ragged.inputs["input_ids"].shape[1]
    from transformers import StaticCache

    store = with_cache(StaticCache(config=model.config, max_cache_len=64)) if cache == "static" else {}
    first, traces = generate(model, ragged.inputs, 3, **store), session.traces
    ids = torch.cat([first.sequences, second_turn(family, ragged, first, 2, (2, 3))], 1)
    mask = torch.cat([ragged.inputs["attention_mask"], torch.ones(3, ids.shape[1] - length, dtype=torch.long)], 1)
    inputs = {
        "input_ids": ids,
        "attention_mask": mask,
        **with_cache(cache_of(first)),
        FEATURES: batch(family, (((2, 3), 1),) * 3, seeds=(50, 51, 52)).inputs[FEATURES],
    }
    if family == "gemma3":
        inputs["token_type_ids"] = (ids == IMAGE).long()
    out = generate(model, inputs, 3)
    assert [trace.n_out for trace in session.traces] == [(3, 3, 3), (0, 0, 0)]
    start = length + 2  # the last generated token of the first turn was not in the cache yet
    for row, parts in enumerate(RAGGED):
        pad = ragged.pads[row]
        image = features_of(((2, 3),), seed=50 + row)[0]
        at = torch.arange(length - pad + 5, length - pad + 11)
        whole = out.sequences[row, pad : ids.shape[1]]
        merged = Merged(dense, family, conversation(family, parts, row, whole, image), [*spans_of(parts), at], 0.5)
        for step in range(3):
            whole = out.sequences[row, pad : ids.shape[1] + step]
            single = conversation(family, parts, row, whole, image)
            earlier = alive_by_layer(traces[1:], row, pad, len(whole), N_LAYERS)
            later = alive_by_layer(session.traces[1:], row, pad - start, len(whole), N_LAYERS)
            alive = [a & b & merged.alive(len(whole)) for a, b in zip(earlier, later, strict=True)]
            wanted = layered_logits(dense, family, single, alive, merge=merged, sizes=merged.sizes(len(whole)))[-1]
            torch.testing.assert_close(out.logits[step][row], wanted, atol=1e-4, rtol=1e-4)


# --- bad input ------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def llava():
    """A model that is patched by no test that goes well."""
    return tiny("llava")


@pytest.mark.parametrize(("options", "parts"), [
    ({"merge": None, "prune": None}, ("merge and prune are both None",)),
    ({"merge": 0}, ("merge", "at least 1", "got 0")),
    ({"merge": 0.0}, ("merge", "(0, 1]", "got 0.0")),
    ({"merge": 1.5}, ("merge", "(0, 1]", "got 1.5")),
    ({"merge": "half"}, ("merge", "got 'half'")),
    ({"keep": 0.5}, ("merge", "prune", "no keep", "got keep=0.5")),
    ({"prune": (3, 3)}, ("0 <= start < end", "(3, 3)")),
    ({"prune": (0.7, 0.2)}, ("0 <= start < end", "(0.7, 0.2)")),
    ({"prune": (-1, 2)}, ("0 <= start < end", "(-1, 2)")),
    ({"prune": (0.5, 1.5)}, ("end <= 1.0 for floats", "(0.5, 1.5)")),
    ({"prune": (float("nan"), 0.5)}, ("0 <= start < end",)),
    ({"prune": (1, 0.5)}, ("a pair of ints (layers) or of floats", "(1, 0.5)")),
    ({"prune": 3}, ("a pair of ints (layers) or of floats", "got 3")),
    ({"prune": (1, 2, 3)}, ("a pair of ints (layers) or of floats",)),
    ({"prune": (True, 3)}, ("a pair of ints (layers) or of floats",)),
    ({"prune": (1, 4)}, ("layers 1 to 4", "decoder of 4 layers", "end <= 3")),
    ({"prune": (20, 28)}, ("layers 20 to 28", "decoder of 4 layers", "end <= 3")),
    ({"importance": "best"}, ("'pagerank', 'column_sum' or 'last_query'", "got 'best'")),
    ({"temperature": 0}, ("temperature", "above 0", "got 0")),
    ({"temperature": float("nan")}, ("temperature", "above 0", "got nan")),
    ({"temperature": True}, ("temperature", "got True")),
    ({"prune": (1, 3), "merge": None, "positions": "packed"}, ("packed", "'aim' drops tokens inside", "original")),
])  # fmt: skip
def test_options_of_aim_that_make_no_sense_are_refused(llava, options, parts):
    refused(llava, OptionError, *parts, method="aim", **options)


@pytest.mark.parametrize(("method", "options", "parts"), [
    ("fastv", {"layer": 0}, ("layer", "at least 1", "got 0")),
    ("fastv", {"layer": 1.0}, ("layer", "got 1.0")),
    ("fastv", {"layer": 4}, ("layer=4", "decoder of 4 layers", "at most 3")),
    ("fastv", {"keep": 0}, ("keep", "at least 1", "got 0")),
    ("pyramiddrop", {"keep": 3}, ("keep", "from stage to stage", "got 3")),
    ("pyramiddrop", {"keep": 0.0}, ("keep", "(0, 1]", "got 0.0")),
    ("pyramiddrop", {"stages": ()}, ("stages", "got ()")),
    ("pyramiddrop", {"stages": (2, 1)}, ("stages", "ascending", "(2, 1)")),
    ("pyramiddrop", {"stages": (0.5, 2)}, ("stages", "(0.5, 2)")),
    ("pyramiddrop", {"stages": (0.0, 0.5)}, ("stages", "(0.0, 0.5)")),
    ("pyramiddrop", {"stages": 2}, ("stages", "got 2")),
    ("pyramiddrop", {"stages": (2, 4)}, ("2, 4 layers", "decoder of 4 layers", "1 to 3")),
    ("pyramiddrop", {"stages": (0.5, 0.55)}, ("2, 2 layers", "different numbers")),
])  # fmt: skip
def test_options_of_the_other_methods_inside_the_decoder_are_checked(llava, method, options, parts):
    refused(llava, OptionError, *parts, method=method, **options)


def test_a_cut_among_the_layers_of_deepstack_is_refused():
    model = tiny("qwen3_vl")
    refused(model, OptionError, "'fastv'", "after layer 0", "DeepStack", "layer 1 or later", method=FastV(layer=1))
    assert tokenprune.patch(model, FastV(layer=2)).installed


def test_an_attention_implementation_set_after_patching_is_looked_at():
    model, inputs = tiny("llava"), batch("llava").inputs
    session = tokenprune.patch(model, FastV())
    model.set_attn_implementation("flex_attention")
    with torch.no_grad(), pytest.raises(OptionError, match="flex_attention"):
        model(**inputs)
    model.set_attn_implementation("sdpa")
    with torch.no_grad():
        model(**inputs)
    assert session.traces[-1].status == "applied"


def test_attention_implementations_that_cannot_do_it_are_refused(monkeypatch):
    model = tiny("llava")
    monkeypatch.setattr(model.get_decoder().config, "_attn_implementation_internal", "flex_attention")
    refused(model, OptionError, "sdpa, eager and flash", "'flex_attention'", method=FastV())
    for implementation in ("flash_attention_2", "flex_attention"):
        monkeypatch.setattr(model.get_decoder().config, "_attn_implementation_internal", implementation)
        parts = ("'aim'", "size_bias=True", f"'{implementation}'", "sdpa")
        refused(model, OptionError, *parts, method=BIASED)
    tokenprune.patch(model, AIM(merge=0.25, prune=None)).remove()
