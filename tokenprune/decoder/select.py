"""Selection at the decoder's entrance: from the images of a forward to the kept tokens of every row."""

import time
from collections.abc import Iterable
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from tokenprune.decoder.boundaries import Image
from tokenprune.errors import InputError
from tokenprune.methods.base import Method
from tokenprune.reduction import Merge
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


def write_merged(x: Tensor, *, merged: list[Merged]) -> None:
    """Put the means of merged tokens into `x` `[B, L, D]`."""
    for one in merged:
        one.write(x)


def sizes_of(merged: list[Merged], shape: tuple[int, int], device: torch.device) -> Tensor | None:
    """How many tokens each token represents, `[B, L]` fp32; None where attention is not to count them."""
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
    images: list[Image], method: Method, embeds: Tensor, merged: list[Merged]
) -> tuple[list[Image], Tensor, Trace]:
    """Let one method choose among, or merge, the tokens of every image; images of one size go to it together.

    Args:
        images: the images of the forward, with the tokens that are left of them.
        method: the method.
        embeds: what the decoder was to get, `[B, L, D]`.
        merged: what was merged before; what is merged now is added.

    Returns:
        The images with the kept tokens, the embeddings with the groups' means in place, and the trace.

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
        keep = ask_before_llm(method, Signals(features, grid, tuple(images[i].ordinal for i in members), n_hidden))
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
    return chosen, embeds, _trace(method.name, images, chosen, embeds.shape[0], radii, started)


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
        note=_uncertain(sum(not image.certain for image in before)),
        overhead_ms=(time.perf_counter() - started) * 1e3,
    )


def _uncertain(n_runs: int) -> str:
    """What to say where `n_runs` runs of visual tokens were taken for an image each."""
    if not n_runs:
        return ""
    each = "1 run of visual tokens was taken for 1 image"
    return "the boundaries of images could not be told: " + (
        each if n_runs == 1 else f"{n_runs} runs of visual tokens were taken for {n_runs} images"
    )


def dropped_tokens(before: tuple[Tensor, ...], after: tuple[Tensor, ...], *, length: int) -> Tensor:
    """Which tokens of each row were chosen from and not chosen, `[B, length]` bool on the CPU.

    Args:
        before: for each row `[n]` int64, the tokens that were chosen from.
        after: for each row `[m]` int64, those of them that were chosen.
        length: tokens of the call.
    """
    dropped = torch.zeros(len(before), length, dtype=torch.bool, device="cpu")
    for row, old, new in zip(dropped, before, after, strict=True):
        row[old] = True
        row[new] = False
    return dropped
