"""What a report says of the sites of one forward and of the decoder's layers, as data and as rows of tables."""

import dataclasses
import statistics
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import groupby
from typing import Any

from tokenprune.report.generation import Inspection
from tokenprune.report.tables import number
from tokenprune.signals import Trace

CROWDED = 2
SITE_HEADER = ["site", "layer", "method", "status", "row", "images", "in", "out", "kept", "radius", "site ms"]
BLOCK_HEADER = ["layer", "tokens in", "tokens out", "kept", "site ms"]
LAYER_HEADER = ["layer", "visual in", "visual out", "sequence", "pruned", "KV MiB", "pruned", "saved"]


@dataclass(frozen=True)
class SiteReport:
    """One site of one forward: a :class:`~tokenprune.signals.Trace` without its tensors; same names, same meaning."""

    site: str
    layer: int | None
    method: str
    status: str
    reason: str
    note: str
    n_in: tuple[int, ...]
    n_out: tuple[int, ...]
    images: tuple[tuple[int, ...], ...]
    radius: tuple[tuple[float, ...], ...] | None
    overhead_ms: float

    @classmethod
    def of(cls, *traces: Trace) -> "SiteReport":
        """Take over what the traces of a site say, one trace a run; of their times the median counts."""
        said = {entry.name: getattr(traces[-1], entry.name) for entry in dataclasses.fields(cls)}
        return cls(**{**said, "overhead_ms": statistics.median(trace.overhead_ms for trace in traces)})

    @property
    def total_in(self) -> int:
        """Visual tokens that reached the site, all rows together."""
        return sum(self.n_in)

    @property
    def total_out(self) -> int:
        """Visual tokens that went on, all rows together."""
        return sum(self.n_out or self.n_in)


@dataclass(frozen=True)
class LayerReport:
    """One layer of the decoder in the prefill; what was not measured is None.

    Attributes:
        layer: its index.
        visual_in: visual tokens that reached it, all rows together; None if no site told.
        visual_out: visual tokens that went on from it, likewise.
        dense_tokens: length of the sequence that entered it without pruning, text and padding included.
        pruned_tokens: the same with pruning.
        dense_kv_mib: its part of the KV cache after the last token, without pruning.
        pruned_kv_mib: the same with pruning.
    """

    layer: int
    visual_in: int | None
    visual_out: int | None
    dense_tokens: int | None = None
    pruned_tokens: int | None = None
    dense_kv_mib: float | None = None
    pruned_kv_mib: float | None = None


def layers_of(
    sites: Sequence[SiteReport], dense: Inspection | None = None, pruned: Inspection | None = None
) -> tuple[LayerReport, ...]:
    """The decoder's layers, from the sites of a forward and from a run of each side."""
    before = [site for site in sites if site.site == "before_llm" and site.n_in]
    inside = {
        layer: list(group)
        for layer, group in groupby(
            (site for site in sites if site.site == "llm_layer" and site.n_in), key=lambda site: site.layer
        )
    }
    counts = [len(seen.layer_tokens) for seen in (dense, pruned) if seen is not None]
    n_layers = max(counts + [layer + 1 for layer in inside if layer is not None], default=0)
    left = before[-1].total_out if before else next((found[0].total_in for found in inside.values()), None)
    layers = []
    for layer in range(n_layers):
        found = inside.get(layer, [])
        reached = found[0].total_in if found else left
        left = found[-1].total_out if found else left
        values: list[Any] = [
            _at(layer, () if seen is None else getattr(seen, name))
            for name in ("layer_tokens", "layer_kv_mib")
            for seen in (dense, pruned)
        ]
        layers.append(LayerReport(layer, reached, left, *values))
    return tuple(layers)


def _at(place: int, values: Sequence[float]) -> float | None:
    return values[place] if place < len(values) else None


def visual_tokens(sites: Sequence[SiteReport]) -> tuple[int, int] | None:
    """Visual tokens that came and that were left in the end, all rows together; None if no site saw any. Where sites
    inside the encoder and at the decoder both did, those at the decoder count."""
    seen = [site for site in sites if site.n_in]
    seen = [site for site in seen if site.site != "encoder_block"] or seen
    return (seen[0].total_in, seen[-1].total_out) if seen else None


def crowded(sites: Sequence[SiteReport]) -> dict[str, list[SiteReport]]:
    """Sites that repeat over more layers than a table row by row has room for, by their names."""
    by_name: dict[str, list[SiteReport]] = {}
    for site in sites:
        if site.layer is not None and site.n_in:
            by_name.setdefault(site.site, []).append(site)
    return {name: group for name, group in by_name.items() if len(group) > CROWDED}


def site_rows(site: SiteReport) -> list[list[str]]:
    """A row of cells for each row of the batch."""
    head = [site.site, "-" if site.layer is None else str(site.layer), site.method[:14], site.status]
    rows = []
    for row, n_in in enumerate(site.n_in):
        n_out = site.n_out[row] if row < len(site.n_out) else n_in
        images = str(len(site.images[row])) if row < len(site.images) else "-"
        radius = max(site.radius[row], default=None) if site.radius is not None else None
        cells = [str(row), images, f"{n_in:,}", f"{n_out:,}", _share(n_out, n_in), number(radius)]
        rows.append([*head, *cells, "" if row else number(site.overhead_ms)])
    return rows or [[*head, *["-"] * 7]]


def block_rows(sites: Sequence[SiteReport]) -> list[list[str]]:
    """A row of cells for each layer, rows of the batch together; layers where nothing changes stand as one."""
    rows = []
    for _, group in groupby(enumerate(sites), key=lambda pair: _unchanged(*pair)):
        run = [site for _, site in group]
        first, last = run[0], run[-1]
        name = str(first.layer) if len(run) == 1 else f"{first.layer}-{last.layer}"
        spent = number(sum(site.overhead_ms for site in run))
        kept = _share(last.total_out, first.total_in)
        rows.append([name, f"{first.total_in:,}", f"{last.total_out:,}", kept, spent])
    return rows


def _unchanged(place: int, site: SiteReport) -> int:
    """A key that joins neighbours through which all tokens pass."""
    return -1 if site.total_in == site.total_out else place


def layer_rows(layers: Sequence[LayerReport]) -> list[list[str]]:
    """A row of cells for each layer; neighbours with the same figures stand as one."""
    rows = []
    for _, group in groupby(layers, key=lambda layer: dataclasses.astuple(layer)[1:]):
        run = list(group)
        first = run[0]
        name = str(first.layer) if len(run) == 1 else f"{first.layer}-{run[-1].layer}"
        dense, pruned = first.dense_kv_mib, first.pruned_kv_mib
        saved = f"{100 * (1 - pruned / dense):.1f} %" if dense and pruned is not None else "-"
        counts = (first.visual_in, first.visual_out, first.dense_tokens, first.pruned_tokens)
        rows.append([name, *map(number, counts), number(dense), number(pruned), saved])
    return rows


def _share(part: int, whole: int) -> str:
    return f"{100 * part / whole:.1f} %" if whole else "-"
