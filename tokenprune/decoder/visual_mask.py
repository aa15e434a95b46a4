"""Which tokens are visual where a call of the model does not tell: image features merged by the caller.

Such a call brings embeddings without ids. Where a module around the model was called with ids and computes the
embeddings out of them, these ids tell (:mod:`tokenprune.decoder.around`); else the caller can say it, by
:func:`visual_tokens`.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional

from tokenprune.errors import InputError
from tokenprune.upstream.decoder_call import DecoderCall
from tokenprune.upstream.prompts import Prompt

_BLOCK = "tokenprune.visual_tokens(mask)"


@dataclass
class _Said:
    """What a caller says of the prompts in a block.

    Attributes:
        mask: `[B, L]` bool on the CPU, the visual tokens of a prompt.
        start: tokens before the prompt that came last; None before the first.
        end: how many tokens of it came so far.
        ids: whether a prompt came whose ids tell already.
    """

    mask: Tensor
    start: int | None = None
    end: int = 0
    ids: bool = False

    def of_call(self, n_rows: int, length: int, past: int, *, cached: bool) -> Tensor | None:
        """The visual tokens of a call, `[n_rows, length]` bool; None where the call is no part of a prompt.

        Args:
            n_rows: rows of the call.
            length: its tokens.
            past: tokens before it.
            cached: whether there is a KV cache, without which every call brings the whole sequence.

        Raises:
            InputError: the mask does not fit the call, or the prompt before ended early.
        """
        width, goes_on = self.mask.shape[1], self.start is not None and past > self.start
        grown = not cached and self.start == past and self.end == length - 1 >= width
        if past and length == 1 and not goes_on:
            return None
        if not goes_on and not grown:
            self.finish()
            chunk = cached and not past and length < width
            if n_rows % len(self.mask) or not (chunk or width in (length, past + length)):
                raise self._misfit(n_rows, length, past)
            self.start = past if length == width else 0
        assert self.start is not None
        first = past - self.start
        if first >= width:
            return None
        if n_rows % len(self.mask) or (first + length > width and not grown):
            raise self._misfit(n_rows, length, past)
        self.end = first + length
        columns = self.mask[:, first : first + length].repeat_interleave(n_rows // len(self.mask), dim=0)
        return functional.pad(columns, (0, length - columns.shape[1]))

    def _misfit(self, n_rows: int, length: int, past: int) -> InputError:
        wanted = f"[{n_rows}, {length}]" + (f", or [{n_rows}, {past + length}] with those before it" if past else "")
        return InputError(
            f"{_BLOCK} was given a mask of shape {list(self.mask.shape)} for a call of {n_rows} rows of {length} "
            f"tokens after {past} others; nothing was pruned. What fits is {wanted}; several sequences of each prompt "
            "need a row of the mask for each prompt, and a prompt that comes in chunks one mask for the whole"
        )

    def finish(self) -> None:
        """Check that the last prompt was as long as the mask.

        Raises:
            InputError: it was not.
        """
        if self.start is not None and self.end < self.mask.shape[1]:
            raise InputError(
                f"{_BLOCK} was given a mask of {self.mask.shape[1]} columns, and only {self.end} tokens of the prompt "
                "came; give a column for each of its tokens, and each prompt a block of its own"
            )


_SAID: ContextVar[_Said | None] = ContextVar("tokenprune_visual", default=None)


@contextmanager
def visual_tokens(mask: Tensor) -> Iterator[None]:
    """Within the block, in this thread, say which tokens of a prompt given as embeddings are visual.

    For callers that merge image features into the embeddings themselves and give the model (or its ``generate``) these
    alone, so that nothing in the call tells visual tokens from text::

        with tokenprune.visual_tokens(ids == image_token_id):
            model.generate(inputs_embeds=embeds, attention_mask=attention_mask)

    A run of visual tokens is an image, as far as nothing else tells where one ends and the next begins. The mask is
    about the prompt, and what is generated behind it is text. The prompt may come in chunks; with beams or several
    sequences of each prompt, the rows are those of the prompts. Calls that bring ids are read by those.

    Args:
        mask: `[B, L]` bool, True where a visual token stands; as many rows and columns as the embeddings.

    Raises:
        InputError: the mask is no such tensor or, in the block or at its end, does not fit a call.
    """
    if not isinstance(mask, Tensor) or mask.ndim != 2 or mask.dtype != torch.bool or not mask.numel():
        seen = f"{mask.dtype} of shape {list(mask.shape)}" if isinstance(mask, Tensor) else type(mask).__name__
        raise InputError(f"{_BLOCK} takes a bool tensor [B, L], True where a visual token stands, and got {seen}")
    said = _Said(mask.cpu())
    token = _SAID.set(said)
    try:
        yield
    finally:
        _SAID.reset(token)
    said.finish()
    if said.ids and said.start is None:
        raise InputError(
            f"{_BLOCK} was given around calls that bring ids, which tell visual tokens themselves; it is for calls "
            "with embeddings alone"
        )


def _ids_tell(prompt: Prompt, given: DecoderCall) -> bool:
    """Whether the ids of all tokens of a call of the decoder are known."""
    if given.ids is not None:
        return True
    return prompt.ids is not None and given.embeds is not None and prompt.ids.shape == given.embeds.shape[:2]


def mask_of(prompt: Prompt, given: DecoderCall, past: int, *, cached: bool) -> Tensor | None:
    """The visual tokens of a call of the decoder as the caller has said it, `[B, L]` bool; None where he has not.

    Raises:
        InputError: what he said does not fit the call, or the decoder was called without the model around it.
    """
    said = _SAID.get()
    if said is None or given.embeds is None:
        return None
    if not prompt.given:
        raise InputError(
            f"{_BLOCK} was given around a call of {type(given.module).__name__}, and what is pruned are calls of the "
            "model around it; call that, with embeddings"
        )
    n_rows, length = given.embeds.shape[:2]
    if _ids_tell(prompt, given):
        said.ids = said.ids or length > 1 or not past
        return None
    return said.of_call(n_rows, length, past, cached=cached)


def reason_of(prompt: Prompt, given: DecoderCall) -> str:
    """Why a call of the decoder has no visual tokens that would be known."""
    if _SAID.get() is not None or prompt.has_features or _ids_tell(prompt, given):
        return "no image in this call"
    return f"embeddings without ids do not tell which tokens are visual; give {_BLOCK} around the call"
