"""What acts while tokens are generated, in all its combinations, and positions without gaps with pruning inside the
decoder: complete generations of ragged batches against the oracle of decoding."""

from itertools import product

import pytest
import torch
from families import alone, batch, generate, tiny, twins
from oracle_decoding import Row
from oracle_planes import recorded_planes, stored_by
from upstream import cache_of

import tokenprune
from tokenprune import AIM, DivPrune, FastV, PyramidDrop, SpAtten

KEPT = (1.0, 1.0, 0.7, 0.4)
TEXT = {"tokens": KEPT, "protect_text": False, "keep_first": 2, "keep_recent": 3}
PLANES = {"quantize": "4+4", "threshold": 0.15}
HEADS = {"heads": (1.0, 1.0, 0.75, 0.5)}
ROWS = ((3, (3, 4), 4, (2, 2), 7), (5, (3, 4), 9), (6, (2, 2), 1, (2, 2), 5))
STEPS = 7


def check(family, implementation, methods, *, positions="original", n=STEPS, **overrides):
    """Compare the logits of a generation with the oracle's, in each row up to a choice that rounding may turn.

    Returns:
        The output, and the rows of the oracle.
    """
    dense, model = twins(family, implementation, **overrides)
    session = tokenprune.patch(model, methods, positions=positions)
    prompt, rows, compared = batch(family, ROWS), [], 0
    with recorded_planes() as recorded:
        out = generate(model, prompt.inputs, n)
    length = prompt.inputs["input_ids"].shape[1]
    for row, pad in enumerate(prompt.pads):
        stored = stored_by(cache_of(out), recorded, row)
        rows.append(Row(dense, family, alone(family, ROWS, row), session, row, pad, stored=stored))
        for step in range(n):
            wanted = rows[row].logits(out.sequences[row : row + 1, length : length + step])
            if not rows[row].sure:
                break
            torch.testing.assert_close(out.logits[step][row], wanted, atol=1e-4, rtol=1e-4)
            compared += 1
    assert compared >= 0.7 * n * len(ROWS)
    return out, rows


DECODING = {
    "planes": SpAtten(tokens=1.0, **PLANES),
    "planes, tokens leave": SpAtten(**TEXT, **PLANES, interval=1),
    "planes, tokens leave now and then": SpAtten(**TEXT, **PLANES, interval=3),
    "planes, tokens are passed over": SpAtten(**TEXT, **PLANES, kv="per_step"),
    "planes, values": SpAtten(tokens=1.0, values=0.4, **PLANES),
    "planes, heads": SpAtten(tokens=1.0, **HEADS, **PLANES),
    "tokens leave, values": SpAtten(**TEXT, interval=1, values=0.4),
    "tokens are passed over, values, heads": SpAtten(**TEXT, **HEADS, kv="per_step", values=0.4),
    "everything": SpAtten(**TEXT, **HEADS, **PLANES, interval=2, values=0.5),
    "everything, pruned before": [DivPrune(keep=0.5), SpAtten(**TEXT, **HEADS, **PLANES, interval=1, values=0.5)],
    "everything, merged before": [AIM(merge=0.5, prune=None), SpAtten(**TEXT, **HEADS, **PLANES, interval=1)],
}


def default(family, implementation, name):
    return family == "llava" and (implementation == "sdpa" or name == "everything")


@pytest.mark.parametrize(
    ("family", "implementation", "name"),
    [
        pytest.param(*case, marks=() if default(*case) else pytest.mark.matrix)
        for case in product(("llava", "qwen3_vl", "glm4v", "smolvlm"), ("sdpa", "eager"), DECODING)
    ],
)
def test_every_logit_is_that_of_a_computation_by_the_rules(family, implementation, name):
    out, rows = check(family, implementation, DECODING[name])
    layers, planes = cache_of(out).layers, "planes" in name or "everything" in name
    assert all(hasattr(layer, "planes") for layer in layers) == planes
    if "leave" in name:  # and more of them than in the prompt
        assert any(int(one.alive[-1].sum()) < int(one.entered[-1].sum()) for one in rows)
    if planes:
        read = torch.cat([torch.stack(one.both)[:, :, one.n_prompt :] for one in rows], 2)
        assert bool(read.any())
        assert not bool(read.all())  # else it would make no difference which plane is read


PACKED = {
    "once": [DivPrune(keep=0.5), FastV(layer=2)],
    "progressive": [DivPrune(keep=0.75), PyramidDrop(stages=(2, 3))],
    "merged": AIM(merge=0.5, prune=(1, 3)),
    "text": [DivPrune(keep=0.5), SpAtten(**TEXT, interval=2)],
    "each step": [DivPrune(keep=0.5), SpAtten(**TEXT, kv="per_step")],
    "everything": [DivPrune(keep=0.5), SpAtten(**TEXT, **HEADS, **PLANES, interval=1, values=0.5)],
}


@pytest.mark.parametrize("name", PACKED)
@pytest.mark.parametrize(
    ("family", "implementation"),
    [
        ("llava", "sdpa"),
        ("internvl", "eager"),
        pytest.param("llava", "eager", marks=pytest.mark.matrix),
        pytest.param("idefics3", "sdpa", marks=pytest.mark.matrix),
        pytest.param("molmo2", "sdpa", marks=pytest.mark.matrix),
    ],
)
def test_positions_without_gaps_go_on_while_the_decoder_is_pruned_inside(family, implementation, name):
    check(family, implementation, PACKED[name], positions="packed", n=4)


INSIDE = (FastV(layer=2), PyramidDrop(stages=(2, 3)), AIM(merge=None, prune=(1, 3)), SpAtten())


@pytest.mark.parametrize("method", INSIDE, ids=lambda method: method.name)
def test_positions_without_gaps_are_refused_where_tokens_are_pruned_inside_alone(method):
    model = tiny("llava")
    with pytest.raises(tokenprune.OptionError, match=r'positions="packed".*use positions="original"'):
        tokenprune.patch(model, method, positions="packed")
