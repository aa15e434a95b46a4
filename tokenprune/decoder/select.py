"""Selection at the decoder's entrance: from the images of a forward to the tokens of every row that go on."""

import time
from collections.abc import Iterable
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from tokenprune.decoder.images import Image
from tokenprune.engine import Reducer
from tokenprune.errors import InputError
from tokenprune.reduction import Keep, Merge, pack
from tokenprune.signals import Signals, Trace
from tokenprune.validate import ask_before_llm

SITE = "before_llm"
_NONE = torch.empty(0, dtype=torch.int64, device="cpu")


@dataclass(frozen=True)
class Merged:
    """What a merge did to some images of one size.

    Attributes:
        rows: `[R]` int64, the row of each image.
        tokens: `[R, N]` int64, the positions of its tokens.
        merge: what was done to them.
    """

    rows: Tensor
    tokens: Tensor
    merge: Merge

    def write(self, x: Tensor) -> None:
        """Put the means of the groups into `x` `[B, L, ...]`, at the places where the groups stand."""
        rows, tokens = self.rows.to(x.device)[:, None], self.tokens.to(x.device)
        x[rows, tokens.gather(1, self.merge.index.to(x.device))] = self.merge.apply(x[rows, tokens])


def sizes_of(merged: list[Merged], shape: tuple[int, int], device: torch.device) -> Tensor | None:
    """How many tokens each token stands for, `[B, L]` fp32; None where attention is not to know."""
    if not any(one.merge.biased for one in merged):
        return None
    sizes = torch.ones(shape, dtype=torch.float32, device="cpu")
    for one in merged:
        rows, tokens, merge = one.rows.cpu()[:, None], one.tokens.cpu(), one.merge
        before = sizes[rows, tokens]
        index = merge.index.cpu()
        after = torch.zeros_like(index, dtype=torch.float32).scatter_add_(1, merge.assign.cpu(), before)
        sizes[rows, tokens.gather(1, index)] = after
    return sizes.to(device)


def skipped(names: Iterable[str], reason: str, *, site: str = SITE) -> list[Trace]:
    """A trace for each method that had nothing to do."""
    return [Trace(site, None, name, status="skipped", reason=reason) for name in names]


def reduce_images(
    images: list[Image], reducer: Reducer, embeds: Tensor, merged: list[Merged]
) -> tuple[list[Image], Tensor, Trace]:
    """Let one method choose among, or merge, the tokens of every image; images of one size go to it together.

    Args:
        images: the images of the forward, with the tokens that are left of them.
        reducer: the method.
        embeds: what the decoder was to get, `[B, L, D]`.
        merged: what was merged before; what is merged now is added.

    Returns:
        The images with the tokens that go on, the embeddings with the groups' means in place, and the trace.

    Raises:
        InputError: a visual token holds NaN or infinite values.
    """
    started = time.perf_counter()
    groups: dict[tuple[int, tuple[int, int] | None, int], list[int]] = {}
    for i, image in enumerate(images):
        groups.setdefault((len(image.tokens), image.grid, image.n_hidden), []).append(i)
    chosen = list(images)
    radii: dict[int, float] = {}
    n_before = len(merged)
    for (n_tokens, grid, n_hidden), members in groups.items():
        rows = torch.tensor([images[i].row for i in members], dtype=torch.int64, device=embeds.device)
        tokens = torch.stack([images[i].tokens for i in members]).to(embeds.device)
        features = embeds[rows[:, None], tokens]
        if not bool(torch.stack(torch.aminmax(features)).isfinite().all()):  # a NaN or an infinity is one of the two
            finite = torch.isfinite(features).flatten(1).all(dim=1)
            row = images[members[int((~finite).nonzero()[0])]].row
            raise InputError(
                f"{SITE}: the visual tokens of row {row} hold NaN or infinite values, so nothing was pruned"
            )
        keep = ask_before_llm(reducer, Signals(features, grid, tuple(images[i].ordinal for i in members), n_hidden))
        if isinstance(keep, Merge):
            embeds = embeds if len(merged) > n_before else embeds.clone()
            merged.append(Merged(rows, tokens, keep))
            merged[-1].write(embeds)
        index = keep.index.cpu()  # sessions hand it over on the CPU
        valid = torch.ones_like(index, dtype=torch.bool) if keep.valid is None else keep.valid.cpu()
        for member, i in enumerate(members):
            kept = index[member][valid[member]]
            left = grid if len(kept) == n_tokens else None
            chosen[i] = replace(images[i], tokens=images[i].tokens[kept], grid=left, n_hidden=0)
        if keep.radius is not None:
            radii.update(zip(members, keep.radius.tolist(), strict=True))
    return chosen, embeds, _trace(reducer.name, images, chosen, embeds.shape[0], radii, started)


def tokens_by_row(images: list[Image], n_rows: int) -> tuple[Tensor, ...]:
    """Positions of the visual tokens of every row, `[n]` int64 each, ascending."""
    rows = [[image.tokens for image in images if image.row == row] for row in range(n_rows)]
    return tuple(torch.cat(row).sort().values if row else _NONE for row in rows)


def _trace(
    name: str, before: list[Image], after: list[Image], n_rows: int, radii: dict[int, float], started: float
) -> Trace:
    members = [[i for i, image in enumerate(before) if image.row == row] for row in range(n_rows)]
    seen, kept = tokens_by_row(before, n_rows), tokens_by_row(after, n_rows)
    return Trace(
        SITE,
        None,
        name,
        n_in=tuple(map(len, seen)),
        n_out=tuple(map(len, kept)),
        kept_indices=kept,
        visual_indices=seen,
        images=tuple(tuple(len(before[i].tokens) for i in row) for row in members),
        grids=tuple(tuple(before[i].grid for i in row) for row in members),
        radius=tuple(tuple(radii[i] for i in row) for row in members) if radii else None,
        note=_untold(sum(not image.told for image in before)),
        overhead_ms=(time.perf_counter() - started) * 1e3,
    )


def _untold(n_runs: int) -> str:
    """What to say where `n_runs` runs of visual tokens were taken for an image each."""
    if not n_runs:
        return ""
    each = "1 run of visual tokens was taken for 1 image"
    return "the boundaries of images could not be told: " + (
        each if n_runs == 1 else f"{n_runs} runs of visual tokens were taken for {n_runs} images"
    )


def all_positions(positions: Tensor | None, past: int, embeds: Tensor) -> Tensor:
    """Positions of all tokens of the call, `[B, L]` or `[3 or 4, B, L]`; where none are given, those the decoder
    would take."""
    n_rows, length = embeds.shape[:2]
    if positions is None:
        positions = torch.arange(past, past + length, dtype=torch.int64, device=embeds.device)[None]
    shape = (n_rows, length) if positions.ndim == 2 else (positions.shape[0], n_rows, length)
    return positions.expand(shape)


def padding_of(mask: Any, *, past: int, length: int, offset: int) -> Tensor | None:
    """Which tokens of this call are no padding, `[B, length]` bool on the CPU, None where all are.

    Args:
        mask: the attention mask that the decoder was to get, in any of its forms.
        past: tokens before this call.
        length: tokens of this call.
        offset: position of the first key that a 4-D mask covers.
    """
    if isinstance(mask, dict):
        entries = [mask[kind] for kind in sorted(mask) if isinstance(mask[kind], Tensor)]
        entries.sort(key=lambda entry: entry.ndim)
        mask = entries[0] if entries else None
    if not isinstance(mask, Tensor):
        return None
    if mask.ndim == 2:
        start = 0 if mask.shape[1] == length else past  # that of recurrent layers covers the call alone
        return mask[:, start : start + length].bool().cpu()
    # A token that is no padding sees itself.
    own = mask[:, 0].diagonal(offset=past - offset, dim1=1, dim2=2)
    return own.cpu() if own.dtype == torch.bool else own.eq(0).cpu()


def keep_rows(
    before: list[Image],
    after: list[Image],
    padding: Tensor | None,
    *,
    shape: tuple[int, int],
    device: torch.device,
    left: bool,
) -> tuple[Keep, Tensor]:
    """Tokens of each row that go on: the text and what is left of the images, but no padding that nothing needs.

    Args:
        before: the images of the forward, `after`: what is left of them.
        after: see `before`.
        padding: `[B, L]` bool on the CPU, False for padding, or None.
        shape: B and L.
        device: where the result is needed.
        left: whether what fills short rows up comes first.

    Returns:
        The reduction (`valid` None where all rows are full) and the dropped visual tokens, `[B, L]` bool.
    """
    dropped = torch.zeros(shape, dtype=torch.bool, device="cpu")
    for old, new in zip(before, after, strict=True):
        dropped[old.row, old.tokens] = True
        dropped[new.row, new.tokens] = False
    real = ~dropped if padding is None or not bool(dropped.any()) else ~dropped & padding
    return pack(real, left=left).to(device), dropped.to(device)
