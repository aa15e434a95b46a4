"""Families without a row in the table: tried with defaults, accepted only if the self-check holds."""

import copy

import pytest
import torch
from families import CONFIGS, IMAGE, generate
from processors import expected, processed
from transformers import AutoConfig, AutoModelForImageTextToText

import tokenprune
from tokenprune.testing import CheckError, check_method

VISION = {
    "model_type": "siglip_vision_model",
    "hidden_size": 32,
    "intermediate_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "image_size": 32,
    "patch_size": 8,
    "vision_use_head": False,
}
TEXT = {
    "vocab_size": 128,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 127,
}


def build(family, **text):
    config = AutoConfig.for_model(
        family, vision_config=dict(VISION), text_config={**TEXT, **text}, image_token_id=IMAGE
    )
    torch.manual_seed(0)
    model = AutoModelForImageTextToText.from_config(config).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim >= 2:
                parameter.normal_(std=0.25)
    return model


def test_a_family_of_the_usual_shape_is_taken_without_a_row():
    model = build("cohere2_vision", model_type="cohere2", sliding_window=64)
    session = tokenprune.patch(model, "divprune", keep=0.5)
    assert "cohere2" in session.family
    assert session.family not in tokenprune.list_families()
    config = model.config
    n_tokens = (32 // 8 // config.downsample_factor) ** 2
    ids = torch.tensor([[5, 6, *[IMAGE] * n_tokens, 9, 10]])
    with torch.no_grad():
        model(input_ids=ids, pixel_values=torch.randn(1, 3, 32, 32), attention_mask=torch.ones_like(ids))
    assert session.traces[0].n_in == (n_tokens,)
    assert session.traces[0].n_out == (n_tokens // 2,)


def test_grids_tell_images_and_frames_of_a_family_without_a_row():
    raw = copy.deepcopy(CONFIGS["qwen3_vl"])
    raw["text_config"] |= {"moe_intermediate_size": 16, "num_experts": 4, "num_experts_per_tok": 2}
    torch.manual_seed(0)
    model = AutoModelForImageTextToText.from_config(AutoConfig.for_model("qwen3_vl_moe", **raw)).eval()
    session = tokenprune.patch(model, "divprune", keep=3)
    assert session.family not in tokenprune.list_families()
    rows = (("w5", (40, 40), (5, 32, 32), "w6"), ("w7", (32, 96)))
    inputs = processed("qwen3_vl", rows)
    for run in (lambda: model(**inputs), lambda: generate(model, inputs, 1)):
        with torch.no_grad():
            run()
        assert session.traces[0].images == expected("qwen3_vl", rows)
        assert session.traces[0].note == ""


def test_tiles_or_images_of_a_family_without_a_row_are_taken_for_images_and_the_trace_says_so():
    model = build("cohere2_vision", model_type="cohere2", sliding_window=64)
    session = tokenprune.patch(model, "divprune", keep=1)
    ids = torch.tensor([[5, *[IMAGE] * 4, 6, 7, *[IMAGE] * 4, 9]])
    with torch.no_grad():
        model(input_ids=ids, pixel_values=torch.randn(2, 3, 32, 32), attention_mask=torch.ones_like(ids))
    assert session.traces[0].images == ((4, 4),)
    assert session.traces[0].note.endswith("2 runs of visual tokens were taken for 2 images")


def test_a_decoder_that_mixes_neighbours_is_refused_by_the_self_check():
    model = build("lfm2_vl", model_type="lfm2", layer_types=["conv", "full_attention", "conv"], block_multiple_of=8)
    before = copy.deepcopy(model.state_dict())
    with pytest.raises(tokenprune.UnsupportedModelError, match=r"not in the table.*self-check.*supported families are"):
        tokenprune.patch(model)
    assert not any(module._forward_pre_hooks or module._forward_hooks for module in model.modules())
    assert all(torch.equal(before[name], value) for name, value in model.state_dict().items())


@pytest.mark.parametrize(
    "method",
    [
        tokenprune.DivPrune(keep=0.3),
        tokenprune.Random(keep=5),
        tokenprune.Uniform(keep=0.5),
        tokenprune.AIM(),
        tokenprune.FastV(),
        tokenprune.PyramidDrop(),
        tokenprune.SpAtten(tokens=0.6),
        tokenprune.ToMe(r=4),
    ],
    ids=lambda method: method.name,
)
def test_the_shipped_methods_pass_the_check_for_methods(method):
    check_method(method)


def test_the_check_for_methods_finds_one_that_looks_at_its_neighbours():
    class Peeking(tokenprune.Method):
        def before_llm(self, signals, budget):
            return self.choose(signals.features, budget)

        def choose(self, rows, budget):
            start = rows.shape[0] % 2
            return tokenprune.reduction.Keep(torch.arange(start, start + budget.high).expand(rows.shape[0], -1))

    class PeekingLater(Peeking):
        before_llm = None

        def schedule(self, n_layers):
            return (tokenprune.signals.Stage(2, 0.5),)

        def llm_layer(self, signals, budget):
            return self.choose(signals.importance, budget)

    for method in (Peeking(keep=4), PeekingLater()):
        with pytest.raises(CheckError, match="alone"):
            check_method(method, features=torch.randn(2, 10, 8))


def test_a_method_after_layers_says_where_and_gets_scores():
    class Late(tokenprune.Method):
        def llm_layer(self, signals, budget):
            assert signals.importance.min() > 0
            return tokenprune.reduction.Keep(signals.importance.topk(budget.high).indices.sort(dim=1).values)

    class Planned(Late):
        def schedule(self, n_layers):
            return (tokenprune.signals.Stage(0, 0.5),)

    model = build("cohere2_vision", model_type="cohere2", sliding_window=64)
    with pytest.raises(tokenprune.OptionError, match=r"Late.*schedule"):
        tokenprune.patch(model, Late())
    session = tokenprune.patch(model, Planned())
    ids = torch.tensor([[5, 6, *[IMAGE] * 4, 9, 10]])
    with torch.no_grad():
        model(input_ids=ids, pixel_values=torch.randn(1, 3, 32, 32), attention_mask=torch.ones_like(ids))
    assert session.traces[-1].n_out == (2,)
