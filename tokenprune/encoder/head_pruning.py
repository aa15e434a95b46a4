"""Pruned heads inside the blocks of a vision encoder: attention of the kept ones alone.

While a model is patched, a module of the attention's own class and with its whole state stands in every block in the
place of the attention. Where heads are pruned it computes the attention out of the parts that the family's row names
(:class:`tokenprune.upstream.tower.Attending`), and else what the attention computes. Where all rows keep the same heads
and the projections are plain linear layers, these are cut to the kept heads too.
"""

import copy
import inspect
from dataclasses import dataclass, replace
from functools import cache, partial
from operator import attrgetter
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.nn import functional

from tokenprune.decode.heads import Heads, count_heads, heads_of, note_magnitude
from tokenprune.encoder import run_state
from tokenprune.encoder.block_check import Block
from tokenprune.encoder.block_split import agree, attempt, first_of
from tokenprune.encoder.run_state import SITE
from tokenprune.errors import OptionError, UnsupportedModelError
from tokenprune.hooks import Hook
from tokenprune.session import Session
from tokenprune.signals import AttentionPlan
from tokenprune.upstream.attention import not_plain
from tokenprune.upstream.encoders import BlockCall
from tokenprune.upstream.tower import Attending, Logits, Tower, averaged, child, is_wrapped

_OTHER = "its attention is not made of the projections, norms and biases found in it"


@dataclass(frozen=True)
class FewerHeads:
    """The attention of one block, without pruned heads.

    Attributes:
        session: that of the patched model.
        block: the block.
        module: its attention.
        names: what the attention's arguments are called.
        tower: its kind.
        parts: what the attention is made of.
        logits: scale and rotation of its logits.
        plan: which share of the heads each block keeps.
    """

    session: Session
    block: Block
    module: Any
    names: tuple[str, ...]
    tower: Tower
    parts: Attending
    logits: Logits
    plan: AttentionPlan

    def attend(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """What the attention gives without pruned heads; None where it is to run as it is."""
        run, number = run_state.reducing(self.session), self.block.number
        if run is None or run.number != number or "attention" not in run.due:
            return None
        run.due.discard("attention")
        heads = heads_of(run, self.plan, layer=number)
        output, run.seen, magnitude = self.compute(args, kwargs, heads)
        note_magnitude(run, magnitude, heads)
        return output

    def compute(
        self, args: tuple[Any, ...], kwargs: dict[str, Any], heads: Heads | None
    ) -> tuple[Any, dict[str, Tensor], Tensor]:
        """The attention of `heads` (None: of all) for the arguments of its forward.

        Returns:
            What it gives; what it has read, as in :class:`RunState`, of these heads; the magnitudes of what they gave,
            `[B, n]` fp32.
        """
        call = BlockCall(self.tower, self.names, args, kwargs)
        x, index = call.states, None
        if heads is not None and heads.common is not None and self.whole() is None:
            index = heads.index[0].to(x.device)
        query, key, value = self._projected(x, index)
        if heads is not None:
            query, key, value = map(heads.take, (query, key, value))
        if self.parts.norms:
            query, key = (self._part(name)(one) for name, one in zip(self.parts.norms, (query, key), strict=True))
        rope, keys = _by_head(call.rope, heads, len(x)), averaged(key, 1)
        query, key = self.logits.turned(query, rope), self.logits.turned(key, rope)
        states, weights = self._attended(query, key, value, _by_head(call.mask, heads, len(x)))
        output: Any = self._put_out(states, heads, index)
        if self.parts.paired:
            output = (output, weights if weights is None or heads is None else heads.widen(weights))
        magnitude = states.detach().float().abs().sum((2, 3))
        return output, {"keys": keys, "query": query, "key": key}, magnitude

    def whole(self) -> str | None:
        """Why the projections are not cut, None where they are."""
        for name in (*self.parts.inward, self.parts.outward):
            if (reason := not_plain(self._part(name))) is not None:
                return f"{name} {reason}"
        return None

    def _part(self, name: str) -> Any:
        return attrgetter(name)(self.module)

    def _projected(self, x: Tensor, index: Tensor | None) -> list[Tensor]:
        """Queries, keys and values `[B, n, N, K]` of `x` `[B, N, D]`, of the heads at `index` `[n]` or of all."""
        bias = torch.cat([self._part(name) for name in self.parts.biases]) if self.parts.biases else None
        n_parts, found = 3 // len(self.parts.inward), list[Tensor]()

        def cut(parameter: Any) -> Any:
            by_head = (n_parts, self.parts.n_heads, -1)
            return None if parameter is None else parameter.unflatten(0, by_head)[:, index].flatten(0, 2)

        for name in self.parts.inward:
            linear = self._part(name)
            if index is not None:
                product = functional.linear(x, cut(linear.weight), cut(linear.bias if bias is None else bias))
            else:
                product = linear(x) if bias is None else linear(x) + bias
            n_heads = self.parts.n_heads if index is None else len(index)
            found += product.view(*x.shape[:2], n_parts, n_heads, -1).permute(2, 0, 3, 1, 4).unbind()
        return found

    def _attended(self, query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None) -> tuple[Tensor, Tensor | None]:
        """What the heads give, `[B, n, N, K]`, and where the attention is not fused their probabilities too."""
        dropout = self.parts.dropout(self.module) if self.module.training else 0.0
        if not self.parts.plain(self.module):
            attend = functional.scaled_dot_product_attention
            return attend(query, key, value, mask, dropout, scale=self.logits.scale), None
        logits = query @ key.transpose(2, 3) * self.logits.scale
        if mask is not None:
            logits = logits.masked_fill(~mask, float("-inf")) if mask.dtype == torch.bool else logits + mask
        weights = functional.dropout(logits.softmax(-1, dtype=torch.float32).to(query.dtype), dropout)
        return weights @ value, weights

    def _put_out(self, states: Tensor, heads: Heads | None, index: Tensor | None) -> Tensor:
        """What the attention makes of its heads `[B, n, N, K]`."""
        output = self._part(self.parts.outward)
        if index is not None:
            weight = output.weight.unflatten(1, (self.parts.n_heads, -1))[:, index].flatten(1)
            output = partial(functional.linear, weight=weight, bias=output.bias)
        elif heads is not None:
            states = heads.widen(states)
        x = output(states.transpose(1, 2).flatten(2))
        for name in self.parts.last:
            x = self._part(name)(x)
        return cast(Tensor, x)


def _by_head(x: Any, heads: Heads | None, n_rows: int) -> Any:
    """What the kept heads see of a mask or of rotary embeddings that may have an axis of heads, the third last one."""
    if isinstance(x, tuple):
        return tuple(_by_head(one, heads, n_rows) for one in x)
    if heads is None or x is None or x.ndim < 3 or x.shape[-3] != heads.total:
        return x
    return heads.take(x.expand(n_rows, *x.shape[-3:]))


def plan_heads(session: Session, tower: Tower, host: nn.Module, blocks: list[Block]) -> dict[int, FewerHeads]:
    """What stands in for the attention of each block, if heads are pruned. Every block is tried on random tokens.

    Args:
        session: that of the patched model.
        tower: the kind of the encoder.
        host: the encoder.
        blocks: its blocks.

    Raises:
        OptionError: two methods prune heads.
        UnsupportedModelError: an attention cannot do with fewer heads.
    """
    methods = session.methods_at(SITE)
    plans = [(method.name, plan) for method in methods if (plan := method.attention_plan(len(blocks))) is not None]
    if not plans:
        return {}
    if len(plans) > 1:
        raise OptionError(
            f"methods {plans[0][0]!r} and {plans[1][0]!r} both prune heads; only one can, so give the other one "
            "heads=1.0"
        )
    (_, plan), *_ = plans
    found, whole = dict[int, FewerHeads](), dict[str, list[str]]()
    for block in blocks:
        attention: Any = child(block.module, tower.parts[1])
        cause = None
        parts = "it has no attention of its own" if attention is None else tower.attending(attention)
        if isinstance(parts, str):
            reason = parts
        else:
            names, logits = tuple(inspect.signature(attention.forward).parameters), cast(Logits, block.logits)
            fewer = FewerHeads(session, block, attention, names, tower, parts, logits, plan)
            try:
                reason = _refusal(found.setdefault(block.number, fewer), host, total=found[0].parts.n_heads)
            except Exception as error:  # what others' code raises on parts that are not what they seem is open
                reason, cause = f"{_OTHER} ({error!r})", error
        if reason:
            what = f"block {block.number} ({type(block.module).__name__}) of {type(host).__name__}"
            raise UnsupportedModelError(f"{what} cannot prune heads: {reason}; heads=1.0 works") from cause
        pruned = count_heads(plan.heads[block.number], fewer.parts.n_heads) < fewer.parts.n_heads
        if pruned and (kept := fewer.whole()) is not None:
            whole.setdefault(kept, []).append(str(block.number))
    n_heads = found[0].parts.n_heads
    counts = ", ".join(str(count_heads(fraction, n_heads)) for fraction in plan.heads)
    session.remark(f"Blocks 0 to {len(blocks) - 1} keep {counts} of {n_heads} heads.")
    for reason, numbers in whole.items():
        session.remark(
            f"Blocks {', '.join(numbers)} project all heads, because {reason}; pruned ones are zeroed, not skipped."
        )
    return found


def _refusal(fewer: FewerHeads, host: nn.Module, *, total: int) -> str:
    """Why an attention is not what `fewer` makes of its parts, "" where it is."""
    if is_wrapped(fewer.module):
        return "its attention has a forward of its own"
    if fewer.parts.n_heads != total:
        return f"it has {fewer.parts.n_heads} heads, and block 0 has {total}"
    x, kwargs = fewer.tower.sample(host, fewer.block.module, fewer.block.number)
    if fewer.tower.mask in kwargs:
        kwargs[fewer.tower.mask] = x.new_ones(2, 1, 1, x.shape[1]).cumsum(3).log()
    same: list[bool] = []

    def compare(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> None:
        ours = first_of(fewer.compute(args, kwargs, None)[0])
        same.append(isinstance(output, tuple) == fewer.parts.paired and agree(ours, first_of(output)))

    attempt(fewer.block.module, x, kwargs, Hook(fewer.module, "post", compare))
    if len(same) != 1:
        return f"one call of its attention was looked for, and there were {len(same)}"
    return "" if same[0] else _OTHER


@cache
def _kind(kind: type[nn.Module]) -> Any:
    """The class of what stands in for an attention of class `kind`. Copies and pickles are the attention itself,
    replicas of ``DataParallel`` stand in for one."""

    def forward(self: Any, *args: Any, **kwargs: Any) -> Any:
        found = self.ask(args, kwargs)
        return kind.forward(self, *args, **kwargs) if found is None else found

    def replicate(self: Any) -> Any:
        attention = self.standing_for._replicate_for_data_parallel()
        return standing_in(replace(self.fewer, module=attention))

    members = {
        "__slots__": ("ask", "fewer", "standing_for"),
        "__module__": kind.__module__,
        "__qualname__": kind.__qualname__,
        "__doc__": kind.__doc__,
        "__deepcopy__": lambda self, memo: copy.deepcopy(self.standing_for, memo),
        "__reduce_ex__": lambda self, protocol: (_itself, (self.standing_for,)),
        "_replicate_for_data_parallel": replicate,
        "forward": forward,
    }
    return type(kind.__name__, (kind,), members)


def standing_in(fewer: FewerHeads) -> Any:
    """A module with the whole state of an attention (parameters, hooks, flags), which asks `fewer` first."""
    attention = fewer.module
    found = object.__new__(_kind(cast(Any, type(attention))))
    disable: Any = torch.compiler.disable  # here, for it imports torch's compiler
    own = {"standing_for": attention, "fewer": fewer, "ask": disable(fewer.attend)}
    for name, value in {"__dict__": attention.__dict__, **own}.items():
        object.__setattr__(found, name, value)
    return found


def _itself(attention: Any) -> Any:
    return attention
