"""What a decoding step of a patched model costs in Python: 32 layers so thin that computing takes next to nothing.

One thread; steps of the unpruned model and of a copy for each method in turn, each behind its own cache of the same
prompt. What a method adds is the median, over rounds, of its step less the unpruned step of that round.
"""

import copy
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from measuring import Timing, alternate
from test_prefill import DEVICE, make_model, make_prompt, prefill
from upstream import cache_of, with_cache

import tokenprune

N_LAYERS, REPEATS, STEPS = 32, 30, 4
THIN = {"hidden_size": 64, "intermediate_size": 128, "num_attention_heads": 8, "num_key_value_heads": 8}
# What is asked for, and what it may add to an unpruned step in ms, where something was promised.
KINDS: dict[str, tuple[str, dict[str, Any], float | None]] = {
    "divprune": ("divprune", {"keep": 0.25}, None),
    "fastv": ("fastv", {"keep": 0.25}, None),
    "aim": ("aim", {}, None),
    "tokens": ("spatten", {"tokens": 0.6, "protect_text": False}, 1.0),
    "heads": ("spatten", {"heads": 0.6}, 4.0),
    "values": ("spatten", {"values": 0.5}, None),
    "quantize": ("spatten", {"quantize": "4+4"}, None),
    "per_step": ("spatten", {"tokens": 0.6, "kv": "per_step", "protect_text": False}, 3.0),
}


@pytest.fixture
def one_thread() -> Iterator[None]:
    """One thread of torch, so that what is measured is Python."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


def stepper(model: Any) -> Callable[[], None]:
    """A function that runs `STEPS` decoding steps of `model` behind a prompt of its own."""
    cache = cache_of(prefill(model, make_prompt(64, width=THIN["hidden_size"])))
    token = torch.full((1, 1), 7, device=DEVICE)

    def step() -> None:
        for _ in range(STEPS):
            model(input_ids=token, **with_cache(cache), logits_to_keep=1)

    return step


@pytest.mark.usefixtures("one_thread")
@torch.inference_mode()
def test_step(record: Callable[..., None]) -> None:
    """Every method beside the unpruned model."""
    dense = make_model(n_layers=N_LAYERS, **THIN)
    steps = {"dense": stepper(dense)}
    for kind, (method, options, _) in KINDS.items():
        model = copy.deepcopy(dense)
        tokenprune.patch(model, method, **options)
        steps[kind] = stepper(model)
    times = alternate(steps, repeats=REPEATS, device=DEVICE)
    rows = []
    for kind, (_, options, target) in KINDS.items():
        added = Timing(tuple(a - b for a, b in zip(times[kind].samples, times["dense"].samples, strict=True)))
        quantiles = [round(added.quantile(fraction) / STEPS, 3) for fraction in (0.2, 0.5, 0.8)]
        rows.append(
            {
                "what": "added to a decoding step",
                "kind": kind,
                "options": options,
                "layers": N_LAYERS,
                "steps": STEPS,
                "repeats": REPEATS,
                "dense_latency_ms": round(times["dense"].median / STEPS, 3),
                "added_latency_ms": quantiles,
                **({} if target is None else {"target_ms": target, "met": quantiles[1] <= target}),
            }
        )
    record(steps["dense"], *rows)
