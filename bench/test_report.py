"""Whether the measured report can be believed: its ratios against those of a stopwatch outside of it.

Two stopwatches. One stands around `model.generate` while the report runs: the same calls, timed from outside; it has to
agree within 5 %. The other one runs the same prompt again, dense and pruned in turn, without the report; it is noted
beside it, and differs by what the machine does in between.
"""

import time
from collections.abc import Callable
from typing import Any

import torch
from measuring import Timing, alternate
from torch import nn
from transformers import AutoModelForImageTextToText, LlavaConfig
from upstream import FEATURES, encoder_output, with_features

import tokenprune
from tokenprune.report.generation import GREEDY
from tokenprune.report.measure import synchronise

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
DTYPE = torch.bfloat16 if DEVICE.type == "cuda" else torch.float32
IMAGE, N_VISUAL, N_TEXT, WIDTH = 5, 576, 48, 512
REPEATS, NEW_TOKENS, TOLERANCE = 5, 8, 0.05


def make_model() -> nn.Module:
    """A random LLaVA whose decoder has about 30 M parameters."""
    vision = {"hidden_size": 32, "intermediate_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2}
    sizes = {"hidden_size": WIDTH, "intermediate_size": 1408, "num_hidden_layers": 8, "num_attention_heads": 8}
    config = LlavaConfig(
        image_token_index=IMAGE,
        vision_config={"model_type": "clip_vision_model", **vision},
        text_config={"model_type": "llama", "vocab_size": 4096, "pad_token_id": 0, **sizes},
    )
    torch.manual_seed(0)
    with torch.device(DEVICE):
        model: nn.Module = AutoModelForImageTextToText.from_config(config, dtype=DTYPE).eval()
    return model


def make_inputs() -> dict[str, Any]:
    """A prompt with one image, its features given."""
    ids = torch.randint(IMAGE + 1, 1000, (1, N_VISUAL + N_TEXT))
    ids[:, N_TEXT // 2 : N_TEXT // 2 + N_VISUAL] = IMAGE
    features = torch.randn(N_VISUAL, WIDTH, device=DEVICE, dtype=DTYPE)
    return {
        "input_ids": ids.to(DEVICE),
        "attention_mask": torch.ones_like(ids).to(DEVICE),
        **with_features(encoder_output([features])),
    }


class Stopwatch:
    """Stands in for a model's `generate` and times every call of it."""

    def __init__(self, generate: Callable[..., Any]) -> None:
        """Time `generate`."""
        self.generate, self.samples_ms = generate, list[float]()

    def __call__(self, **kwargs: Any) -> Any:
        """Generate."""
        synchronise(DEVICE)
        started = time.perf_counter()
        result = self.generate(**kwargs)
        synchronise(DEVICE)
        self.samples_ms.append((time.perf_counter() - started) * 1e3)
        return result


def test_report(record: Callable[..., None]) -> None:
    """Dense over pruned, end to end."""
    model: Any = make_model()
    inputs = make_inputs()
    watch = Stopwatch(model.generate)
    with tokenprune.patch(model, "divprune", keep=0.25) as session:
        vars(model)["generate"] = watch
        try:
            report = session.report(inputs, max_new_tokens=NEW_TOKENS, repeats=REPEATS)
        finally:
            del vars(model)["generate"]
        dense_ms, pruned_ms = _sides(watch.samples_ms[2:])  # the first two runs look, they are not timed

        def run() -> Any:
            fresh = {**inputs, FEATURES: dict(inputs[FEATURES])}
            return model.generate(**fresh, **GREEDY, max_new_tokens=NEW_TOKENS)

        def run_dense() -> Any:
            with session.pause():
                return run()

        with torch.inference_mode():
            apart = alternate({"dense": run_dense, "pruned": run}, repeats=REPEATS, device=DEVICE)
    total = report.cost("total_latency_ms")
    inner, outer = total.dense / total.pruned, dense_ms.median / pruned_ms.median
    later = apart["dense"].median / apart["pruned"].median
    row = {
        "what": "dense over pruned, end to end: the report's and an outside stopwatch's",
        "method": "divprune",
        "visual_tokens": N_VISUAL,
        "text_tokens": N_TEXT,
        "new_tokens": NEW_TOKENS,
        "repeats": REPEATS,
        "report": round(inner, 4),
        "stopwatch_same_calls": round(outer, 4),
        "stopwatch_other_calls": round(later, 4),
        "difference_same_calls": round(inner / outer - 1, 4),
        "difference_other_calls": round(inner / later - 1, 4),
        "target": f"difference_same_calls within {TOLERANCE}",
        "met": abs(inner / outer - 1) <= TOLERANCE,
    }
    record(run, row)


def _sides(samples: list[float]) -> tuple[Timing, Timing]:
    """Samples of rounds that run dense and pruned in turn, every other round backwards."""
    pairs = [samples[i : i + 2] if (i // 2) % 2 == 0 else samples[i : i + 2][::-1] for i in range(0, len(samples), 2)]
    dense_ms, pruned_ms = zip(*pairs, strict=True)
    return Timing(tuple(dense_ms)), Timing(tuple(pruned_ms))
