"""What the library counts, held against the formula for a decoder's arithmetic and against torch's own counter."""

import pytest
import torch
from decoder_flops import decoder_flops_g
from families import batch, fresh, tiny
from measuring import flops_g
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

DENSE = ("llava", "qwen2_vl", "qwen3_vl", "internvl", "gemma3", "mistral3", "smolvlm", "glm4v")


@pytest.mark.parametrize("implementation", ["sdpa", "eager"])
@pytest.mark.parametrize("family", DENSE)
def test_formula_agrees_with_both_counters_within_two_percent(family: str, implementation: str) -> None:
    model, inputs = tiny(family, implementation), batch(family).inputs
    decoder = model.get_decoder()
    rows, length = inputs["input_ids"].shape
    formula = decoder_flops_g(decoder, rows=rows, lengths=[length] * len(decoder.layers))
    assert formula is not None
    with torch.no_grad():
        with FlopCounterMode(display=False) as torchs:  # torch 2.14 counts no fused attention on a CPU
            tiny(family, "eager")(**fresh(inputs), logits_to_keep=1)
        ours = flops_g(lambda: model(**fresh(inputs), logits_to_keep=1))
    head = 2 * rows * model.lm_head.weight.numel() / 1e9
    assert formula + head == pytest.approx(torchs.get_total_flops() / 1e9, rel=0.02)
    assert formula + head == pytest.approx(ours, rel=0.02)


def test_layers_of_different_lengths_add_up() -> None:
    decoder = tiny("llava").get_decoder()
    whole = [decoder_flops_g(decoder, rows=2, lengths=[length] * 4) for length in (20, 20, 10, 5)]
    assert decoder_flops_g(decoder, rows=2, lengths=[20, 20, 10, 5]) == pytest.approx(sum(whole) / 4)


def test_decoders_of_another_build_get_no_figure() -> None:
    decoder = tiny("llava").get_decoder()
    assert decoder_flops_g(decoder, rows=1, lengths=[4, 4]) is None
    assert decoder_flops_g(decoder, rows=1, lengths=[4, 4, 0, 4]) is None
    assert decoder_flops_g(nn.Linear(2, 2), rows=1, lengths=[]) is None
    decoder.layers[1].mlp = nn.Conv1d(32, 32, 1)
    assert decoder_flops_g(decoder, rows=1, lengths=[4] * 4) is None
