"""O1, O2, O5, O7: pruned against an independent dense computation, over all families, in ragged padded batches."""

import copy

import pytest
import torch
import tokenprune
from families import FAMILIES, RAGGED, batch, implementations, tiny
from oracle import kept_of_row, reference_logits

CASES = [(family, implementation) for family in FAMILIES for implementation in implementations(family)]


def fresh(inputs):
    """The model writes into `mm_encoder_outputs`, so every call gets its own."""
    return {**inputs, "mm_encoder_outputs": dict(inputs["mm_encoder_outputs"])}


def generate(model, inputs, n, **kwargs):
    options = {"max_new_tokens": n, "do_sample": False, "output_logits": True, "return_dict_in_generate": True, **kwargs}
    options.setdefault("suppress_tokens", list(range(100, 115)))  # a generated placeholder could not be told from an image in the reference
    with torch.no_grad():
        return model.generate(**fresh(inputs), **options)


def check_steps(dense, family, out, traces, rows, pads, n, *, packed=False, tolerance=1e-4):
    """Every generated token's logits against the full recomputation."""
    ids = out.sequences
    length = ids.shape[1] - n
    for row, parts in enumerate(rows):
        for step in range(n):
            extra = ids[row : row + 1, length : length + step]
            single = batch(family, (parts,), seeds=(row,), extra=extra)
            kept = kept_of_row(traces, row, pads[row], single.inputs["input_ids"].shape[1])
            wanted = reference_logits(dense, family, single, kept, packed=packed)[-1]
            torch.testing.assert_close(out.logits[step][row], wanted, atol=tolerance, rtol=tolerance)


@pytest.mark.parametrize(("family", "implementation"), CASES)
def test_pruned_generation_equals_a_dense_run_on_the_kept_tokens(family, implementation):
    dense = tiny(family, implementation)
    model = copy.deepcopy(dense)
    session = tokenprune.patch(model, "divprune", keep=0.5)
    ragged = batch(family)
    out = generate(model, ragged.inputs, 4)
    assert session.traces[-1].n_out == (8, 6, 4)
    check_steps(dense, family, out, session.traces, RAGGED, ragged.pads, 4)
