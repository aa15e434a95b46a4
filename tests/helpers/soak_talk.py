"""A conversation of a batch written down as it happens, and what the unpatched model makes of it.

Written down is what stands in each row, and up to where in the sequence each layer sees each token. The oracle runs the
unpatched model on each row alone, at full length and without a cache, with a mask for every layer.
"""

import copy
import itertools
from contextlib import ExitStack
from dataclasses import dataclass, field, fields, replace
from typing import Any

import families
import torch
from families import DIM, IMAGE, fresh
from hybrid import FAMILY as HYBRID
from hybrid import only_alive
from oracle_layers import hidden_by_layer, layers_of, naive_groups
from torch import Tensor, nn
from upstream import POSITIONS, USE_CACHE, with_features

import tokenprune
from tokenprune.decoder.pruned_cache import ledger_of
from tokenprune.schedule import count

NEVER, TOLERANCE = 1 << 30, 1e-4
SHAKEN, NOISE = 1e-6, 20  # by how much of themselves embeddings change, and how much farther rounding may reach
Picture = tuple[int, int, Tensor]  # rows and columns of its grid, and its features `[rows * columns, D]`


@dataclass
class Talk:
    """A conversation of a batch.

    Attributes:
        family: of the model.
        ids: `[B, n]`, the tokens that went through the model, and those of the call at hand.
        mask: `[B, n]`, 0 for the padding that a row begins with.
        spots: `[B, n]` bool, where features of images stand.
        taken: `[B, n]`, how much lower its position is than its place.
        sizes: `[B, n]`, as how many tokens attention counts each.
        gone: `[layers, B, n]`, how long the sequence was when a layer lost a token; 0 where it never saw it.
        heads: `[layers, B, n, H]`, 0 for heads that were left out of a token.
        pictures: the images of each row, in order.
        means: for each row the tokens whose mean stands at a place, with their weights.
        scores: `[B, H]`, magnitudes that heads have gathered.
        n: how much of all of that went through the model.
        found: logits `[B, V]` that are still to be compared, by the token that they follow.
        cache: the KV cache.
    """

    family: str
    ids: Tensor
    mask: Tensor
    spots: Tensor
    taken: Tensor
    sizes: Tensor
    gone: Tensor
    heads: Tensor
    pictures: list[list[Picture]]
    means: list[dict[int, dict[int, float]]]
    scores: Tensor
    n: int = 0
    found: dict[int, Tensor] = field(default_factory=dict)
    cache: Any = None

    @classmethod
    def begin(cls, family: str, n_rows: int, config: Any) -> "Talk":
        """An empty conversation with a model whose decoder has this config."""
        none, n_layers, n_heads = (
            torch.empty(n_rows, 0, dtype=torch.int64),
            config.num_hidden_layers,
            config.num_attention_heads,
        )
        gone, heads = none.expand(n_layers, -1, -1), torch.empty(n_layers, n_rows, 0, n_heads)
        lists: Any = [[] for _ in range(n_rows)], [{} for _ in range(n_rows)]
        return cls(
            family, none, none, none.bool(), none, none.float(), gone, heads, *lists, torch.zeros(n_rows, n_heads)
        )

    @property
    def pads(self) -> list[int]:
        return (self.mask == 0).sum(1).tolist()

    def add(self, ids: Tensor, mask: Tensor, spots: Tensor, pictures: list[list[Picture]]) -> None:
        """Append what the next call is to bring."""
        last = self.taken[:, -1:] if self.taken.shape[1] else torch.zeros(len(ids), 1, dtype=torch.int64)
        n_new = ids.shape[1]
        self.ids, self.mask = torch.cat([self.ids, ids], 1), torch.cat([self.mask, mask], 1)
        self.spots = torch.cat([self.spots, spots], 1)
        self.taken = torch.cat([self.taken, last.expand(-1, n_new)], 1)
        self.sizes = nn.functional.pad(self.sizes, (0, n_new), value=1.0)
        self.gone = nn.functional.pad(self.gone, (0, n_new), value=NEVER)
        self.heads = nn.functional.pad(self.heads, (0, 0, 0, n_new), value=1.0)
        for row, new in zip(self.pictures, pictures, strict=True):
            row.extend(new)

    def cut(self, n: int) -> None:
        """Forget all but the first `n` tokens."""
        for name in ("ids", "mask", "spots", "taken", "sizes", "gone"):
            setattr(self, name, getattr(self, name)[..., :n])
        self.gone = self.gone.where(self.gone == NEVER, self.gone.clamp(max=n))
        self.heads, self.n = self.heads[:, :, :n], min(self.n, n)

    def take(self, rows: list[int]) -> "Talk":
        """Some of the rows, as a conversation without a cache."""
        found = {one.name: getattr(self, one.name) for one in fields(self)}
        for name, value in found.items():
            if isinstance(value, list):
                found[name] = [copy.copy(value[row]) for row in rows]
            elif isinstance(value, Tensor):
                found[name] = value[:, rows] if name in ("gone", "heads") else value[rows]
        return Talk(**{**found, "found": {}, "cache": None})

    def fork(self, cache: Any) -> "Talk":
        """The same conversation, to be gone on with another cache."""
        return replace(copy.deepcopy(replace(self, cache=None)), cache=cache)

    def inputs(self, start: int, *, whole: bool, features: bool = True) -> dict[str, Any]:
        """What a call is to be given for the tokens from `start` on; `whole`: as ``generate`` wants it."""
        first, old = 0 if whole else start, self.spots[:, :start].sum(1).tolist()
        new = [
            [one for one, end in zip(row, _ends(row), strict=True) if end > n]
            for row, n in zip(self.pictures, old, strict=True)
        ]
        flat = [picture[2] for row in new for picture in row]
        found: dict[str, Any] = {"input_ids": self.ids[:, first:], "attention_mask": self.mask}
        if flat and features:
            found |= with_features(families._encoded(self.family, flat, list(range(len(new)))))
        elif start:
            found |= with_features()
        if self.family in families.MROPE:
            found["mm_token_type_ids"] = self.spots[:, first:].long()
            grids = [(1, 2 * h, 2 * w) for row in (self.pictures if whole else new) for h, w, _ in row]
            found |= {"image_grid_thw": torch.tensor(grids)} if grids else {}
        if self.family == "gemma3":
            found["token_type_ids"] = self.spots.long()  # the mask reads them from the start of the sequence
        return found

    def positions(self, model: nn.Module, start: int) -> Tensor:
        """Positions of the tokens from `start` on as a caller counts them; a model with M-RoPE gets to know theirs."""
        if self.family not in families.MROPE:
            return (self.mask.cumsum(1) - 1).clamp(min=0)[:, start:]
        given = self.inputs(0, whole=True, features=False)
        names = ("input_ids", "mm_token_type_ids", "image_grid_thw", "attention_mask")
        positions, model.model.rope_deltas = model.model.get_rope_index(**{name: given.get(name) for name in names})
        return positions[..., start:]

    # --- what happens -------------------------------------------------------------------------------------------------

    def hear(self, past: int, ids: Tensor, dense: nn.Module) -> None:
        """A call brings `ids` `[B, m]` on `past` tokens."""
        if past < self.n:
            self.compare(dense)
            self.gone = self.gone.where(self.gone == NEVER, self.gone.clamp(max=past))
            self.gone[..., past:], self.sizes[:, past:], self.heads[:, :, past:] = NEVER, 1.0, 1.0
            self.taken[:, past:] = self.taken[:, past - 1 : past] if past else 0
            self.means = [{place: mean for place, mean in row.items() if place < past} for row in self.means]
            self.n = past
        assert past == self.n, f"the cache speaks of {past} tokens, and {self.n} were given"
        end = past + ids.shape[1]
        if end > self.ids.shape[1] or not torch.equal(self.ids[:, past:end], ids):
            n_more = max(0, end - self.ids.shape[1])
            spots, mask = nn.functional.pad(self.spots, (0, n_more)), nn.functional.pad(self.mask, (0, n_more), value=1)
            self.cut(past)
            self.add(ids, mask[:, past:end], spots[:, past:end], [[] for _ in ids])
        self.n = end

    def drop(self, trace: Any, past: int, session: Any) -> None:
        """A site has left tokens of this call out."""
        dropped = torch.zeros_like(self.spots)
        for row, (seen, kept) in enumerate(zip(trace.visual_indices, trace.kept_indices, strict=True)):
            dropped[row, seen + past] = True
            dropped[row, kept + past] = False
            self.gone[0 if trace.layer is None else trace.layer + 1 :, row, dropped[row].nonzero()[:, 0]] = 0
        if session.positions == "packed" and trace.site == "before_llm":
            self.taken += dropped.cumsum(1)
        merging = [one for one in session.methods if isinstance(one, tokenprune.AIM) and one.merge is not None]
        if trace.site == "before_llm" and trace.method == "aim" and merging:
            self._merge(trace, past, merging[0])

    def _merge(self, trace: Any, past: int, method: Any) -> None:
        for row, (seen, kept) in enumerate(zip(trace.visual_indices, trace.kept_indices, strict=True)):
            places, expected = self.spots[row].nonzero()[:, 0], list[int]()
            features = torch.cat([torch.empty(0, DIM), *(one[2] for one in self.pictures[row])])
            for image in (seen + past).split(list(trace.images[row])):
                mine = features[torch.searchsorted(places, image)]
                groups = naive_groups(mine, count(method.merge, len(image)), weighted=method.size_weighted)
                for place, weights in ((int(image[place]), weights) for place, weights in groups.items()):
                    expected.append(place)
                    self.means[row][place] = {int(image[i]): weight for i, weight in weights.items()}
                    self.sizes[row, place] = len(weights) if method.size_bias else 1
            assert sorted(expected) == (kept + past).tolist(), "AIM merged other tokens than the rule says"

    def evict(self, cache: Any, *, may: bool) -> None:
        """Take over from a cache what has left it while tokens were generated; `may`: whether any could."""
        ledger = ledger_of(cache)
        if ledger is None:
            return
        for layer in range(len(self.gone)):
            slots = ledger.at(layer)
            columns = slots.columns(torch.arange(self.n))
            for row in range(len(self.ids)):
                real, gone = self.mask[row, : self.n] != 0, self.gone[layer, row, : self.n]
                held = torch.isin(torch.arange(self.n), columns[row])
                assert bool((gone[held & real] != 0).all()), "a cache holds what the traces say was dropped"
                assert may or bool((gone[~held & real] != NEVER).all()), "a cache lacks what the traces say was kept"
                gone[~held & real] = gone[~held & real].clamp(max=self.n)

    def answer(self, logits: Tensor) -> None:
        """The call has returned `logits` `[B, k, V]`."""
        for i, one in enumerate(logits.unbind(1)):
            self.found[self.n - logits.shape[1] + i] = one.clone()

    # --- what the unpatched model makes of it -------------------------------------------------------------------------

    def compare(self, dense: nn.Module) -> None:
        """Compare all logits that were found since with those of the unpatched model."""
        found, self.found = self.found, {}
        for row, pad in enumerate(self.pads if found else ()):
            strays = ((self.ids == IMAGE) & ~self.spots)[row, : self.n].nonzero()[:, 0].tolist()  # guesses, rejected
            columns = [i for i in sorted(found) if pad <= i < min([self.n, *strays]) and self.gone[-1, row, i] > 0]
            if not columns:
                continue
            stop, places = max(columns) + 1, [i - pad for i in columns]
            wanted = self.reference(dense, row, stop)[places]
            off = (torch.stack([found[i][row] for i in columns]) - wanted).abs()
            if bool((off <= TOLERANCE * (1 + wanted.abs())).all()):
                continue
            told = f"row {row}: logits are {float(off.max()):.2g} off"
            assert self.family == HYBRID, told  # where rounding in fp32 recurrences is blown up now and then
            shaken = self.reference(dense, row, stop, shaken=SHAKEN)[places]
            assert float(off.max()) <= NOISE * float((shaken - wanted).abs().max()), told

    def steer(self, dense: nn.Module, fractions: tuple[float, ...], past: int) -> None:
        """Choose heads for the tokens from `past` on, as the rule says, with `fractions` of them in each layer."""
        for row in range(len(self.ids)):
            self.reference(dense, row, self.n, steer=(fractions, past))

    def reference(self, dense: nn.Module, row: int, stop: int, *, shaken: float = 0.0, steer: Any = None) -> Tensor:
        """Logits `[stop - pad, V]` of a row alone by the unpatched model."""
        pad = self.pads[row]
        alone = self.take([row])
        alone.cut(stop)
        for name in ("ids", "mask", "spots", "taken", "sizes"):
            setattr(alone, name, getattr(alone, name)[:, pad:])
        inputs = {**fresh(alone.inputs(0, whole=True)), USE_CACHE: False}
        gone, places = alone.gone[:, 0, pad:], torch.arange(pad, stop)

        def merge(x: Tensor) -> Tensor:
            out = x * (1 + shaken * torch.randn(x.shape, generator=torch.Generator().manual_seed(0)))
            for place, weights in self.means[row].items():
                if place < stop:
                    out[0, place - pad] = sum(weight * x[0, i - pad].double() for i, weight in weights.items())
            return out

        with torch.no_grad(), ExitStack() as stack:
            if self.family == HYBRID:
                assert set(gone.unique().tolist()) <= {0, NEVER}
                stack.enter_context(only_alive(dense, list(gone > 0), merge))
                some = dense(**inputs).logits[0]
                return torch.zeros(stop - pad, some.shape[1]).masked_scatter_((gone[-1] > 0)[:, None], some)
            if self.family not in families.MROPE:
                inputs[POSITIONS] = torch.arange(stop - pad)[None] - alone.taken
            sizes = alone.sizes[0] if bool((alone.sizes != 1).any()) else None
            seen = [places[:, None] < one for one in gone]
            stack.enter_context(hidden_by_layer(dense, seen, merge=merge, sizes=sizes))
            if steer is not None or bool((self.heads != 1).any()):
                self._leave_heads_out(dense, row, pad, stop, steer, stack)
            return dense(**inputs).logits[0]  # type: ignore[no-any-return]

    def _leave_heads_out(self, dense: nn.Module, row: int, pad: int, stop: int, steer: Any, stack: ExitStack) -> None:
        """Have heads put zeros into the output projections of the unpatched model."""
        alive = list(range(self.heads.shape[-1]))

        def hook(module: nn.Module, args: Any, layer: int) -> Any:
            outputs = args[0][0].unflatten(-1, (self.heads.shape[-1], -1))
            if steer is not None:
                fractions, past = steer
                n_keep = max(1, int(len(self.heads[0, 0, 0]) * fractions[layer] + 1e-6))
                if n_keep < self.heads.shape[-1]:
                    alive.sort(key=lambda i: (-float(self.scores[row, i]), i))
                    del alive[n_keep:]
                    self.heads[layer, row, past:stop] = 0
                    self.heads[layer, row, past:stop, alive] = 1
            outputs = outputs * self.heads[layer, row, pad:stop, :, None]
            if steer is not None:
                new = torch.arange(pad, stop) >= past
                self.scores[row] += outputs[new & (self.gone[layer, row, pad:stop] > 0)].abs().sum((0, 2))
            return (outputs.flatten(1)[None],)

        for layer, one in enumerate(layers_of(dense.get_decoder())):
            handle = one.self_attn.o_proj.register_forward_pre_hook(lambda *args, layer=layer: hook(*args, layer=layer))
            stack.callback(handle.remove)


def _ends(pictures: list[Picture]) -> list[int]:
    """After how many visual tokens of its row each picture ends."""
    return list(itertools.accumulate(len(features) for _, _, features in pictures))
