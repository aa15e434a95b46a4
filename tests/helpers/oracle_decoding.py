"""The independent oracle of everything that a method does while tokens are generated: one row by itself, on the
unpatched model, at full length and without a cache, recomputed for every token, its attention written out.

Taken over from the run under test are discrete things alone, each of them checked: which tokens were pruned in the
prompt (its traces, against the scores of this computation), and the integers that a cache in planes stored
(`oracle_planes`). What is chosen while tokens are generated follows from the rules. Where two candidates are so close
that rounding decides, another computation may choose otherwise: from there on the row is not `sure`, and not compared.
"""

from collections.abc import Callable
from contextlib import ExitStack
from dataclasses import dataclass
from typing import Any

import torch
from families import MROPE, Batch, fresh
from oracle_layers import MergedByTraces, alive_by_layer, full_masks, layers_of, merged_inputs, naive_importance
from oracle_planes import Pair, as_stored
from torch import Tensor, nn
from torch.nn.functional import pad as padded
from transformers import AttentionInterface, AttentionMaskInterface
from transformers.masking_utils import eager_mask
from upstream import EMBEDS, MASK, POSITIONS, USE_CACHE, with_cache

NAME = "written_out"
MARGIN = 2e-5  # of the scores themselves: what lies closer may be chosen either way
NOTHING = 1e-7  # probabilities that change no logit
RUNNING: list["Row"] = []


@dataclass(frozen=True)
class Rules:
    """What is left out while tokens are generated; tuples have an entry for each layer.

    Attributes:
        tokens: fraction kept of the tokens that may be pruned.
        guard: how many tokens at the start and at the end of a row stay; None where no text is pruned.
        interval: caches are pruned whenever the length of the row passes a multiple of it. None: nothing leaves them,
            each step passes over tokens anew.
        heads: fraction of the heads that is kept.
        values: fraction of the values that a step reads.
        threshold: a step whose largest probability by the high plane is lower reads both.
    """

    tokens: tuple[float, ...]
    guard: tuple[int, int] | None
    interval: int | None
    heads: tuple[float, ...]
    values: tuple[float, ...]
    threshold: float | None

    @classmethod
    def of(cls, methods: Any, n_layers: int) -> "Rules":
        """The rules of the methods of a session."""
        caches = [plan for one in methods if (plan := one.cache_plan(n_layers)) is not None]
        attention = [plan for one in methods if (plan := one.attention_plan(n_layers)) is not None]
        everything = (1.0,) * n_layers
        return cls(
            tokens=caches[0].keep if caches else everything,
            guard=(caches[0].guard.first, caches[0].guard.recent) if caches else None,
            interval=caches[0].interval if caches and caches[0].persistent else None,
            heads=attention[0].heads if attention else everything,
            values=attention[0].values if attention else everything,
            threshold=attention[0].threshold if attention else None,
        )


class Row:
    """One row of a generation.

    Attributes:
        sure: whether every choice so far had a margin beyond rounding.
        entered: for each layer which tokens it was called with, `[L]` bool.
        alive: which of these are still in its cache.
        seen: `[L, L]` bool, which tokens each one sees there, as far as methods have a say.
        heads: `[L, H]` bool, the heads that each token has there.
        values: `[H, L, L]` bool, the values that each one reads there.
        both: `[H, L]` bool, whether it reads both planes.
        scores: `[L]`, attention received so far.
        head_scores: `[H]`, magnitudes of the heads' outputs so far.
    """

    def __init__(
        self,
        dense: nn.Module,
        family: str,
        alone: Callable[[Tensor], Batch],
        session: Any,
        row: int,
        pad: int,
        *,
        stored: dict[int, Pair] | None = None,
        offset: int = 0,
    ) -> None:
        """The row before its prompt.

        Args:
            dense: the unpatched model, whatever its attention implementation.
            family: its family.
            alone: gives the row by itself, with ids `[1, n]` behind the prompt.
            session: what its methods are, and the traces of the prompt.
            row: which row of the batch it is.
            pad: how many padding slots it begins with there.
            stored: for each layer that keeps its tokens in planes, what the run has stored of this row.
            offset: position of the row's first token.
        """
        self.dense, self.family, self.alone, self.row, self.pad = dense, family, alone, row, pad
        self.session, self.stored, self.offset, self.sure = session, stored or {}, offset, True
        self.traces = [trace for trace in session.traces if trace.site != "encoder_block" and trace.status == "applied"]
        self.n_layers = n = len(layers_of(dense.get_decoder()))
        self.n_heads: int = dense.get_decoder().config.num_attention_heads
        self.rules = Rules.of(session.methods, n)
        self.past = self.length = self.n_prompt = 0
        self.scores, self.head_scores = torch.zeros(0), torch.zeros(self.n_heads)
        self.entered, self.alive = (list[Tensor]() for _ in range(2))
        self.seen = [torch.zeros(0, 0, dtype=torch.bool)] * n
        self.heads = [torch.zeros(0, self.n_heads, dtype=torch.bool)] * n
        self.values = [torch.zeros(self.n_heads, 0, 0, dtype=torch.bool)] * n
        self.both = [torch.zeros(self.n_heads, 0, dtype=torch.bool)] * n
        self.merged: MergedByTraces | None = None

    def logits(self, extra: Tensor) -> Tensor:
        """Logits `[V]` behind the prompt and `extra` `[1, n]` ids, the last of which is new."""
        single = self.alone(extra)
        self.past, self.length = self.length, single.inputs["input_ids"].shape[1]
        self._grow()
        out = self._run(single)[-1]
        self._evict()
        return out

    def _grow(self) -> None:
        """Make room for the tokens of this call, which see what is there."""
        n_new = self.length - self.past
        self.scores = padded(self.scores, (0, n_new))
        if not self.past:
            self.n_prompt = self.length
            self.alive = alive_by_layer(self.traces, self.row, self.pad, self.length, self.n_layers)
            self.entered = [one.clone() for one in self.alive]
        for layer in range(self.n_layers):
            if self.past:
                self.alive[layer] = padded(self.alive[layer], (0, n_new), value=True)
                self.entered[layer] = padded(self.entered[layer], (0, n_new), value=True)
            self.seen[layer] = padded(self.seen[layer], (0, n_new, 0, n_new))
            self.seen[layer][self.past :] = self.alive[layer]
            self.heads[layer] = padded(self.heads[layer], (0, 0, 0, n_new), value=True)
            self.values[layer] = padded(self.values[layer], (0, n_new, 0, n_new), value=True)
            self.both[layer] = padded(self.both[layer], (0, n_new), value=True)
        self.passing, self.kept_heads = torch.ones(self.length, dtype=torch.bool), list(range(self.n_heads))

    # --- the model ----------------------------------------------------------------------------------------------------

    def _run(self, single: Batch) -> Tensor:
        decoder = self.dense.get_decoder()
        inputs = {**fresh(single.inputs, dtype=self.dense.dtype), USE_CACHE: False}
        if self.family not in MROPE:
            first = int(self.family.startswith("paligemma"))  # what it counts positions from
            inputs[POSITIONS] = (torch.arange(self.length) + first + self.offset - self._packed())[None]
        implementation = decoder.config._attn_implementation

        def enter(module: nn.Module, args: Any, kwargs: dict[str, Any]) -> Any:
            if not self.past:
                self.merged = MergedByTraces(self.session.methods, self.traces, self.row, self.pad, kwargs[EMBEDS][0])
            self.masks = full_masks(module, kwargs.get(MASK), self.length)
            changed = {**merged_inputs(kwargs, self.merged), **with_cache(None), USE_CACHE: False}
            if changed.get(POSITIONS) is None:
                changed[POSITIONS] = torch.arange(self.length)[None]
            return (), changed

        def at(layer: int) -> Any:
            return lambda module, args: setattr(self, "layer", layer)

        with ExitStack() as stack, torch.no_grad():
            stack.callback(setattr, decoder.config, "_attn_implementation", implementation)
            decoder.config._attn_implementation = NAME
            stack.callback(decoder.register_forward_pre_hook(enter, with_kwargs=True).remove)
            for i, layer in enumerate(layers_of(decoder)):
                stack.callback(layer.register_forward_pre_hook(at(i)).remove)
            RUNNING.append(self)
            stack.callback(RUNNING.pop)
            return self.dense(**inputs).logits[0]  # type: ignore[no-any-return]

    def _packed(self) -> Tensor:
        """How much lower the position of each token is, because of tokens that were pruned before the decoder."""
        before = [trace for trace in self.traces if trace.site == "before_llm"]
        alive = alive_by_layer(before, self.row, self.pad, self.length, 1)[0]
        return (~alive).cumsum(0) * (self.session.positions == "packed")

    # --- attention, written out ---------------------------------------------------------------------------------------

    def attention(self, query: Tensor, key: Tensor, value: Tensor, scaling: float, softcap: float | None) -> Any:
        """Output `[1, L, H, K]` of the layer at hand; chooses for the tokens of this call, and notes scores."""
        layer, step, groups = self.layer, self.past > 0, query.shape[0] // key.shape[0]
        if step and self.rules.guard is not None and self.rules.interval is None:
            self._pass_over(layer)
        self._choose_heads(layer)
        seen = self.masks[layer] & (self.seen[layer] | torch.eye(self.length, dtype=torch.bool))
        pairs = [(key, value)]
        if layer in self.stored:
            pairs = list(as_stored(key, value, self.entered[layer], self.stored[layer]))
        found = []
        for keys, _ in pairs:
            logits = query @ keys.repeat_interleave(groups, 0).transpose(1, 2) * scaling
            logits = logits if softcap is None else softcap * torch.tanh(logits / softcap)
            if self.merged is not None and self.merged.sizes is not None:
                n_old = len(self.merged.sizes)
                logits[..., :n_old] = logits[..., :n_old] + self.merged.sizes.log().to(logits)
            logits = wide(logits).masked_fill(~seen, -torch.inf)
            found.append((logits, logits.softmax(-1)))
        both = self.both[layer]
        if step and len(pairs) > 1:
            both[:, -1] = self._flat(found[1][1][:, -1])
        logits, weights = (one.where(both[:, :, None], other) for one, other in zip(found[0], found[-1], strict=True))
        if step and self.rules.values[layer] < 1.0:
            self._choose_values(layer, logits[:, -1], seen[-1])
        read = (weights * self.values[layer]).to(query)
        outputs = [read @ values.repeat_interleave(groups, 0) for _, values in pairs]
        output = outputs[0].where(both[:, :, None], outputs[-1]) * self.heads[layer].T[:, :, None]
        self._score(layer, weights, output)
        return output.transpose(0, 1)[None], weights[None]

    # --- choices ------------------------------------------------------------------------------------------------------

    def best(self, scores: Tensor, among: list[int], n: int, *, ignore: float = 0.0) -> list[int]:
        """The `n` of `among` with the highest scores; those up to `ignore` count for nothing."""
        ranked = sorted(among, key=lambda i: (-float(scores[i]), i))
        if 0 < n < len(ranked):
            last, after = float(scores[ranked[n - 1]]), float(scores[ranked[n]])
            self.sure = self.sure and (last - after > MARGIN * last or last <= ignore)
        return sorted(ranked[:n])

    def _movable(self) -> list[int]:
        assert self.rules.guard is not None
        return list(range(self.rules.guard[0], self.length - self.rules.guard[1]))

    def _pass_over(self, layer: int) -> None:
        """Choose which tokens this layer sees in this step, none that the one before it did not."""
        movable = self._movable()
        n_keep = int(len(movable) * self.rules.tokens[layer] + 1e-6)
        kept = self.best(self.scores, [i for i in movable if self.passing[i]], n_keep)
        self.passing[movable] = False
        self.passing[kept] = True
        self.seen[layer][-1] = self.passing & self.alive[layer]

    def _evict(self) -> None:
        """Take out of the caches what is due after this call."""
        interval = self.rules.interval
        if self.rules.guard is None or interval is None or self.length // interval <= self.past // interval:
            return
        movable = self._movable()
        n_keeps = [int(len(movable) * share + 1e-6) for share in self.rules.tokens]
        for alive, n_keep in zip(self.alive, n_keeps, strict=True):
            left = [i for i in movable if alive[i]]
            if len(left) > n_keep:
                alive[left] = False
                alive[self.best(self.scores, left, n_keep)] = True

    def _choose_heads(self, layer: int) -> None:
        n_keep = max(1, int(self.n_heads * self.rules.heads[layer] + 1e-6))
        if n_keep < self.n_heads:
            self.kept_heads = self.best(self.head_scores, self.kept_heads, n_keep)
            self.heads[layer][self.past :] = torch.isin(torch.arange(self.n_heads), torch.tensor(self.kept_heads))

    def _flat(self, weights: Tensor) -> Tensor:
        """Which heads read both planes, by the probabilities `[H, L]` of the high one."""
        assert self.rules.threshold is not None
        above = weights.amax(-1) - self.rules.threshold
        self.sure = self.sure and bool((above[self.kept_heads].abs() > MARGIN).all())
        return above < 0

    def _choose_values(self, layer: int, logits: Tensor, seen: Tensor) -> None:
        """Choose the values that each head reads in this step, by its `logits` `[H, L]`."""
        among = seen.nonzero()[:, 0].tolist()
        n_keep = max(1, int(len(among) * self.rules.values[layer] + 1e-6))
        for head in self.kept_heads:
            kept = self.best(logits[head].softmax(-1), among, n_keep, ignore=NOTHING)
            self.values[layer][head, -1] = torch.isin(torch.arange(self.length), torch.tensor(kept))

    def _score(self, layer: int, weights: Tensor, output: Tensor) -> None:
        """Add up what tokens and heads have gathered, and check what the prompt pruned after this layer."""
        new = self.entered[layer] & (torch.arange(self.length) >= self.past)
        weights = weights[self.kept_heads]
        self.scores = self.scores.to(weights) + weights[:, new].sum((0, 1))
        self.head_scores = self.head_scores.to(weights) + wide(output)[:, new].abs().sum((1, 2))
        traces = [trace for trace in self.traces if trace.site == "llm_layer" and trace.layer == layer]
        if not self.past and traces:
            here = [one for one in self.session.methods if "llm_layer" in one.sites()]
            here = [one for one in here if any(stage.layer == layer for stage in one.schedule(self.n_layers))]
            for trace, method in zip(traces, here, strict=True):
                self._check_choice(trace, method.probe, weights, self.alive[layer].nonzero()[:, 0])

    def _check_choice(self, trace: Any, probe: Any, weights: Tensor, left: Tensor) -> None:
        """Whether the tokens that a trace says were kept are those with the highest scores, where margins allow."""
        seen, kept = ((which[self.row] - self.pad).tolist() for which in (trace.visual_indices, trace.kept_indices))
        dropped = sorted(set(seen) - set(kept))
        if not kept or not dropped:
            return
        scores = self.scores.clone()
        if not probe.cumulative:
            attention = weights[:, left][:, :, left]
            scores[left] = naive_importance(attention, probe.reduction, probe.temperature).to(scores)
        self.check_kept(scores, kept, dropped)

    def check_kept(self, scores: Tensor, kept: list[int], dropped: list[int]) -> None:
        """Check that no score of what was kept is lower than one of what was dropped."""
        highest = scores[dropped].max()
        assert scores[kept].min() >= highest - MARGIN * highest.abs(), "a token with a lower score was kept"


def wide(x: Tensor) -> Tensor:
    """`x` in fp32, or in fp64 if it is."""
    return x.to(torch.promote_types(x.dtype, torch.float32))


def attend(
    module: nn.Module, query: Tensor, key: Tensor, value: Tensor, mask: Any, *, scaling: float, **options: Any
) -> Any:
    """The attention function of the unpatched model while a :class:`Row` runs."""
    return RUNNING[-1].attention(query[0], key[0], value[0], scaling, options.get("softcap"))


AttentionInterface.register(NAME, attend)
AttentionMaskInterface.register(NAME, eager_mask)
