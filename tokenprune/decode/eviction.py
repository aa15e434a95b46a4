"""Dropping entries of the KV cache while tokens are generated, layer by layer."""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import pad

from tokenprune import ops
from tokenprune.decoder.call import Call
from tokenprune.decoder.pruned_cache import Ledger, Slots
from tokenprune.decoder.state import Alive, Forward
from tokenprune.errors import OptionError
from tokenprune.reduction import gather, pack
from tokenprune.signals import CachePlan, TextGuard
from tokenprune.upstream.caches import keep_slots, layers_of
from tokenprune.upstream.facts import DecoderFacts


def check_layers(facts: DecoderFacts) -> None:
    """Check that entries of the caches of this decoder's layers can be dropped by index.

    Raises:
        OptionError: they cannot.
    """
    if kinds := facts.positional_caches:
        raise OptionError(
            f"{facts.called} has layers of {', '.join(kinds)}, whose caches count by position, so that no "
            "entry can be dropped by index; keep protect_text=True, which keeps the caches whole while tokens are "
            "generated"
        )


def text_candidates(padding: Tensor, guard: TextGuard, *, past: int) -> Tensor:
    """Which tokens of a prompt are prunable where text is, `[B, length]` bool on the CPU.

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
    """Note which tokens of a call are prunable where text is, and what was known of the sequence before it."""
    assert state.guard is not None
    state.padding = torch.cat([_earlier(call, ledger), call.real_tokens], dim=1)
    found, total = {} if ledger is None else ledger.scores, call.past + call.length
    state.scores = {probe: pad(scores, (0, total - scores.shape[1])) for probe, scores in found.items()}
    if not prompt:
        return
    may = text_candidates(call.ranking, state.guard, past=call.past)
    keep = state.segments[0].keep
    if keep is not None:  # what was dropped before the decoder
        here = torch.zeros_like(may)
        index = keep.index.cpu()
        real = torch.ones_like(index, dtype=torch.bool) if keep.valid is None else keep.valid.cpu()
        may &= here.scatter_(1, index, real)
    state.visual = tuple(row.nonzero()[:, 0] for row in may)


def _earlier(call: Call, ledger: Ledger | None) -> Tensor:
    """Which tokens before a call are no padding, `[B, past]` bool on the CPU: as was written down and, of tokens that
    came without being watched, as the mask says."""
    known = torch.ones(call.n_rows, call.past, dtype=torch.bool, device="cpu")
    if call.padding_mask is not None:
        known = call.padding_mask[:, : call.past].bool().cpu()
    if ledger is None or ledger.padding is None:
        return known
    return torch.cat([ledger.padding, known[:, ledger.padding.shape[1] :]], dim=1)


def end(state: Forward, call: Call, cache: Any, ledger: Ledger) -> None:
    """Write down what the forward has learnt of the tokens' importance, and drop entries of the cache."""
    assert state.plan is not None
    ledger.padding, ledger.scores = state.padding, dict(state.scores)
    if state.plan.persistent:
        evict(cache, ledger, state.plan, past=call.past)


def _prunable(padding: Tensor, guard: TextGuard) -> Tensor:
    """Which tokens of the sequence so far are prunable, `[B, n]` bool."""
    return text_candidates(padding, guard, past=0)


def evict(cache: Any, ledger: Ledger, plan: CachePlan, *, past: int) -> None:
    """Drop the least important entries of the caches of all layers, in the rows whose turn it is.

    Args:
        cache: the cache, after a forward.
        ledger: what it knows; changed.
        plan: what is dropped.
        past: tokens of the unpruned sequence before the forward.
    """
    assert ledger.padding is not None
    lengths, before = ledger.padding.sum(dim=1), ledger.padding[:, :past].sum(dim=1)
    due = lengths // plan.interval > before // plan.interval
    if not bool(due.any()):
        return
    prunable = _prunable(ledger.padding, plan.guard) & due[:, None]
    n_prunable = prunable.sum(dim=1).tolist()
    sequence = torch.arange(ledger.padding.shape[1], dtype=torch.int64, device="cpu")
    parts = []
    for layer, fraction in enumerate(plan.keep):
        n_keep = [int(n * fraction + 1e-6) for n in n_prunable]
        parts.append(_shrink(layers_of(cache)[layer], ledger.at(layer), ledger, plan, prunable, n_keep, sequence))
    ledger.starts, ledger.parts = tuple(range(len(parts))), tuple(parts)


def _shrink(
    layer: Any, slots: Slots, ledger: Ledger, plan: CachePlan, prunable: Tensor, n_keep: list[int], sequence: Tensor
) -> Slots:
    """One layer's cache without the entries that are dropped, and its slots."""
    columns = slots.columns(sequence)
    tokens, device = columns.clamp(min=0), columns.device
    may = gather(prunable.to(device), tokens) & (columns >= 0)
    n_may = may.sum(dim=1).tolist()
    counts = [min(wanted, n) for wanted, n in zip(n_keep, n_may, strict=True)]
    if counts == n_may:
        return slots
    scores = gather(ledger.scores[plan.probe].to(device), tokens)
    stay = _with_largest(~may, scores, counts, may)
    stay &= columns >= 0
    keep = pack(stay)
    keep_slots(layer, keep.index, columns.shape[1])
    index = gather(columns.masked_fill(~stay, -1), keep.index)
    bias = slots.biases(n_slots=columns.shape[1])
    bias = None if bias is None else gather(bias, keep.index)
    return Slots(index, len(sequence) - index.shape[1], bool((index < 0).any()), bias)


def _with_largest(stay: Tensor, scores: Tensor, counts: Sequence[int], may: Tensor) -> Tensor:
    """`stay` `[B, N]` bool and, of the tokens `may` of each row, as many of the largest scores as `counts` says."""
    if counts[0] and len(set(counts)) == 1:
        return stay.scatter_(1, ops.top_k_select(scores.masked_fill(~may, -torch.inf), k=counts[0]), True)
    if not any(counts):
        return stay
    chosen = ops.top_k_select(scores, k=counts, valid=may)  # -1 behind the last one of a row
    return pad(stay, (1, 0)).scatter_(1, chosen + 1, True)[:, 1:]


def pass_over(state: Forward, call: Call, *, layer: int) -> Tensor:
    """Which tokens of the sequence `layer` looks at in a decoding step, `[B, past + 1]` bool.

    Fewer with depth, chosen by the scores so far, those of the layers before in this step included.
    """
    plan, device = state.plan, call.embeds.device
    assert plan is not None
    assert state.padding is not None
    if state.alive is None:
        prunable = _prunable(state.padding, plan.guard)
        n_prunable = tuple(prunable.sum(dim=1).tolist())
        state.alive = Alive(torch.ones_like(prunable, device=device), prunable.to(device), n_prunable, n_prunable)
    alive = state.alive
    counts = tuple(
        min(int(n * plan.keep[layer] + 1e-6), left) for n, left in zip(alive.n_prunable, alive.n_left, strict=True)
    )
    if counts != alive.n_left:
        scores = state.scores.get(plan.probe)
        scores = torch.zeros_like(alive.seen, dtype=torch.float32) if scores is None else scores.to(device)
        if scores.shape[1] < alive.seen.shape[1]:
            scores = pad(scores, (0, alive.seen.shape[1] - scores.shape[1]))
        seen = _with_largest(alive.seen & ~alive.prunable, scores, counts, alive.seen & alive.prunable)
        state.alive = Alive(seen, alive.prunable, alive.n_prunable, counts)
    return state.alive.seen
