"""What dropping tokens between decoder layers saves of a prefill, beside what its arithmetic saves.

The model of `test_prefill.py`: random weights, fp32 on a CPU, image features given. A prompt is text, images of 150
tokens each (one image of 600 or 3,000 for the image preset), text. Presets are AIM's published ones, relative to the
depth of twelve layers; "prune" is the image preset without merging, where importance has all tokens to rank.

Every row times the unpatched and the patched prefill in turn, in one process; a ratio is the median of the ratios
within a round. `flops_ratio` counts everything that runs: layers, matching, merging, importance. `layer_flops_ratio`
counts the decoder's layers alone, by formula: what would be had if choosing cost nothing. Both count the pairs of
queries and keys that causal attention looks at, since fused kernels leave the others out; `square_flops_ratio` counts
all pairs, as is the custom, which makes the unpruned model's arithmetic a quarter more than it is at 3,000 tokens.

"ideal" is put together from the unpatched model: for each layer a twelfth of its prefill of as many tokens as that
layer sees. Short products are slower by the operation, which no method can help. The lengths of the caches are checked
against the schedule.
"""

from collections.abc import Callable
from statistics import fmean
from typing import Any

import pytest
import torch
from test_prefill import DEVICE, DTYPE, IMAGE, SHAPE, TEXT, Prompt, forward, prefill, ratio, summary, twin
from test_prefill import dense as dense  # a fixture
from torch import nn

import tokenprune
from tokenprune.flops import decoder_flops_g
from tokenprune.measure import Timing, alternate, flops_g, kv_mib
from tokenprune.schedule import share

FRAME = 150
REPEATS = {600: 9, 3000: 5}
PRESETS: dict[str, Callable[..., tokenprune.AIM]] = {
    "image": tokenprune.AIM,
    "video": tokenprune.AIM.for_video,
    "prune": lambda **options: tokenprune.AIM(merge=None, **options),
}


def make_frames(n_visual: int, size: int) -> Prompt:
    """One row: text, images of `size` tokens, text."""
    ids = torch.randint(IMAGE + 1, 1000, (1, n_visual + TEXT))
    ids[:, TEXT // 2 : TEXT // 2 + n_visual] = IMAGE
    count, width = n_visual // size, SHAPE["hidden_size"]
    features = tuple(torch.randn(size, width, device=DEVICE, dtype=DTYPE) for _ in range(count))
    return Prompt(ids.to(DEVICE), torch.ones_like(ids).to(DEVICE), features)


def scheduled(method: tokenprune.AIM, sizes: list[int], n_layers: int) -> list[int]:
    """Tokens that each layer is to see."""
    entered = sum(method.budget(size).high for size in sizes)
    lengths = [TEXT + entered] * n_layers
    for stage in method.schedule(n_layers):
        lengths[stage.layer + 1 :] = [TEXT + share(stage.keep, entered)] * (n_layers - stage.layer - 1)
    return lengths


def unseen_flops_g(lengths: list[int]) -> float:
    """What counting all pairs of queries and keys counts more than causal attention looks at."""
    return sum(2 * length * (length - 1) * SHAPE["hidden_size"] for length in lengths) / 1e9


def stored(cache: Any) -> list[int]:
    """Keys that each layer of a cache holds."""
    return [layer.keys.shape[2] for layer in cache.layers]


@pytest.mark.parametrize("importance", ["pagerank", "column_sum", "last_query"])
@pytest.mark.parametrize("n_visual", [600, 3000])
@pytest.mark.parametrize("preset", PRESETS)
@torch.inference_mode()
def test_aim(dense: nn.Module, record: Callable[..., None], preset: str, n_visual: int, importance: str) -> None:
    """Dense and pruned prefill of one prompt."""
    sizes = [FRAME] * (n_visual // FRAME) if preset == "video" else [n_visual]
    prompt, patched, method = make_frames(n_visual, sizes[0]), twin(dense), PRESETS[preset](importance=importance)
    session = tokenprune.patch(patched, method)
    lengths = scheduled(method, sizes, SHAPE["num_hidden_layers"])
    whole, short = prefill(dense, prompt).past_key_values, prefill(patched, prompt).past_key_values
    assert stored(short) == lengths
    assert session.traces[-1].n_out == (0,)
    calls = {"dense": lambda: prefill(dense, prompt), "pruned": lambda: prefill(patched, prompt)}
    all_lengths = {"dense": [TEXT + n_visual] * len(lengths), "pruned": lengths}
    unseen = {name: unseen_flops_g(some) for name, some in all_lengths.items()}
    square = {name: flops_g(call) for name, call in calls.items()}
    counted = {name: square[name] - unseen[name] for name in calls}
    decoder: Any = dense.get_decoder()  # type: ignore[operator]
    layers = {
        name: (decoder_flops_g(decoder, rows=1, lengths=some) or 0) - unseen[name] for name, some in all_lengths.items()
    }
    ratios = {
        name: round(flops["dense"] / flops["pruned"], 4)
        for name, flops in (("flops", counted), ("layer_flops", layers), ("square_flops", square))
    }
    for length in sorted(set(lengths)):
        inputs = {"inputs_embeds": torch.randn(1, length, SHAPE["hidden_size"], device=DEVICE, dtype=DTYPE)}
        calls[str(length)] = lambda inputs=inputs: forward(dense, inputs)
    times = alternate(calls, repeats=REPEATS[n_visual], device=DEVICE)
    steps = zip(*(times[str(length)].samples for length in lengths), strict=True)
    times = {name: times[name] for name in ("dense", "pruned")} | {"ideal": Timing(tuple(map(fmean, steps)))}
    measured = ratio(times["dense"], times["pruned"])
    target = "layer_flops" if importance == "last_query" else "flops"
    row = {
        "what": "prefill",
        "preset": preset,
        "importance": importance,
        "visual_tokens": n_visual,
        "text_tokens": TEXT,
        "entered": lengths[0] - TEXT,
        "lengths": lengths,
        "dtype": str(DTYPE).removeprefix("torch."),
        "repeats": REPEATS[n_visual],
        **summary(times),
        "selection_ms": round(sum(trace.overhead_ms for trace in session.traces), 3),
        "dense_flops_g": round(counted["dense"], 3),
        "pruned_flops_g": round(counted["pruned"], 3),
        "dense_over_pruned": measured,
        "pruned_over_ideal": ratio(times["pruned"], times["ideal"]),
        **{f"{name}_ratio": value for name, value in ratios.items()},
        **{f"of_{name}_ratio": round(measured[1] / value, 4) for name, value in ratios.items()},
        "dense_kv_mib": round(kv_mib(whole), 3),
        "pruned_kv_mib": round(kv_mib(short), 3),
        "target": f"of_{target}_ratio >= 0.9",
        "met": measured[1] / ratios[target] >= 0.9,
    }
    record(calls["pruned"], row)
    session.remove()
