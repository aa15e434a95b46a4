"""One forward of a vision encoder: which token represents which patch, so far.

It is opened by the host (the module that holds the blocks) or, where a caller goes around the host's forward, by the
first block. The last block ends the pass, and so does an exception; the host closes what it has opened.
"""

import time
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from tokenprune import ops, running
from tokenprune.decode.heads import Heads
from tokenprune.errors import InputError
from tokenprune.methods.base import Method
from tokenprune.reduction import Merge, Reduction, gather
from tokenprune.running import Running
from tokenprune.session import Session
from tokenprune.signals import BlockSignals, Budget, Trace
from tokenprune.upstream.tower import Logits
from tokenprune.validate import ask

SITE = "encoder_block"
_REPLACED = "where modules of the encoder were replaced since (some quantizers do so), call tokenprune.patch again"


@dataclass
class RunState(Running):
    """State of one forward of one patched encoder, and of the tokens between two of its blocks.

    Attributes:
        direct: whether its first block opened it.
        plan: for each method how many tokens each block removes; empty before the first block and where nothing is to
            be reduced.
        n_prefix: tokens before the patches.
        length: tokens that entered the first block, the prefix included.
        phase: `"open"` before the first block, `"reducing"` from there to the last block, `"over"` behind it and where
            nothing is to be reduced.
        number: the block that runs, or ran last.
        due: what is still to come in the block that runs: `"attention"` to run without pruned heads, `"tokens"` to be
            reduced.
        seen: what was read in the block that runs: `"keys"` averaged over heads, `"query"` and `"key"` of all heads.
        bias: what is added to the attention logits of the block that runs, `[B, 1, 1, n_left]`; None for nothing.
        rope: rotary embeddings of the block that runs, where its queries and keys are still to be turned.
        index: `[B, n_left]` int64, where the tokens that are left stood at first; None while nothing was reduced.
        assign: `[B, length]` int64, which of them carries each token that entered.
        order: `[B, n_left]` int64, the tokens in ToMe's order (:class:`tokenprune.signals.BlockSignals`); None while
            nothing was merged.
        sizes: `[B, n_left]` fp32, how many tokens each represents; None while nothing was merged.
        importance: `[B, n_left]` fp32, attention received so far by the tokens that are left; None while none was seen.
        head_scores: `[B, H]` fp32, magnitudes of the heads' outputs so far; None while none was seen.
        heads: the heads that the last block kept, if not all.
        heads_at: index of that block.
        traces: what happened so far.
    """

    direct: bool = False
    plan: tuple[tuple[int, ...], ...] = ()
    n_prefix: int = 0
    length: int = 0
    phase: str = "open"
    number: int = -1
    due: set[str] = field(default_factory=set)
    seen: dict[str, Tensor] = field(default_factory=dict)
    bias: Tensor | None = None
    rope: Any = None
    index: Tensor | None = None
    assign: Tensor | None = None
    order: Tensor | None = None
    sizes: Tensor | None = None
    importance: Tensor | None = None
    head_scores: Tensor | None = None
    heads: Heads | None = None
    heads_at: int = -1
    traces: list[Trace] = field(default_factory=list)

    @property
    def n_left(self) -> int:
        """Tokens that are left."""
        return self.length if self.index is None else self.index.shape[1]

    def shortened(self, x: Tensor) -> Tensor:
        """The input of the block, `[B, n_left, D]`, out of what reached it, whether that was restored or not.

        Raises:
            InputError: it has another number of tokens than was handed on.
        """
        if x.shape[1] == self.length and self.index is not None:
            return gather(x, self.index)
        if x.shape[1] != self.n_left:
            told = f"{self.n_left} (of {self.length}) were handed on to it; something between the blocks changes that"
            raise InputError(f"block {self.number} of the encoder got {x.shape[1]} tokens, but {told}")
        return x

    def score(self, logits: Logits) -> None:
        """Add the attention that tokens receive in the block, whose logits are made of `logits`, to what they have
        received so far.

        Raises:
            InputError: the block's queries or keys were not seen.
        """
        if not {"query", "key"} <= self.seen.keys():
            raise InputError(
                f"queries and keys of block {self.number} were not seen, so its tokens cannot be scored; {_REPLACED}"
            )
        query, key = (logits.turned(self.seen[name], self.rope) for name in ("query", "key"))
        seen = None if self.bias is None else self.bias.expand(-1, 1, self.n_left, -1)
        scores = ops.attention_importance(query, key, scale=logits.scale, causal=False, seen=seen)
        self.importance = scores if self.importance is None else self.importance + scores

    def reduce(self, method: Method, x: Tensor, *, r: int, place: str) -> Tensor:
        """Let a method remove `r` tokens of `x` `[B, n_left, D]`; appends a trace.

        Raises:
            InputError: the method's answer does not fit, or the block's keys were not seen.
        """
        started, n_in = time.perf_counter(), self.n_left
        if "keys" not in self.seen:
            raise InputError(
                f"the keys of block {self.number} were not seen, so {method.name} has nothing to go by; {_REPLACED}"
            )
        protected = torch.arange(n_in, dtype=torch.int64, device="cpu") < self.n_prefix
        importance = self.importance if method.uses_attention_scores else None
        signals = BlockSignals(self.number, self.seen["keys"], self.sizes, protected, importance, self.order)
        answer = ask(method, SITE, signals, Budget(n_in - r, n_in - r), shape=x.shape, n_prefix=self.n_prefix)
        x, carrier = self._take(answer, x, method.backend)
        self.assign = carrier if self.assign is None else gather(carrier, self.assign)
        self.trace(
            method,
            len(x),
            n_in,
            assignment=self.assign[:, self.n_prefix :] - self.n_prefix,
            place=place,
            overhead_ms=(time.perf_counter() - started) * 1e3,
        )
        return x

    def trace(self, method: Method, n_rows: int, n_in: int, **what: Any) -> None:
        """Note what a method made of `n_in` tokens of each row, the prefix included."""
        n_in, n_out = n_in - self.n_prefix, self.n_left - self.n_prefix
        self.traces.append(Trace(SITE, self.number, method.name, (n_in,) * n_rows, (n_out,) * n_rows, **what))

    def _take(self, answer: Reduction, x: Tensor, backend: str) -> tuple[Tensor, Tensor]:
        """Apply a reduction to `x` and to everything that is carried along. Returns `x` `[B, M, D]`, and which of its
        tokens carries each of those before, `[B, n_left]`."""
        index = answer.index
        self.order = self._reordered(answer)
        if isinstance(answer, Merge):
            x = ops.merge_tokens(x, answer.assign, n_out=index.shape[1], weight=answer.weight, backend=backend).tokens
            carrier = answer.assign
            self.sizes = Merge(index, carrier, self.sizes).sizes()
            self.importance = None if self.importance is None else Merge(index, carrier, self.importance).sizes()
        else:
            carrier = answer.source(length=x.shape[1])
            carrier[:, self.n_prefix :].clamp_(min=self.n_prefix)  # a patch is carried by a patch
            x = answer.apply(x)
            self.sizes = None if self.sizes is None else gather(self.sizes, index)
            self.importance = None if self.importance is None else gather(self.importance, index)
        self.seen["keys"] = gather(self.seen["keys"], index)  # another method may go by them
        self.index = index if self.index is None else gather(self.index, index)
        return x, carrier

    def _reordered(self, answer: Reduction) -> Tensor | None:
        """The order `[B, M]` of the tokens that a reduction keeps of `n_left`: where it merges some, those at odd
        places of the order so far come behind those at even ones."""
        merged = isinstance(answer, Merge) and answer.index.shape[1] < self.n_left
        if self.order is None and not merged:
            return None
        place = torch.arange(self.n_left, dtype=torch.int64, device=answer.index.device)
        place = place.expand(len(answer.index), -1) if self.order is None else self.order.argsort(1)
        if merged:
            place = place + self.n_left * (place % 2) * (place >= self.n_prefix)
        return gather(place, answer.index).argsort(1)


def enter(run: RunState) -> None:
    """Begin a forward; what an interrupt left of an earlier one of its session is dropped."""
    outer = running.innermost()
    while isinstance(outer, RunState) and outer.owner is run.owner:
        outer = outer.outer
    run.outer = outer
    running.enter(run)


def reducing(session: Session) -> RunState | None:
    """The forward of `session` that is going on, if its blocks reduce tokens now."""
    run = running.current(RunState, session)
    return run if run is not None and run.phase == "reducing" else None


def end(session: Session) -> None:
    """Note that no further block runs. Where the first block has opened the forward, that is its end."""
    run = running.current(RunState, session)
    if run is not None:
        run.phase = "over"
        if run.direct:
            running.leave(run)
