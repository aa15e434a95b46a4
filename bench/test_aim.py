"""What dropping tokens between decoder layers saves of a prefill, beside what its arithmetic saves.

The model of `test_prefill.py` with 24 layers (on CUDA as many as there): random weights, fp32 on a CPU, image features
given. A prompt is text, images of 150 tokens each (one image of 600 or 3,000 for the image preset), text. Presets are
AIM's published ones, relative to the depth; "prune" is the image preset without merging, where importance has all
tokens to rank.

All variants of one case run in turn with the unpatched model, in one process; a ratio is the median of the ratios
within a round. `flops_ratio` counts everything that runs: layers, matching, merging, importance. `layer_flops_ratio`
counts the decoder's layers alone, by formula: what would be saved if choosing cost nothing. Both count the pairs of
queries and keys that causal attention looks at, since fused kernels leave the others out; `square_flops_ratio` counts
all pairs, as is the custom, which makes the unpruned model's arithmetic a quarter more than it is at 3,000 tokens.

"ideal" is put together from the unpatched model: for each layer its share of a whole prefill of as many tokens as that
layer sees. Short products are slower by the operation, which no method can help: a single row of 600 tokens comes down
to products of 48 to 123 tokens, and more rows make them longer. The lengths of the caches are checked against the
schedule.
"""

from collections.abc import Callable
from statistics import fmean
from typing import Any

import pytest
import torch
from decoder_flops import decoder_flops_g
from measuring import Timing, alternate, flops_g, kv_mib
from test_prefill import CUDA, DEVICE, DTYPE, IMAGE, SHAPE, TEXT, Prompt, forward, make_model, prefill, ratio, summary
from test_prefill import twin as twin_of
from torch import nn
from upstream import cache_of

import tokenprune
from tokenprune.schedule import share

N_LAYERS = SHAPE["num_hidden_layers"] if CUDA else 24
FRAME = 150
IMPORTANCE = ("pagerank", "column_sum", "last_query")
PRESETS: dict[str, Callable[..., tokenprune.AIM]] = {
    "image": tokenprune.AIM,
    "video": tokenprune.AIM.for_video,
    "prune": lambda **options: tokenprune.AIM(merge=None, **options),
}
# Visual tokens of a row, rows, presets, repeats on a CPU.
CASES = [(600, 1, ("image", "video", "prune"), 3), (600, 4, ("image", "video"), 2), (3000, 1, ("image", "video"), 2)]


@pytest.fixture(scope="module")
def dense() -> nn.Module:
    """The unpatched model."""
    return make_model(n_layers=N_LAYERS)


def make_frames(n_visual: int, size: int, n_rows: int) -> Prompt:
    """Rows of text, images of `size` tokens, text."""
    ids = torch.randint(IMAGE + 1, 1000, (n_rows, n_visual + TEXT))
    ids[:, TEXT // 2 : TEXT // 2 + n_visual] = IMAGE
    count, width = n_rows * n_visual // size, SHAPE["hidden_size"]
    features = tuple(torch.randn(size, width, device=DEVICE, dtype=DTYPE) for _ in range(count))
    return Prompt(ids.to(DEVICE), torch.ones_like(ids).to(DEVICE), features)


def scheduled(method: tokenprune.AIM, sizes: list[int]) -> list[int]:
    """Tokens of a row that each layer is to see."""
    entered = sum(method.budget(size).high for size in sizes)
    lengths = [TEXT + entered] * N_LAYERS
    for stage in method.schedule(N_LAYERS):
        lengths[stage.layer + 1 :] = [TEXT + share(stage.keep, entered)] * (N_LAYERS - stage.layer - 1)
    return lengths


def unseen_flops_g(lengths: list[int], n_rows: int) -> float:
    """What counting all pairs of queries and keys counts more than causal attention looks at."""
    return n_rows * sum(2 * length * (length - 1) * SHAPE["hidden_size"] for length in lengths) / 1e9


def stored(cache: Any) -> list[int]:
    """Keys that each layer of a cache holds."""
    return [layer.keys.shape[2] for layer in cache.layers]


class Variant:
    """One preset with one importance, on a prompt of its own.

    Raises:
        AssertionError: the lengths of the cache are not those of the schedule.
    """

    def __init__(self, dense: nn.Module, preset: str, importance: str, n_visual: int, n_rows: int) -> None:
        """Patch a twin of `dense` and look at one prefill."""
        sizes = [FRAME] * (n_visual // FRAME) if preset == "video" else [n_visual]
        method = PRESETS[preset](importance=importance)
        self.preset, self.importance, self.lengths = preset, importance, scheduled(method, sizes)
        self.prompt, self.model = make_frames(n_visual, sizes[0], n_rows), twin_of(dense)
        self.session = tokenprune.patch(self.model, method)
        cache = cache_of(self.run())
        assert stored(cache) == self.lengths
        assert self.session.traces[-1].n_out == (0,) * n_rows
        self.kv_mib = kv_mib(cache)
        self.selection_ms = sum(trace.overhead_ms for trace in self.session.traces)
        self.square_flops_g = flops_g(self.run)

    def run(self) -> Any:
        """One prefill."""
        return prefill(self.model, self.prompt)


@pytest.mark.parametrize(("n_visual", "n_rows", "presets", "repeats"), CASES, ids=[f"{a}-{b}" for a, b, *_ in CASES])
@torch.inference_mode()
def test_aim(
    dense: nn.Module, record: Callable[..., None], n_visual: int, n_rows: int, presets: tuple[str, ...], repeats: int
) -> None:
    """Dense and pruned prefill of one prompt."""
    variants = [Variant(dense, preset, one, n_visual, n_rows) for preset in presets for one in IMPORTANCE]
    whole, repeats = make_frames(n_visual, n_visual, n_rows), 9 if CUDA else repeats
    calls: dict[Any, Callable[[], object]] = {"dense": lambda: prefill(dense, whole)}
    calls |= {variant: variant.run for variant in variants}
    for length in sorted({length for variant in variants for length in variant.lengths}):
        embeds = torch.randn(n_rows, length, SHAPE["hidden_size"], device=DEVICE, dtype=DTYPE)
        calls[length] = lambda embeds=embeds: forward(dense, {"inputs_embeds": embeds})
    times = alternate(calls, repeats=repeats, warmup=int(CUDA), device=DEVICE)  # on a CPU they are warm by now
    dense_kv_mib, dense_flops_g = kv_mib(cache_of(prefill(dense, whole))), flops_g(calls["dense"])
    rows = []
    for variant in variants:
        steps = zip(*(times[length].samples for length in variant.lengths), strict=True)
        taken = {"dense": times["dense"], "pruned": times[variant], "ideal": Timing(tuple(map(fmean, steps)))}
        measured = ratio(taken["dense"], taken["pruned"])
        figures = arithmetic(dense, variant, dense_flops_g, n_visual, n_rows)
        target = "layer_flops" if variant.importance == "last_query" else "flops"
        row = {
            "what": "prefill",
            "preset": variant.preset,
            "importance": variant.importance,
            "visual_tokens": n_visual,
            "text_tokens": TEXT,
            "rows": n_rows,
            "n_layers": N_LAYERS,
            "entered": variant.lengths[0] - TEXT,
            "lengths": variant.lengths,
            "dtype": str(DTYPE).removeprefix("torch."),
            "repeats": repeats,
            **summary(taken),
            "selection_ms": round(variant.selection_ms, 3),
            "dense_over_pruned": measured,
            "pruned_over_ideal": ratio(taken["pruned"], taken["ideal"]),
            **figures,
            **{f"of_{name}": round(measured[1] / value, 4) for name, value in figures.items() if "ratio" in name},
            "dense_kv_mib": round(dense_kv_mib, 3),
            "pruned_kv_mib": round(variant.kv_mib, 3),
        }
        if variant.preset != "prune":
            row |= {"target": f"of_{target}_ratio >= 0.9", "met": row[f"of_{target}_ratio"] >= 0.9}
        rows.append(row)
        variant.session.remove()
    record(variants[0].run, *rows)


def arithmetic(dense: Any, variant: Variant, square_g: float, n_visual: int, n_rows: int) -> dict[str, float]:
    """GFLOPs of both sides, and their ratios counted in three ways."""
    square = {"dense": square_g, "pruned": variant.square_flops_g}
    lengths = {"dense": [TEXT + n_visual] * N_LAYERS, "pruned": variant.lengths}
    unseen = {side: unseen_flops_g(some, n_rows) for side, some in lengths.items()}
    decoder = dense.get_decoder()
    counted = {side: square[side] - unseen[side] for side in square}
    layers = {
        side: (decoder_flops_g(decoder, rows=n_rows, lengths=some) or 0) - unseen[side]
        for side, some in lengths.items()
    }
    ratios = {"flops_ratio": counted, "layer_flops_ratio": layers, "square_flops_ratio": square}
    return {f"{side}_flops_g": round(value, 3) for side, value in counted.items()} | {
        name: round(flops["dense"] / flops["pruned"], 4) for name, flops in ratios.items()
    }
