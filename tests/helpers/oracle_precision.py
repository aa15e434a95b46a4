"""The oracle of decoding for runs in bf16 and fp16, where rounding turns choices: it makes those that the run has made.

What the run chose is discrete, and written down while it runs. The oracle computes twice what follows from that, in the
run's dtype and in fp64. The difference of the two is what the dtype costs: it bounds how far the run may be from fp64,
in its logits and in the scores that it chose by.
"""

from collections import defaultdict
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import torch
from oracle_decoding import Row
from oracle_layers import layers_of
from torch import Tensor, nn
from upstream import HIDDEN, MASK, cache_of

from tokenprune import ops
from tokenprune.decoder.pruned_cache import ledger_of

Scored = tuple[Tensor, Tensor]  # scores of the candidates, and which of them were chosen


class Choices:
    """What a run chose, by call and layer; call 0 is the prompt.

    Attributes:
        masks: `[B, n]` bool, which slots a decoding step sees.
        held: `[B, n]` bool, which tokens a cache holds after the call.
        heads: `[B, k]`, the heads that are kept.
        values: `[B, H, n]` bool, which slots a decoding step reads the values of.
    """

    def __init__(self) -> None:
        self.masks, self.held, self.heads, self.values = (dict[tuple[int, int], Tensor]() for _ in range(4))
        self.call, self.layer = -1, 0

    def heads_of(self, layer: int, call: int) -> Tensor:
        """The heads that a layer kept in a call: those of the layer before it where no others were chosen."""
        return self.heads[call, max(at for one, at in self.heads if one == call and at <= layer)]


@contextmanager
def written_down(model: nn.Module, n_heads: int) -> Iterator[Choices]:
    """Within the block what the patched `model` chooses in a generation is written down."""
    found, select, decode = Choices(), ops.top_k_select, ops.decode_attention

    def begin(module: nn.Module, args: Any, kwargs: dict[str, Any]) -> None:
        found.call += 1

    def end(module: nn.Module, args: Any, kwargs: dict[str, Any], out: Any) -> None:
        ledger = ledger_of(cache_of(out))
        if ledger is None or ledger.length is None:
            return
        for layer in range(len(layers_of(model.get_decoder()))):
            slots = ledger.at(layer)
            columns = slots.columns(torch.arange(ledger.length))
            held = torch.zeros(len(columns), ledger.length + 1, dtype=torch.bool)
            held.scatter_(1, columns.where(columns >= 0, ledger.length), True)
            found.held[found.call, layer] = held[:, :-1]

    def enter(layer: int) -> Any:
        def hook(module: nn.Module, args: Any, kwargs: dict[str, Any]) -> None:
            found.layer, mask = layer, kwargs.get(MASK)
            hidden = args[0] if args else kwargs[HIDDEN]
            if hidden.shape[1] == 1 and isinstance(mask, Tensor) and mask.ndim == 4:
                seen = mask[:, 0, 0] if mask.dtype == torch.bool else mask[:, 0, 0] > torch.finfo(mask.dtype).min / 2
                found.masks[found.call, layer] = seen.expand(len(hidden), -1)

        return hook

    def selected(scores: Tensor, **options: Any) -> Tensor:
        chosen = select(scores, **options)
        if scores.shape[1] == n_heads and isinstance(options["k"], int):
            found.heads[found.call, found.layer] = chosen
        return chosen

    def decoded(query: Tensor, key: Tensor, value: Tensor, **options: Any) -> Any:
        if (n_values := options["n_values"]) is not None:
            keys = key.float().repeat_interleave(query.shape[1] // key.shape[1], 1)
            logits = (query.float() @ keys.transpose(2, 3))[:, :, 0]
            if options["valid"] is not None:
                logits = logits.masked_fill(~options["valid"][:, None], -torch.inf)
            order = logits.argsort(dim=-1, descending=True, stable=True).argsort(dim=-1)
            found.values[found.call, found.layer] = order < torch.as_tensor(n_values).view(-1, 1, 1)
        return decode(query, key, value, **options)

    handles = [
        model.register_forward_pre_hook(begin, with_kwargs=True), model.register_forward_hook(end, with_kwargs=True),
        *(
            layer.register_forward_pre_hook(enter(i), with_kwargs=True)
            for i, layer in enumerate(layers_of(model.get_decoder()))
        ),
    ]  # fmt: skip
    try:
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(ops, "top_k_select", selected)
            patch.setattr(ops, "decode_attention", decoded)
            yield found
    finally:
        for handle in handles:
            handle.remove()


class Replayed(Row):
    """A row whose choices are those of a run.

    Attributes:
        chosen: by what they were chosen here, in order.
    """

    def __init__(self, *args: Any, choices: Choices, **options: Any) -> None:
        super().__init__(*args, **options)
        self.choices, self.call = choices, -1
        self.chosen = defaultdict[str, list[Scored]](list)

    def _note(self, kind: str, scores: Tensor, among: list[int], kept: list[int]) -> None:
        self.chosen[kind].append((scores[among].double(), torch.isin(torch.tensor(among), torch.tensor(kept))))

    def check_kept(self, scores: Tensor, kept: list[int], dropped: list[int]) -> None:
        """Note the scores; whether they allow that choice is for the two computations together to say."""
        self._note("prompt", scores, kept + dropped, kept)

    def _grow(self) -> None:
        self.call += 1
        super()._grow()

    def _pass_over(self, layer: int) -> None:
        movable, last = self._movable(), self.passing
        self.passing = last & self.choices.masks[self.call, layer][self.row, self.pad : self.pad + self.length]
        self._note("step", self.scores, [i for i in movable if last[i]], [i for i in movable if self.passing[i]])
        assert int(self.passing[movable].sum()) == int(len(movable) * self.rules.tokens[layer] + 1e-6)
        self.seen[layer][-1] = self.passing & self.alive[layer]

    def _evict(self) -> None:
        if self.rules.guard is None or self.rules.interval is None:
            return
        movable = self._movable()
        for layer, before in enumerate(self.alive):
            alive = before & self.choices.held[self.call, layer][self.row, self.pad : self.pad + self.length]
            self._note("cache", self.scores, [i for i in movable if before[i]], [i for i in movable if alive[i]])
            self.alive[layer] = alive
            assert int(alive[movable].sum()) <= int(len(movable) * self.rules.tokens[layer] + 1e-6)
            assert bool(alive[[i for i in range(self.length) if before[i] and i not in movable]].all())

    def _choose_heads(self, layer: int) -> None:
        n_keep = max(1, int(self.n_heads * self.rules.heads[layer] + 1e-6))
        if n_keep == self.n_heads:
            return
        kept = self.choices.heads_of(layer, self.call)[self.row].tolist()
        assert len(kept) == n_keep
        assert set(kept) <= set(self.kept_heads)
        self._note("heads", self.head_scores, self.kept_heads, kept)
        self.kept_heads = kept
        self.heads[layer][self.past :] = torch.isin(torch.arange(self.n_heads), torch.tensor(kept))

    def _choose_values(self, layer: int, logits: Tensor, seen: Tensor) -> None:
        among = seen.nonzero()[:, 0].tolist()
        read = self.choices.values[self.call, layer][self.row, :, self.pad : self.pad + self.length]
        for head in self.kept_heads:
            kept = read[head].nonzero()[:, 0].tolist()
            assert len(kept) == max(1, int(len(among) * self.rules.values[layer] + 1e-6))
            self._note("values", logits[head].softmax(-1), among, kept)
            self.values[layer][head, -1] = read[head]


def check_choices(rough: Replayed, exact: Replayed, factor: float) -> int:
    """Check that what was chosen has the highest scores in fp64, as far as the dtype allows.

    Two scores that are compared may both be off by `factor` times what the dtype costs.

    Returns:
        How many choices were so clear that only one was right.
    """
    clear = 0
    for kind, choices in exact.chosen.items():
        cost = max(
            float((one - other).abs().max()) for (one, _), (other, _) in zip(rough.chosen[kind], choices, strict=True)
            if len(one)
        )  # fmt: skip
        for scores, kept in choices:
            if kept.all() or not kept.any():
                continue
            slack = 2 * factor * cost
            assert float(scores[kept].min()) >= float(scores[~kept].max()) - slack, f"{kind}: others were to be kept"
            ranked = scores.sort(descending=True).values
            clear += float(ranked[int(kept.sum()) - 1] - ranked[int(kept.sum())]) > slack
    return clear
