"""What a decoder was called with, in terms of the unpruned sequence, and the checks of such a call."""

from dataclasses import dataclass, field
from functools import cached_property
from typing import Any, Self

import torch
from torch import Tensor, nn

from tokenprune.decoder.pruned_cache import Ledger
from tokenprune.errors import InputError
from tokenprune.upstream.caches import first_key, grows, layers_of, past_length, window_of
from tokenprune.upstream.decoder_call import DecoderCall
from tokenprune.upstream.facts import DecoderFacts
from tokenprune.upstream.masks import dense_mask


@dataclass
class Call:
    """What the decoder was called with, in terms of the unpruned sequence. Made before it runs.

    Attributes:
        mask: the attention mask, in any of its forms; where a sliding window makes a difference, 4-D ones by kind of
            layer.
        cache: the KV cache, or None.
        embeds: embeddings `[B, length, 0]`: their shape, dtype and device without their content.
        positions: text positions `[B, length]`.
        past: tokens before this call.
        facts: the decoder's.
        n_behind: how many of the last tokens stand behind the prompt and rank nothing, see
            :mod:`tokenprune.decoder.prompt_end`.
        flat: whether the mask that was given is a 2-D one, or none.
        fused: whether attention is sdpa.
        flash: whether attention is flash attention.
        offsets: for each kind of layers that `mask` tells apart (None: it is one for all), the position of its first
            column.
    """

    mask: Any
    cache: Any
    embeds: Tensor
    positions: Tensor
    past: int
    facts: DecoderFacts
    n_behind: int = 0
    flat: bool = field(init=False)
    fused: bool = field(init=False)
    flash: bool = field(init=False)
    offsets: dict[str | None, int] = field(init=False)

    def __post_init__(self) -> None:
        """Note what the cache can only tell before the decoder runs, and build masks that a window makes necessary."""
        facts = self.facts
        self.fused, self.flash = facts.fused, facts.flash
        self.flat = self.mask is None or (isinstance(self.mask, Tensor) and self.mask.ndim == 2)
        self._given = self.mask
        windows = [facts.window, *(window_of(layer) for layer in layers_of(self.cache))]
        if self.flat and any(window is not None and window < self.past + self.length for window in windows):
            self.mask = dense_mask(
                facts, self.mask, self.cache, past=self.past, embeds=self.embeds, positions=self.positions
            )
        kinds: list[str | None] = sorted(self.mask) if isinstance(self.mask, dict) else [None]
        self.offsets = {
            kind: 0 if facts.is_recurrent(kind) else first_key(self.cache, self.length, facts.layer_of(kind))
            for kind in kinds
        }

    @classmethod
    def of(cls, given: DecoderCall, facts: DecoderFacts) -> Self:
        """A call of a decoder that gets embeddings."""
        embeds, past = given.embeds, past_length(given.cache)
        assert embeds is not None
        positions = all_positions(given.positions, past, embeds)
        text = positions[0] if positions.ndim == 3 else positions
        return cls(given.mask, given.cache, embeds.new_empty(*embeds.shape[:2], 0), text, past, facts)

    @cached_property
    def padding(self) -> Tensor | None:
        """Which tokens of the call are no padding, `[B, length]` bool on the CPU, None where all are."""
        mask, kind = self._given, None
        if isinstance(mask, dict):
            kinds = [kind for kind in sorted(mask) if isinstance(mask[kind], Tensor)]
            kind = min(kinds, key=lambda kind: mask[kind].ndim, default=None)
            mask = mask.get(kind)
        if not isinstance(mask, Tensor):
            return None
        if mask.ndim == 2:
            start = 0 if mask.shape[1] == self.length else self.past  # that of recurrent layers covers the call alone
            return mask[:, start : start + self.length].bool().cpu()
        # A token that is no padding sees itself.
        own = mask[:, 0].diagonal(offset=self.past - self.offsets[kind], dim1=1, dim2=2)
        return own.cpu() if own.dtype == torch.bool else own.eq(0).cpu()

    @property
    def padding_mask(self) -> Tensor | None:
        """`mask` where it is a 2-D one, else None."""
        return self.mask if isinstance(self.mask, Tensor) and self.mask.ndim == 2 else None

    @property
    def real_tokens(self) -> Tensor:
        """`padding`, all True where it is None."""
        if self.padding is not None:
            return self.padding
        return torch.ones(self.n_rows, self.length, dtype=torch.bool, device="cpu")

    @property
    def ranking(self) -> Tensor:
        """`real_tokens` without those behind the prompt."""
        if not self.n_behind:
            return self.real_tokens
        ranking = self.real_tokens.clone()
        ranking[:, -self.n_behind :] = False
        return ranking

    @cached_property
    def effective_mask(self) -> Any:
        """`mask`, None where it is a padding mask without padding. On a GPU, the first look waits for it."""
        total, padding = self.past + self.length, self.padding_mask
        whole = padding is not None and padding.shape[1] >= total and bool(padding[:, :total].all())
        return None if whole else self.mask

    @cached_property
    def grows(self) -> bool:
        """Whether each layer of the cache has room for what it holds and no more."""
        return grows(self.cache)

    @property
    def length(self) -> int:
        """Tokens of this call."""
        return int(self.embeds.shape[1])

    @property
    def n_rows(self) -> int:
        """Rows of the batch."""
        return int(self.embeds.shape[0])

    @cached_property
    def sequence(self) -> Tensor:
        """Every position of the sequence so far, `[past + length]` int64."""
        return torch.arange(self.past + self.length, dtype=torch.int64, device=self.embeds.device)

    @cached_property
    def all_rows(self) -> Tensor:
        """Every position of the call, `[B, length]` int64."""
        return torch.arange(self.length, dtype=torch.int64, device=self.embeds.device).expand(self.n_rows, -1)


def all_positions(positions: Tensor | None, past: int, embeds: Tensor) -> Tensor:
    """Positions of all tokens of the call, `[B, L]` or `[3 or 4, B, L]`; where none are given, those the decoder
    would take."""
    n_rows, length = embeds.shape[:2]
    if positions is None:
        positions = torch.arange(past, past + length, dtype=torch.int64, device=embeds.device)[None]
    shape = (n_rows, length) if positions.ndim == 2 else (positions.shape[0], n_rows, length)
    return positions.expand(shape)


def shape_of(ids: Tensor, *, like: nn.Module) -> Tensor:
    """Embeddings `[B, L, 0]` of token ids `[B, L]`: their shape and the dtype that `like` computes in."""
    return torch.empty(*ids.shape, 0, dtype=next(like.parameters()).dtype, device=ids.device)


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
            f"positions of row {row} jump from {int(positions[row, column])} to {int(positions[row, column + 1])}, "
            f"at token {column + 1}, and without an attention mask that means several sequences packed into one row, "
            "which pruning does not respect; give each sequence a row of its own, padded"
        )
