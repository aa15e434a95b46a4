"""The independent oracle of pruning inside the decoder: the unpatched model at full length, with a mask for every
layer.

Nothing here uses the library, and no token ever leaves: a token that was dropped after layer l is hidden from all
others in the layers after l by a 4-D mask of its own for each layer. Merged embeddings are put in place by plain
arithmetic.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from families import MROPE, Batch, Row, fresh
from oracle import additive
from torch import Tensor, nn
from upstream import DEEPSTACK, EMBEDS, HIDDEN, MASK, POSITIONS, USE_CACHE, VISUAL_PLACES, with_cache


def layers_of(decoder: nn.Module) -> list[nn.Module]:
    return next(list(child) for child in decoder.children() if isinstance(child, nn.ModuleList) and len(child) > 1)


def full_masks(decoder: nn.Module, given: Any, length: int) -> list[Tensor]:
    """What each layer of the unpatched decoder would see of an unpadded row, `[1, 1, L, L]` bool."""
    kinds = getattr(decoder.config, "layer_types", None)
    window = getattr(decoder.config, "sliding_window", None)
    query, key = torch.arange(length)[:, None], torch.arange(length)[None, :]
    masks = []
    for layer in range(decoder.config.num_hidden_layers):
        kind = kinds[layer] if kinds else None
        mask = given[kind] if isinstance(given, dict) else given
        if mask is not None and mask.ndim == 4:
            masks.append(mask[0, 0] if mask.dtype == torch.bool else mask[0, 0] == 0)
            continue
        seen = key <= query
        if window is not None and (kind is None or "sliding" in kind):
            seen = seen & (query - key < window)
        masks.append(seen)
    return masks


def merged_inputs(given: dict[str, Any], merge: Any) -> dict[str, Any]:
    """What a decoder is `given`, its embeddings `[1, L, D]` and DeepStack planes changed by `merge` unless it is
    None."""
    if merge is None:
        return given
    changed = {**given, EMBEDS: merge(given[EMBEDS])}
    if given.get(DEEPSTACK) is not None:
        visual, planes = given[VISUAL_PLACES], []
        for plane in given[DEEPSTACK]:
            whole = plane.new_zeros(1, visual.shape[1], plane.shape[-1])
            whole[visual] = plane
            planes.append(merge(whole)[visual])
        changed[DEEPSTACK] = planes
    return changed


@contextmanager
def hidden_by_layer(
    model: nn.Module, alive: list[Tensor], *, merge: Any = None, sizes: Tensor | None = None, collected: Any = None
) -> Iterator[None]:
    """Within the block the decoder of `model` runs its single row at full length, but in layer l no token sees one that
    `alive[l]` does not hold.

    Args:
        model: the unpatched model.
        alive: for each layer which tokens are left, `[L]` bool; or `[L, L]`, which each token can see.
        merge: a function of the embeddings `[1, L, D]` (and of DeepStack planes spread to `[1, L, D]`).
        sizes: `[L]`, what each token counts in attention.
        collected: a dict that gets each layer's queries and keys, by a wrapper around its projections' attention.
    """
    decoder = model.get_decoder()
    masks: list[Tensor] = []

    def enter(module: nn.Module, args: Any, kwargs: dict[str, Any]) -> Any:
        embeds, positions = kwargs[EMBEDS], kwargs.get(POSITIONS)
        length = embeds.shape[1]
        masks.clear()
        masks.extend(full_masks(module, kwargs.get(MASK), length))
        changed = {**merged_inputs(kwargs, merge), **with_cache(None), USE_CACHE: False}
        changed[POSITIONS] = torch.arange(length)[None] if positions is None else positions
        changed[MASK] = {} if isinstance(kwargs.get(MASK), dict) else masks[0][None, None]
        kinds = getattr(module.config, "layer_types", None)
        if (kinds and len(set(kinds)) > 1) or isinstance(kwargs.get(MASK), dict):
            changed[MASK] = dict.fromkeys(set(kinds or []), masks[0][None, None])
        return (), changed

    def layer_hook(layer: int) -> Any:
        def hook(module: nn.Module, args: Any, kwargs: dict[str, Any]) -> Any:
            hidden = args[0] if args else kwargs[HIDDEN]
            own = torch.eye(len(alive[layer]), dtype=torch.bool)
            seen = masks[layer] & (alive[layer].expand_as(own) | own)
            mask = additive(seen, hidden.dtype)[None, None]
            if sizes is not None:
                mask = torch.where(seen, sizes.log()[None, :].expand_as(seen), mask)
            elif decoder.config._attn_implementation != "eager":
                mask = seen[None, None]
            return args, {**kwargs, MASK: mask.view(1, 1, *seen.shape)}

        return hook

    handles = [decoder.register_forward_pre_hook(enter, with_kwargs=True)]
    for i, layer in enumerate(layers_of(decoder)):
        handles.append(layer.register_forward_pre_hook(layer_hook(i), with_kwargs=True))
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def layered(
    model: nn.Module, family: str, row: Batch, alive: list[Tensor], *, attentions: bool = False, **options: Any
) -> Any:
    """Output of the unpatched model for a single unpadded row."""
    inputs = {**fresh(row.inputs), USE_CACHE: False, "output_attentions": attentions}
    if family not in MROPE:
        first = int(family.startswith("paligemma"))  # what it counts positions from
        inputs[POSITIONS] = inputs[MASK].cumsum(-1) - 1 + first
    with hidden_by_layer(model, alive, **options), torch.no_grad():
        return model(**inputs)


def layered_logits(model: nn.Module, family: str, row: Batch, alive: list[Tensor], **options: Any) -> Tensor:
    """Logits `[L, V]` of a single unpadded row, by the unpatched model."""
    logits: Tensor = layered(model, family, row, alive, **options).logits[0]
    return logits


def naive_importance(attention: Tensor, reduction: str, temperature: float) -> Tensor:
    """Scores `[n]` out of the probabilities `[H, n, n]` of one layer, from the formulas.

    A softmax at another temperature follows from the probabilities alone: logits are their logarithms up to a number
    for each row.
    """
    matrix = (attention.double().log() / temperature).softmax(-1)
    if reduction == "column_sum":
        return matrix.sum((0, 1))
    if reduction == "last_query":
        return matrix[:, -1].mean(0)
    score = torch.full_like(matrix[:, 0], 1 / matrix.shape[-1])
    for _ in range(5):
        score = torch.einsum("hq,hqk->hk", score, matrix)
    return score.square().mean(0).sqrt()


def alive_by_layer(traces: Any, row: int, pad: int, length: int, n_layers: int) -> list[Tensor]:
    """For each layer which tokens of a row are left, counted without its padding, out of the traces."""
    alive = [torch.ones(length, dtype=torch.bool) for _ in range(n_layers)]
    for trace in traces:
        gone = set(trace.visual_indices[row].tolist()) - set(trace.kept_indices[row].tolist())
        first = 0 if trace.layer is None else trace.layer + 1
        for layer in range(first, n_layers):
            alive[layer][[i - pad for i in gone]] = False
    return alive


# --- merging --------------------------------------------------------------------------------------


def spans_of(row: Row) -> list[Tensor]:
    """Positions of the tokens of each image of an unpadded row."""
    spans, start = [], 0
    for part in row:
        n_tokens = part if isinstance(part, int) else part[0] * part[1]
        if not isinstance(part, int):
            spans.append(torch.arange(start, start + n_tokens))
        start += n_tokens
    return spans


def naive_groups(features: Tensor, n_left: int, *, weighted: bool = False) -> dict[int, dict[int, float]]:
    """What AIM merges of the tokens `[N, D]` of one image: for the place of each group what its tokens count.

    In each round tokens at even places look for the most similar one at an odd place, and those that are most similar
    to theirs are averaged into it, half of all tokens at most.
    """
    groups: dict[int, dict[int, float]] = {i: {i: 1.0} for i in range(len(features))}
    whole = features.double()
    while len(groups) > n_left:
        places = sorted(groups)
        means = {place: sum(weight * whole[i] for i, weight in groups[place].items()) for place in places}
        unit = {place: mean / mean.norm() for place, mean in means.items()}
        found = []
        for source in places[::2]:
            cosines = [float(unit[source] @ unit[other]) for other in places[1::2]]
            best = max(range(len(cosines)), key=lambda i: (cosines[i], -i))
            found.append((-cosines[best], source, places[1::2][best]))
        moved = sorted(found)[: min(len(places) - n_left, len(places) // 2)]
        joined: dict[int, list[int]] = {place: [place] for place in places}
        for _, source, other in moved:
            joined[other].append(source)
            del joined[source]
        new = {}
        for place, members in joined.items():
            counts = {member: len(groups[member]) if weighted else 1 for member in members}
            total = sum(counts.values())
            new[place] = {
                i: weight * counts[member] / total for member in members for i, weight in groups[member].items()
            }
        groups = new
    return groups


class Merged:
    """The images of one unpadded row merged from the rule; a function of what the decoder gets `[1, L, D]`."""

    def __init__(
        self, model: nn.Module, family: str, row: Batch, spans: list[Tensor], keep: float, *, weighted: bool = False
    ) -> None:
        seen: list[Tensor] = []
        length = row.inputs["input_ids"].shape[1]
        everything = [torch.ones(length, dtype=torch.bool)] * model.get_decoder().config.num_hidden_layers
        layered(model, family, row, everything, merge=lambda x: (seen.append(x), x)[1])
        self.gone: set[int] = set()
        self.groups: dict[int, dict[int, float]] = {}
        for span in spans:
            n_left = max(1, int(keep * len(span) + 0.5))
            for place, weights in naive_groups(seen[0][0, span], n_left, weighted=weighted).items():
                self.groups[int(span[place])] = {int(span[i]): weight for i, weight in weights.items()}
            self.gone |= set(span.tolist()) - set(self.groups)

    def __call__(self, x: Tensor) -> Tensor:
        out = x.clone()
        for place, weights in self.groups.items():
            out[0, place] = sum(weight * x[0, i].double() for i, weight in weights.items())
        return out

    def alive(self, length: int) -> Tensor:
        """Which of `length` tokens are left, `[length]` bool."""
        return ~torch.isin(torch.arange(length), torch.tensor(sorted(self.gone)))

    def sizes(self, length: int) -> Tensor:
        """How many tokens each of `length` tokens stands for."""
        sizes = torch.ones(length)
        for place, weights in self.groups.items():
            sizes[place] = len(weights)
        return sizes


class MergedByTraces:
    """What methods merged of the images of one row, by the rule, out of what they left of each image.

    Attributes:
        weights: for each place that a mean stands at how much of each token is in it.
        sizes: `[L]`, what each token counts in attention; None where that is 1.
    """

    def __init__(self, methods: Any, traces: Any, row: int, pad: int, embeds: Tensor) -> None:
        """Follow the traces.

        Args:
            methods: of the session, in order.
            traces: of the prompt.
            row: which row of the batch it is.
            pad: padding slots before it.
            embeds: `[L, D]`, what the unpatched decoder gets.
        """
        self.weights: dict[int, dict[int, float]] = {}
        sizes, biased = torch.ones(len(embeds)), False
        before = [trace for trace in traces if trace.site == "before_llm"]
        merging = [one for one in methods if getattr(one, "merge", None) is not None]
        for trace in before:
            if trace.method != "aim":
                continue
            method, kept = merging.pop(0), []
            biased = biased or method.size_bias
            for image in (trace.visual_indices[row] - pad).split(list(trace.images[row])):
                keep, n_tokens = method.merge, len(image)
                n_left = min(keep, n_tokens) if isinstance(keep, int) else max(1, int(keep * n_tokens + 0.5))
                groups = naive_groups(self(embeds[None])[0, image], n_left, weighted=method.size_weighted)
                means = {int(image[place]): self._mean(image, weights) for place, weights in groups.items()}
                for place, weights in groups.items():
                    sizes[image[place]] = sum(float(sizes[image[i]]) for i in weights)
                self.weights |= means
                kept += sorted(means)
            assert kept == (trace.kept_indices[row] - pad).tolist(), "AIM merged other tokens than the rule says"
        self.sizes = sizes if biased else None

    def _mean(self, image: Tensor, weights: dict[int, float]) -> dict[int, float]:
        found: dict[int, float] = {}
        for member, weight in weights.items():
            for token, share in self.weights.get(int(image[member]), {int(image[member]): 1.0}).items():
                found[token] = found.get(token, 0.0) + weight * share
        return found

    def __call__(self, x: Tensor) -> Tensor:
        out = x.clone()
        for place, weights in self.weights.items():
            out[0, place] = sum(weight * x[0, i].double() for i, weight in weights.items())
        return out
