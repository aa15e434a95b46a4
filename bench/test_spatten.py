"""What SpAtten does to decoding: latency of a generated token, and the KV memory that is left.

A random decoder of text in the shape of `test_prefill.py`, fp32 on a CPU; generations of the patched and the paused
model in turn, in one process; a ratio is the median of the ratios within a round. The cache is looked through every 16
tokens, all layers' importance is followed in every step, so what is dropped has to pay for that first.
"""

from collections.abc import Callable
from contextlib import nullcontext
from typing import Any

import pytest
import torch
from measuring import Timing
from test_prefill import CUDA, DEVICE, DTYPE, SHAPE, ratio
from torch import nn
from transformers import AutoModelForCausalLM, LlamaConfig

import tokenprune
from tokenprune.report.generation import inspect_generation, time_generation
from tokenprune.report.measure import in_turn

NEW_TOKENS, REPEATS = 17, 5
# What is asked of SpAtten, and what decoding may at most take of the unpruned time, where something was promised.
KINDS: dict[str, tuple[dict[str, Any], float | None]] = {
    "persistent": ({"tokens": 0.5}, 1.0),
    "per_step": ({"tokens": 0.5, "kv": "per_step"}, None),
    "values": ({"tokens": 0.5, "values": 0.25}, None),
    "quantize": ({"tokens": 0.5, "values": 0.25, "quantize": "4+4"}, None),
}


# Tokens of the prompt, and what is asked.
CASES = [(8192 if CUDA else 1024, kind) for kind in KINDS] + [(32768 if CUDA else 4096, "persistent")]


@pytest.fixture(scope="module")
def model() -> nn.Module:
    """A decoder of text."""
    config = LlamaConfig(vocab_size=4096, max_position_embeddings=65536, pad_token_id=0, **SHAPE)
    torch.manual_seed(0)
    with torch.device(DEVICE):
        found: nn.Module = AutoModelForCausalLM.from_config(config, dtype=DTYPE).eval()
    return found


@pytest.mark.parametrize(("length", "kind"), CASES)
@torch.inference_mode()
def test_spatten(model: nn.Module, record: Callable[..., None], length: int, kind: str) -> None:
    """Decoding behind one prompt."""
    options, target = KINDS[kind]
    inputs = {"input_ids": torch.randint(1, 4000, (1, length), device=DEVICE)}
    with tokenprune.patch(model, "spatten", protect_text=False, **options) as session:

        def run(_side: str = "pruned") -> float:
            return time_generation(model, inputs, max_new_tokens=NEW_TOKENS)["decode_latency_ms"]

        pruned = inspect_generation(model, inputs, max_new_tokens=NEW_TOKENS)
        with session.pause():
            whole = inspect_generation(model, inputs, max_new_tokens=NEW_TOKENS)
        sides = {"dense": session.pause, "pruned": nullcontext}
        samples = in_turn(sides, run, repeats=REPEATS, label=kind)
        times = {side: Timing(tuple(found)) for side, found in samples.items()}
        traffic = session.traffic
        measured = ratio(times["pruned"], times["dense"])
        row = {
            "what": "decoding of one token",
            "kind": kind,
            "options": options,
            "prompt_tokens": length,
            "new_tokens": NEW_TOKENS,
            "dtype": str(DTYPE).removeprefix("torch."),
            "repeats": REPEATS,
            **{f"{side}_decode_latency_ms": round(time.median, 3) for side, time in times.items()},
            "pruned_over_dense": measured,
            "dense_kv_mib": round(whole.amounts["kv_mib"], 3),
            "pruned_kv_mib": round(pruned.amounts["kv_mib"], 3),
            "bytes_read": None if traffic is None else round(traffic.read / traffic.dense, 4),
        }
        if target is not None:
            row |= {"target": f"pruned_over_dense <= {target:g}", "met": measured[1] <= target}
        record(run, row)
