"""The independent oracle: the unpatched model, without any cache, on the kept tokens of one row, computed in full.

Nothing here uses the library. What the dense model hands to its decoder is captured; the rows and columns of the kept
tokens are taken out by plain indexing; masks are explicit; and the row stands alone, without padding.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from families import MROPE, Batch, alone, fresh
from torch import Tensor, nn
from upstream import DEEPSTACK, EMBEDS, MASK, POSITIONS, USE_CACHE, VISUAL_PLACES, with_cache


def additive(seen: Tensor, dtype: torch.dtype) -> Tensor:
    return torch.zeros(seen.shape, dtype=dtype).masked_fill(~seen, torch.finfo(dtype).min)


def explicit_mask(decoder: nn.Module, given: Any, kept: Tensor, length: int) -> Any:
    """The mask over the kept tokens of an unpadded row: rows and columns of the dense one."""
    eager = decoder.config._attn_implementation == "eager"

    def causal(window: int | None) -> Tensor:
        query, key = torch.arange(length)[:, None], torch.arange(length)[None, :]
        seen = (key <= query) if window is None else (key <= query) & (query - key < window)
        seen = seen[kept][:, kept][None, None]
        return additive(seen, torch.float32) if eager else seen

    def one(mask: Any, window: int | None) -> Tensor:
        if mask is None or mask.ndim == 2:
            return causal(window)
        return mask[:, :, kept][:, :, :, kept]

    kinds = getattr(decoder.config, "layer_types", None)
    window = getattr(decoder.config, "sliding_window", None)
    if isinstance(given, dict):
        return {kind: one(mask, window if "sliding" in kind else None) for kind, mask in given.items()}
    if given is not None and given.ndim == 4:
        return one(given, None)
    if kinds and len(set(kinds)) > 1:
        return {kind: causal(window if "sliding" in kind else None) for kind in set(kinds)}
    return causal(window if kinds is None or "sliding" in kinds[0] else None)


@contextmanager
def only_kept(model: nn.Module, kept: Tensor, *, packed: bool = False) -> Iterator[None]:
    """Within the block the decoder of `model` runs on the tokens `kept` `[m]` of its single row."""
    decoder = model.get_decoder()

    def shorten(module: nn.Module, args: Any, kwargs: dict[str, Any]) -> Any:
        embeds, positions = kwargs[EMBEDS], kwargs.get(POSITIONS)
        length = embeds.shape[1]
        if positions is None:
            positions = torch.arange(length)[None]
        changed = {**kwargs, EMBEDS: embeds[:, kept], **with_cache(None), USE_CACHE: False}
        changed[POSITIONS] = torch.arange(len(kept))[None] if packed else positions[..., kept]
        changed[MASK] = explicit_mask(module, kwargs.get(MASK), kept, length)
        if kwargs.get(VISUAL_PLACES) is not None:
            visual = kwargs[VISUAL_PLACES][0]
            left = torch.isin(visual.nonzero()[:, 0], kept)
            changed[VISUAL_PLACES] = visual[None, kept]
            changed[DEEPSTACK] = [plane[left] for plane in kwargs[DEEPSTACK]]
        return (), changed

    handle = decoder.register_forward_pre_hook(shorten, with_kwargs=True)
    try:
        yield
    finally:
        handle.remove()


def reference_logits(model: nn.Module, family: str, row: Batch, kept: Tensor, *, packed: bool = False) -> Tensor:
    """Logits `[m, V]` of the kept tokens of a single unpadded row, by the unpatched model."""
    inputs = {**fresh(row.inputs), USE_CACHE: False}
    if family not in MROPE:
        inputs[POSITIONS] = inputs[MASK].cumsum(-1) - 1
    with only_kept(model, kept, packed=packed), torch.no_grad():
        return model(**inputs).logits[0]


def kept_of_row(traces: Any, row: int, pad: int, length: int) -> Tensor:
    """Positions that go on in row `row` of a patched batch, counted without its padding; `length` tokens in the row."""
    dropped = set(traces[0].visual_indices[row].tolist()) - set(traces[-1].kept_indices[row].tolist())
    return torch.tensor([i for i in range(length) if i + pad not in dropped])


def check_steps(
    dense: nn.Module,
    family: str,
    out: Any,
    traces: Any,
    prompt: Batch,
    n: int,
    *,
    packed: bool = False,
    tolerance: float = 1e-4,
) -> None:
    """Compare the logits of each of `n` generated tokens of each row with a full computation by the unpatched model."""
    for row, pad in enumerate(prompt.pads):
        single = alone(family, prompt.rows, row)(generated(out, row, n))
        kept = kept_of_row(traces, row, pad, single.inputs["input_ids"].shape[1])
        wanted = reference_logits(dense, family, single, kept, packed=packed)
        check_tokens(out, row, n, wanted, tolerance=tolerance)


def generated(out: Any, row: int, n: int) -> Tensor:
    """The ids `[1, n - 1]` of a row that came before the last of `n` generated ones."""
    ids: Tensor = out.sequences[row : row + 1]
    return ids[:, ids.shape[1] - n : ids.shape[1] - 1]


def check_tokens(out: Any, row: int, n: int, wanted: Tensor, *, tolerance: float = 1e-4) -> None:
    """Compare the logits of `n` generated tokens of a row with the last ones of `wanted` `[m, V]`: those of a dense run
    over everything before the last one, in which no token sees a later one."""
    found = torch.stack([step[row] for step in out.logits[:n]])
    torch.testing.assert_close(found, wanted[-n:], atol=tolerance, rtol=tolerance)
