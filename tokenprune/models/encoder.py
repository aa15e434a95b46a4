"""The adapter of vision transformers: tokens are merged or dropped inside the blocks, between attention and MLP.

The class and register tokens come first and always go on. Blocks without that place (post-norm, parallel) reduce at
their end instead; the trace says so. Attention counts a merged token by its size through the block's own mask argument,
so that fused attention stays on.

Whoever may look at what a block returns (a caller that goes around the host's forward, such as
``forward_intermediates``; hooks of others, such as those behind ``output_hidden_states``; the code behind the last
block) finds all tokens there, each with the value of the one that stands for it. The next block takes the reduced
tokens out again.
"""

import inspect
from dataclasses import dataclass
from functools import partial
from typing import Any, cast

import torch
from torch import Tensor, nn

from tokenprune.errors import InputError, OptionError, UnsupportedModelError
from tokenprune.models import passage
from tokenprune.models.base import Engine, Hook, Swap
from tokenprune.models.block_logits import disagreement
from tokenprune.models.encoder_heads import FewerHeads, plan_heads
from tokenprune.models.half_block import become, first_of, has_halves, hooked, still
from tokenprune.models.passage import SITE, BlockReducer, Passage
from tokenprune.models.tower import Keys, Logits, Tower, child, shorten_rope
from tokenprune.signals import Trace

BETWEEN, END = "between attention and MLP", "at the end of the block"


@dataclass(frozen=True)
class _Block:
    """A block, the norm behind which its second half begins where it has such, where its keys are read, what its logits
    are made of where a method asks for that, and what its forward's arguments are called."""

    module: nn.Module
    middle: nn.Module | None
    keys: Keys
    logits: Logits | None
    names: tuple[str, ...]


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
        reducers = _reducers(engine)
        elsewhere = {one.name for one in engine.reducers("before_llm")} | {one.name for one in engine.layer_reducers()}
        if alone and (idle := elsewhere - {reducer.name for reducer in reducers}):
            raise OptionError(
                f"{type(self.host).__name__} is a vision encoder ({self.family}) with the site {SITE!r} only, where "
                f"{sorted(idle)} take no part"
            )
        n_tokens = self.tower.patches(self.host)
        for reducer in reducers:
            if n_tokens or reducer.method.scored:
                reducer.method.removals(n_layers=len(self.blocks), n_tokens=n_tokens)
        proportional, scored = passage.is_proportional(reducers), passage.is_scored(reducers)
        implementation = getattr(getattr(self.host, "config", None), "_attn_implementation", None) or "sdpa"
        if proportional and implementation not in ("sdpa", "eager"):
            raise OptionError(
                f"proportional=True adds sizes to the attention logits, and attn_implementation={implementation!r} has "
                'no argument for them; use model.set_attn_implementation("sdpa") or proportional=False'
            )
        blocks = [self._block(number, module, proportional, scored) for number, module in enumerate(self.blocks)]
        hooks: list[Hook | Swap] = [
            Hook(self.host, "pre", lambda module, args, kwargs: passage.open_forward(engine, direct=False)),
            Hook(self.host, "post", lambda module, args, kwargs, output: passage.close_forward(engine)),
        ]
        fewer = plan_heads(engine, self.tower, self.host, [(block.module, block.logits) for block in blocks])
        for number, block in enumerate(blocks):
            hooks += self._block_hooks(engine, number, block, fewer.get(number))
        return hooks

    def _block(self, number: int, module: nn.Module, proportional: bool, scored: bool = False) -> _Block:
        """Find out how a block can be reduced.

        Raises:
            UnsupportedModelError: it cannot.
        """
        keys, names = self.tower.keys(module), tuple(inspect.signature(module.forward).parameters)
        what = f"block {number} ({type(module).__name__}) of {type(self.host).__name__} cannot be reduced"
        if keys is None:
            raise UnsupportedModelError(f"{what}: it has no keys that could be read")
        if proportional and self.tower.mask not in names:
            raise UnsupportedModelError(
                f"{what} in proportion to sizes: its forward takes no {self.tower.mask}; proportional=False works"
            )
        x, kwargs = self.tower.sample(self.host, module, number)
        mask = {self.tower.mask: x.new_zeros(2, 1, 1, x.shape[1])} if proportional else {}
        seen: list[Tensor] = []
        try:
            with still(module), hooked([keys.hook(lambda: True, seen.append)]):
                module.forward(x, **{**kwargs, **mask})
        except Exception as error:
            raise UnsupportedModelError(f"{what}: on a few random tokens it raised {error!r}") from error
        if len(seen) != 1 or seen[0].shape[:2] != x.shape[:2]:
            raise UnsupportedModelError(f"{what}: its keys were not found where they were looked for")
        logits = self.tower.logits(module) if scored else None
        if scored and (reason := disagreement(logits, module, x, kwargs, kwargs.get(self.tower.rope))):
            raise UnsupportedModelError(f"{what} by the attention that its tokens gather: {reason}")
        norm, mlp = (child(module, path) for path in self.tower.parts[2:])
        halves = norm is not None and mlp is not None and has_halves(module, norm, mlp, x, kwargs)
        return _Block(module, norm if halves else None, keys, logits, names)

    def _block_hooks(
        self, engine: Engine, number: int, block: _Block, fewer: FewerHeads | None = None
    ) -> list[Hook | Swap]:
        """The hooks of one block and of its parts. One with `fewer` heads hands its keys and queries over itself."""

        def before(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
            kwargs = {**dict(zip(block.names, args, strict=False)), **kwargs}
            x = kwargs.pop(block.names[0])
            if number == 0:
                self._begin(engine, x, kwargs)
            run = passage.entered(engine, number)
            if run is None:
                return None
            run.keys, run.wants_keys = None, engine.forced or any(plan[number] for plan in run.plan)
            run.query, run.key, run.scoring = None, None, block.logits is not None and self._scores(engine, run, number)
            run.attending, run.due = None if fewer is None else number, True
            changed = (run.shortened(x, number),), self._shortened(engine, run, x, kwargs)
            run.rope = None if fewer is not None else changed[1].get(self.tower.rope)  # its queries are turned already
            return changed

        def between(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
            run = passage.passage_of(engine)
            if run is not None and run.due:
                x = self._reduced(engine, number, block, run, args[0])
                if x is not args[0]:
                    become(args[0], x)

        def after(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> Any:
            run = passage.passage_of(engine)
            if run is None:
                return None
            if output is None:
                passage.end(engine)
                return None
            try:
                return self._after(engine, number, block, run, output)
            except BaseException:
                passage.end(engine)
                raise

        def wants(what: str) -> bool:
            run = passage.passage_of(engine)
            return run is not None and bool(getattr(run, what))

        def keep_keys(keys: Tensor) -> None:
            if (run := passage.passage_of(engine)) is not None:
                run.keys, run.wants_keys = keys, False

        def keep(name: str, x: Tensor) -> None:
            setattr(passage.passage_of(engine), name, x)

        hooks: list[Hook | Swap] = [Hook(block.module, "pre", before), Hook(block.module, "first", after)]
        hooks += [Hook(block.middle, "pre", between)] if block.middle is not None else ()
        if fewer is not None:
            return [*hooks, fewer.swap()]
        if block.logits is not None:
            scoring = partial(wants, "scoring")
            hooks += [getattr(block.logits, one).hook(scoring, partial(keep, one)) for one in ("query", "key")]
        return [*hooks, block.keys.hook(partial(wants, "wants_keys"), keep_keys)]

    def _begin(self, engine: Engine, x: Tensor, kwargs: dict[str, Any]) -> None:
        """Open a pass, unless there is a reason not to, which then is left in the traces.

        Raises:
            InputError: the encoder is no longer what was patched.
        """
        if not engine.active:
            passage.begin(engine, None)
            return
        if self.tower.blocks(self.host)[: self.n_used] != self.blocks:
            raise InputError(
                f"the blocks of {type(self.host).__name__} are not those that were patched ({len(self.blocks)}); after "
                "a change of them call tokenprune.patch again"
            )
        if torch.is_grad_enabled() and (reason := self.tower.refusal(self.host)):
            raise InputError(f"the encoder was patched, and since then it changed: {reason}")
        reducers, n_prefix, length = _reducers(engine), self.tower.prefix(self.host), x.shape[1]
        reason = ""
        if _hides(kwargs.get(self.tower.mask)):
            reason = "an attention mask hides tokens, which must not be merged with others"
        elif kwargs.get("is_causal"):
            reason = "attention is causal here"
        elif length <= n_prefix or not x.numel():
            reason = "empty input"
        if reason:
            engine.publish(tuple(Trace(SITE, None, one.name, status="skipped", reason=reason) for one in reducers))
            passage.begin(engine, None)
            return
        plan = tuple(one.method.removals(n_layers=len(self.blocks), n_tokens=length - n_prefix) for one in reducers)
        passage.begin(engine, Passage(plan, n_prefix, length, length))

    def _shortened(self, engine: Engine, run: Passage, x: Tensor, kwargs: dict[str, Any]) -> dict[str, Any]:
        """The arguments of a block beside its hidden states, for the tokens that are left."""
        if run.index is None:
            return kwargs
        kwargs = dict(kwargs)
        if self.tower.mask in kwargs or passage.is_proportional(_reducers(engine)):
            kwargs[self.tower.mask] = self._bias(engine, run, x)
        if kwargs.get(self.tower.rope) is not None:
            kwargs[self.tower.rope] = shorten_rope(kwargs[self.tower.rope], run.index[:, run.n_prefix :] - run.n_prefix)
        return kwargs

    def _bias(self, engine: Engine, run: Passage, x: Tensor) -> Tensor | None:
        """What a block's logits get added, `[B, 1, 1, n_left]`."""
        counts = run.n_left < run.length and passage.is_proportional(_reducers(engine))
        return run.size_mask(x) if counts else None

    def _scores(self, engine: Engine, run: Passage, number: int) -> bool:
        """Whether a method goes by the attention that tokens get in block `number`, in this or a later block."""
        pairs = zip(_reducers(engine), run.plan, strict=True)
        return any(one.method.scored and (engine.forced or any(plan[number:])) for one, plan in pairs)

    def _reduced(self, engine: Engine, number: int, block: _Block, run: Passage, x: Tensor) -> Tensor:
        """What is left of a block's tokens `x` `[B, n_left, D]`.

        Raises:
            InputError: a method's answer does not fit, or what it goes by was not seen.
        """
        run.due = False
        if run.attending is not None:
            raise InputError(f"the attention of block {number} was not called, so its heads cannot leave")
        if run.scoring and block.logits is not None:
            run.score(block.logits, number=number, bias=self._bias(engine, run, x))
        for reducer, plan in zip(_reducers(engine), run.plan, strict=True):
            left = run.n_left - run.n_prefix
            r = min(plan[number], left - 1 if reducer.method.scored else left // 2)
            if r or engine.forced:
                x = run.reduce(reducer, x, number=number, r=r, place=END if block.middle is None else BETWEEN)
                continue
            run.skip(reducer, number=number, n_rows=x.shape[0])
        run.keys = run.rope = None
        return x

    def _after(self, engine: Engine, number: int, block: _Block, run: Passage, output: Any) -> Any:
        """What a block returns, its tokens reduced if they are not yet; publishes the traces."""
        x, last = first_of(output), number == len(self.blocks) - 1
        if run.due and block.middle is not None:
            raise InputError(f"the norm before the MLP of block {number} was not called, so no token can leave there")
        if run.due:
            x = self._reduced(engine, number, block, run, x)
        engine.publish(tuple(run.traces))
        watched = passage.is_direct(engine) or len(block.module._forward_hooks) > 1
        if (watched or (last and not self.tower.pooled(self.host))) and passage.restores(_reducers(engine)):
            x = run.restored(x)
        if last:
            passage.end(engine)
        return (x, *output[1:]) if isinstance(output, tuple) else x


def _reducers(engine: Engine) -> tuple[BlockReducer, ...]:
    return cast(tuple[BlockReducer, ...], engine.reducers(SITE))


def _hides(mask: Any) -> bool:
    """Whether an attention mask hides a token from another or favours one."""
    if not isinstance(mask, Tensor):
        return mask is not None
    return not bool(mask.all()) if mask.dtype == torch.bool else bool(mask.any())
