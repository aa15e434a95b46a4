"""One forward of a vision encoder: which token represents which patch, so far.

It lives in a context variable, never on a module. It is opened by the host (the module that holds the blocks) or, where
a caller goes around the host's forward, by the first block. The last block ends the pass, and so does an exception; the
host closes what it has opened.
"""

import time
from contextvars import ContextVar
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from tokenprune import ops
from tokenprune.decode.heads import Heads
from tokenprune.encoder.reducers import SITE
from tokenprune.errors import InputError
from tokenprune.methods.base import Method
from tokenprune.reduction import Merge, Reduction, gather
from tokenprune.session import Session
from tokenprune.signals import BlockSignals, Budget, Trace
from tokenprune.upstream.tower import Logits
from tokenprune.validate import ask

_REPLACED = "where modules of the encoder were replaced since (some quantizers do so), call tokenprune.patch again"


@dataclass
class RunState:
    """State of one forward of one patched encoder, and of the tokens between two of its blocks.

    Attributes:
        owner: the session whose forward it is.
        outer: the forward that it takes place in.
        direct: whether its first block opened it.
        plan: for each method how many tokens each block removes; empty before the first block and where nothing is to
            be reduced.
        n_prefix: tokens before the patches.
        length: tokens that entered the first block, the prefix included.
        begun: whether the first block ran.
        running: whether tokens are being reduced: from the first block to the last.
        number: the block that runs, or ran last.
        due: what is still to come in the block that runs: `"keys"`, `"query"` and `"key"` (of all heads) to be read,
            `"attention"` to run without pruned heads, `"tokens"` to be reduced.
        seen: what was read of the keys and queries that were due.
        rope: rotary embeddings of the block that runs, where its queries and keys are still to be turned.
        index: `[B, n_left]` int64, where the tokens that are left stood at first; None while nothing was reduced.
        assign: `[B, length]` int64, which of them carries each token that entered.
        order: `[B, n_left]` int64, the tokens in ToMe's order (:class:`tokenprune.signals.BlockSignals`); None while
            nothing was merged.
        sizes: `[B, n_left]` fp32, how many tokens each represents; None while nothing was merged.
        importance: `[B, n_left]` fp32, attention received so far by the tokens that are left; None while none was seen.
        head_scores: `[B, H]` fp32, magnitudes of the heads' outputs so far; None while none was seen.
        heads: the heads that the last block kept, if not all.
        traces: what happened so far.
    """

    owner: Session
    outer: "RunState | None"
    direct: bool
    plan: tuple[tuple[int, ...], ...] = ()
    n_prefix: int = 0
    length: int = 0
    begun: bool = False
    running: bool = False
    number: int = -1
    due: set[str] = field(default_factory=set)
    seen: dict[str, Tensor] = field(default_factory=dict)
    rope: Any = None
    index: Tensor | None = None
    assign: Tensor | None = None
    order: Tensor | None = None
    sizes: Tensor | None = None
    importance: Tensor | None = None
    head_scores: Tensor | None = None
    heads: Heads | None = None
    traces: list[Trace] = field(default_factory=list)

    @property
    def n_left(self) -> int:
        """Tokens that are left."""
        return self.length if self.index is None else self.index.shape[1]

    def note(self, name: str, x: Tensor) -> None:
        """Take keys or queries that were due."""
        self.seen[name] = x
        self.due.discard(name)

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

    def restored(self, x: Tensor) -> Tensor:
        """`x` `[B, n_left, D]` with all tokens back, `[B, length, D]`."""
        return x if self.assign is None else gather(x, self.assign)

    @property
    def shorter(self) -> set[int]:
        """Lengths that hidden states had on the way, without the one that they entered with."""
        counts = {trace.n_out[0] + self.n_prefix for trace in self.traces if trace.n_out}
        return counts - {self.length}

    def size_mask(self, x: Tensor) -> Tensor | None:
        """What sizes add to the attention logits, `[B, 1, 1, n_left]`; None where all sizes are 1."""
        return None if self.sizes is None else self.sizes.log()[:, None, None].to(x.dtype)

    def score(self, logits: Logits, *, bias: Tensor | None) -> None:
        """Add the attention that tokens receive in the block to what they have received so far.

        Args:
            logits: what the block's logits are made of.
            bias: what was added to the logits, `[B, 1, 1, n_left]`.

        Raises:
            InputError: the block's queries or keys were not seen.
        """
        query, key = self.seen.pop("query", None), self.seen.pop("key", None)
        if query is None or key is None:
            raise InputError(
                f"queries and keys of block {self.number} were not seen, so its tokens cannot be scored; {_REPLACED}"
            )
        scores = ops.attention_importance(
            logits.turned(query, self.rope),
            logits.turned(key, self.rope),
            scale=logits.scale,
            causal=False,
            seen=None if bias is None else bias.expand(-1, 1, query.shape[2], -1),
        )
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
        self._trace(
            method,
            len(x),
            n_in,
            assignment=self.assign[:, self.n_prefix :] - self.n_prefix,
            place=place,
            overhead_ms=(time.perf_counter() - started) * 1e3,
        )
        return x

    def skip(self, method: Method, n_rows: int) -> None:
        """Note that a method removes nothing in the block."""
        reason = "the schedule removes no tokens in this block"
        self._trace(method, n_rows, self.n_left, status="skipped", reason=reason)

    def _trace(self, method: Method, n_rows: int, n_in: int, **what: Any) -> None:
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
        """The order `[B, M]` of the tokens that a reduction leaves of `n_left`."""
        merged = isinstance(answer, Merge) and answer.index.shape[1] < self.n_left
        if self.order is None and not merged:
            return None
        place = torch.arange(self.n_left, dtype=torch.int64, device=answer.index.device)
        place = place.expand(len(answer.index), -1) if self.order is None else self.order.argsort(1)
        if merged:
            place = place + self.n_left * (place % 2) * (place >= self.n_prefix)
        return gather(place, answer.index).argsort(1)


_CURRENT: ContextVar[RunState | None] = ContextVar("tokenprune_encoder", default=None)


def open_forward(session: Session, *, direct: bool) -> RunState:
    """Begin a forward of `session`; what an interrupt left of an earlier one goes."""
    outer = _CURRENT.get()
    while outer is not None and outer.owner is session:
        outer = outer.outer
    run = RunState(session, outer, direct)
    _CURRENT.set(run)
    return run


def close_forward(session: Session) -> RunState | None:
    """End the forward of `session` if there is one, and tell what it was."""
    if (run := _CURRENT.get()) is None or run.owner is not session:
        return None
    _CURRENT.set(run.outer)
    return run


def begin(session: Session) -> RunState:
    """Note that the first block runs, in the host's forward or by itself. Tokens are reduced once there is a plan."""
    run = _CURRENT.get()
    run = open_forward(session, direct=run is None or run.owner is not session or run.direct)
    run.begun = True
    return run


def end(session: Session) -> None:
    """Note that no further block runs."""
    run = _CURRENT.get()
    if run is not None and run.owner is session:
        run.running = False
        if run.direct:
            _CURRENT.set(run.outer)


def run_of(session: Session) -> RunState | None:
    """The pass of `session` that is going on."""
    run = _CURRENT.get()
    return run if run is not None and run.owner is session and run.running else None
