"""The adapter of vision transformers: tokens are merged or dropped inside the blocks, between attention and MLP.

The class and register tokens come first and always go on. Blocks without that place (post-norm, parallel) reduce at
their end instead; the trace says so. Attention counts a merged token by its size through the block's own mask argument,
so that fused attention stays on.

Whoever may look at what a block returns (a caller that goes around the host's forward, such as
``forward_intermediates``; hooks of others, such as those behind ``output_hidden_states``; the code behind the last
block) finds all tokens there, each with the value of the one that stands for it. The next block takes the reduced
tokens out again.
"""

from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from tokenprune.encoder import run_state
from tokenprune.encoder.block_check import Block, block_of
from tokenprune.encoder.block_split import first_argument, first_of, reading, replace_in_place
from tokenprune.encoder.head_pruning import FewerHeads, plan_heads
from tokenprune.encoder.reducers import SITE, is_proportional, is_scored, reducers_of, restores
from tokenprune.encoder.run_state import RunState
from tokenprune.engine import Engine, Hook, Swap
from tokenprune.errors import InputError, OptionError
from tokenprune.signals import Trace
from tokenprune.upstream.encoders import BlockCall, lengths_in
from tokenprune.upstream.tower import Tower

BETWEEN, END = "between attention and MLP", "at the end of the block"


class EncoderAdapter:
    """Sites of a vision encoder whose blocks stand in a row and see all tokens.

    Args:
        host: the module that holds the blocks.
        tower: its row.
        n_used: how many of its blocks to reduce in; None for all. The others get all tokens back.
    """

    def __init__(self, host: nn.Module, tower: Tower, *, n_used: int | None = None) -> None:
        self.host = host
        self.tower = tower
        self.n_used = n_used
        self.blocks = tower.blocks(host)[:n_used]

    @property
    def family(self) -> str:
        """Name of the family."""
        return self.tower.name

    @property
    def modules(self) -> tuple[nn.Module, ...]:
        """Modules that get hooks."""
        return (self.host, *self.blocks)

    def preflight(self, *, sites: tuple[str, ...], positions: str) -> None:
        """Check that the encoder has `sites`.

        Raises:
            OptionError: it has not.
        """
        if SITE not in sites:
            raise OptionError(
                f"{type(self.host).__name__} is a vision encoder ({self.family}), and what was asked for acts on "
                f"the visual tokens of a language model (at {', '.join(sites)}); a vision encoder takes "
                '"tome" (r=13 or keep=0.5) or "spatten" (tokens=0.6)'
            )
        if positions != "original":
            raise OptionError(
                f"positions={positions!r} was asked for, but the tokens of a vision encoder keep their positions; use "
                'positions="original"'
            )

    def hooks(self, engine: Engine, *, alone: bool = True) -> list[Hook | Swap]:
        """The hooks that make `engine` act on the encoder. Every block is tried on a few random tokens.

        Args:
            engine: the session.
            alone: whether the encoder is the whole model, so that every method has to take part in it.

        Raises:
            OptionError: a method's options do not fit the encoder.
            UnsupportedModelError: a block cannot be reduced.
        """
        reducers = reducers_of(engine)
        elsewhere = {one.name for one in engine.reducers("before_llm")} | {one.name for one in engine.layer_reducers()}
        if alone and (idle := elsewhere - {reducer.name for reducer in reducers}):
            raise OptionError(
                f"{type(self.host).__name__} is a vision encoder ({self.family}) with the site {SITE!r} only, where "
                f"{sorted(idle)} take no part"
            )
        n_tokens = self.tower.patches(self.host)
        for reducer in reducers:
            if n_tokens or reducer.method.uses_attention_scores:
                reducer.method.removals(n_layers=len(self.blocks), n_tokens=n_tokens)
        proportional, scored = is_proportional(reducers), is_scored(reducers)
        implementation = self.tower.implementation(self.host)
        if proportional and implementation not in ("sdpa", "eager"):
            raise OptionError(
                f"proportional=True adds sizes to the attention logits, and attn_implementation={implementation!r} has "
                'no argument for them; use model.set_attn_implementation("sdpa") or proportional=False'
            )
        what = {"proportional": proportional, "scored": scored}
        blocks = [block_of(self.tower, self.host, number, module, **what) for number, module in enumerate(self.blocks)]
        hooks: list[Hook | Swap] = [
            Hook(self.host, "pre", lambda module, args, kwargs: run_state.open_forward(engine, direct=False)),
            Hook(self.host, "post", lambda module, args, kwargs, output: self._end(engine, output)),
        ]
        fewer = plan_heads(engine, self.tower, self.host, [(block.module, block.logits) for block in blocks])
        for number, block in enumerate(blocks):
            hooks += self._block_hooks(engine, number, block, fewer.get(number))
        return hooks

    def _block_hooks(
        self, engine: Engine, number: int, block: Block, fewer: FewerHeads | None = None
    ) -> list[Hook | Swap]:
        """The hooks of one block and of its parts. One with `fewer` heads hands its keys and queries over itself."""

        def before(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
            call = BlockCall(self.tower, block.names, args, kwargs)
            if number == 0:
                self._begin(engine, call)
            run = run_state.entered(engine, number)
            if run is None:
                return None
            run.keys, run.wants_keys = None, engine.forced or any(plan[number] for plan in run.plan)
            run.query, run.key, run.scoring = None, None, block.logits is not None and self._scores(engine, run, number)
            run.attending, run.due = None if fewer is None else number, True
            x = run.shortened(call.states, number)
            if run.index is not None or run.wants_keys or fewer is not None:
                call.shorten(run.index, n_prefix=run.n_prefix, length=run.length, mask=self._bias(engine, run, x))
            run.rope = None if fewer is not None else call.rope  # its queries are turned already
            return (x,), call.others

        def between(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
            run = run_state.run_of(engine)
            if run is not None and run.due:
                given = first_argument(args, kwargs)
                x = self._reduced(engine, number, block, run, given)
                if x is not given:
                    replace_in_place(given, x)

        def after(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> Any:
            run = run_state.run_of(engine)
            if run is None or output is None:
                run_state.end(engine)
                return None
            try:
                return self._after(engine, number, block, run, output)
            except BaseException:
                run_state.end(engine)
                raise

        def wants(what: str) -> bool:
            run = run_state.run_of(engine)
            return run is not None and bool(getattr(run, what))

        def keep_keys(keys: Tensor) -> None:
            if (run := run_state.run_of(engine)) is not None:
                run.keys, run.wants_keys = keys, False

        def keep(name: str, x: Tensor) -> None:
            setattr(run_state.run_of(engine), name, x)

        hooks: list[Hook | Swap] = [Hook(block.module, "pre", before), Hook(block.module, "first", after)]
        hooks += [Hook(block.middle, "pre", between)] if block.middle is not None else ()
        if fewer is not None:
            return [*hooks, fewer.swap()]
        if block.logits is not None:
            scoring = partial(wants, "scoring")
            hooks += [reading(getattr(block.logits, one), scoring, partial(keep, one)) for one in ("query", "key")]
        return [*hooks, reading(block.keys, partial(wants, "wants_keys"), keep_keys)]

    def _begin(self, engine: Engine, call: BlockCall) -> None:
        """Open a pass, unless there is a reason not to, which then is left in the traces.

        Raises:
            InputError: the encoder is no longer what was patched.
        """
        if not engine.active:
            run_state.begin(engine, None)
            return
        if self.tower.blocks(self.host)[: self.n_used] != self.blocks:
            raise InputError(
                f"the blocks of {type(self.host).__name__} are not those that were patched ({len(self.blocks)}); after "
                "a change of them call tokenprune.patch again"
            )
        if torch.is_grad_enabled() and (reason := self.tower.refusal(self.host)):
            raise InputError(f"the encoder was patched, and since then it changed: {reason}")
        reducers, n_prefix, length = reducers_of(engine), self.tower.prefix(self.host), call.states.shape[1]
        reason = ""
        if call.hides:
            reason = "an attention mask hides tokens, which must not be merged with others"
        elif call.is_causal:
            reason = "attention is causal here"
        elif length <= n_prefix or not call.states.numel():
            reason = "empty input"
        if reason:
            engine.publish(tuple(Trace(SITE, None, one.name, status="skipped", reason=reason) for one in reducers))
            run_state.begin(engine, None)
            return
        plan = tuple(one.method.removals(n_layers=len(self.blocks), n_tokens=length - n_prefix) for one in reducers)
        run_state.begin(engine, RunState(plan, n_prefix, length, length))

    def _end(self, engine: Engine, output: Any) -> None:
        """End a forward.

        Raises:
            InputError: not all blocks took part, or the host returns fewer tokens than it has to.
        """
        state = run_state.close_forward(engine)
        if output is None or state is None or not self.blocks:
            return
        run, host, last = state.last, type(self.host).__name__, len(self.blocks) - 1
        if not state.begun or (run is not None and run.number != last):
            told = (
                f"block {run.number} of blocks 0 to {last} was the last one" if run is not None else "none was called"
            )
            raise InputError(f"the forward of {host} was to call all blocks that were patched: {told}")
        if run is not None and restores(reducers_of(engine)):
            short = run.shorter - {run.length - run.n_prefix}
            if found := short & lengths_in(output, self.tower.width(self.host)):
                raise InputError(
                    f"{host} returned hidden states of {sorted(found)} tokens, where all {run.length} were to be "
                    "restored; something between its blocks and its output changes that"
                )

    def _bias(self, engine: Engine, run: RunState, x: Tensor) -> Tensor | None:
        """What a block's logits get added, `[B, 1, 1, n_left]`."""
        counts = run.n_left < run.length and is_proportional(reducers_of(engine))
        return run.size_mask(x) if counts else None

    def _scores(self, engine: Engine, run: RunState, number: int) -> bool:
        """Whether a method goes by the attention that tokens get in block `number`, in this or a later block."""
        pairs = zip(reducers_of(engine), run.plan, strict=True)
        return any(one.method.uses_attention_scores and (engine.forced or any(plan[number:])) for one, plan in pairs)

    def _reduced(self, engine: Engine, number: int, block: Block, run: RunState, x: Tensor) -> Tensor:
        """What is left of a block's tokens `x` `[B, n_left, D]`.

        Raises:
            InputError: a method's answer does not fit, or what it goes by was not seen.
        """
        run.due = False
        if run.attending is not None:
            raise InputError(f"the attention of block {number} was not called, so its heads cannot leave")
        if run.scoring and block.logits is not None:
            run.score(block.logits, number=number, bias=self._bias(engine, run, x))
        for reducer, plan in zip(reducers_of(engine), run.plan, strict=True):
            left = run.n_left - run.n_prefix
            r = min(plan[number], left - 1 if reducer.method.uses_attention_scores else left // 2)
            if r or engine.forced:
                x = run.reduce(reducer, x, number=number, r=r, place=END if block.middle is None else BETWEEN)
                continue
            run.skip(reducer, number=number, n_rows=x.shape[0])
        run.keys = run.rope = None
        return x

    def _after(self, engine: Engine, number: int, block: Block, run: RunState, output: Any) -> Any:
        """What a block returns, its tokens reduced if they are not yet; publishes the traces."""
        x, last = first_of(output), number == len(self.blocks) - 1
        if not isinstance(x, Tensor) or x.shape[1:2] != (run.n_left,):
            found = f"a tensor {list(x.shape)}" if isinstance(x, Tensor) else type(x).__name__
            raise InputError(f"block {number} of the encoder returned {found}, but {run.n_left} tokens were left in it")
        if run.due and block.middle is not None:
            raise InputError(f"the norm before the MLP of block {number} was not called, so no token can leave there")
        if run.due:
            x = self._reduced(engine, number, block, run, x)
        engine.publish(tuple(run.traces))
        watched = run_state.is_direct(engine) or len(block.module._forward_hooks) > 1
        if (watched or (last and not self.tower.pooled(self.host))) and restores(reducers_of(engine)):
            x = run.restored(x)
        if last:
            run_state.end(engine)
        return (x, *output[1:]) if isinstance(output, tuple) else x
