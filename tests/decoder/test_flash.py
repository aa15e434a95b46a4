"""Flash attention without a GPU: a function in torch that does with its arguments what transformers' one does.

It unpads rows by a 2-D mask, takes several sequences packed into a row where positions of one row do not grow by one
(then a key is seen by queries of its own sequence alone), and is causal from the bottom right otherwise. What it was
given is recorded.
"""

import copy
from typing import Any

import pytest
import torch
from families import batch, fresh, generate, tiny
from oracle import check_steps
from torch import Tensor
from transformers import AttentionInterface
from transformers.masking_utils import AttentionMaskInterface, flash_attention_mask
from upstream import POSITIONS, cache_of, with_cache

import tokenprune

NAME = "flash_in_torch"
GIVEN: list[dict[str, Any]] = []


def attend(query: Tensor, key: Tensor, value: Tensor, seen: Tensor, scale: float) -> Tensor:
    weights = (query @ key.transpose(-1, -2) * scale).masked_fill(~seen, -torch.inf).softmax(-1).nan_to_num(0.0)
    return weights @ value


def has_gaps(positions: Tensor) -> bool:
    return bool((positions - positions.min() - torch.arange(len(positions))).any())


def flash(module: Any, query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None, **kwargs: Any) -> Any:
    positions = kwargs.get(POSITIONS)
    GIVEN.append({"positions": positions, "mask": mask, "rows": len(query), "queries": query.shape[2]})
    assert mask is None or mask.ndim == 2
    groups = query.shape[1] // key.shape[1]
    key, value = key.repeat_interleave(groups, 1), value.repeat_interleave(groups, 1)
    n_queries, n_keys = query.shape[2], key.shape[2]
    row, column = torch.arange(n_queries)[:, None] + n_keys - n_queries, torch.arange(n_keys)
    seen = (column <= row)[None, None].expand(len(query), 1, -1, -1)
    if (window := kwargs.get("sliding_window")) is not None:
        seen = seen & (row - column < window)
    if mask is not None:
        seen = seen & mask[:, None, None, -n_keys:].bool()
    elif positions is not None and len(query) == 1 and n_queries > 1 and has_gaps(positions[0]):  # packed: varlen
        parts = (positions[0].diff() != 1).cumsum(0)
        parts = torch.cat([parts.new_zeros(1), parts])
        assert n_keys == n_queries, "lengths of packed sequences are those of the queries, and there are more keys"
        seen = seen & (parts[:, None] == parts[None, :])
    output = attend(query, key, value, seen, kwargs.get("scaling") or query.shape[-1] ** -0.5)
    return output.transpose(1, 2).contiguous(), None


AttentionInterface.register(NAME, flash)
AttentionMaskInterface.register(NAME, flash_attention_mask)


def with_flash(family: str) -> Any:
    model = tiny(family)
    for module in model.get_decoder().modules():
        if (config := getattr(module, "config", None)) is not None:
            config._attn_implementation = NAME
    model.get_decoder().config._attn_implementation = NAME
    return model


METHODS = (
    ("divprune", {"keep": 0.5}),
    ("fastv", {"keep": 0.5, "layer": 1}),
    (tokenprune.SpAtten(tokens=(1.0, 0.5, 0.5, 0.5)), {}),
)
ROW = ((3, (3, 4), 4, (2, 2), 3),)


def recorded(call: Any) -> list[dict[str, Any]]:
    GIVEN.clear()
    call()
    return list(GIVEN)


@pytest.mark.parametrize("family", ["llava", "qwen2_5_vl", "qwen3_vl", "mistral3"])
@pytest.mark.parametrize("rows", [1, 3])
def test_flash_generates_what_a_dense_run_on_the_kept_tokens_gives(family: str, rows: int) -> None:
    dense = tiny(family)
    model = with_flash(family)
    session = tokenprune.patch(model, "divprune", keep=0.5)
    prompt = batch(family, ROW) if rows == 1 else batch(family)
    out = generate(model, prompt.inputs, 4)
    assert GIVEN
    check_steps(dense, family, out, session.traces, prompt, 4)


@pytest.mark.parametrize(("method", "options"), METHODS)
def test_no_packed_sequences_are_read_out_of_gaps(method: Any, options: dict[str, Any]) -> None:
    model = with_flash("llava")
    tokenprune.patch(model, method, **options)
    prompt = batch("llava", ROW)
    calls = recorded(lambda: generate(model, prompt.inputs, 3))
    assert calls
    assert all(call["positions"] is None and call["mask"] is None for call in calls)
    assert {call["queries"] for call in calls} >= {1}
    assert len({call["queries"] for call in calls}) > 1


@pytest.mark.parametrize(("method", "options"), METHODS)
def test_flash_agrees_with_sdpa_in_a_second_turn_with_an_image(method: Any, options: dict[str, Any]) -> None:
    logits = []
    for make in (tiny, with_flash):
        model = make("llava")
        tokenprune.patch(model, method, **options)
        first = batch("llava", ROW)
        out = generate(model, first.inputs, 3, use_cache=True)
        second = batch("llava", ((2, (2, 2), 4),), seeds=(5,))
        ids = torch.cat([out.sequences, second.inputs["input_ids"]], dim=1)
        turn = {**second.inputs, "input_ids": ids, "attention_mask": torch.ones_like(ids)}
        again = generate(model, turn, 3, **with_cache(cache_of(out)))
        logits.append(torch.stack([*out.logits, *again.logits]))
    torch.testing.assert_close(*logits, atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize(("method", "options"), METHODS)
@pytest.mark.parametrize("masked", [False, True])
def test_packed_sequences_are_refused_with_a_cache_too(method: Any, options: dict[str, Any], masked: bool) -> None:
    """Whatever the cache, flash attention takes positions that start again for another sequence."""
    model = with_flash("llava")
    tokenprune.patch(model, method, **options)
    inputs = fresh(batch("llava", ROW).inputs)
    inputs[POSITIONS] = torch.arange(inputs["input_ids"].shape[1])[None] % 20
    if not masked:
        del inputs["attention_mask"]
    with pytest.raises(tokenprune.InputError, match="jump from 19 to 0"), torch.no_grad():
        model(**inputs)


def test_an_unpatched_model_keeps_its_positions() -> None:
    calls = recorded(lambda: generate(with_flash("llava"), batch("llava", ROW).inputs, 2))
    assert any(call["positions"] is not None for call in calls)


def test_attention_set_to_flash_after_patching_is_answered() -> None:
    model = copy.deepcopy(tiny("llava"))
    tokenprune.patch(model, "divprune", keep=0.5)
    model.get_decoder().config._attn_implementation = NAME
    with pytest.raises(tokenprune.InputError, match="set_attn_implementation"):
        generate(model, batch("llava", ROW).inputs, 2)
