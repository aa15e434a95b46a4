"""One pass of hidden states through the blocks of a vision encoder: what stands for which patch, so far.

It lives in a context variable, never on a module. It is opened by the host (the module that holds the blocks) or, where
a caller goes around the host's forward, by the first block; the last block ends it, and so does an exception.
"""

import time
from contextvars import ContextVar
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from tokenprune import ops
from tokenprune.decode.heads import Heads
from tokenprune.encoder.reducers import SITE, BlockReducer
from tokenprune.engine import Engine
from tokenprune.errors import InputError
from tokenprune.reduction import Merge, Reduction, gather
from tokenprune.signals import BlockSignals, Budget, Trace
from tokenprune.upstream.tower import Logits
from tokenprune.validate import ask

_REPLACED = "where modules of the encoder were replaced since (some quantizers do so), call tokenprune.patch again"


@dataclass
class RunState:
    """What stands for which token between two blocks.

    Attributes:
        plan: for each method what each block removes.
        n_prefix: tokens before the patches.
        length: tokens that entered the first block, the prefix included.
        n_left: tokens that are left of them.
        index: `[B, n_left]` int64, where the tokens that are left stood at first; None while nothing was reduced.
        assign: `[B, length]` int64, which of them carries each token that entered.
        sizes: `[B, n_left]` fp32, how many tokens each stands for.
        keys: keys of the block that runs, `[B, n_left, K]`, once they are seen; `wants_keys` while looked for.
        importance: attention gathered so far by the tokens that are left, `[B, n_left]` fp32; None while none was seen.
        query: queries of the block that runs, `[B, H, n_left, K]`, once they are seen; `key` likewise; `scoring` while
            they are looked for.
        head_scores: `[B, H]` fp32, magnitudes of the heads' outputs so far; None while none was seen.
        heads: the heads that the last block kept, if not all.
        heads_at: index of that block.
        attending: the block whose attention is to run without the heads that left; None once it did.
        rope: rotary embeddings of the block that runs, where its queries and keys are still to be turned.
        due: whether the tokens of the block that runs are still to be reduced.
        number: the block that runs, or ran last.
        traces: what happened so far.
    """

    plan: tuple[tuple[int, ...], ...]
    n_prefix: int
    length: int
    n_left: int
    index: Tensor | None = None
    assign: Tensor | None = None
    sizes: Tensor | None = None
    keys: Tensor | None = None
    wants_keys: bool = False
    importance: Tensor | None = None
    query: Tensor | None = None
    key: Tensor | None = None
    scoring: bool = False
    head_scores: Tensor | None = None
    heads: Heads | None = None
    heads_at: int = -1
    attending: int | None = None
    rope: Any = None
    due: bool = False
    number: int = -1
    traces: list[Trace] = field(default_factory=list)

    def shortened(self, x: Tensor, number: int) -> Tensor:
        """The input of block `number`, `[B, n_left, D]`, out of what reached it, whether that was restored or not.

        Raises:
            InputError: it has another number of tokens than was handed on.
        """
        if x.shape[1] == self.length and self.index is not None:
            return gather(x, self.index)
        if x.shape[1] != self.n_left:
            told = f"{self.n_left} (of {self.length}) were handed on to it; something between the blocks changes that"
            raise InputError(f"block {number} of the encoder got {x.shape[1]} tokens, but {told}")
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

    def score(self, logits: Logits, *, number: int, bias: Tensor | None) -> None:
        """Add the attention that tokens get in block `number` to what they have gathered.

        Args:
            logits: what the block's logits are made of.
            number: index of the block.
            bias: what was added to the logits, `[B, 1, 1, n_left]`.

        Raises:
            InputError: the block's queries or keys were not seen.
        """
        query, key, rope = self.query, self.key, self.rope
        self.query, self.key, self.rope, self.scoring = None, None, None, False
        if query is None or key is None:
            raise InputError(
                f"queries and keys of block {number} were not seen, so its tokens cannot be scored; {_REPLACED}"
            )
        scores = ops.attention_importance(
            logits.turned(query, rope),
            logits.turned(key, rope),
            scale=logits.scale,
            causal=False,
            seen=None if bias is None else bias.expand(-1, 1, query.shape[2], -1),
        )
        self.importance = scores if self.importance is None else self.importance + scores

    def reduce(self, reducer: BlockReducer, x: Tensor, *, number: int, r: int, place: str) -> Tensor:
        """Let a method take `r` tokens of `x` `[B, n_left, D]` away; appends a trace.

        Raises:
            InputError: the method's answer does not fit, or the block's keys were not seen.
        """
        started = time.perf_counter()
        if self.keys is None:
            raise InputError(
                f"the keys of block {number} were not seen, so {reducer.name} has nothing to go by; {_REPLACED}"
            )
        n_in = self.n_left
        protected = torch.zeros(n_in, dtype=torch.bool, device="cpu")
        protected[: self.n_prefix] = True
        budget = Budget(n_in - r, n_in - r)
        importance = self.importance if reducer.method.uses_attention_scores else None
        signals = BlockSignals(number, self.keys, self.sizes, protected, importance)
        answer = ask(reducer.method, SITE, signals, budget, shape=x.shape, n_prefix=self.n_prefix)
        x = self._take(answer, x, reducer.backend)
        assign = self.assign
        assert assign is not None
        self.traces.append(
            Trace(
                SITE,
                number,
                reducer.name,
                n_in=(n_in - self.n_prefix,) * x.shape[0],
                n_out=(self.n_left - self.n_prefix,) * x.shape[0],
                assignment=assign[:, self.n_prefix :] - self.n_prefix,
                place=place,
                overhead_ms=(time.perf_counter() - started) * 1e3,
            )
        )
        return x

    def skip(self, reducer: BlockReducer, *, number: int, n_rows: int) -> None:
        """Note that a method takes nothing away in a block."""
        count = (self.n_left - self.n_prefix,) * n_rows
        reason = "the schedule removes no tokens in this block"
        self.traces.append(Trace(SITE, number, reducer.name, count, count, status="skipped", reason=reason))

    def _take(self, answer: Reduction, x: Tensor, backend: str) -> Tensor:
        """Apply a reduction to `x` and to everything that is carried along."""
        if isinstance(answer, Merge):
            merged = ops.merge_tokens(
                x, answer.assign, n_out=answer.index.shape[1], weight=answer.weight, backend=backend
            )
            x, carries = merged.tokens, answer.assign
            # A mean of other weights leaves it open how many tokens there were.
            counted = answer.weight is self.sizes or (self.index is None and answer.weight is None)
            self.sizes = merged.size if counted else Merge(answer.index, answer.assign, self.sizes).sizes()
        else:
            carries = answer.source(length=x.shape[1])
            carries[:, self.n_prefix :].clamp_(min=self.n_prefix)  # a patch is carried by a patch
            x = answer.apply(x)
            self.sizes = None if self.sizes is None else gather(self.sizes, answer.index)
        if self.importance is not None and isinstance(answer, Merge):
            gathered = self.importance.new_zeros(answer.index.shape)
            self.importance = gathered.scatter_add_(1, answer.assign, self.importance)
        elif self.importance is not None:
            self.importance = gather(self.importance, answer.index)
        if self.keys is not None and len(self.plan) > 1:  # another method may go by them
            self.keys = gather(self.keys, answer.index)
        self.index = answer.index if self.index is None else gather(self.index, answer.index)
        self.assign = carries if self.assign is None else gather(carries, self.assign)
        self.n_left = answer.index.shape[1]
        return x


@dataclass
class Forward:
    """State of one forward of one patched encoder.

    Attributes:
        owner: whose forward it is.
        outer: the forward that it takes place in.
        direct: whether its first block opened it.
        run: the pass that is going on.
        begun: whether the first block ran.
        last: the pass that is going on, or was last.
    """

    owner: Engine
    outer: "Forward | None"
    direct: bool
    run: RunState | None = None
    begun: bool = False
    last: RunState | None = None


_CURRENT: ContextVar[Forward | None] = ContextVar("tokenprune_encoder", default=None)


def open_forward(engine: Engine, *, direct: bool) -> None:
    """Begin a forward of `engine`; what an interrupt left of an earlier one goes."""
    outer = _CURRENT.get()
    while outer is not None and outer.owner is engine:
        outer = outer.outer
    _CURRENT.set(Forward(engine, outer, direct))


def close_forward(engine: Engine) -> Forward | None:
    """End the forward of `engine` if there is one, and tell what it was."""
    if (state := _CURRENT.get()) is None or state.owner is not engine:
        return None
    _CURRENT.set(state.outer)
    return state


def begin(engine: Engine, run: RunState | None) -> None:
    """Note that the first block runs; None where nothing is to be reduced."""
    state = _CURRENT.get()
    if state is None or state.owner is not engine or state.direct:
        if run is None:
            close_forward(engine)
            return
        open_forward(engine, direct=True)
        state = _CURRENT.get()
    assert state is not None
    state.run = state.last = run
    state.begun = True


def end(engine: Engine) -> None:
    """Note that no further block runs."""
    state = _CURRENT.get()
    if state is not None and state.owner is engine:
        state.run = None
        if state.direct:
            _CURRENT.set(state.outer)


def run_of(engine: Engine) -> RunState | None:
    """The pass of `engine` that is going on."""
    state = _CURRENT.get()
    return state.run if state is not None and state.owner is engine else None


def entered(engine: Engine, number: int) -> RunState | None:
    """The pass that block `number` is to take part in. Blocks called by other code than the host's forward make one as
    long as they are called in order: a block that is not the next one is called for itself."""
    run = run_of(engine)
    if run is None:
        return None
    if number != run.number + 1 and is_direct(engine):
        end(engine)
        return None
    run.number = number
    return run


def is_direct(engine: Engine) -> bool:
    """Whether the blocks are called by other code than the host's forward."""
    state = _CURRENT.get()
    return state is not None and state.owner is engine and state.direct
