"""What has to hold of a case of the fuzz: traces that fit together, and logits of an independent computation."""

from collections import Counter
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from families import MROPE, STACKED, Batch, batch
from families import Row as Parts
from oracle_decoding import Row
from oracle_planes import Recorded, stored_by
from torch import Tensor, nn
from upstream import cache_of, encoder_output, with_features

import tokenprune
from tokenprune.schedule import count

STEPS = 3
TOLERANCE = 1e-4
PATCHES = 16  # of an image that goes through a tower
TOWERS = ("llava", "vipllava", "paligemma", "paligemma2")  # whose blocks ToMe can merge in
NEVER = 1000  # an interval that no row reaches


@dataclass(frozen=True)
class Case:
    """One call of `patch` and what runs after it."""

    methods: tuple[tuple[str, tuple[tuple[str, Any], ...]], ...]
    positions: str
    implementation: str
    rows: tuple[Parts, ...]
    mode: str
    forced: bool
    pixels: bool = False  # instead of features

    def build(self) -> list[tokenprune.Method]:
        return [tokenprune.api.build_method(name, **dict(options)) for name, options in self.methods]


def guard_of(case: Case) -> tuple[int, int] | None:
    """How many tokens at the start and at the end of a row stay, where text may be pruned too; else None."""
    texts = [one for one in case.build() if isinstance(one, tokenprune.SpAtten) and not one.protect_text]
    return (texts[0].keep_first, texts[0].keep_recent) if texts else None


def in_planes(case: Case) -> bool:
    """Whether the cache that ``generate`` makes is kept in planes."""
    return any(dict(options).get("quantize") is not None for _, options in case.methods)


# --- traces ---------------------------------------------------------------------------------------


def check_traces(session: tokenprune.Session, family: str, case: Case, prompt: Batch) -> None:
    """Counts are those that `keep` says, text stays unless it may go, and what is kept is part of what came."""
    left = [(row == 100).nonzero()[:, 0].tolist() for row in prompt.inputs["input_ids"]]
    whole = [set(row) for row in left]
    guard, fresh = guard_of(case), True
    in_tower = _check_tower([trace for trace in session.traces if trace.site == "encoder_block"], case)
    keeps = {name: dict(options).get("keep") for name, options in case.methods}
    once = len(keeps) == len(case.methods)
    traces = [trace for trace in session.traces if trace.site != "encoder_block"]
    for number, trace in enumerate(traces):
        assert trace.status == "applied", trace
        assert trace.overhead_ms >= 0
        if guard is not None and fresh and trace.site == "llm_layer":
            left, fresh = _movable(prompt, guard, whole, left), False
        for row, before in enumerate(left):
            assert trace.visual_indices[row].tolist() == before
            kept = trace.kept_indices[row].tolist()
            assert sorted(set(kept)) == kept
            assert set(kept) <= set(before)
            assert (len(before), len(kept)) == (trace.n_in[row], trace.n_out[row])
            if trace.site == "before_llm":
                assert sum(trace.images[row]) == len(before)
                if trace.method == "tome":
                    if number == 0 and family != "vipllava":  # it joins layers from before and behind the blocks
                        share = in_tower / PATCHES if case.pixels else 1
                        assert len(kept) == share * len(before)
                elif once and trace.method != "aim":
                    assert len(kept) == sum(count(keeps[trace.method], size) for size in trace.images[row])
            left[row] = kept


def _check_tower(traces: list[tokenprune.Trace], case: Case) -> int:
    """How many patches of each image the blocks of the tower leave."""
    n_left, n_images = PATCHES, sum(isinstance(part, tuple) for row in case.rows for part in row)
    assert bool(traces) == (case.pixels and any(name == "tome" for name, _ in case.methods))
    for trace in traces:
        (n_out,) = set(trace.n_out)
        assert trace.n_in == (n_left,) * n_images
        assert n_left - n_left // 2 <= n_out <= n_left
        n_left = n_out
    return n_left


def _movable(prompt: Batch, guard: tuple[int, int], whole: list[set[int]], left: list[list[int]]) -> list[list[int]]:
    """What may go of each row where text may: all but its ends and what has left before the decoder."""
    length = prompt.inputs["input_ids"].shape[1]
    places = [range(pad + guard[0], length - guard[1]) for pad in prompt.pads]
    return [
        [i for i in may if i not in visual or i in kept] for may, visual, kept in zip(places, whole, left, strict=True)
    ]


# --- logits ---------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Oracle:
    """The unpatched model, and the prompt row by row.

    Attributes:
        dense: the model.
        family: its family.
        prompt: the batch.
        features: what the decoder got of the images `[images, patches, D]`, where they came as pixels.
    """

    dense: nn.Module
    family: str
    prompt: Batch
    features: Tensor | None

    def single(self, row: int, extra: Tensor) -> Batch:
        """A row by itself, `extra` `[1, n]` ids behind it."""
        found = batch(self.family, (self.prompt.rows[row],), seeds=(row,), extra=extra)
        counts = [sum(isinstance(part, tuple) for part in parts) for parts in self.prompt.rows]
        if self.features is None or not counts[row]:
            return found
        first = sum(counts[:row])
        mine = self.features[first : first + counts[row]]
        given = with_features(encoder_output(mine if self.family in STACKED else list(mine)))
        return Batch({**found.inputs, **given}, found.pads, found.rows)

    def compare(self, session: tokenprune.Session, case: Case, out: Any, recorded: Recorded) -> Counter[str]:
        """Compare the logits of each token that was generated (else those of the last one of the prompt) with a
        computation by the rules, up to a choice that rounding may turn.

        Returns:
            How many logits were "compared", and how many were left "open".
        """
        length, found = self.prompt.inputs["input_ids"].shape[1], Counter[str]()
        steps = out.logits if case.mode == "generate" else (out.logits[:, -1],)
        ids = out.sequences[:, length:] if case.mode == "generate" else torch.empty(len(steps[0]), 0, dtype=torch.int64)
        for row, pad in enumerate(self.prompt.pads):
            # A forward without positions counts padding, which turns keys further, so that they are rounded elsewhere.
            offset = 0 if case.mode == "generate" or self.family in MROPE else pad
            stored = stored_by(cache_of(out), recorded, row)
            one = Row(
                self.dense, self.family, partial(self.single, row), session, row, pad, stored=stored, offset=offset
            )
            for step, logits in enumerate(steps):
                wanted = one.logits(ids[row : row + 1, :step])
                if not one.sure:
                    break
                torch.testing.assert_close(logits[row], wanted, atol=TOLERANCE, rtol=TOLERANCE)
                found["compared"] += 1
            found["open"] += len(steps) - step if not one.sure else 0
        return found
