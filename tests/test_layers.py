"""O3, O5, O7: pruning inside the decoder against an unpatched full-length run with a mask for every layer, over all
families, in ragged padded batches."""

import copy

import pytest
import torch
from families import FAMILIES, RAGGED, batch, fresh, generate, implementations, tiny
from oracle_layers import alive_by_layer, layered_logits, layers_of

import tokenprune

CASES = [(family, implementation) for family in FAMILIES for implementation in implementations(family)]
N_LAYERS = 4
FIRST = {"qwen3_vl": 2}  # two planes of DeepStack features


def progressive(family: str, **options):
    """A method that drops tokens after two of the four layers, the last visual ones with the second."""
    return tokenprune.AIM(merge=None, prune=(FIRST.get(family, 1) - 0, 3), **options)


def check_layers(dense, family, out, traces, prompt, n, *, tolerance=1e-4, **options):
    """Compare the logits of each of `n` generated tokens of each row with a full recomputation."""
    length = out.sequences.shape[1] - n
    for row, parts in enumerate(prompt.rows):
        for step in range(n):
            extra = out.sequences[row : row + 1, length : length + step]
            single = batch(family, (parts,), seeds=(row,), extra=extra)
            alive = alive_by_layer(traces, row, prompt.pads[row], single.inputs["input_ids"].shape[1], N_LAYERS)
            wanted = layered_logits(dense, family, single, alive, **options)[-1]
            torch.testing.assert_close(out.logits[step][row], wanted, atol=tolerance, rtol=tolerance)


@pytest.mark.parametrize("importance", ["pagerank", "last_query"])
@pytest.mark.parametrize(("family", "implementation"), CASES)
def test_tokens_that_left_are_unseen_by_later_layers(family, implementation, importance):
    dense = tiny(family, implementation)
    model = copy.deepcopy(dense)
    session = tokenprune.patch(model, progressive(family, importance=importance))
    ragged = batch(family)
    out = generate(model, ragged.inputs, 4)
    assert session.traces[-1].n_out == (0, 0, 0)
    assert session.traces[0].n_in == (16, 12, 8)
    check_layers(dense, family, out, session.traces, ragged, 4)
