"""The adapter of vision transformers: tokens are merged or dropped inside the blocks, between attention and MLP.

The class and register tokens come first and are always kept. Blocks without that place (post-norm, parallel) reduce at
their end instead; the trace says so. Attention counts a merged token by its size through the block's own mask argument,
so that fused attention stays on.

Whoever may look at what a block returns (a caller that goes around the host's forward, such as
``forward_intermediates``; hooks of others, such as those behind ``output_hidden_states``; the code behind the last
block) finds all tokens there, each with the value of the one that represents it. The next block takes the reduced
tokens out again.
"""

from functools import partial
from typing import Any

import torch
from torch import nn

from tokenprune import running
from tokenprune.encoder import run_state
from tokenprune.encoder.block_check import block_of
from tokenprune.encoder.block_hooks import BlockHooks
from tokenprune.encoder.head_pruning import plan_heads
from tokenprune.encoder.run_state import SITE, RunState
from tokenprune.errors import InputError, OptionError, UnsupportedModelError
from tokenprune.hooks import Hook, Swap
from tokenprune.session import Session
from tokenprune.signals import Trace
from tokenprune.upstream.encoders import BlockCall, lengths_in, towers_of
from tokenprune.upstream.tower import Tower


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
        self.family = tower.name
        self.n_used = n_used
        self.blocks = tower.blocks(host)[:n_used]

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

    def hooks(self, session: Session, *, alone: bool = True) -> list[Hook | Swap]:
        """The hooks that make `session` act on the encoder. Every block is tried on a few random tokens.

        Args:
            session: that of the patched model.
            alone: whether the encoder is the whole model, so that every method has to take part in it.

        Raises:
            OptionError: a method's options do not fit the encoder.
            UnsupportedModelError: a block cannot be reduced.
        """
        methods, n_blocks = session.methods_at(SITE), len(self.blocks)
        idle = sorted({method.name for method in session.methods} - {method.name for method in methods})
        if alone and idle:
            raise OptionError(
                f"{type(self.host).__name__} is a vision encoder ({self.family}) with the site {SITE!r} only, where "
                f"{idle} take no part"
            )
        n_tokens = self.tower.patches(self.host)
        for method in methods:
            if n_tokens or method.uses_attention_scores:
                method.removals(n_layers=n_blocks, n_tokens=n_tokens)
        proportional = any(method.proportional for method in methods)
        implementation = self.tower.implementation(self.host)
        if proportional and implementation not in ("sdpa", "eager"):
            raise OptionError(
                f"proportional=True adds sizes to the attention logits, and attn_implementation={implementation!r} has "
                'no argument for them; use model.set_attn_implementation("sdpa") or proportional=False'
            )
        scored = any(method.uses_attention_scores for method in methods)
        blocks = [
            block_of(self.tower, self.host, number, module, proportional=proportional, scored=scored)
            for number, module in enumerate(self.blocks)
        ]
        fewer = plan_heads(session, self.tower, self.host, blocks)
        hooks: list[Hook | Swap] = [
            Hook(self.host, "pre", lambda module, args, kwargs: run_state.enter(RunState(session, None))),
            Hook(self.host, "post", lambda module, args, kwargs, output: self._end(session, output)),
        ]
        hooks += [Hook(block.module, "pre", partial(self._begin, session, block.names)) for block in blocks[:1]]
        for block in blocks:
            hooks += BlockHooks(session, methods, self.tower, self.host, block, fewer.get(block.number)).hooks()
        return hooks

    def _begin(
        self, session: Session, names: tuple[str, ...], module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> None:
        """Begin a pass through the blocks. Where there is a reason not to reduce tokens, it is left in the traces.

        Raises:
            InputError: the encoder is no longer what was patched.
        """
        call, host = BlockCall(self.tower, names, args, kwargs), running.current(RunState, session)
        run = RunState(session, None, direct=host is None or host.direct, phase="over")
        run_state.enter(run)
        if not session.active:
            return run_state.end(session)
        if self.tower.blocks(self.host)[: self.n_used] != self.blocks:
            raise InputError(
                f"the blocks of {type(self.host).__name__} are not those that were patched ({len(self.blocks)}); after "
                "a change of them call tokenprune.patch again"
            )
        if torch.is_grad_enabled() and (reason := self.tower.refusal(self.host)):
            raise InputError(f"the encoder was patched, and since then it changed: {reason}")
        methods, n_prefix, length = session.methods_at(SITE), self.tower.prefix(self.host), call.states.shape[1]
        reasons = {
            "an attention mask hides tokens, which must not be merged with others": call.hides,
            "attention is causal here": call.is_causal,
            "empty input": length <= n_prefix or not call.states.numel(),
        }
        if any(reasons.values()):
            reason = next(reason for reason, holds in reasons.items() if holds)
            session.publish(tuple(Trace(SITE, None, one.name, status="skipped", reason=reason) for one in methods))
            return run_state.end(session)
        run.plan = tuple(one.removals(n_layers=len(self.blocks), n_tokens=length - n_prefix) for one in methods)
        run.phase, run.n_prefix, run.length = "reducing", n_prefix, length

    def _end(self, session: Session, output: Any) -> None:
        """End a forward.

        Raises:
            InputError: not all blocks took part, or the host returns fewer tokens than it has to.
        """
        run = running.current(RunState, session)
        if run is None:
            return
        running.leave(run)
        if output is None or not self.blocks:
            return
        host, last = type(self.host).__name__, len(self.blocks) - 1
        if run.phase == "open" or (run.plan and run.number != last):
            told = f"block {run.number} of blocks 0 to {last} was the last one" if run.plan else "none was called"
            raise InputError(f"the forward of {host} was to call all blocks that were patched: {told}")
        lengths = {trace.n_out[0] + run.n_prefix for trace in run.traces if trace.n_out}
        found = lengths_in(output, self.tower.width(self.host)) & lengths - {run.length, run.length - run.n_prefix}
        if found and all(method.restore for method in session.methods_at(SITE)):
            raise InputError(
                f"{host} returned hidden states of {sorted(found)} tokens, where all {run.length} were to be "
                "restored; something between its blocks and its output changes that"
            )


def find_encoder(model: nn.Module) -> EncoderAdapter | None:
    """The adapter for the vision encoder that `model` is or holds, None where there is none that is known.

    Raises:
        UnsupportedModelError: the encoder is of a kind that cannot be reduced, or there are several.
    """
    found = towers_of(model)
    if len(found) > 1:
        raise UnsupportedModelError(
            f"{type(model).__name__} holds {len(found)} vision encoders "
            f"({', '.join(type(host).__name__ for host, _ in found)}); patch one of them, such as model.vision_model"
        )
    if not found:
        return None
    host, tower = found[0]
    if reason := tower.refusal(host):
        raise UnsupportedModelError(f"{type(host).__name__} cannot be reduced: {reason}")
    return EncoderAdapter(host, tower)
