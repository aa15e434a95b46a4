"""What a decoder returns, with the unpruned length: a dropped token has the state of the nearest kept one before it.

Hidden states of all layers that a caller asked for are to be a part of the graph, too. Layers hand shortened tensors to
each other, and what the caller gets is made out of these afterwards: no gradient would reach it. So where gradients are
on, each layer hands over what is taken out of states of the unpruned length, and the caller gets those. Values stay
what they are, bit for bit. The hooks for that are put in place when hidden states are first asked for, and stay until
the model is unpatched.
"""

from typing import Any

import torch
from torch import Tensor, nn

from tokenprune.decoder.call import Call
from tokenprune.decoder.segments import Segment
from tokenprune.decoder.state import Forward
from tokenprune.hooks import Hook
from tokenprune.reduction import gather
from tokenprune.running import current
from tokenprune.session import Session
from tokenprune.upstream.attention import checkpoints
from tokenprune.upstream.decoder_call import LayerCall, first_of_kwargs, lengthen_output
from tokenprune.upstream.facts import layers_of


def wants_graph(decoder: nn.Module) -> bool:
    """Whether gradients may be asked for. Checkpointed layers run a second time, outside of any forward."""
    return torch.is_grad_enabled() and not (decoder.training and any(map(checkpoints, decoder.modules())))


def hooks_of(session: Session, decoder: nn.Module) -> list[Hook]:
    """The hooks of a decoder's layers."""

    def before(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        hidden = first_of_kwargs(args, kwargs)
        again = _through_whole(current(Forward, session), hidden, layer=0)
        if again is hidden:
            return None
        given = LayerCall.read(module, args, kwargs)
        given.hidden = again
        return given.arguments()

    def hook_after(layer: int) -> Any:
        def after(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> Any:
            if isinstance(output, tuple):
                return (_through_whole(current(Forward, session), output[0], layer=layer), *output[1:])
            return None if output is None else _through_whole(current(Forward, session), output, layer=layer)

        return after

    modules = layers_of(decoder) or []
    first = [Hook(module, "pre", before) for module in modules[:1]]
    return [*first, *(Hook(module, "first", hook_after(layer)) for layer, module in enumerate(modules))]


def _through_whole(state: Forward | None, x: Tensor, *, layer: int) -> Tensor:
    """`x` `[B, M, D]`, what `layer` gave, as taken out of the same with the unpruned length, which is noted.

    A padding slot gets the state of some token; nobody reads it.

    Args:
        state: the forward that runs.
        x: hidden states.
        layer: index of the layer, or 0 for what the first one gets.
    """
    if state is None or state.call is None or state.whole is None or not x.requires_grad:
        return x
    keep = state.segment_of(layer).keep
    if keep is None or x.shape[1] != keep.index.shape[1]:
        return x
    whole = keep.restore(x, length=state.call.length)
    again = keep.apply(whole)
    state.whole.append((again, whole))
    return again


def lengthened(output: Any, state: Forward, call: Call) -> Any:
    """What the decoder returned with the unpruned length: a dropped token has the state of the nearest kept one before
    it."""
    known, state.whole = state.whole or [], None

    def lengthen(x: Tensor, segment: Segment) -> Tensor:
        keep = segment.keep
        if keep is None or x.ndim != 3 or x.shape[1] != keep.index.shape[1]:
            return x
        whole = next((whole for short, whole in known if short is x), None)
        if whole is None:
            whole = gather(x, keep.source(length=call.length))
            known.append((x, whole))  # the last hidden states come twice, as one object
        return whole

    def by_layer(states: tuple[Any, ...]) -> tuple[Any, ...]:
        seen = [state.segment_of(max(0, i - 1)) for i in range(len(states))]
        return tuple(
            lengthen(x, segment) if isinstance(x, Tensor) else x for x, segment in zip(states, seen, strict=True)
        )

    last = state.segments[-1]
    return lengthen_output(output, lambda x: lengthen(x, last), by_layer)
