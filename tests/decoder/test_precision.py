"""O2, O3 in bf16 and fp16: a pruned model is no farther from an fp64 run on the same kept tokens than the unpatched one
in its dtype is."""

import copy
from typing import Any

import pytest
import torch
from families import FAMILIES, RAGGED, alone, batch, fresh, generate, implementations, tiny
from oracle_precision import Replayed, check_choices, written_down
from states import logits

import tokenprune
from tokenprune import AIM, DivPrune, FastV, PyramidDrop, SpAtten

# Two computations in one dtype round in other places, so that each has a draw of its own of the same error. Over all
# rows, steps and the vocabulary they cost the same; a single step that blows roundings up has no such average.
FACTOR, OF_ONE_STEP = 2.0, 4.0
STEPS = 4
TEXT: dict[str, Any] = {"protect_text": False, "keep_first": 2, "keep_recent": 3, "interval": 1}
KEPT = (1.0, 0.8, 0.6, 0.4)
METHODS = {
    "before": DivPrune(keep=0.5),
    "merged": AIM(merge=0.5, prune=None, size_bias=True),
    "fastv": FastV(layer=2),
    "pyramiddrop": PyramidDrop(stages=(2, 3)),
    "aim": AIM(merge=0.5, prune=(1, 3)),
    "tokens": SpAtten(tokens=KEPT),
    "text": SpAtten(tokens=KEPT, **TEXT),
    "each step": SpAtten(tokens=KEPT, **TEXT, kv="per_step"),
    "heads": SpAtten(tokens=1.0, heads=(1.0, 0.75, 0.5, 0.5)),
    "values": SpAtten(tokens=1.0, values=0.4),
}
DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16}
FEW = ("llava", "qwen3_vl", "gemma3", "mistral3")


def check(family: str, method: Any, dtype: torch.dtype, implementation: str) -> int:
    """Compare a generation with what the oracle makes of the run's choices, in `dtype` and in fp64.

    Returns:
        How many of the choices were beyond what the dtype may turn.
    """
    dense, prompt = tiny(family, implementation).to(dtype), batch(family)
    exact, model = copy.deepcopy(dense).double(), copy.deepcopy(dense)
    inputs = fresh(prompt.inputs, dtype=dtype)
    session = tokenprune.patch(model, method)
    whole = logits(model, inputs)
    assert (whole.dtype, whole.shape) == (dtype, (*prompt.inputs["input_ids"].shape, 128))
    with written_down(model, dense.get_decoder().config.num_attention_heads) as choices:
        out = generate(model, inputs, STEPS)
    length, clear, off, costs = prompt.inputs["input_ids"].shape[1], 0, [], []
    for row, pad in enumerate(prompt.pads):
        given = family, alone(family, RAGGED, row), session, row, pad
        rows = [Replayed(one, *given, choices=choices) for one in (dense, exact)]
        for step in range(STEPS):
            ids = out.sequences[row : row + 1, length : length + step]
            rough, wanted = (one.logits(ids).double() for one in rows)
            off.append((out.logits[step][row].double() - wanted).square().mean())
            costs.append((rough - wanted).square().mean())
        clear += check_choices(*rows, FACTOR)
    cost = float(torch.stack(costs).mean().sqrt())
    assert float(torch.stack(off).mean().sqrt()) <= FACTOR * cost
    assert float(torch.stack(off).max().sqrt()) <= OF_ONE_STEP * float(torch.stack(costs).max().sqrt())
    assert cost < 0.05 * float(out.logits[0].std())  # else nothing else would be seen
    return clear


@pytest.mark.parametrize(
    "family", [family if family in FEW else pytest.param(family, marks=pytest.mark.matrix) for family in FAMILIES]
)
def test_pruning_before_the_decoder(family):
    check(family, METHODS["before"], torch.bfloat16, implementations(family)[0])


@pytest.mark.parametrize(
    ("dtype", "implementation"),
    [
        ("bf16", "sdpa"),
        ("fp16", "eager"),
        pytest.param("bf16", "eager", marks=pytest.mark.matrix),
        pytest.param("fp16", "sdpa", marks=pytest.mark.matrix),
    ],
)
@pytest.mark.parametrize("name", METHODS)
def test_every_method(name, dtype, implementation):
    clear = check("llava", METHODS[name], DTYPES[dtype], implementation)
    assert clear > 0 or name in ("before", "merged") or dtype == "bf16"


@pytest.mark.matrix
@pytest.mark.parametrize("family", ["gemma3", "glm4v", "paligemma2"])
@pytest.mark.parametrize("name", [name for name in METHODS if name not in ("text", "each step")])
def test_other_families(family, name):
    check(family, METHODS[name], torch.bfloat16, implementations(family)[0])
