"""What leaves the KV cache while tokens are generated, layer by layer."""

from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import pad

from tokenprune import ops
from tokenprune.decoder.pruned_cache import Ledger, Slots
from tokenprune.decoder.state import Call, Forward
from tokenprune.errors import OptionError
from tokenprune.reduction import gather, pack
from tokenprune.signals import CachePlan, TextGuard
from tokenprune.upstream.caches import keep_slots, layers_of
from tokenprune.upstream.facts import DecoderFacts


def check_layers(facts: DecoderFacts) -> None:
    """Check that entries can leave the caches of this decoder's layers by index.

    Raises:
        OptionError: they cannot.
    """
    if kinds := facts.positional_caches:
        raise OptionError(
            f"{facts.called} has layers of {', '.join(kinds)}, whose caches count by position, so that no "
            "entry can leave them by index; keep protect_text=True, which leaves the caches alone while tokens are "
            "generated"
        )


def text_candidates(padding: Tensor, guard: TextGuard, *, past: int) -> Tensor:
    """Which tokens of a prompt may go where text may, `[B, length]` bool on the CPU.

    Args:
        padding: `[B, length]` bool on the CPU, False for padding.
        guard: which tokens stay in any case.
        past: tokens before this call; the row began with them.
    """
    rank = padding.long().cumsum(dim=1) - 1
    last = rank[:, -1:]
    first = 0 if past else guard.first
    return padding & (rank >= first) & (rank <= last - guard.recent)


def begin(state: Forward, call: Call, ledger: Ledger | None, *, prompt: bool) -> None:
    """Note which tokens of a call may go where text may, and what was known of the sequence before it."""
    assert state.guard is not None
    state.padding = torch.cat([_earlier(call, ledger), call.real_tokens], dim=1)
    found, total = {} if ledger is None else ledger.scores, call.past + call.length
    state.scores = {probe: pad(scores, (0, total - scores.shape[1])) for probe, scores in found.items()}
    if not prompt:
        return
    may = text_candidates(call.ranking, state.guard, past=call.past)
    keep = state.segments[0].keep
    if keep is not None:  # what left before the decoder
        here = torch.zeros_like(may)
        index = keep.index.cpu()
        real = torch.ones_like(index, dtype=torch.bool) if keep.valid is None else keep.valid.cpu()
        may &= here.scatter_(1, index, real)
    state.visual = tuple(row.nonzero()[:, 0] for row in may)


def _earlier(call: Call, ledger: Ledger | None) -> Tensor:
    """Which tokens before a call are no padding, `[B, past]` bool on the CPU: as was written down and, of tokens that
    came without being watched, as the mask says."""
    known = torch.ones(call.n_rows, call.past, dtype=torch.bool, device="cpu")
    if isinstance(call.mask, Tensor) and call.mask.ndim == 2:
        known = call.mask[:, : call.past].bool().cpu()
    if ledger is None or ledger.padding is None:
        return known
    return torch.cat([ledger.padding, known[:, ledger.padding.shape[1] :]], dim=1)


def end(state: Forward, call: Call, cache: Any, ledger: Ledger) -> None:
    """Write down what the forward has learnt of the tokens' importance, and let entries leave the cache."""
    assert state.plan is not None
    ledger.padding, ledger.scores = state.padding, dict(state.scores)
    if state.plan.persistent:
        evict(cache, ledger, state.plan, past=call.past)


def _movable(padding: Tensor, guard: TextGuard) -> Tensor:
    """Which tokens of the sequence so far may go, `[B, n]` bool."""
    return text_candidates(padding, guard, past=0)


def evict(cache: Any, ledger: Ledger, plan: CachePlan, *, past: int) -> None:
    """Take the least important entries out of the caches of all layers, of the rows whose turn it is.

    Args:
        cache: the cache, after a forward.
        ledger: what it knows; changed.
        plan: what has to leave.
        past: tokens of the unpruned sequence before the forward.
    """
    assert ledger.padding is not None
    total = ledger.padding.shape[1]
    lengths, before = ledger.padding.sum(dim=1), ledger.padding[:, :past].sum(dim=1)
    due = lengths // plan.interval > before // plan.interval
    if not bool(due.any()):
        return
    movable = _movable(ledger.padding, plan.guard) & due[:, None]
    n_may = movable.sum(dim=1)
    parts = []
    for layer, keep in enumerate(plan.keep):
        slots = ledger.at(layer)
        parts.append(
            _shrink(layers_of(cache)[layer], slots, ledger, plan, movable, (n_may.double() * keep + 1e-6).long(), total)
        )
    ledger.starts, ledger.parts = tuple(range(len(parts))), tuple(parts)


def _shrink(
    layer: Any, slots: Slots, ledger: Ledger, plan: CachePlan, movable: Tensor, n_keep: Tensor, total: int
) -> Slots:
    """One layer's cache without the entries that leave, and its slots."""
    n_slots = total - slots.dropped
    columns = slots.columns(n_slots=n_slots)
    device = columns.device
    may = gather(movable.to(device), columns.clamp(min=0)) & (columns >= 0)
    surplus = may.sum(dim=1) - n_keep.to(device)
    if not bool((surplus > 0).any()):
        return slots
    scores = gather(ledger.scores[plan.probe].to(device), columns.clamp(min=0))
    wanted = torch.minimum(n_keep.to(device), may.sum(dim=1))
    stay = ~may
    if int(wanted.max()):
        stay = _mark(stay, ops.top_k_select(scores, k=wanted, valid=may))
    stay &= columns >= 0
    keep = pack(stay)
    keep_slots(layer, keep.index, n_slots)
    index = gather(columns.masked_fill(~stay, -1), keep.index)
    bias = slots.biases(n_slots=n_slots)
    bias = None if bias is None else gather(bias, keep.index)
    return Slots(index, total - index.shape[1], bool((index < 0).any()), bias)


def _mark(stay: Tensor, chosen: Tensor) -> Tensor:
    """`stay` `[B, N]` with the positions `chosen` `[B, k]` (-1: none) set."""
    wide = pad(stay, (0, 1))
    wide.scatter_(1, torch.where(chosen < 0, stay.shape[1], chosen), True)
    return wide[:, :-1]


def pass_over(state: Forward, call: Call, *, layer: int) -> Tensor:
    """Which tokens of the sequence `layer` looks at in a decoding step, `[B, past + 1]` bool.

    Fewer with depth, chosen by the scores so far, those of the layers before in this step included.
    """
    plan = state.plan
    assert plan is not None
    assert state.padding is not None
    movable = _movable(state.padding, plan.guard)
    n_keep = (movable.sum(dim=1).double() * plan.keep[layer] + 1e-6).long()
    scores = state.scores.get(plan.probe)
    device = call.embeds.device if scores is None else scores.device
    alive = torch.ones_like(movable, device=device) if state.alive is None else state.alive.to(device)
    may = movable.to(device) & alive
    wanted = torch.minimum(n_keep.to(device), may.sum(dim=1))
    stay = alive & ~may
    if scores is not None and int(wanted.max()):
        padded = pad(scores, (0, may.shape[1] - scores.shape[1]))
        stay = _mark(stay, ops.top_k_select(padded, k=wanted, valid=may))
    state.alive = stay
    return stay
