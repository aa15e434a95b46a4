"""ToMe inside the vision tower of a multimodal model: tower, projector and decoder against plain computations."""

import copy
from typing import Any

import pytest
import torch
from families import Batch, fresh, generate, tiny
from hypothesis import given, settings
from hypothesis import strategies as st
from oracle import reference_logits
from states import hook_counts, snapshot
from test_pixels import CASES, TEXTS, pixel_batch
from torch import Tensor, nn
from upstream import encoder_output, with_features
from vits import DEPTH, HEADS, WIDTH, Row, merged

import tokenprune
from tokenprune import AIM, DivPrune, InputError, OptionError, ToMe, UnsupportedModelError, running
from tokenprune.ops.equal import equal_tokens

VISION = {"hidden_size": WIDTH, "num_attention_heads": HEADS, "num_hidden_layers": DEPTH}
ONE_TO_ONE = {"llava": ("hf clip", 3, 1), "paligemma": ("hf siglip", 4, 0)}  # plain name, blocks used, prefix


def model_of(family: str) -> nn.Module:
    return tiny(family, vision_config=VISION)


def tower_rows(family: str, dense: nn.Module, pixels: Tensor, r: int) -> list[Row]:
    """What the blocks that count leave of every image, by the paper written out."""
    name, n_used, _ = ONE_TO_ONE[family]
    tower, got = dense.model.vision_tower, []
    handle = tower.encoder.layers[0].register_forward_pre_hook(lambda module, args: got.append(args[0]))
    with torch.no_grad():
        tower(pixels)
    handle.remove()
    removed = [r] * n_used + [0] * (DEPTH - n_used)
    return [rows[n_used - 1] for rows in merged(name, tower, {}, got[0], removed)]


def middles(row: Row, prefix: int) -> list[int]:
    """The middle patch of every group, ascending."""
    groups = [sorted(i - prefix for i in group) for group in row.groups[prefix:]]
    return sorted(group[(len(group) - 1) // 2] for group in groups)


def features_of(family: str, dense: nn.Module, row: Row) -> Tensor:
    tower, prefix = dense.model.vision_tower, ONE_TO_ONE[family][2]
    x = row.spread()
    x = tower.post_layernorm(x) if family == "paligemma" else x[prefix:]
    return dense.model.multi_modal_projector(x[None])


@pytest.mark.parametrize("family", ONE_TO_ONE)
def test_generation_equals_a_dense_run_on_one_token_a_group(family):
    dense, case, rows = model_of(family), CASES[family], (0, 1, 2)
    model = copy.deepcopy(dense)
    session = tokenprune.patch(model, "tome", r=3)
    prompt = pixel_batch(case, rows)
    out = generate(model, prompt.inputs, 3)
    n_left, prefix = 16 - 3 * ONE_TO_ONE[family][1], ONE_TO_ONE[family][2]
    assert [trace.site for trace in session.traces] == ["encoder_block"] * ONE_TO_ONE[family][1] + ["before_llm"]
    assert session.traces[-1].n_out == (n_left,) * 3
    length = out.sequences.shape[1] - 3
    for row in rows:
        (plain,) = tower_rows(family, dense, prompt.inputs["pixel_values"][row : row + 1], 3)
        first = TEXTS[row][0]
        kept = middles(plain, prefix)
        assert [i - first - prompt.pads[row] for i in session.traces[-1].kept_indices[row].tolist()] == kept
        for step in range(3):
            single = pixel_batch(case, (row,), extra=out.sequences[row : row + 1, length : length + step])
            inputs = {key: value for key, value in single.inputs.items() if key != "pixel_values"}
            with torch.no_grad():
                features = features_of(family, dense, plain)
            inputs |= with_features(encoder_output(features if family == "paligemma" else list(features)))
            n_tokens = inputs["input_ids"].shape[1]
            places = torch.tensor([i for i in range(n_tokens) if not first <= i < first + 16 or i - first in kept])
            wanted = reference_logits(dense, family, Batch(inputs, single.pads, ()), places)[-1]
            torch.testing.assert_close(out.logits[step][row], wanted, atol=2e-4, rtol=2e-4)


def test_it_composes_with_what_prunes_before_and_inside_the_decoder():
    model, prompt = model_of("llava"), pixel_batch(CASES["llava"], (0, 1, 2))
    session = tokenprune.patch(model, [ToMe(r=2), DivPrune(keep=0.5), AIM(merge=None, prune=(0, 2))])
    generate(model, prompt.inputs, 3)
    seen = [(trace.site, trace.method, trace.n_in[0], trace.n_out[0]) for trace in session.traces]
    assert seen[:5] == [
        ("encoder_block", "tome", 16, 14),
        ("encoder_block", "tome", 14, 12),
        ("encoder_block", "tome", 12, 10),
        ("before_llm", "tome", 16, 10),
        ("before_llm", "divprune", 10, 5),
    ]
    assert {site for site, *_ in seen[5:]} == {"llm_layer"}
    assert "before_llm" in str(session.report())


@pytest.mark.parametrize("family", [*ONE_TO_ONE, "vipllava"])
def test_nothing_merged_is_bit_identical(family):
    model, prompt = model_of(family), pixel_batch(CASES[family], (0, 1, 2))
    wanted = generate(model, prompt.inputs, 3)
    session = tokenprune.patch(model, "tome", keep=1.0)
    for forced in (False, True):
        session.forced = forced
        out = generate(model, prompt.inputs, 3)
        assert all(torch.equal(*pair) for pair in zip(out.logits, wanted.logits, strict=True))


def test_features_computed_beforehand_and_beams_see_the_same_tokens():
    model, prompt = model_of("llava"), pixel_batch(CASES["llava"], (0, 1, 2))
    session = tokenprune.patch(model, "tome", r=3)
    with torch.no_grad():
        wanted = model(**prompt.inputs).logits
        given = fresh(prompt.inputs)
        encoded = model.get_image_features(given.pop("pixel_values"))
        found = model(**given, **with_features(encoded)).logits
    assert torch.equal(found, wanted)
    model.generate(**prompt.inputs, max_new_tokens=2, num_beams=2, do_sample=False)
    assert session.traces[-1].n_out == (7,) * 6
    assert running.innermost() is None


def test_where_layers_are_joined_the_finest_groups_count():
    model, prompt = model_of("vipllava"), pixel_batch(CASES["vipllava"], (0,))
    session = tokenprune.patch(model, "tome", r=3)
    with torch.no_grad():
        model(**prompt.inputs)
    assert session.traces[-1].n_out == (16,)  # its second layer is the one before all blocks
    model.config.vision_feature_layer = model.model.config.vision_feature_layer = [-2, -3]
    session = tokenprune.patch(model, "tome", r=3)
    with torch.no_grad():
        model(**prompt.inputs)
    assert [trace.n_out for trace in session.traces] == [(13,), (10,), (7,), (10,)]


@pytest.mark.filterwarnings("ignore:this .* is a copy of a patched one")
def test_unpatching_and_pausing_leave_the_model_as_it_was():
    model, prompt = model_of("llava"), pixel_batch(CASES["llava"], (0, 1, 2))
    with torch.no_grad():
        wanted = model(**prompt.inputs).logits
        before, hooks = snapshot(model), hook_counts(model)
        with tokenprune.patch(model, "tome", r=3) as session:
            assert not torch.allclose(model(**prompt.inputs).logits, wanted, atol=1e-3)
            with session.pause():
                assert torch.equal(model(**prompt.inputs).logits, wanted)
            assert torch.equal(copy.deepcopy(model)(**prompt.inputs).logits, wanted)
        assert (snapshot(model), hook_counts(model)) == (before, hooks)
        assert torch.equal(model(**prompt.inputs).logits, wanted)


@pytest.mark.parametrize(("family", "reason"), [
    ("qwen2_vl", "packs the patches"),
    ("qwen3_vl", "packs the patches"),
    ("mistral3", "packs the patches"),
    ("llava_next", "broken into lines"),
    ("gemma3", "pooled"),
])  # fmt: skip
def test_towers_whose_patches_are_no_tokens_of_the_decoder_are_refused_with_the_reason(family, reason):
    model = tiny(family)
    before = snapshot(model)
    with pytest.raises(UnsupportedModelError) as caught:
        tokenprune.patch(model, [ToMe(r=1), DivPrune(keep=0.5)])
    assert all(part in str(caught.value) for part in (family, reason, "llava, paligemma"))
    assert snapshot(model) == before


@pytest.mark.parametrize("family", ONE_TO_ONE)
def test_handing_on_fewer_tokens_than_the_text_has_places_is_refused(family):
    model = tiny(family)
    before = snapshot(model)
    with pytest.raises(OptionError, match=r"restore=False.*placeholder for every patch.*restore=True"):
        tokenprune.patch(model, ToMe(r=1, restore=False))
    assert snapshot(model) == before


@settings(deadline=None, max_examples=60, database=None)
@given(st.lists(st.integers(0, 4), min_size=1, max_size=20), st.sampled_from([torch.float32, torch.bfloat16]))
def test_equal_tokens_are_found_by_their_first_and_middle_one(groups, dtype):
    table = torch.randn(5, 7, generator=torch.Generator().manual_seed(0)).to(dtype)
    x = table[torch.tensor([groups, groups[::-1]])]
    found = equal_tokens(x.transpose(0, 1).contiguous().transpose(0, 1))
    for row, order in enumerate((groups, groups[::-1])):
        for i, group in enumerate(order):
            members = [j for j, other in enumerate(order) if other == group]
            assert found.first[row, i] == members[0]
            assert found.middle[row, i] == members[(len(members) - 1) // 2]


@pytest.mark.parametrize("x", [torch.zeros(3, 4), torch.zeros(1, 2, 3, dtype=torch.int64)])
def test_other_shapes_and_dtypes_are_refused(x: Any):
    with pytest.raises(InputError, match="equal_tokens needs x"):
        equal_tokens(x)
