"""O1, O2, O3 for every method from pixels, so that they run on every transformers supported: the oldest minor takes no
features computed beforehand. ``bench/minors.py`` runs this file on each of them."""

import copy

import pytest
import torch
from families import generate, tiny
from oracle_layers import Merged, alive_by_layer, layered_logits
from test_layers import N_LAYERS, first_cut, progressive
from test_pixels import CASES, TEXTS, pixel_batch

import tokenprune

pytestmark = pytest.mark.matrix
SINGLE = tuple(name for name in CASES if len(CASES[name].counts) == 1)
ROWS = (0, 1, 2)


def fastv(family):
    return tokenprune.FastV(layer=first_cut(family) + 1, keep=0.5)


def pyramiddrop(family):
    return tokenprune.PyramidDrop(stages=(first_cut(family) + 1,), keep=0.5)


def spatten(family):
    return tokenprune.SpAtten(tokens=(1.0, 1.0, 0.5, 0.25) if first_cut(family) == 2 else (1.0, 0.75, 0.5, 0.25))


METHODS = {"aim": progressive, "fastv": fastv, "pyramiddrop": pyramiddrop, "spatten": spatten}


def check(case, dense, session, out, prompt, *, merging=None):
    """Compare the logits of each generated token of each row with a full recomputation by the unpatched model."""
    n = len(out.logits)
    length = out.sequences.shape[1] - n
    for row in ROWS:
        first, pad = TEXTS[row][0], prompt.pads[row]
        merged = None
        if merging is not None:
            span = torch.arange(first, first + case.counts[0])
            merged = Merged(dense, case.family, pixel_batch(case, (row,)), [span], merging)
            assert (session.traces[0].kept_indices[row] - pad).tolist() == sorted(merged.groups)
        for step in range(n):
            single = pixel_batch(case, (row,), extra=out.sequences[row : row + 1, length : length + step])
            n_tokens = single.inputs["input_ids"].shape[1]
            later = session.traces if merged is None else session.traces[1:]
            alive = alive_by_layer(later, row, pad, n_tokens, N_LAYERS)
            if merged is not None:
                alive = [one & merged.alive(n_tokens) for one in alive]
            wanted = layered_logits(dense, case.family, single, alive, merge=merged)[-1]
            torch.testing.assert_close(out.logits[step][row], wanted, atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("name", SINGLE)
def test_pruning_inside_the_decoder_equals_a_run_that_hides_what_was_dropped(name, method):
    case = CASES[name]
    dense = tiny(case.family)
    model = copy.deepcopy(dense)
    session = tokenprune.patch(model, METHODS[method](case.family))
    prompt = pixel_batch(case, ROWS)
    out = generate(model, prompt.inputs, 3)
    assert session.traces[-1].status == "applied"
    assert max(session.traces[-1].n_out) < min(session.traces[0].n_in)
    check(case, dense, session, out, prompt)


@pytest.mark.parametrize("name", SINGLE)
def test_merging_and_pruning_equal_a_run_over_plain_means(name):
    case = CASES[name]
    dense = tiny(case.family)
    model = copy.deepcopy(dense)
    session = tokenprune.patch(model, tokenprune.AIM(merge=0.5, prune=(first_cut(case.family), 3)))
    prompt = pixel_batch(case, ROWS)
    out = generate(model, prompt.inputs, 3)
    assert session.traces[0].n_out == (case.counts[0] // 2,) * 3
    check(case, dense, session, out, prompt, merging=0.5)


@pytest.mark.parametrize("name", SINGLE)
def test_keeping_everything_is_bit_identical(name):
    case = CASES[name]
    model = tiny(case.family)
    prompt = pixel_batch(case, ROWS)
    wanted = generate(model, prompt.inputs, 3)
    session = tokenprune.patch(model, "divprune", keep=1.0)
    for forced in (False, True):
        session.forced = forced
        out = generate(model, prompt.inputs, 3)
        assert all(torch.equal(*pair) for pair in zip(out.logits, wanted.logits, strict=True)), f"forced={forced}"
