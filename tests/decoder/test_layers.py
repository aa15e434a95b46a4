"""O1, O3, O5, O7: pruning inside the decoder against an unpatched full-length run with a mask for every layer, over all
families, in ragged padded batches."""

import pytest
import torch
from families import FAMILIES, RAGGED, alone, batch, generate, implementations, tiny, twins
from oracle import check_tokens, generated
from oracle_layers import alive_by_layer, layered, layered_logits, layers_of, naive_importance
from states import logits
from upstream import HIDDEN, cache_of

import tokenprune

N_LAYERS = 4
FEW = ("llava", "qwen3_vl", "gemma3", "idefics3", "mistral3")
CASES = [(family, implementation) for family in FAMILIES for implementation in implementations(family)]
REDUCTIONS = ("pagerank", "column_sum", "last_query")


def spread(cases=CASES):
    """All cases, families or tuples that begin with one; those beyond a few belong to the wide matrix."""
    return [
        case
        if (case if isinstance(case, str) else case[0]) in FEW
        else pytest.param(*([case] if isinstance(case, str) else case), marks=pytest.mark.matrix)
        for case in cases
    ]


def first_cut(family):
    """The first layer after which tokens can leave: behind the layers that DeepStack adds features to."""
    return 2 if family == "qwen3_vl" else 1


def progressive(family, **options):
    """Drops tokens after two of the four layers (qwen3_vl: one), the last visual ones with the second."""
    return tokenprune.AIM(**{"merge": None, "prune": (first_cut(family), 3), **options})


def halved(family):
    """Half of the visual tokens go on after a layer, half of these after the next one."""
    if first_cut(family) == 2:
        return tokenprune.FastV(layer=3)
    return tokenprune.PyramidDrop(stages=(2, 3))


def pair(family, implementation=None, method=None, **overrides):
    dense, model = twins(family, implementation or implementations(family)[0], **overrides)
    return dense, model, tokenprune.patch(model, method or halved(family))


def check_layers(dense, family, out, traces, prompt, n, *, tolerance=1e-4, **options):
    """Compare the logits of each of `n` generated tokens of each row with a full computation."""
    for row, pad in enumerate(prompt.pads):
        single = alone(family, prompt.rows, row)(generated(out, row, n))
        alive = alive_by_layer(traces, row, pad, single.inputs["input_ids"].shape[1], N_LAYERS)
        check_tokens(out, row, n, layered_logits(dense, family, single, alive, **options), tolerance=tolerance)


@pytest.mark.parametrize("importance", ["pagerank", "last_query"])
@pytest.mark.parametrize(("family", "implementation"), spread())
def test_tokens_that_left_are_unseen_by_later_layers(family, implementation, importance):
    dense, model, session = pair(family, implementation, progressive(family, importance=importance))
    ragged = batch(family)
    out = generate(model, ragged.inputs, 3)
    assert session.traces[-1].n_out == (0, 0, 0)
    assert session.traces[0].n_in == (16, 12, 8)
    check_layers(dense, family, out, session.traces, ragged, 3)


@pytest.mark.parametrize("family", spread(FAMILIES))
def test_tokens_that_stay_are_seen_by_later_layers(family):
    dense, model, session = pair(family)
    ragged = batch(family)
    out = generate(model, ragged.inputs, 3)
    assert all(0 < n < 16 for n in session.traces[-1].n_out)
    check_layers(dense, family, out, session.traces, ragged, 3)


# --- which tokens stay ----------------------------------------------------------------------------


def check_choice(scores, visual, kept):
    """`kept` are those of the tokens `visual` whose scores are highest."""
    dropped = sorted(set(visual) - set(kept))
    assert set(kept) < set(visual)
    if kept and dropped:
        assert scores[kept].min() >= scores[dropped].max() - 1e-5 * scores.max()


@pytest.mark.parametrize("rows", [RAGGED[:1], RAGGED], ids=["one row", "ragged"])
@pytest.mark.parametrize("importance", REDUCTIONS)
@pytest.mark.parametrize(("family", "implementation"), spread())
def test_the_tokens_that_stay_are_those_that_the_formula_says(family, implementation, importance, rows):
    method = progressive(family, importance=importance)
    _, model, session = pair(family, implementation, method)
    eager, prompt = tiny(family, "eager"), batch(family, rows)
    generate(model, prompt.inputs, 1)
    for row, parts in enumerate(rows):
        single, pad = batch(family, (parts,), seeds=(row,)), prompt.pads[row]
        length = single.inputs["input_ids"].shape[1]
        for i, trace in enumerate(session.traces):
            alive = alive_by_layer(session.traces[:i], row, pad, length, N_LAYERS)
            attention = layered(eager, family, single, alive, attentions=True).attentions[trace.layer][0]
            left = alive[trace.layer].nonzero()[:, 0]
            scores = torch.zeros(length, dtype=torch.float64)
            scores[left] = naive_importance(attention[:, left][:, :, left], importance, method.temperature)
            visual, kept = (trace.visual_indices[row] - pad).tolist(), (trace.kept_indices[row] - pad).tolist()
            check_choice(scores, visual, kept)


@pytest.mark.parametrize("importance", REDUCTIONS)
def test_the_ways_to_rank_tokens_differ(importance):
    prompt, kept = batch("llava"), {}
    for way in REDUCTIONS:
        _, model, session = pair("llava", method=progressive("llava", importance=way, prune=(0, 2)))
        generate(model, prompt.inputs, 1)
        kept[way] = [tuple(indices.tolist()) for indices in session.traces[0].kept_indices]
    assert len({tuple(rows) for rows in kept.values()}) == 3, importance


# --- engaged: lengths -----------------------------------------------------------------------------


def widths_of(model, inputs, n=1, **options):
    """How many tokens each layer sees in the prefill, and how many keys and values its cache holds after it."""
    seen: dict[int, int] = {}
    handles = [
        layer.register_forward_pre_hook(
            lambda module, args, kwargs, i=i: (
                seen.setdefault(i, (args[0] if args else kwargs[HIDDEN]).shape[1]) and None
            ),
            with_kwargs=True,
        )
        for i, layer in enumerate(layers_of(model.get_decoder()))
    ]
    out = generate(model, inputs, n, **options)
    for handle in handles:
        handle.remove()
    return [seen[i] for i in range(N_LAYERS)], [layer.keys.shape[2] for layer in cache_of(out).layers]


# After a cut the rows of RAGGED have 10, 7 and 12 tokens of text and no padding but what fills them up.
SCHEDULES = {
    "aim": (lambda start: tokenprune.AIM(merge=None, prune=(start, 3)), {1: [26, 26, 18, 12], 2: [26, 26, 26, 12]}),
    "fastv": (lambda start: tokenprune.FastV(layer=start + 1, keep=0.25), {1: [26, 26, 14, 14], 2: [26, 26, 26, 14]}),
    "pyramiddrop": (
        lambda start: tokenprune.PyramidDrop(stages=(2, 3)[start - 1 :]),
        {1: [26, 26, 18, 14], 2: [26, 26, 26, 18]},
    ),
    "both": (
        lambda start: [tokenprune.DivPrune(keep=0.5), tokenprune.AIM(merge=None, prune=(start, 3))],
        {1: [18, 18, 14, 12], 2: [18, 18, 18, 12]},
    ),
}


@pytest.mark.parametrize("name", SCHEDULES)
@pytest.mark.parametrize(("family", "implementation"), spread())
def test_hidden_states_and_caches_are_as_short_as_the_schedule_says(family, implementation, name):
    make, wanted = SCHEDULES[name]
    start = first_cut(family)
    dense, model, session = pair(family, implementation, make(start))
    ragged = batch(family)
    assert widths_of(dense, ragged.inputs) == ([26] * N_LAYERS, [26] * N_LAYERS)
    widths, stored = widths_of(model, ragged.inputs)
    assert widths == wanted[start]
    assert stored == widths
    assert all(trace.status == "applied" for trace in session.traces)
    assert (logits(model, ragged.inputs)[:, -1] - logits(dense, ragged.inputs)[:, -1]).abs().max() > 1e-3


def test_layers_before_the_first_cut_are_untouched():
    dense, model, _ = pair("llava", method=tokenprune.FastV(layer=2, keep=0.25))
    ragged = batch("llava")
    wanted, out = generate(dense, ragged.inputs, 1), generate(model, ragged.inputs, 1)
    for layer in range(2):
        for name in ("keys", "values"):
            one, other = (getattr(cache_of(each).layers[layer], name) for each in (out, wanted))
            assert torch.equal(one, other)


# --- everything kept, and rows by themselves ------------------------------------------------------


@pytest.mark.parametrize(("family", "implementation"), spread())
def test_keeping_everything_changes_no_bit_of_any_logit(family, implementation):
    dense, model, session = pair(family, implementation, tokenprune.FastV(layer=first_cut(family) + 1, keep=1.0))
    ragged = batch(family)
    wanted, uncached = generate(dense, ragged.inputs, 3), logits(dense, ragged.inputs, use_cache=False)
    for forced in (False, True):
        session.forced = forced
        out = generate(model, ragged.inputs, 3)
        assert torch.equal(out.sequences, wanted.sequences)
        assert all(torch.equal(one, other) for one, other in zip(out.logits, wanted.logits, strict=True))
        assert torch.equal(logits(model, ragged.inputs, use_cache=False), uncached)
    assert session.traces[0].n_out == session.traces[0].n_in == (16, 12, 8)


@pytest.mark.parametrize("importance", REDUCTIONS)
@pytest.mark.parametrize("family", spread(FAMILIES))
def test_a_row_of_a_batch_equals_the_row_alone(family, importance):
    _, model, session = pair(family, method=progressive(family, importance=importance))
    ragged = batch(family)
    out, traces = generate(model, ragged.inputs, 3), session.traces
    for row, parts in enumerate(RAGGED):
        alone = generate(model, batch(family, (parts,), seeds=(row,)).inputs, 3)
        for one, other in zip(session.traces, traces, strict=True):
            assert one.kept_indices[0].tolist() == (other.kept_indices[row] - ragged.pads[row]).tolist()
        assert torch.equal(alone.sequences[0, -3:], out.sequences[row, -3:])
        for step in range(3):
            torch.testing.assert_close(alone.logits[step][0], out.logits[step][row], atol=1e-4, rtol=1e-4)
