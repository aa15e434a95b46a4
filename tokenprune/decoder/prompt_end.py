"""Where the prompt ends within a call of the decoder: what ranks its tokens are the tokens up to there.

Two kinds of tokens stand behind it: drafts of an assistant or of a prompt lookup, which come with the prompt and are
recognised by the number of logits that are asked for, and tokens generated without a KV cache, where every step brings
the whole sequence again. Ranked by these, a prompt would lose other tokens than without an assistant or with a cache.
"""

import weakref
from contextvars import ContextVar
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from tokenprune.decoder.around import n_logits_of
from tokenprune.session import Session
from tokenprune.upstream.prompts import Prompt

_BITS = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}


@dataclass(frozen=True)
class _Seen:
    """A prompt that went through a decoder without a KV cache.

    Attributes:
        session: whose decoder it was.
        marks: `[B, L]`, what tells its tokens: their ids, or a sum over the bits of their embeddings.
        length: tokens of the call that last went on from it, or its own.
    """

    session: Any
    marks: Tensor
    length: int


_SEEN: ContextVar[_Seen | None] = ContextVar("tokenprune_seen", default=None)


def n_drafts(prompt: Prompt, length: int) -> int:
    """How many of the last of `length` tokens are drafts, whose logits are asked for beside those of the token before
    them."""
    return min(n_logits_of(prompt), length) - 1


def n_generated(session: Session, ids: Tensor | None, embeds: Tensor) -> int:
    """How many of the last tokens of a call without a KV cache were generated since its prompt.

    A call continues the one before where it is one token longer and begins with the same prompt, image features
    included.

    Args:
        session: that of the patched model.
        ids: token ids `[B, L]` where the decoder is given such, else None.
        embeds: embeddings `[B, L, D]`, where it is given such.
    """
    if ids is None:
        ids = embeds.detach().contiguous().view(_BITS[embeds.element_size()]).sum(dim=-1, dtype=torch.int64)
    marks, length, seen = ids, embeds.shape[1], _SEEN.get()
    if seen is not None and seen.session() is session and length == seen.length + 1:
        earlier = seen.marks.to(marks.device)
        start = marks[:, : earlier.shape[1]]
        if start.shape == earlier.shape and torch.equal(start, earlier):
            _SEEN.set(replace(seen, length=length))
            return length - earlier.shape[1]
    _SEEN.set(_Seen(weakref.ref(session), marks, length))
    return 0
