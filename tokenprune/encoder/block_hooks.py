"""The hooks of one block of a vision encoder and of its parts."""

from dataclasses import dataclass
from functools import partial
from typing import Any, cast

from torch import Tensor, nn

from tokenprune.encoder import run_state
from tokenprune.encoder.block_check import Block
from tokenprune.encoder.block_split import first_argument, first_of, replace_in_place
from tokenprune.encoder.head_pruning import FewerHeads, standing_in
from tokenprune.encoder.run_state import RunState
from tokenprune.errors import InputError
from tokenprune.hooks import Hook, Swap
from tokenprune.methods.base import Method
from tokenprune.reduction import gather
from tokenprune.session import Session
from tokenprune.upstream.encoders import BlockCall
from tokenprune.upstream.tower import Keys, Logits, Tower

BETWEEN, END = "between attention and MLP", "at the end of the block"


@dataclass(frozen=True)
class BlockHooks:
    """What happens to the tokens in one block.

    Attributes:
        session: that of the patched model.
        methods: those of its methods that take part.
        tower: the row of the encoder.
        host: the encoder.
        block: the block.
        fewer: its attention without pruned heads, None where all heads are kept.
    """

    session: Session
    methods: tuple[Method, ...]
    tower: Tower
    host: nn.Module
    block: Block
    fewer: FewerHeads | None

    def hooks(self) -> list[Hook | Swap]:
        """The hooks. An attention with fewer heads hands its keys and queries over itself."""
        block = self.block
        hooks: list[Hook | Swap] = [Hook(block.module, "pre", self._before), Hook(block.module, "first", self._after)]
        hooks += [Hook(block.middle, "pre", self._between)] if block.middle is not None else ()
        if self.fewer is not None:
            return [*hooks, Swap(block.module, self.tower.parts[1], standing_in(self.fewer))]
        for name, keys in block.read.items():
            hooks.append(Hook(keys.module, keys.kind, partial(self._read, name, keys)))
        return hooks

    def _read(
        self, name: str, keys: Keys, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], *output: Any
    ) -> None:
        run, x = run_state.reducing(self.session), output[0] if output else first_argument(args, kwargs)
        if run is not None and x is not None:
            run.seen[name] = keys.read(x)

    def _before(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        run, number = run_state.reducing(self.session), self.block.number
        if run is None:
            return None
        if run.direct and number != run.number + 1:  # it is called by itself
            return run_state.end(self.session)
        call = BlockCall(self.tower, self.block.names, args, kwargs)
        run.number, run.due = number, {"tokens"} if self.fewer is None else {"tokens", "attention"}
        x, run.bias = run.shortened(call.states), None
        if run.sizes is not None and run.n_left < run.length and any(one.proportional for one in self.methods):
            run.bias = run.sizes.log()[:, None, None].to(x.dtype)
        call.shorten(run.index, n_prefix=run.n_prefix, length=run.length, mask=run.bias)
        run.rope = call.rope if self.fewer is None else None  # its queries are turned already
        return (x,), call.others

    def _between(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        run = run_state.reducing(self.session)
        if run is not None and "tokens" in run.due:
            given = first_argument(args, kwargs)
            x = self._reduced(run, given)
            if x is not given:
                replace_in_place(given, x)

    def _after(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> Any:
        run = run_state.reducing(self.session)
        if run is None or output is None:
            run_state.end(self.session)
            return None
        try:
            return self._handed_on(run, output)
        except BaseException:
            run_state.end(self.session)
            raise

    def _handed_on(self, run: RunState, output: Any) -> Any:
        """What the block returns, its tokens reduced if they are not yet; publishes the traces."""
        x, number = first_of(output), self.block.number
        last = number == len(run.plan[0]) - 1
        if not isinstance(x, Tensor) or x.shape[1:2] != (run.n_left,):
            found = f"a tensor {list(x.shape)}" if isinstance(x, Tensor) else type(x).__name__
            raise InputError(f"block {number} of the encoder returned {found}, but {run.n_left} tokens were left in it")
        if "tokens" in run.due and self.block.middle is not None:
            raise InputError(f"the norm before the MLP of block {number} was not called, so no token can be dropped")
        if "tokens" in run.due:
            x = self._reduced(run, x)
        self.session.publish(tuple(run.traces))
        watched = run.direct or len(self.block.module._forward_hooks) > 1
        whole = (watched or (last and not self.tower.pooled(self.host))) and all(one.restore for one in self.methods)
        if whole and run.assign is not None:
            x = gather(x, run.assign)
        if last:
            run_state.end(self.session)
        return (x, *output[1:]) if isinstance(output, tuple) else x

    def _reduced(self, run: RunState, x: Tensor) -> Tensor:
        """What is left of the block's tokens `x` `[B, n_left, D]`.

        Raises:
            InputError: a method's answer does not fit, or what it goes by was not seen.
        """
        number, forced = self.block.number, self.session.forced
        if "attention" in run.due:
            raise InputError(f"the attention of block {number} was not called, so its heads cannot be pruned")
        pairs = list(zip(self.methods, run.plan, strict=True))
        if any(method.uses_attention_scores and (forced or any(plan[number:])) for method, plan in pairs):
            run.score(cast(Logits, self.block.logits))
        for method, plan in pairs:
            n_patches = run.n_left - run.n_prefix
            r = min(plan[number], n_patches - 1 if method.uses_attention_scores else n_patches // 2)
            if r or forced:
                x = run.reduce(method, x, r=r, place=END if self.block.middle is None else BETWEEN)
            else:
                reason = "the schedule removes no tokens in this block"
                run.trace(method, len(x), run.n_left, status="skipped", reason=reason)
        run.due, run.seen, run.bias, run.rope = set(), {}, None, None
        return x
