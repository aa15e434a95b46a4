"""The hooks of one block of a vision encoder and of its parts."""

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any

from torch import Tensor, nn

from tokenprune.encoder import run_state
from tokenprune.encoder.block_check import Block
from tokenprune.encoder.block_split import first_argument, first_of, reading, replace_in_place
from tokenprune.encoder.head_pruning import FewerHeads
from tokenprune.encoder.reducers import methods_of, restores
from tokenprune.encoder.run_state import RunState
from tokenprune.errors import InputError
from tokenprune.hooks import Hook, Swap
from tokenprune.session import Session
from tokenprune.upstream.encoders import BlockCall
from tokenprune.upstream.tower import Tower

BETWEEN, END = "between attention and MLP", "at the end of the block"


@dataclass(frozen=True)
class BlockHooks:
    """What happens to the tokens in one block.

    Attributes:
        session: the session.
        tower: the row of the encoder.
        host: the encoder.
        block: the block.
        fewer: its attention without pruned heads, None where all heads are kept.
        last: whether it is the last block.
        begin: called with what the first block is called with, before anything else.
    """

    session: Session
    tower: Tower
    host: nn.Module
    block: Block
    fewer: FewerHeads | None
    last: bool
    begin: Callable[[BlockCall], None]

    def hooks(self) -> list[Hook | Swap]:
        """The hooks. An attention with fewer heads hands its keys and queries over itself."""
        block, logits = self.block, self.block.logits
        hooks: list[Hook | Swap] = [Hook(block.module, "pre", self._before), Hook(block.module, "first", self._after)]
        hooks += [Hook(block.middle, "pre", self._between)] if block.middle is not None else ()
        if self.fewer is not None:
            return [*hooks, self.fewer.swap()]
        read = (
            {"keys": block.keys} if logits is None else {"keys": block.keys, "query": logits.query, "key": logits.key}
        )
        for name, keys in read.items():
            hooks.append(reading(keys, partial(self._note, name), wanted=partial(self._is_due, name)))
        return hooks

    def _is_due(self, name: str) -> bool:
        run = run_state.run_of(self.session)
        return run is not None and name in run.due

    def _note(self, name: str, x: Tensor) -> None:
        if (run := run_state.run_of(self.session)) is not None:
            run.note(name, x)

    def _before(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        call, number = BlockCall(self.tower, self.block.names, args, kwargs), self.block.number
        if number == 0:
            self.begin(call)
        run = run_state.run_of(self.session)
        if run is None:
            return None
        if run.direct and number != run.number + 1:  # it is called for itself
            run_state.end(self.session)
            return None
        run.number, run.due = number, {"tokens"}
        if self.session.forced or any(plan[number] for plan in run.plan):
            run.due.add("keys")
        if self._scores(run):
            run.due |= {"query", "key"}
        if self.fewer is not None:
            run.due.add("attention")
        x = run.shortened(call.states)
        if run.index is not None or run.due & {"keys", "attention"}:
            call.shorten(run.index, n_prefix=run.n_prefix, length=run.length, mask=self._bias(run, x))
        run.rope = call.rope if self.fewer is None else None  # its queries are turned already
        return (x,), call.others

    def _between(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        run = run_state.run_of(self.session)
        if run is not None and "tokens" in run.due:
            given = first_argument(args, kwargs)
            x = self._reduced(run, given)
            if x is not given:
                replace_in_place(given, x)

    def _after(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> Any:
        run = run_state.run_of(self.session)
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
        if not isinstance(x, Tensor) or x.shape[1:2] != (run.n_left,):
            found = f"a tensor {list(x.shape)}" if isinstance(x, Tensor) else type(x).__name__
            raise InputError(f"block {number} of the encoder returned {found}, but {run.n_left} tokens were left in it")
        if "tokens" in run.due and self.block.middle is not None:
            raise InputError(f"the norm before the MLP of block {number} was not called, so no token can leave there")
        if "tokens" in run.due:
            x = self._reduced(run, x)
        self.session.publish(tuple(run.traces))
        watched = run.direct or len(self.block.module._forward_hooks) > 1
        if (watched or (self.last and not self.tower.pooled(self.host))) and restores(self.session):
            x = run.restored(x)
        if self.last:
            run_state.end(self.session)
        return (x, *output[1:]) if isinstance(output, tuple) else x

    def _reduced(self, run: RunState, x: Tensor) -> Tensor:
        """What is left of the block's tokens `x` `[B, n_left, D]`.

        Raises:
            InputError: a method's answer does not fit, or what it goes by was not seen.
        """
        number, logits = self.block.number, self.block.logits
        if "attention" in run.due:
            raise InputError(f"the attention of block {number} was not called, so its heads cannot leave")
        if logits is not None and self._scores(run):
            run.score(logits, bias=self._bias(run, x))
        for method, plan in zip(methods_of(self.session), run.plan, strict=True):
            n_patches = run.n_left - run.n_prefix
            r = min(plan[number], n_patches - 1 if method.uses_attention_scores else n_patches // 2)
            if r or self.session.forced:
                x = run.reduce(method, x, r=r, place=END if self.block.middle is None else BETWEEN)
            else:
                run.skip(method, len(x))
        run.due, run.seen, run.rope = set(), {}, None
        return x

    def _bias(self, run: RunState, x: Tensor) -> Tensor | None:
        """What the block's logits get added, `[B, 1, 1, n_left]`."""
        counts = run.n_left < run.length and any(method.proportional for method in methods_of(self.session))
        return run.size_mask(x) if counts else None

    def _scores(self, run: RunState) -> bool:
        """Whether a method goes by the attention that tokens receive in the block, in this or a later one."""
        forced, number = self.session.forced, self.block.number
        return any(
            method.uses_attention_scores and (forced or any(plan[number:]))
            for method, plan in zip(methods_of(self.session), run.plan, strict=True)
        )
