"""What has to hold of a case of the fuzz: traces that fit together, and logits of an independent computation."""

from dataclasses import dataclass
from types import SimpleNamespace
from typing import Any

import torch
from families import STACKED, Batch, Row, batch
from oracle import check_steps
from oracle_layers import alive_by_layer, layered_logits, layers_of
from oracle_planes import as_stored, stored_by
from torch import Tensor, nn
from upstream import cache_of, encoder_output, with_features

import tokenprune
from tokenprune.schedule import count

STEPS = 2
TOLERANCE = 2e-4
PATCHES = 16  # of an image that goes through a tower
TOWERS = ("llava", "vipllava", "paligemma", "paligemma2")  # whose blocks ToMe can merge in
NEVER = 1000  # an interval that no row reaches


@dataclass(frozen=True)
class Case:
    """One call of `patch` and what runs after it."""

    methods: tuple[tuple[str, tuple[tuple[str, Any], ...]], ...]
    positions: str
    implementation: str
    rows: tuple[Row, ...]
    mode: str
    forced: bool
    pixels: bool = False  # instead of features

    def build(self) -> list[tokenprune.Method]:
        return [tokenprune.api.build_method(name, **dict(options)) for name, options in self.methods]


@dataclass(frozen=True)
class LeftOut:
    """What SpAtten leaves out beside visual tokens, by the options of a case.

    Attributes:
        heads: whether heads leave.
        values: whether decoding steps pass over values.
        planes: whether the cache that ``generate`` makes is kept in planes.
        threshold: with `planes`, when both of them are read.
        text: whether text may go; it stays in the first `guard[0]` places of a row and in the last `guard[1]`.
        evicts: whether text leaves the cache too.
    """

    heads: bool
    values: bool
    planes: bool
    threshold: float
    text: bool
    guard: tuple[int, int]
    evicts: bool

    @classmethod
    def of(cls, case: Case) -> "LeftOut":
        found = [one for one in case.build() if isinstance(one, tokenprune.SpAtten)]
        texts = [one for one in found if not one.protect_text]
        return cls(
            any(one.heads != 1.0 for one in found),
            any(one.values != 1.0 for one in found),
            any(one.quantize is not None for one in found),
            min((one.threshold for one in found if one.quantize is not None), default=1.0),
            bool(texts),
            (texts[0].keep_first, texts[0].keep_recent) if texts else (0, 0),
            any(one.kv == "persistent" and one.interval < NEVER for one in texts),
        )


# --- traces ---------------------------------------------------------------------------------------


def check_traces(session: tokenprune.Session, family: str, case: Case, prompt: Batch) -> None:
    """Counts are those that `keep` says, text stays unless it may go, and what is kept is part of what came."""
    left = [(row == 100).nonzero()[:, 0].tolist() for row in prompt.inputs["input_ids"]]
    whole = [set(row) for row in left]
    left_out, fresh = LeftOut.of(case), True
    in_tower = _check_tower([trace for trace in session.traces if trace.site == "encoder_block"], case)
    keeps = {name: dict(options).get("keep") for name, options in case.methods}
    once = len(keeps) == len(case.methods)
    traces = [trace for trace in session.traces if trace.site != "encoder_block"]
    for number, trace in enumerate(traces):
        assert trace.status == "applied", trace
        assert trace.overhead_ms >= 0
        if left_out.text and fresh and trace.site == "llm_layer":
            left, fresh = _movable(prompt, left_out.guard, whole, left), False
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

    def check(self, session: tokenprune.Session, steps: list[Tensor], ids: Tensor, cache: Any) -> None:
        """Each of `steps` `[B, V]`: logits after the prompt and the first of `ids` `[B, n]` that were generated."""
        n_layers = len(layers_of(self.dense.get_decoder()))
        for row, pad in enumerate(self.prompt.pads):
            stored = {} if cache is None else stored_by(cache, row)
            for step, logits in enumerate(steps):
                single = self.single(row, ids[row : row + 1, :step])
                traces = [trace for trace in session.traces if trace.site != "encoder_block"]
                length = single.inputs["input_ids"].shape[1]
                alive = alive_by_layer(traces, row, pad, length, n_layers)
                with as_stored(self.dense, stored, alive):
                    wanted = layered_logits(self.dense, self.family, single, alive)[-1]
                torch.testing.assert_close(logits[row], wanted, atol=TOLERANCE, rtol=TOLERANCE)


def check_logits(
    oracle: Oracle, case: Case, left_out: LeftOut, out: Any, wanted: Any, session: tokenprune.Session
) -> None:
    """Against a dense run on the kept tokens, or at full length with a mask for each layer.

    Behind the prompt only where no decoding step makes a choice of its own.
    """
    generated, packed = case.mode == "generate", case.positions == "packed"
    cache = cache_of(out)  # some models make one before their decoder runs, others in it
    planes = any(hasattr(layer, "planes") for layer in getattr(cache, "layers", ()))
    assert left_out.planes or not planes
    chooses = left_out.values or left_out.text
    if not session.traces and not planes:  # methods may be told to leave everything alone
        n = 1 if generated and chooses else None
        torch.testing.assert_close(tuple(out.logits)[:n], tuple(wanted.logits)[:n], atol=0, rtol=0)
        return
    sites = {trace.site for trace in session.traces if trace.n_in != trace.n_out and trace.site != "encoder_block"}
    length = oracle.prompt.inputs["input_ids"].shape[1]
    if sites <= {"before_llm"} and generated and not planes and not case.pixels:
        n = 1 if chooses else STEPS
        first = SimpleNamespace(sequences=out.sequences[:, : length + n], logits=out.logits[:n])
        check_steps(
            oracle.dense, oracle.family, first, session.traces, oracle.prompt, n, packed=packed, tolerance=TOLERANCE
        )
    elif planes and not generated and any(oracle.prompt.pads):
        pass  # there padding moves positions, so that keys are turned, and rounded, in another way than in a row alone
    elif not packed and not (planes and left_out.evicts):
        n = STEPS if planes and left_out.threshold == 1.0 and not chooses else 1
        steps = list(out.logits[:n]) if generated else [out.logits[:, -1]]
        ids = out.sequences[:, length:] if generated else torch.empty(len(oracle.prompt.pads), 0, dtype=torch.int64)
        oracle.check(session, steps, ids, cache if planes else None)
