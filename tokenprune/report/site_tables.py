"""What a report says of the sites of one forward, of the decoder's layers, and of the KV cache's traffic."""

import dataclasses
import statistics
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from itertools import groupby, zip_longest
from typing import Any, TypeVar

from tokenprune.report.generation import Inspection
from tokenprune.report.measure import MIB
from tokenprune.report.tables import Part, Table, factor, number, percent
from tokenprune.signals import Trace, Traffic

SHOWN_ROWS, SHOWN_LAYERS, CROWDED = 12, 40, 2
SITE_HEADER = ["site", "layer", "method", "status", "row", "images", "in", "out", "kept", "radius", "site ms"]
BLOCK_HEADER = ["layer", "tokens in", "tokens out", "kept", "site ms"]
LAYER_HEADER = ["layer", "visual in", "visual out", "sequence", "pruned", "KV MiB", "pruned", "saved"]
TRAFFIC_HEADER = ["read of the KV cache", "MiB", "factor"]


@dataclass(frozen=True)
class LayerReport:
    """One layer of the decoder in the prefill; what was not measured is None.

    Attributes:
        layer: its index.
        visual_in: visual tokens that reached it, all rows together; None if no site saw any.
        visual_out: visual tokens that were kept after it, likewise.
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


Layered = TypeVar("Layered", Trace, LayerReport)


def site_of(*traces: Trace) -> Trace:
    """What the traces of a site say, one trace a run, without tensors; of their times the median."""
    spent = statistics.median(trace.overhead_ms for trace in traces)
    return dataclasses.replace(traces[-1], kept_indices=(), visual_indices=(), assignment=None, overhead_ms=spent)


def _n_in(site: Trace) -> int:
    """Visual tokens that reached the site, all rows together."""
    return sum(site.n_in)


def _n_out(site: Trace) -> int:
    """Visual tokens that the site kept, all rows together."""
    return sum(site.n_out or site.n_in)


def visual_tokens(sites: Sequence[Trace]) -> tuple[int, int] | None:
    """Visual tokens that came and that were kept to the end, all rows together; None if no site saw any. Where sites
    inside the encoder and at the decoder both did, those at the decoder count."""
    seen = [site for site in sites if site.n_in]
    seen = [site for site in seen if site.site != "encoder_block"] or seen
    return (_n_in(seen[0]), _n_out(seen[-1])) if seen else None


def layers_of(
    sites: Sequence[Trace], dense: Inspection | None = None, pruned: Inspection | None = None
) -> tuple[LayerReport, ...]:
    """The decoder's layers, from the sites of a forward and from a run of each side."""
    before = [site for site in sites if site.site == "before_llm" and site.n_in]
    inside: dict[int, list[Trace]] = {}
    for site in sites:
        if site.site == "llm_layer" and site.layer is not None and site.n_in:
            inside.setdefault(site.layer, []).append(site)
    measured: list[Any] = [
        getattr(seen, name, ()) for name in ("layer_tokens", "layer_kv_mib") for seen in (dense, pruned)
    ]
    there = _n_out(before[-1]) if before else next((_n_in(found[0]) for found in inside.values()), None)
    layers = []
    for layer, (_, *values) in enumerate(zip_longest(range(max(inside, default=-1) + 1), *measured)):
        reached = there
        if layer in inside:
            reached, there = _n_in(inside[layer][0]), _n_out(inside[layer][-1])
        layers.append(LayerReport(layer, reached, there, *values))
    return tuple(layers)


def site_parts(sites: Sequence[Trace]) -> Iterator[Part]:
    """What happened at the sites: row by row or, where a site repeats over many layers, layer by layer."""
    counts = Counter(site.site for site in sites if site.layer is not None and site.n_in)
    repeated = [name for name, n_sites in counts.items() if n_sites > CROWDED]
    rows = [row for site in sites if site.site not in repeated for row in _site_rows(site)]
    if rows:
        yield Table(SITE_HEADER, rows[:SHOWN_ROWS])
    if len(rows) > SHOWN_ROWS:
        yield f"{len(rows) - SHOWN_ROWS} more rows are in to_dict()."
    for name in repeated:
        group = [site for site in sites if site.site == name and site.n_in]
        yield f"{name}, {', '.join(dict.fromkeys(site.method for site in group))}: all rows of the batch together."
        yield Table(BLOCK_HEADER, _block_rows(group)[:SHOWN_LAYERS])
    yield from dict.fromkeys(f"{site.site}, {site.method}: skipped, {site.reason}." for site in sites if site.reason)
    yield from dict.fromkeys(f"{site.site}, {site.method}: {site.note}." for site in sites if site.note)
    if all(site.status != "applied" for site in sites):
        yield "No tokens were pruned."


def _site_rows(site: Trace) -> list[list[str]]:
    """A row of cells for each row of the batch."""
    head = [site.site, "-" if site.layer is None else str(site.layer), site.method[:14], site.status]
    rows = []
    for row, (n_in, n_out) in enumerate(zip(site.n_in, site.n_out or site.n_in, strict=True)):
        images = str(len(site.images[row])) if row < len(site.images) else "-"
        radius = None if site.radius is None else max(site.radius[row], default=None)
        counts = [str(row), images, f"{n_in:,}", f"{n_out:,}", _kept(n_out, n_in)]
        rows.append([*head, *counts, number(radius), "" if row else number(site.overhead_ms)])
    return rows or [[*head, *["-"] * 7]]


def _block_rows(sites: Iterable[Trace]) -> list[list[str]]:
    """A row of cells for each layer, rows of the batch together; neighbours where nothing is pruned share one."""
    rows = []
    for name, run in _neighbours(sites, lambda site: None if _n_in(site) == _n_out(site) else site.layer):
        n_in, n_out = _n_in(run[0]), _n_out(run[-1])
        rows.append(
            [name, f"{n_in:,}", f"{n_out:,}", _kept(n_out, n_in), number(sum(site.overhead_ms for site in run))]
        )
    return rows


def layer_parts(layers: Sequence[LayerReport]) -> Iterator[Part]:
    """The measured layers of the decoder; neighbours with the same figures share a row."""
    if all(layer.dense_tokens is None for layer in layers):
        return
    rows = []
    for name, (layer, *_) in _neighbours(layers, lambda layer: dataclasses.astuple(layer)[1:]):
        dense, pruned = layer.dense_kv_mib, layer.pruned_kv_mib
        saved = percent(1 - pruned / dense) if dense and pruned is not None else "-"
        rows.append([name, *map(number, dataclasses.astuple(layer)[1:]), saved])
    yield "Layers of the decoder: visual tokens, length of the sequence at the prefill, KV cache."
    yield Table(LAYER_HEADER, rows[:SHOWN_LAYERS])


def _neighbours(layers: Iterable[Layered], same: Callable[[Layered], object]) -> Iterator[tuple[str, list[Layered]]]:
    """Neighbouring layers of which `same` is equal, under one name such as `2-3`."""
    for _, group in groupby(layers, key=same):
        run = list(group)
        first, last = run[0].layer, run[-1].layer
        yield str(first) if first == last else f"{first}-{last}", run


def traffic_parts(traffic: Traffic) -> Iterator[Part]:
    """Bytes of keys and values read while tokens were generated: a row for each thing that is not read, with the bytes
    that remain and the factor that it saves."""
    amounts = {
        "dense": traffic.dense,
        "without dropped tokens": traffic.tokens,
        "without pruned heads": traffic.heads,
        "without values not read": traffic.values,
        "without bits not read": traffic.read,
    }
    steps = zip(amounts.items(), [traffic.dense, *amounts.values()], strict=False)
    rows = [[name, number(after / MIB), factor(before, after)] for (name, after), before in steps]
    yield Table(TRAFFIC_HEADER, [*rows, ["in all", number(traffic.read / MIB), factor(traffic.dense, traffic.read)]])
    yield (
        f"Counted over {traffic.steps:,} attentions of a row in decoding steps; {percent(traffic.recomputed)} of their "
        "heads read the low bits too."
    )


def _kept(n_out: int, n_in: int) -> str:
    return percent(n_out / n_in if n_in else None)
