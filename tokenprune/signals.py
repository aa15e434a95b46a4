"""What a site hands to a method, what a method may keep, and what is left behind as a trace.

These records stand between :mod:`tokenprune.methods` and :mod:`tokenprune.models`, which never import each other.
"""

from dataclasses import dataclass

from torch import Tensor

SITES = ("before_llm",)
"""Names of the places where a method can take part; a method does so by defining a function of that name."""


@dataclass(frozen=True)
class Signals:
    """What a method may look at. Images (or frames) of one size are handed over together, as one batch.

    Attributes:
        features: visual tokens as they enter the decoder, `[B, N, D]`, in the model's dtype.
        grid: rows and columns of the token grid (`h * w == N`) where the tokens are one, else None.
        ids: for each image its ordinal within its own row of the batch, so that what a seeded method draws does not
            depend on the rows beside it.
    """

    features: Tensor
    grid: tuple[int, int] | None
    ids: tuple[int, ...]


@dataclass(frozen=True)
class Budget:
    """How many tokens of each image a method has to keep: from `low` to `high`, both included."""

    low: int
    high: int


@dataclass(frozen=True)
class Trace:
    """What happened at one site of one forward. Rows are the rows of the batch.

    Attributes:
        site: name of the site, for instance `before_llm`.
        layer: index of the decoder layer, or None where the site stands before all layers.
        method: name of the method.
        n_in: visual tokens that reached the site, per row.
        n_out: visual tokens that went on, per row.
        kept_indices: positions of the visual tokens that went on, in the unpruned sequence of this call, `[n_out]`
            int64 on the CPU, per row.
        visual_indices: positions of the visual tokens that reached the site, likewise.
        images: visual tokens that reached the site for each image (or frame) of the row.
        grids: rows and columns of the token grid of each of these images, None where the tokens are not one grid.
        radius: largest cosine distance from a dropped token to its nearest kept one, per row and image, where the
            method knows it.
        status: "applied" or "skipped".
        reason: why the site was skipped, else "".
        overhead_ms: wall time spent at the site: selection, gathering and masks. On a GPU it includes the wait for the
            selection.
    """

    site: str
    layer: int | None
    method: str
    n_in: tuple[int, ...] = ()
    n_out: tuple[int, ...] = ()
    kept_indices: tuple[Tensor, ...] = ()
    visual_indices: tuple[Tensor, ...] = ()
    images: tuple[tuple[int, ...], ...] = ()
    grids: tuple[tuple[tuple[int, int] | None, ...], ...] = ()
    radius: tuple[tuple[float, ...], ...] | None = None
    status: str = "applied"
    reason: str = ""
    overhead_ms: float = 0.0
