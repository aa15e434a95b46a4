"""What is known of one forward of one patched model: it lives in a context variable, never on a module."""

from bisect import bisect_right
from dataclasses import dataclass, field
from operator import attrgetter
from typing import NamedTuple

from torch import Tensor

from tokenprune.decode.heads import Heads
from tokenprune.decode.traffic import Reads
from tokenprune.decoder.call import Call
from tokenprune.decoder.pruned_cache import Ledger, grown, ledger_of
from tokenprune.decoder.segments import Segment
from tokenprune.running import Running
from tokenprune.signals import AttentionPlan, CachePlan, Probe, TextGuard, Trace
from tokenprune.upstream.prompts import Prompt


class Alive(NamedTuple):
    """The tokens that the layers of a decoding step still attend to.

    Attributes:
        seen: `[B, past + 1]` bool, those that the last layer attended to.
        prunable: `[B, past + 1]` bool, those that may be passed over.
        n_prunable: how many these are, per row.
        n_left: how many of these the last layer attended to, per row.
    """

    seen: Tensor
    prunable: Tensor
    n_prunable: tuple[int, ...]
    n_left: tuple[int, ...]


_FIRST = attrgetter("first")


@dataclass
class Forward(Running):
    """State of one forward.

    Attributes:
        prompt: what the module that holds the decoder was called with.
        traces: what happened so far.
        continues: whether the call continues an earlier one and brings no image.
        call: how the decoder was called; None before it was, or where nothing will be pruned.
        segments: by their first layer.
        visual: positions within the call of the prunable tokens that are kept so far, `[n]` per row, on the CPU: visual
            ones, unless a method prunes text too.
        entered: how many of them entered the decoder, per row.
        shift: `[B]` how many positions the packed policy has taken out so far, this call included; None for original
            positions.
        lowered: `[B, length]` how many it has taken out within this call before each token, likewise.
        probes: for each layer that is to be probed, what is wanted of its attention.
        scores: importance of the tokens of the unpruned sequence `[B, past + length]` fp32, by what asked for it; 0 for
            dropped ones.
        probe_ms: time that probing took since the last trace.
        guard: which text stays where a method prunes text too.
        plan: what is dropped from the cache while tokens are generated, if anything.
        scoring: whether that takes place in this forward, so that every layer is probed.
        padding: `[B, past + length]` bool on the CPU, which tokens are no padding, likewise.
        attention: what a method prunes in every attention, if anything.
        steering: whether that takes place in this forward.
        head_scores: `[B, H]` fp32, magnitudes of the heads' outputs so far, those of earlier forwards included.
        heads: the heads that the last layer kept, if not all.
        heads_at: index of that layer.
        patterns: for each layer the heads that it kept in the last call on this cache, if the same in all rows.
        reads: keys and values read by decoding steps, those of earlier forwards on this cache included.
        alive: the tokens that the last layer of a decoding step attended to, where layers pass over some.
        whole: pairs of hidden states and the same with the unpruned length, where the caller is to get those of all
            layers with gradients (:mod:`tokenprune.decoder.recorded_states`); else None.
    """

    prompt: Prompt
    traces: list[Trace] = field(default_factory=list)
    continues: bool = False
    call: Call | None = None
    segments: list[Segment] = field(default_factory=list)
    visual: tuple[Tensor, ...] = ()
    entered: tuple[int, ...] = ()
    shift: Tensor | None = None
    lowered: Tensor | None = None
    probes: dict[int, tuple[Probe, ...]] = field(default_factory=dict)
    scores: dict[Probe, Tensor] = field(default_factory=dict)
    probe_ms: float = 0.0
    guard: TextGuard | None = None
    plan: CachePlan | None = None
    scoring: bool = False
    padding: Tensor | None = None
    alive: Alive | None = None
    attention: AttentionPlan | None = None
    steering: bool = False
    head_scores: Tensor | None = None
    heads: Heads | None = None
    heads_at: int = -1
    patterns: dict[int, tuple[int, ...]] = field(default_factory=dict)
    reads: Reads = field(default_factory=Reads)
    whole: list[tuple[Tensor, Tensor]] | None = None

    @property
    def quantizes(self) -> bool:
        """Whether keys and values are to be kept in two planes of four bits."""
        return self.attention is not None and self.attention.threshold is not None

    @property
    def passes_over(self) -> bool:
        """Whether each layer passes over some of the cache in this forward, a decoding step."""
        plan, call = self.plan, self.call
        return self.scoring and plan is not None and not plan.persistent and call is not None and call.length == 1

    def segment_of(self, layer: int) -> Segment:
        """The segment that `layer` belongs to."""
        return self.segments[bisect_right(self.segments, layer, key=_FIRST) - 1]

    def recall(self, ledger: Ledger | None) -> None:
        """Begin with what a cache knows of heads and of what was read."""
        self.heads, self.head_scores, self.patterns, self.reads = None, None, {}, Reads()
        if ledger is not None:
            self.head_scores, self.patterns, self.reads = ledger.head_scores, dict(ledger.patterns), ledger.reads

    def ledger(self, call: Call) -> Ledger:
        """What the cache has to know after this forward."""
        parts = tuple(
            grown(segment.slots, segment.keep, segment.bias, past=call.past, rows=call.all_rows)
            for segment in self.segments
        )
        starts = tuple(segment.first for segment in self.segments)
        ledger = Ledger(starts, parts, self.shift, length=call.past + call.length)
        return ledger if (earlier := ledger_of(call.cache)) is None else earlier.renewed(ledger)
