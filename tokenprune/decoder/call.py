"""Both ends of a decoder's call: what it is given for the tokens that go on, and what it returns for all of them."""

from typing import Any

import torch
from torch import Tensor, nn

from tokenprune.decoder import masks
from tokenprune.decoder.pruned_cache import Ledger
from tokenprune.decoder.select import Merged, all_positions
from tokenprune.decoder.state import Call, Forward, Segment
from tokenprune.errors import InputError
from tokenprune.reduction import gather
from tokenprune.upstream.caches import past_length
from tokenprune.upstream.decoder_call import DecoderCall, lengthen_output
from tokenprune.upstream.facts import DecoderFacts


def check_call(given: DecoderCall, facts: DecoderFacts, ledger: Ledger | None, *, unpacks: bool) -> None:
    """Check what a call of a decoder brings against what is known.

    Args:
        given: the call.
        facts: the decoder's.
        ledger: what its cache knows of itself, if it is a pruned one.
        unpacks: whether flash attention was seen when the decoder was patched.

    Raises:
        InputError: the cache is not what the mask or its own ledger says, or attention was changed to one that needs
            hooks of its own.
    """
    if facts.flash and not unpacks:
        raise InputError(
            f"{facts.called} runs {facts.implementation!r} now, which it did not when it was patched; call "
            "tokenprune.patch after set_attn_implementation"
        )
    assert given.embeds is not None
    past, mask = past_length(given.cache), given.mask
    total = past + given.embeds.shape[1]
    if ledger is not None:
        ledger.check(given.cache)
        seen, said = total, ""
        if isinstance(mask, Tensor) and mask.ndim == 2:
            seen, said = mask.shape[1], f"attention_mask has {mask.shape[1]} columns"
        positions = given.positions
        if mask is None and not facts.mrope and positions is not None and positions.ndim == 2 and total > past + 1:
            seen = len(given.embeds[0]) + int(positions.min())  # rows have no padding
            said = f"positions end at token {seen}"
        if seen < total:
            raise InputError(
                f"{said}, and the pruned KV cache ({past} tokens of the sequence) and this call hold {total}; shorten "
                "such a cache with cache.crop, since slicing its tensors to a length of the sequence cuts other tokens "
                "than were meant"
            )
        return
    if past and isinstance(mask, Tensor) and mask.ndim == 2 and mask.shape[1] > total:
        raise InputError(
            f"the attention mask covers {mask.shape[1]} tokens, and the KV cache and this call hold {total}: a "
            "pruned cache that was built anew out of its tensors no longer knows what was pruned; copy it with "
            "copy.deepcopy, or cut it with cache.crop"
        )


def refuse_packed(given: DecoderCall, facts: DecoderFacts, *, caches: bool) -> None:
    """Check that no row holds several sequences, which an unpruned decoder would keep apart by their positions.

    Args:
        given: the call.
        facts: the decoder's.
        caches: whether it keeps a KV cache, beside which only flash attention looks at positions (of a single row,
            whose mask hides nothing).

    Raises:
        InputError: a row does.
    """
    positions, mask = given.positions, given.mask
    if facts.flash and isinstance(mask, Tensor) and mask.ndim == 2 and len(mask) == 1 and bool(mask.all()):
        mask = None
    assert given.embeds is not None
    if mask is not None or positions is None or (caches and not (facts.flash and len(given.embeds) == 1)):
        return
    if positions.ndim == 3 and len(positions) == 4:  # the first plane is that of text, beside three for M-RoPE
        positions = positions[0]
    if positions.ndim == 2 and bool((restarts := positions.diff(dim=1) != 1).any()):
        row, column = restarts.nonzero()[0].tolist()
        raise InputError(
            f"positions of row {row} go on with {int(positions[row, column + 1])} after {int(positions[row, column])}, "
            f"at token {column + 1}, and without an attention mask that means several sequences packed into one row, "
            "which pruning does not respect; give each sequence a row of its own, padded"
        )


def shape_of(ids: Tensor, *, like: nn.Module) -> Tensor:
    """Embeddings `[B, L, 0]` of token ids `[B, L]`: their shape and the dtype that `like` computes in."""
    return torch.empty(*ids.shape, 0, dtype=next(like.parameters()).dtype, device=ids.device)


def call_of(given: DecoderCall, facts: DecoderFacts, past: int) -> Call:
    """A call of a decoder in terms of the unpruned sequence."""
    embeds = given.embeds
    assert embeds is not None
    positions = all_positions(given.positions, past, embeds)
    empty = embeds.new_empty(*embeds.shape[:2], 0)
    text = positions[0] if positions.ndim == 3 else positions
    return Call(given.mask, given.cache, empty, text, past, facts)


def mask_of(call: Call, segment: Segment, *, like: Tensor) -> Any:
    """What the decoder gets as attention mask for its first segment."""
    layout = segment.layout(call)
    if layout.bias is not None:
        if by_kind := call.facts.first_layers():
            return {kind: segment.mask(call, layer=layer, like=like) for kind, layer in by_kind.items()}
        return segment.mask(call, layer=0, like=like)
    if call.mask is None and call.cache is not None and not layout.has_padding_slots:
        return None
    return masks.prune_mask(call.mask, layout, call.cache, call.facts, call.offsets)


def positions_of(given: DecoderCall, state: Forward, shift: Tensor | None) -> Tensor:
    """Positions of all tokens of the call under the policy; the shift from now on is noted in the state."""
    assert state.call is not None
    assert given.embeds is not None
    positions = all_positions(given.positions, state.call.past, given.embeds)
    state.shift = shift
    if shift is not None:
        positions = positions - shift[:, None].to(positions.device)
    if state.lowered is not None:
        positions = positions - state.lowered
        last = state.lowered[:, -1]
        state.shift = last if shift is None else last + shift.to(last.device)
    return positions


def write_merged(merged: list[Merged], x: Tensor) -> None:
    """Put the means of merged tokens into `x` `[B, L, D]`."""
    for one in merged:
        one.write(x)


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
