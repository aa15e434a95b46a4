"""Checks for authors of methods and families: the oracles that the library's own tests rest on, in a form that needs no
fixture.

The dense side of every comparison runs the decoder without a cache on the full sequence, with an explicit mask that
hides the dropped tokens from all others; nothing of the pruning code takes part in it.
"""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor

from tokenprune.decoder.adapter import DecoderAdapter
from tokenprune.encoder.block_split import evaluating
from tokenprune.errors import InputError, TokenPruneError
from tokenprune.methods.base import Method
from tokenprune.reduction import Keep
from tokenprune.session import Session
from tokenprune.signals import SITES, BlockSignals, Budget, LayerSignals, Signals
from tokenprune.upstream.caches import new_cache
from tokenprune.upstream.decoder_call import call_decoder
from tokenprune.upstream.families import placeholder_id
from tokenprune.upstream.prompts import Prompt
from tokenprune.validate import ask


class CheckError(TokenPruneError, AssertionError):
    """A check failed: what was compared and how far apart it was."""


@dataclass(frozen=True, kw_only=True)
class _EveryNth(Method):
    """Keeps the first of every `step` tokens."""

    step: int

    def budget(self, n_tokens: int) -> Budget:
        """All or fewer."""
        return Budget(1, n_tokens)

    def before_llm(self, signals: Signals, budget: Budget) -> Keep:
        """The same of each image."""
        n_rows, n_tokens = signals.features.shape[:2]
        index = torch.arange(0, n_tokens, self.step, device=signals.features.device, dtype=torch.int64)
        return Keep(index.expand(n_rows, -1))


def self_check(adapter: DecoderAdapter) -> None:
    """Check that the decoder of `adapter` can be pruned with the defaults: prefill and a decoding step of a ragged
    padded batch.

    The decoder is run on two short rows of random embeddings in evaluation mode: with all tokens kept (oracle O1), and
    pruned with a cache against a full run without one (oracle O2).

    Args:
        adapter: the adapter of a model that is not patched.

    Raises:
        CheckError: what the pruned decoder computes differs from the dense computation.
    """
    with evaluating(adapter.decoder):
        _self_check(adapter)


def _self_check(adapter: DecoderAdapter) -> None:
    decoder, facts = adapter.decoder, adapter.facts
    weight = next(decoder.parameters())
    length, pad, n_rows = 14, 3, 2
    embeds = _random(n_rows, length + 1, facts.width).to(weight.device, weight.dtype)
    ids = torch.zeros(n_rows, length, dtype=torch.int64, device="cpu")
    ids[:, 5:11] = placeholder_id(adapter.root, adapter.row.ids[0]) or 0
    padding = torch.ones(n_rows, length + 1, dtype=torch.int64, device=weight.device)
    padding[1, :pad] = 0
    positions = (padding.cumsum(1) - 1).clamp(min=0)

    def call(first: int, last: int, cache: Any) -> Tensor:
        return call_decoder(
            decoder,
            embeds=embeds[:, first:last],
            mask=padding[:, :last],
            positions=positions[:, first:last],
            cache=cache,
        )

    def two_calls(step: int | None) -> tuple[Tensor, Tensor]:
        """A prefill and a decoding step in which every `step`-th visual token is kept; None: in the dense decoder."""
        cache, calls = new_cache(facts.config), ((0, length), (length, length + 1))
        if step is None:
            return call(*calls[0], cache), call(*calls[1], cache)
        session = Session(adapter.root, (_EveryNth(step=step),), adapter.family)
        session.forced = True
        with adapter.probing(session, Prompt.of(ids, features=embeds)):
            prefill = call(*calls[0], cache)
        with adapter.probing(session, Prompt.of(ids[:, :1] * 0)):
            return prefill, call(*calls[1], cache)

    for what, found, wanted in zip(("prefill", "step"), two_calls(1), two_calls(None), strict=True):
        compare(f"{what} with all tokens kept", found[0], wanted[0])  # what padding gives is nobody's business
        compare(f"{what} of the padded row with all tokens kept", found[1, -1], wanted[1, -1])
    prefill, step = two_calls(2)

    kept = torch.ones(length + 1, dtype=torch.bool, device=weight.device)
    kept[6:11:2] = False
    seen = torch.ones(length + 1, length + 1, dtype=torch.bool, device=weight.device).tril()
    mask = (seen & kept & padding[:, None, :].bool())[:, None]
    if facts.eager:  # it adds its mask to the logits
        mask = torch.zeros_like(mask, dtype=weight.dtype).masked_fill(~mask, torch.finfo(weight.dtype).min)
    dense = call_decoder(decoder, embeds=embeds, mask=mask, positions=positions)
    compare("prefill", prefill[0, kept[:-1]], dense[0, :-1][kept[:-1]])
    compare("prefill of the padded row", prefill[1, pad:][kept[pad:-1]], dense[1, pad:-1][kept[pad:-1]])
    compare("decoding step", step[:, 0], dense[:, -1])


def _random(*shape: int) -> Tensor:
    """The same random numbers every time, fp32 on the CPU."""
    generator = torch.Generator(device="cpu").manual_seed(0)
    return torch.randn(*shape, generator=generator, dtype=torch.float32, device="cpu")


def compare(what: str, found: Tensor, wanted: Tensor) -> None:
    """Check that two tensors agree as far as their dtype allows.

    Raises:
        CheckError: they do not.
    """
    tolerance = 1e-3 if found.dtype == torch.float32 else 5e-2
    found, wanted = found.float(), wanted.float()
    scale = max(1.0, float(wanted.abs().max()))
    apart = float((found - wanted).abs().max()) / scale
    if not apart <= tolerance:
        raise CheckError(f"{what}: pruned and dense differ by {apart:.2g} of the largest value")


def check_method(method: Method, *, features: Tensor | None = None) -> None:
    """Check that a method keeps what its budget says, the same each time, whatever the batch, at all its sites.

    Args:
        method: the method; its functions `before_llm`, `llm_layer` and `encoder_block` are called, those that it has.
        features: images to try it on, `[B, N, D]`; random ones by default. In an encoder they are the keys, and after
            decoder layers the scores are their first channel.

    Raises:
        CheckError: it does not.
        InputError: it takes part at no site.
        OptionError: its options do not fit a decoder of 8 layers, or an encoder of 4 blocks.
    """
    if not method.sites():
        raise InputError(f"{type(method).__name__} has no function named after a site ({', '.join(SITES)}) to check")
    if features is None:
        features = _random(3, 24, 16)
    for site, budget, signals in _sites_of(method, features):
        _check_site(method, site, budget, signals, shape=features.shape)


def _sites_of(method: Method, features: Tensor) -> Iterator[tuple[str, Budget, Callable[[list[int]], Any]]]:
    """Each site at which a method takes part, what is due there, and what makes the signals for some rows."""
    n_tokens, sites = features.shape[1], method.sites()
    scores, protected = features[..., 0].float(), torch.zeros(n_tokens, dtype=torch.bool, device="cpu")

    def after(layer: int, rows: list[int]) -> LayerSignals:
        return LayerSignals(layer, scores[rows])

    if "before_llm" in sites:
        yield "before_llm", method.budget(n_tokens), lambda rows: Signals(features[rows], None, tuple(rows))
    for stage in method.schedule(8) if "llm_layer" in sites else ():
        n_keep = stage.count(n_tokens)
        if 0 < n_keep < n_tokens:
            yield "llm_layer", Budget(n_keep, n_keep), partial(after, stage.layer)
    if "encoder_block" in sites:
        n_left = n_tokens - max(method.removals(n_layers=4, n_tokens=n_tokens))
        yield (
            "encoder_block",
            Budget(n_left, n_left),
            lambda rows: BlockSignals(0, features[rows].float(), None, protected, scores[rows]),
        )


def _check_site(
    method: Method, site: str, budget: Budget, signals: Callable[[list[int]], Any], *, shape: Sequence[int]
) -> None:
    """Check the answers at one site.

    Raises:
        CheckError: they are not within the budget, change from call to call, or depend on the batch.
    """

    def kept(rows: list[int]) -> list[list[int]]:
        try:
            keep = ask(method, site, signals(rows), budget, shape=(len(rows), shape[1]))
        except InputError as error:
            raise CheckError(str(error)) from error
        valid = torch.ones_like(keep.index, dtype=torch.bool) if keep.valid is None else keep.valid
        return [index[ok].tolist() for index, ok in zip(keep.index, valid, strict=True)]

    rows = list(range(shape[0]))
    together = kept(rows)
    if together != kept(rows):
        raise CheckError(f"{site}: the same rows gave another choice the second time")
    if together != [kept([row])[0] for row in rows]:
        raise CheckError(f"{site}: a row alone gave another choice than in a batch")
