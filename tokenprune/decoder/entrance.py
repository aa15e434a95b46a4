"""At the decoder's entrance: the images of a call are found, and the methods of this site choose among their tokens."""

import time
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

from torch import Tensor, nn

from tokenprune.decode import eviction
from tokenprune.decoder import between_layers, prompt_end, visual_mask
from tokenprune.decoder.boundaries import Image
from tokenprune.decoder.call import Call, all_positions, refuse_packed
from tokenprune.decoder.images import find_images, has_merged_features, visible
from tokenprune.decoder.pruned_cache import ledger_of
from tokenprune.decoder.select import (
    SITE,
    Merged,
    dropped_tokens,
    reduce_images,
    sizes_of,
    skipped,
    tokens_by_row,
    write_merged,
)
from tokenprune.decoder.state import Forward
from tokenprune.errors import InputError
from tokenprune.methods.base import Method
from tokenprune.reduction import pack
from tokenprune.session import Session
from tokenprune.upstream.caches import check_cache, layers_of, past_length, window_of
from tokenprune.upstream.decoder_call import DecoderCall
from tokenprune.upstream.facts import DecoderFacts
from tokenprune.upstream.families import Family
from tokenprune.upstream.quantized_cache import use_planes


@dataclass(frozen=True)
class Host:
    """The model around a decoder.

    Attributes:
        root: the module that takes token ids and calls the decoder.
        row: its row in the table of families.
        facts: the decoder's.
    """

    root: nn.Module
    row: Family
    facts: DecoderFacts

    def check_cache(self, cache: Any, *, layered: bool) -> None:
        """Check that a cache can be continued after pruning.

        Raises:
            UnsupportedModelError: it cannot.
        """
        check_cache(cache, layered=layered)
        self.facts.check_windows([window_of(layer) for layer in layers_of(cache)])


def enter(session: Session, state: Forward, given: DecoderCall, host: Host) -> None:
    """Run the methods of this site on the images of the forward, and put merged tokens in place.

    Sets the state's call (unless nothing will be changed), its first segments and what it knows of visual tokens.
    Appends traces.

    Raises:
        InputError: visual tokens are not finite, or a row holds several sequences.
        UnsupportedModelError: image features came in by an unknown argument, or the cache cannot be continued.
    """
    embeds, cache = given.embeds, given.cache
    assert embeds is not None
    methods, later = session.methods_at(SITE), session.methods_at("llm_layer")
    past, (n_rows, length) = past_length(cache), embeds.shape[:2]
    active = session.active and n_rows * length > 0
    prompt, caches = length > 1 or not past, cache is not None or host.facts.caches(given.caches)
    images, reason = list[Image](), "empty input"
    if active and (methods or later):
        images, reason = _images_of(state, given, host, prompt=prompt, cached=caches, layered=bool(later))
    state.continues = past > 0 and not images
    state.scoring = active and state.plan is not None and caches
    state.steering = active and state.attention is not None
    texts = active and state.guard is not None
    if state.steering and cache is not None and not past and state.quantizes:
        use_planes(cache)
    if not images and session.active and prompt:  # a decoding step is no news
        state.traces += skipped((method.name for method in methods), reason)
        if not texts:
            state.traces += skipped((method.name for method in later), reason, site=between_layers.SITE)
    if not images and not texts:
        goes_on = ledger_of(cache) is not None or state.steering
        state.call = Call.of(given, host.facts) if goes_on else None
        return
    host.check_cache(cache, layered=bool(later))
    left, reduced, merged = _reduce(state, images, methods, embeds)
    kept_all = not images or not methods or state.traces[0].n_in == state.traces[-1].n_out
    through = not kept_all or bool(images and session.forced and methods)
    if not through and not later and ledger_of(cache) is None:
        state.call = None
        return
    refuse_packed(given, host.facts, caches=caches)
    call = state.call = state.call or Call.of(given, host.facts)
    if later and prompt:
        drafts = prompt_end.n_drafts(state.prompt, length)
        call.n_behind = drafts or (0 if caches else prompt_end.n_generated(session, given.ids, embeds))
        state.visual = tokens_by_row(left, n_rows)
    if through:
        _shorten(state, call, images, left, merged, packed=session.positions == "packed")
    _refuse_uneven(state, call)
    if texts:
        eviction.begin(state, call, ledger_of(cache), prompt=prompt)
    hidden = [sum(image.n_hidden for image in left if image.row == row and not texts) for row in range(n_rows)]
    state.entered = tuple(len(visual) + n for visual, n in zip(state.visual, hidden, strict=False))
    given.embeds = reduced
    if merged:
        given.change_planes(partial(write_merged, merged=merged))


def _images_of(
    state: Forward, given: DecoderCall, host: Host, *, prompt: bool, cached: bool, layered: bool
) -> tuple[list[Image], str]:
    """The images of a call with the tokens that its mask shows, and why there is none. Sets the state's call where
    there are some.

    Args:
        state: the forward.
        given: the call.
        host: the model around the decoder.
        prompt: whether the call is more than a decoding step.
        cached: whether there is a KV cache.
        layered: whether the layers of the cache are to hold different tokens.
    """
    assert given.embeds is not None
    mask = visual_mask.mask_of(state.prompt, given, past_length(given.cache), cached=cached)
    reason = visual_mask.reason_of(state.prompt, given)
    brought = mask is not None or state.prompt.has_features
    if not brought and not (prompt and has_merged_features(host.root, host.row, state.prompt, given.embeds)):
        return [], reason
    images = find_images(host.root, host.row, state.prompt, given.positions, mask)
    if not images:
        return [], reason
    host.check_cache(given.cache, layered=layered)
    state.call = Call.of(given, host.facts)
    return visible(images, state.call.padding), "the attention mask hides all visual tokens"


def _reduce(
    state: Forward, images: list[Image], methods: tuple[Method, ...], embeds: Tensor
) -> tuple[list[Image], Tensor, list[Merged]]:
    """The images with the kept tokens, the embeddings with merged tokens in place, and what was merged. Appends
    traces."""
    left, merged = images, list[Merged]()
    for method in methods if images else ():
        left, embeds, trace = reduce_images(left, method, embeds, merged)
        state.traces.append(trace)
    return left, embeds, merged


def _shorten(
    state: Forward, call: Call, images: list[Image], left: list[Image], merged: list[Merged], *, packed: bool
) -> None:
    """Write down in the first segments which tokens are kept: what is `left` of `images`, and all others."""
    device, before = call.embeds.device, tokens_by_row(images, call.n_rows)
    dropped = dropped_tokens(before, tokens_by_row(left, call.n_rows), length=call.length)
    real = ~dropped
    if call.padding is not None and bool(dropped.any()):  # padding that nothing needs is dropped with them
        real &= call.padding
    keep = pack(real, left=call.facts.recurrent).to(device)
    sizes = sizes_of(merged, (call.n_rows, call.length), device)
    for segment in state.segments:
        segment.keep = keep
        segment.bias = None if sizes is None else keep.apply(sizes).log()
    if packed:
        state.lowered = dropped.to(device).cumsum(dim=1)


def _refuse_uneven(state: Forward, call: Call) -> None:
    """Check that recurrent layers that continue a cache need not run over padding slots.

    Raises:
        InputError: they would.
    """
    first = state.segments[0].keep
    uneven = (first is not None and first.valid is not None) or len(set(map(len, state.visual))) > 1
    if call.facts.recurrent and call.past and uneven:
        raise InputError(
            f"the rows of this call would lose different numbers of tokens, and {call.facts.called} has recurrent "
            "layers, which continue from earlier tokens and would run over the padding slots of short rows; give "
            "each row as many visual tokens, or continue with one row at a time"
        )


def positions_of(given: DecoderCall, state: Forward, shift: Tensor | None) -> Tensor:
    """Positions of all tokens of the call under the policy; the shift from now on is noted in the state.

    Args:
        given: the call.
        state: the forward.
        shift: `[B]`, how far the packed policy has lowered positions before this call, or None.
    """
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


def note_time(state: Forward, started: float) -> None:
    """Write all the time that was spent before the decoder into the last trace of this site."""
    before = [trace for trace in state.traces if trace.site == SITE]
    if before:
        spent = (time.perf_counter() - started) * 1e3 - sum(trace.overhead_ms for trace in before[:-1])
        place = max(i for i, trace in enumerate(state.traces) if trace is before[-1])
        state.traces[place] = replace(before[-1], overhead_ms=spent)
