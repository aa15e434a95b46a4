"""What pruning costs beside the ideal: the same model's unpatched forward over nothing but the tokens that were kept.

Random weights in the shape of LLaVA's decoder: about 100 M parameters in fp32 on a CPU, the shape of a 7B model in bf16
on CUDA. The image features are given, so the vision encoder, which pruning before the decoder does not touch, blurs no
ratio. All candidates of one row run in turn, in one process; every ratio is the median of the ratios within a round.

Candidates of a prefill:
    dense     unpatched, the whole prompt.
    ideal     unpatched, embeddings and positions of the kept tokens only.
    pruned    patched with divprune.
    given     patched with a method that returns the same tokens without choosing: pruning without the selection.

Candidates of a decode step: the patched model on its pruned cache, and the unpatched one on a cache of the same
physical length that holds the same keys and values (in the ragged batch with padded slots and a mask that leaves them
out).
"""

import copy
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, ClassVar

import pytest
import torch
from measuring import Timing, alternate
from torch import Tensor, nn
from transformers import AutoModelForImageTextToText, DynamicCache, LlavaConfig
from upstream import cache_of, encoder_output, with_cache, with_features

import tokenprune
from tokenprune.methods.base import Method
from tokenprune.reduction import Keep
from tokenprune.signals import Budget, Signals

CUDA = torch.cuda.is_available()
DEVICE = torch.device("cuda" if CUDA else "cpu")
DTYPE = torch.bfloat16 if CUDA else torch.float32
IMAGE, TEXT = 5, 48
SHAPE = (
    {"hidden_size": 4096, "intermediate_size": 11008, "num_hidden_layers": 32, "num_attention_heads": 32}
    if CUDA
    else {"hidden_size": 768, "intermediate_size": 2048, "num_hidden_layers": 12, "num_attention_heads": 12}
)
REPEATS = {576: 9, 2880: 4}
STEPS = 4


@dataclass(frozen=True, kw_only=True)
class Given(Method):
    """Returns tokens that were chosen before."""

    name: ClassVar[str] = "given"
    index: Tensor = field(repr=False, compare=False)

    def before_llm(self, signals: Signals, budget: Budget) -> Keep:
        """The tokens it was made with, `[1, M]`."""
        return Keep(self.index)


@dataclass(frozen=True)
class Prompt:
    """A left-padded batch with one image in each row.

    Attributes:
        ids: `[B, L]`.
        mask: `[B, L]`, 0 on padding.
        features: `[N, D]` of each image.
    """

    ids: Tensor
    mask: Tensor
    features: tuple[Tensor, ...]

    def inputs(self) -> dict[str, Any]:
        """Keyword arguments of the model's forward, with a new cache."""
        mask = None if bool(self.mask.all()) else self.mask  # as generate() does
        return {"input_ids": self.ids, "attention_mask": mask, **with_features(encoder_output(list(self.features)))}


def make_prompt(*sizes: int, width: int = SHAPE["hidden_size"]) -> Prompt:
    """One row for each size: text, an image of so many tokens of that width, text."""
    length = max(sizes) + TEXT
    ids = torch.randint(IMAGE + 1, 1000, (len(sizes), length))
    mask = torch.ones(len(sizes), length, dtype=torch.int64)
    for row, size in enumerate(sizes):
        start = length - TEXT // 2 - size
        ids[row, start : start + size] = IMAGE
        ids[row, : start - TEXT // 2] = mask[row, : start - TEXT // 2] = 0
    features = tuple(torch.randn(size, width, device=DEVICE, dtype=DTYPE) for size in sizes)
    return Prompt(ids.to(DEVICE), mask.to(DEVICE), features)


def make_model(*, n_layers: int = SHAPE["num_hidden_layers"], **shape: int) -> nn.Module:
    """A model with random weights; `shape` are fields of the decoder's config."""
    vision = {"hidden_size": 32, "intermediate_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2}
    text = {"vocab_size": 4096, "max_position_embeddings": 8192, "pad_token_id": 0, **SHAPE, **shape}
    config = LlavaConfig(
        image_token_index=IMAGE,
        vision_config={"model_type": "clip_vision_model", **vision},
        text_config={"model_type": "llama", **text, "num_hidden_layers": n_layers},
    )
    torch.manual_seed(0)
    with torch.device(DEVICE):
        model: nn.Module = AutoModelForImageTextToText.from_config(config, dtype=DTYPE).eval()
    return model


@pytest.fixture(scope="module")
def dense() -> nn.Module:
    """The unpatched model."""
    return make_model()


def twin(model: nn.Module) -> nn.Module:
    """A second model over the same weights."""
    shared = {id(parameter): parameter for parameter in model.parameters()}
    return copy.deepcopy(model, shared)


def new_cache(model: Any) -> DynamicCache:
    """A new KV cache."""
    return DynamicCache(config=model.config)


def prefill(model: Any, prompt: Prompt) -> Any:
    """Forward over a prompt as ``generate`` runs it."""
    positions = (prompt.mask.cumsum(-1) - 1).clamp(min=0)
    return model(
        **prompt.inputs(), position_ids=positions, **with_cache(new_cache(model)), use_cache=True, logits_to_keep=1
    )


def ideal_inputs(model: Any, prompt: Prompt, kept: list[Tensor]) -> dict[str, Any]:
    """Embeddings, positions and mask of the kept tokens alone; rows are padded on the left to the longest."""
    embeds = model.get_input_embeddings()(prompt.ids)
    embeds[prompt.ids == IMAGE] = torch.cat(prompt.features)
    positions = (prompt.mask.cumsum(-1) - 1).clamp(min=0)
    rows = []
    for row, visual in enumerate(kept):
        text = (prompt.mask[row].bool() & (prompt.ids[row] != IMAGE)).nonzero()[:, 0]
        rows.append(torch.cat([text, visual.to(text.device)]).sort().values)
    width = max(map(len, rows))
    index = torch.stack([nn.functional.pad(row, (width - len(row), 0)) for row in rows])
    mask = torch.stack([nn.functional.pad(torch.ones_like(row), (width - len(row), 0)) for row in rows])
    taken = embeds.gather(1, index[:, :, None].expand(-1, -1, embeds.shape[-1]))
    return {"inputs_embeds": taken, "position_ids": positions.gather(1, index), "attention_mask": mask}


def forward(model: Any, inputs: dict[str, Any]) -> Any:
    """Forward with a new cache."""
    return model(**inputs, **with_cache(new_cache(model)), use_cache=True, logits_to_keep=1)


def assert_same(actual: Any, expected: Any) -> None:
    """A wrong answer is not worth timing."""
    tolerance = 5e-2 if CUDA else 1e-4
    torch.testing.assert_close(actual.logits[:, -1], expected.logits[:, -1], atol=tolerance, rtol=tolerance)


def summary(times: dict[str, Timing]) -> dict[str, Any]:
    """Medians and 20 % / 80 % quantiles in milliseconds."""
    return {
        f"{name}_latency_ms": [round(time.quantile(fraction), 3) for fraction in (0.2, 0.5, 0.8)]
        for name, time in times.items()
    }


def ratio(upper: Timing, lower: Timing) -> list[float]:
    """20 % quantile, median and 80 % quantile of the ratios within one round."""
    ratios = upper.over(lower)
    return [round(ratios.quantile(fraction), 4) for fraction in (0.2, 0.5, 0.8)]


@pytest.mark.parametrize("keep", [0.25, 0.1])
@pytest.mark.parametrize("n_visual", [576, 2880])
@torch.inference_mode()
def test_prefill(dense: nn.Module, record: Callable[..., None], n_visual: int, keep: float) -> None:
    """Dense, pruned and ideal prefill of one prompt with one image."""
    prompt, patched, again = make_prompt(n_visual), twin(dense), twin(dense)
    session = tokenprune.patch(patched, "divprune", keep=keep)
    expected = prefill(patched, prompt)
    (trace,) = session.traces
    inputs = ideal_inputs(dense, prompt, list(trace.kept_indices))
    assert_same(expected, forward(dense, inputs))
    offset = int((prompt.ids[0] == IMAGE).nonzero()[0])
    index = (trace.kept_indices[0].to(DEVICE) - offset)[None]
    given = tokenprune.patch(again, Given(keep=trace.n_out[0], index=index))
    assert_same(prefill(again, prompt), expected)
    times = alternate(
        {
            "dense": lambda: prefill(dense, prompt),
            "ideal": lambda: forward(dense, inputs),
            "pruned": lambda: prefill(patched, prompt),
            "given": lambda: prefill(again, prompt),
        },
        repeats=REPEATS[n_visual],
        device=DEVICE,
    )
    with_selection = CUDA or n_visual == 576
    measured = ratio(times["pruned" if with_selection else "given"], times["ideal"])
    target = 1.03 if CUDA or n_visual == 2880 else 1.05
    row = {
        "what": "prefill",
        "visual_tokens": n_visual,
        "kept_tokens": trace.n_out[0],
        "text_tokens": TEXT,
        "keep": keep,
        "dtype": str(DTYPE).removeprefix("torch."),
        "repeats": REPEATS[n_visual],
        **summary(times),
        "dense_over_pruned": ratio(times["dense"], times["pruned"]),
        "pruned_over_ideal": ratio(times["pruned"], times["ideal"]),
        "given_over_ideal": ratio(times["given"], times["ideal"]),
        "selection_share": round(1 - 1 / times["pruned"].over(times["given"]).median, 4),
        "target": f"{'pruned' if with_selection else 'given'}_over_ideal <= {target}",
        "met": measured[1] <= target,
    }
    record(lambda: prefill(patched, prompt), row)
    given.remove()
    session.remove()


class Decoder:
    """Steps of greedy length 1 on a prefilled cache.

    Args:
        model: patched or not.
        cache: its prefilled cache.
        mask: 2-D mask that ``generate`` would hand on, `[B, length so far]`; None without padding.
        positions: position of the next token of each row, `[B, 1]`.
    """

    def __init__(self, model: Any, cache: Any, mask: Tensor | None, positions: Tensor) -> None:
        """Take over the state after a prefill."""
        self.model, self.cache, self.mask, self.positions = model, cache, mask, positions
        self.ids = torch.full_like(positions, 7)

    def step(self) -> Any:
        """One decode step; the cache grows by one."""
        if self.mask is not None:
            self.mask = torch.cat([self.mask, self.mask.new_ones(len(self.mask), 1)], dim=1)
        output = self.model(
            input_ids=self.ids,
            attention_mask=self.mask,
            position_ids=self.positions,
            **with_cache(self.cache),
            use_cache=True,
            logits_to_keep=1,
        )
        self.positions = self.positions + 1
        return output

    def steps(self) -> None:
        """Several steps, so that one sample is well above the clock's grain."""
        for _ in range(STEPS):
            self.step()


@pytest.mark.parametrize("sizes", [(576,), (576, 288, 144)], ids=["single", "ragged3"])
@torch.inference_mode()
def test_decode(dense: nn.Module, record: Callable[..., None], sizes: tuple[int, ...]) -> None:
    """One decode step on a pruned cache, patched against unpatched on a cache of the same physical length."""
    prompt, patched, keep = make_prompt(*sizes), twin(dense), 0.25
    session = tokenprune.patch(patched, "divprune", keep=keep)
    first = prefill(patched, prompt)
    inputs = ideal_inputs(dense, prompt, list(session.traces[-1].kept_indices))
    plain = forward(dense, inputs)
    assert_same(first, plain)
    positions = prompt.mask.sum(-1, keepdim=True)
    padded = len(sizes) > 1
    theirs = Decoder(dense, cache_of(plain), inputs["attention_mask"] if padded else None, positions)
    ours = Decoder(patched, cache_of(first), prompt.mask if padded else None, positions)
    assert_same(ours.step(), theirs.step())
    physical = [cache.layers[0].keys.shape[2] for cache in (ours.cache, theirs.cache)]
    assert physical[0] == physical[1]
    repeats = 25
    times = alternate({"plain": theirs.steps, "patched": ours.steps}, repeats=repeats, warmup=2, device=DEVICE)
    target = 1.05 if padded else 1.03
    per_step = {name: Timing(tuple(sample / STEPS for sample in time.samples)) for name, time in times.items()}
    measured = ratio(times["patched"], times["plain"])
    row = {
        "what": "decode step, both with a cache of the same physical length",
        "batch": len(sizes),
        "visual_tokens": list(sizes),
        "cache_length": physical[0],
        "keep": keep,
        "dtype": str(DTYPE).removeprefix("torch."),
        "repeats": repeats,
        "steps_per_sample": STEPS,
        **summary(per_step),
        "patched_over_plain": measured,
        "target": f"patched_over_plain <= {target}",
        "met": measured[1] <= target,
    }
    record(ours.steps, row)
    session.remove()
