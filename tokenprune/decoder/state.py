"""What is known of one forward of one patched model: it lives in a context variable, never on a module.

A forward falls into *segments*: stretches of decoder layers that see the same tokens. Without pruning inside the
decoder there is one.
"""

from bisect import bisect_right
from contextvars import ContextVar
from dataclasses import dataclass, field
from functools import cached_property
from operator import attrgetter
from typing import Any, NamedTuple

import torch
from torch import Tensor

from tokenprune.decode.heads import Heads
from tokenprune.decode.traffic import Reads
from tokenprune.decoder import masks
from tokenprune.decoder.pruned_cache import Ledger, Slots, grown, ledger_of
from tokenprune.decoder.select import padding_of
from tokenprune.engine import Engine
from tokenprune.reduction import Keep
from tokenprune.signals import AttentionPlan, CachePlan, Probe, TextGuard, Trace
from tokenprune.upstream.caches import layer_mask_sizes
from tokenprune.upstream.facts import DecoderFacts
from tokenprune.upstream.masks import dense_mask
from tokenprune.upstream.prompts import Prompt


@dataclass
class Call:
    """What the decoder was called with, in terms of the unpruned sequence.

    Attributes:
        mask: the attention mask, in any of its forms.
        cache: the KV cache, or None.
        embeds: embeddings `[B, length, 0]`: their shape, dtype and device without their content.
        positions: text positions `[B, length]`.
        past: tokens before this call.
        facts: the decoder's.
        n_behind: how many of the last tokens stand behind the prompt and rank nothing, see
            :mod:`tokenprune.decoder.prompt_end`.
    """

    mask: Any
    cache: Any
    embeds: Tensor
    positions: Tensor
    past: int
    facts: DecoderFacts
    n_behind: int = 0
    offsets: dict[str | None, int] = field(init=False)
    flat: bool = field(init=False)
    slides: bool = field(init=False)
    fused: bool = field(init=False)
    flash: bool = field(init=False)

    def __post_init__(self) -> None:
        """Note what the cache can only tell before the decoder runs, and build masks that a window makes necessary."""
        self.fused, self.flash = self.facts.fused, self.facts.flash
        self.flat = self.mask is None or (isinstance(self.mask, Tensor) and self.mask.ndim == 2)
        self._given = self.mask, 0 if self.flat else masks.offset_of(self.mask, self.cache, self.facts, self.length)
        self.slides = self.flat and masks.slides(self.facts, self.cache, total=self.past + self.length)
        if self.slides:
            self.mask = dense_mask(
                self.facts, self.mask, self.cache, past=self.past, embeds=self.embeds, positions=self.positions
            )
        self.offsets = masks.offsets_of(self.mask, self.cache, self.facts, self.length)

    @cached_property
    def padding(self) -> Tensor | None:
        """Which tokens of the call are no padding, `[B, length]` bool on the CPU, None where all are."""
        mask, offset = self._given
        return padding_of(mask, past=self.past, length=self.length, offset=offset)

    @property
    def real_tokens(self) -> Tensor:
        """`padding`, all True where it is None."""
        if self.padding is not None:
            return self.padding
        return torch.ones(self.n_rows, self.length, dtype=torch.bool, device="cpu")

    @property
    def ranking(self) -> Tensor:
        """`real_tokens` without those behind the prompt."""
        if not self.n_behind:
            return self.real_tokens
        ranking = self.real_tokens.clone()
        ranking[:, -self.n_behind :] = False
        return ranking

    @cached_property
    def effective_mask(self) -> Any:
        """`mask`, None where it is a padding mask without padding. On a GPU, the first look waits for it."""
        total = self.past + self.length
        flat = isinstance(self.mask, Tensor) and self.mask.ndim == 2 and self.mask.shape[1] >= total
        return None if flat and bool(self.mask[:, :total].all()) else self.mask

    @property
    def recurrent(self) -> bool:
        """Whether some layers go through the tokens one by one, so that nothing may stand between them."""
        return self.facts.recurrent

    @property
    def length(self) -> int:
        """Tokens of this call."""
        return int(self.embeds.shape[1])

    @property
    def n_rows(self) -> int:
        """Rows of the batch."""
        return int(self.embeds.shape[0])

    @cached_property
    def sequence(self) -> Tensor:
        """Every position of the sequence so far, `[past + length]`."""
        return torch.arange(self.past + self.length, dtype=torch.int64, device=self.embeds.device)

    @cached_property
    def all_rows(self) -> Tensor:
        """Every position of the call, `[B, length]`."""
        return torch.arange(self.length, dtype=torch.int64, device=self.embeds.device).expand(self.n_rows, -1)


@dataclass
class Segment:
    """Decoder layers that see the same tokens.

    Attributes:
        first: index of the first of them.
        keep: the tokens of the call that they see, None for all.
        slots: what their caches held before the call, None where that is the unpruned sequence.
        bias: `[B, M]` fp32, what attention adds to the logits of these tokens, or None.
        local: `[B, M]` int64, these tokens among those of the first segment; None where they are the same.
    """

    first: int
    keep: Keep | None
    slots: Slots | None
    bias: Tensor | None = None
    local: Tensor | None = None
    layer_masks: dict[Any, Any] = field(default_factory=dict, repr=False)
    known_layout: masks.Layout | None = field(default=None, repr=False)

    def n_keys(self, call: Call) -> int:
        """Slots of its layers after a call whose tokens they all see."""
        return call.past + call.length - (0 if self.slots is None else self.slots.dropped)

    def is_whole(self, call: Call) -> bool:
        """Whether its layers see all tokens of a call and all their slots, none of which is padding."""
        slots = self.slots
        whole = self.keep is None and self.bias is None and call.flat and call.effective_mask is None
        return whole and (slots is None or not (slots.has_padding_slots or slots.bias is not None))

    def layout(self, call: Call) -> masks.Layout:
        """Rows and columns of the segment's masks."""
        if self.known_layout is None:
            self.known_layout = self._layout(call)
        return self.known_layout

    def is_plain_step(self, call: Call, layer: int) -> bool:
        """Whether `layer` sees all its slots in a call of one token, and its attention knows so without a mask."""
        if call.length > 1 or call.cache is None or not call.fused or not self.is_whole(call):
            return False
        recurrent = call.facts.is_recurrent(call.facts.kind_of(layer))
        return not recurrent and sum(layer_mask_sizes(call.cache, 1, layer)) == self.n_keys(call)

    def _layout(self, call: Call) -> masks.Layout:
        rows = call.all_rows if self.keep is None else self.keep.index
        after = grown(self.slots, self.keep, self.bias, past=call.past, rows=call.all_rows)
        columns = after.columns(call.sequence)
        bias = after.biases(n_slots=columns.shape[1])
        return masks.Layout(rows, columns.to(rows.device), call.past, call.length, after.has_padding_slots, bias)

    def mask(self, call: Call, *, layer: int, like: Tensor) -> Any:
        """What `layer` is to get as `attention_mask`; `like` are its hidden states."""
        if self.is_plain_step(call, layer):
            return None
        key = (call.facts.kind_of(layer), like.device)
        if key not in self.layer_masks:
            self.layer_masks[key] = masks.layer_mask(
                call.effective_mask, self.layout(call), call.cache, call.facts, call.offsets, layer=layer, like=like
            )
        return self.layer_masks[key]


class Alive(NamedTuple):
    """The tokens that the layers of a decoding step still look at.

    Attributes:
        seen: `[B, past + 1]` bool, those that the last layer looked at.
        movable: `[B, past + 1]` bool, those that may be passed over.
        n_movable: how many these are, per row.
        n_left: how many of these the last layer looked at, per row.
    """

    seen: Tensor
    movable: Tensor
    n_movable: tuple[int, ...]
    n_left: tuple[int, ...]


_FIRST = attrgetter("first")


@dataclass
class Forward:
    """State of one forward.

    Attributes:
        owner: the session.
        prompt: what the module that holds the decoder was called with.
        outer: the forward that this one runs in, if any.
        traces: what happened so far.
        continues: whether the call goes on from an earlier one and brings no image.
        call: how the decoder was called; None before it was, or where nothing will be pruned.
        segments: by their first layer.
        visual: positions within the call of the tokens that may go and are left, `[n]` per row, on the CPU: visual
            ones, unless a method prunes text too.
        entered: how many of them entered the decoder, per row.
        shift: `[B]` how many positions the packed policy has taken out so far, this call included; None for original
            positions.
        lowered: `[B, length]` how many it has taken out within this call before each token, likewise.
        probes: for each layer that is to be probed, what is wanted of its attention.
        scores: importance of the tokens of the unpruned sequence `[B, past + length]` fp32, by what asked for it; 0 for
            those that left.
        probe_ms: time that probing took since the last trace.
        guard: which text stays where a method prunes text too.
        plan: what leaves the cache while tokens are generated, if anything.
        scoring: whether that takes place in this forward, so that every layer is probed.
        padding: `[B, past + length]` bool on the CPU, which tokens are no padding, likewise.
        attention: what a method leaves out of every attention, if anything.
        steering: whether that takes place in this forward.
        head_scores: `[B, H]` fp32, magnitudes of the heads' outputs so far, those of earlier forwards included.
        heads: the heads that the last layer kept, if not all.
        heads_at: index of that layer.
        patterns: for each layer the heads that it kept in the last call on this cache, if the same in all rows.
        reads: keys and values read by decoding steps, those of earlier forwards on this cache included.
        alive: the tokens that the last layer of a decoding step looked at, where layers pass over some.
        whole: pairs of hidden states and the same with the unpruned length, where the caller is to get those of all
            layers with gradients (:mod:`tokenprune.decoder.recorded_states`); else None.
    """

    owner: Engine
    prompt: Prompt
    outer: "Forward | None"
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


CURRENT: ContextVar[Forward | None] = ContextVar("tokenprune_forward", default=None)


def current(engine: Engine) -> Forward | None:
    """The forward that runs now, if it is one of the model that `engine` has patched."""
    state = CURRENT.get()
    return state if state is not None and state.owner is engine else None


def first_segments(cache: Any) -> list[Segment]:
    """One segment for each part of a cache."""
    ledger = ledger_of(cache)
    if ledger is None:
        return [Segment(0, None, None)]
    return [
        Segment(start, None, slots if slots.differ else None)
        for start, slots in zip(ledger.starts, ledger.parts, strict=True)
    ]
