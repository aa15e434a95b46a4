"""The torch version of `attention_importance`: one row of the batch at a time, in blocks of queries.

Only the valid tokens of a row are read, so padding costs nothing and changes nothing. A block is one product of queries
and keys in fp32, one softmax, and one pass that adds up columns; keys that none of its queries sees are skipped, which
halves the work of causal attention. Blocks are small enough for the caches of a CPU.
"""

from collections.abc import Iterator
from typing import NamedTuple

import torch
from torch import Tensor

BLOCK = 1 << 20  # Logits in a block, and numbers in the fp32 keys of its heads, unless one query or one head has more.
QUERIES = 128  # In a block at most: with more of them, more products are hidden ones.
HELD = 40 << 20  # Bytes of probabilities that the power iteration holds; what is beyond is computed in every step.
STEPS = 5  # Of the power iteration.
LOW = torch.finfo(torch.float32).min


class Rule(NamedTuple):
    """What a query sees, and how the logits are made.

    Attributes:
        scale: factor of the products of queries and keys.
        temperature: divides the logits.
        causal: whether keys after the query are hidden.
        window: the distance behind the query from which on keys are hidden, if there is one.
        softcap: c where the products times the scale become c tanh(x / c) before the temperature divides them.
    """

    scale: float
    temperature: float
    causal: bool
    window: int | None
    softcap: float | None = None

    @property
    def factor(self) -> float:
        """What products are multiplied by first."""
        return self.scale / (self.temperature if self.softcap is None else self.softcap)

    def cap(self, logits: Tensor) -> Tensor:
        """Products times the factor as logits over the temperature, in place; NaN for those that are not finite."""
        logits.add_(logits, alpha=0)  # 0 times an infinity is a NaN, which neither a cap nor a softmax hides.
        return logits if self.softcap is None else logits.tanh_().mul_(self.softcap / self.temperature)

    def hides(self, at: Tensor, keys: Tensor) -> Tensor:
        """Which keys at positions `keys [n]` are hidden from the queries at positions `at [q, 1]`: `[q, n]`."""
        hidden = (keys > at) if self.causal else torch.zeros_like(keys > at)
        return hidden if self.window is None else hidden | (keys <= at - self.window)


class _Block(NamedTuple):
    """Consecutive valid queries, counted among the valid ones.

    Attributes:
        queries: the queries.
        keys: the span of valid keys that one of them sees.
        edge: the part of that span from the first key on that is hidden from one of them.
    """

    queries: slice
    keys: slice
    edge: slice


def one_query(
    query: Tensor, key: Tensor, valid: Tensor | None, seen: Tensor | None, position: Tensor, rule: Rule
) -> Tensor:
    """Probabilities of one query per row, summed over heads: `[B, Lk]` fp32; nothing waits for the device.

    Args:
        query: `[B, H, 1, K]`.
        key: `[B, Hkv, Lk, K]`.
        valid: `[B, Lk]` bool, or `None` for all.
        seen: `[B, 1, 1, Lk]`, bool or added to the logits, in place of the rule's `causal` and `window`.
        position: `[B]` of the queries among the keys.
        rule: what a query sees.
    """
    (n_rows, n_groups, n_keys, width), at = key.shape, position[:, None]
    hidden = rule.hides(at, torch.arange(n_keys, dtype=torch.int64, device=key.device))
    if seen is not None:
        hidden = hides(seen[:, 0, 0])
    if valid is not None:
        hidden = hidden | ~(valid & valid.gather(1, at))
    total = key.new_zeros(n_rows, n_keys, dtype=torch.float32)
    n_heads = max(1, BLOCK // (n_keys * width))
    for i in range(n_rows):
        rows = query[i].float().view(n_groups, -1, width) * rule.factor
        for start in range(0, n_groups, n_heads):
            heads = slice(start, start + n_heads)
            logits = rule.cap(rows[heads] @ key[i, heads].float().transpose(1, 2))
            if seen is not None and seen.dtype != torch.bool:
                logits.add_(seen[i, 0, 0].float(), alpha=1 / rule.temperature)
            found = logits.masked_fill_(hidden[i], LOW).softmax(2)
            total[i] += found.flatten(0, 1).sum(0)
    return total.masked_fill_(hidden, 0)


def hides(seen: Tensor) -> Tensor:
    """Where `seen` hides keys."""
    return ~seen if seen.dtype == torch.bool else seen <= torch.finfo(seen.dtype).min / 2


class Row:
    """One row of the batch, reduced to its valid tokens."""

    def __init__(self, query: Tensor, key: Tensor, valid: Tensor | None, seen: Tensor | None, rule: Rule) -> None:
        """Plan the blocks.

        Args:
            query: `[H, Lq, K]`, the last `Lq` of the `Lk` positions.
            key: `[Hkv, Lk, K]`.
            valid: `[Lk]` bool, or `None` for all.
            seen: `[Lq, Lk]`, bool or added to the logits, in place of the rule's `causal` and `window`.
            rule: what a query sees.
        """
        self.key, self.seen, self.rule, self.before = key, seen, rule, key.shape[1] - query.shape[1]
        self.query = query.view(len(key), -1, *query.shape[1:])
        self.padded = valid is not None and not bool(valid.all())
        self.keys_at = torch.arange(key.shape[1], dtype=torch.int64, device=key.device)
        if valid is not None and self.padded:
            self.keys_at = self.keys_at[valid]
        self.queries_at = self.keys_at[self.keys_at >= self.before]
        self.n_keys, n_queries = len(self.keys_at), len(self.queries_at)
        height = max(1, min(n_queries, QUERIES, BLOCK // max(1, self.n_keys)))
        self.n_heads = max(1, BLOCK // max(1, self.n_keys * max(height, key.shape[2])))  # Worked on together.
        self.blocks = []
        for start in range(0, n_queries, height):
            queries = slice(start, min(start + height, n_queries))
            hidden = self._hidden(queries, slice(self.n_keys))
            visible = (~hidden).any(0).nonzero()[:, 0].tolist()
            if visible:  # Else these queries see nothing.
                keys = slice(visible[0], visible[-1] + 1)
                edges = hidden[:, keys].any(0).nonzero()[:, 0].tolist()
                edge = slice(keys.start + edges[0] if edges else keys.stop, keys.stop)
                self.blocks.append(_Block(queries, keys, edge))

    def column_sum(self) -> Tensor:
        """Probabilities summed over heads and queries, `[Lk]`."""
        total = self.key.new_zeros(self.n_keys, dtype=torch.float32)
        for query, key in self._heads(self.n_heads):
            for block in self.blocks:
                total[block.keys] += self._probabilities(query, key, block).flatten(0, 1).sum(0)
        return self._spread(total)

    def pagerank(self) -> Tensor:
        """Root mean square over heads of the uniform vector after `STEPS` steps `s <- s P`, `[Lk]`."""
        total = self.key.new_zeros(self.n_keys, dtype=torch.float32)
        sizes = [(b.queries.stop - b.queries.start) * (b.keys.stop - b.keys.start) for b in self.blocks]
        # So many heads at once that their probabilities need not be computed again.
        n_heads = max(1, min(self.n_heads, HELD // (4 * max(1, sum(sizes)))))
        memory = total.new_empty(min(HELD // 4, n_heads * sum(sizes)))
        for query, key in self._heads(n_heads):
            kept: list[Tensor] = []
            free = memory
            score = total.new_full((len(query), 1, self.n_keys), 1 / max(1, self.n_keys))
            for _ in range(STEPS):
                after = torch.zeros_like(score)
                for i, block in enumerate(self.blocks):
                    size = len(query) * sizes[i]
                    if i == len(kept) and size <= len(free):
                        kept.append(self._probabilities(query, key, block, free[:size]))
                        free = free[size:]
                    matrix = kept[i] if i < len(kept) else self._probabilities(query, key, block)
                    after[:, :, block.keys] += torch.bmm(score[:, :, block.queries], matrix)
                score = after
            total += score[:, 0].square().sum(0)
        return self._spread(total.div_(self.query.shape[0] * self.query.shape[1]).sqrt_())

    def _spread(self, scores: Tensor) -> Tensor:
        """Scores of the valid keys at their places, `[Lk]`."""
        return scores.new_zeros(self.key.shape[1]).index_copy_(0, self.keys_at, scores)

    def _heads(self, n: int) -> Iterator[tuple[Tensor, Tensor]]:
        """Query heads `[h, Lq, K]` that are worked on together, and their valid keys `[h, K, n]` in fp32."""
        for start in range(0, len(self.key), n):
            key = self.key[start : start + n]
            if self.padded:
                key = key.index_select(1, self.keys_at)
            key = key.float().contiguous().transpose(1, 2)
            for query in self.query[start : start + n].unbind(1):
                yield query, key

    def _hidden(self, queries: slice, keys: slice) -> Tensor:
        """Which keys are hidden from queries, `[queries, keys]`."""
        if self.seen is not None:
            return hides(self._seen(queries, keys))
        return self.rule.hides(self.queries_at[queries, None], self.keys_at[keys])

    def _seen(self, queries: slice, keys: slice) -> Tensor:
        """The part of `seen` at some valid queries and keys."""
        assert self.seen is not None
        seen = self.seen.index_select(0, self.queries_at[queries] - self.before)
        return seen.index_select(1, self.keys_at[keys]) if self.padded else seen[:, keys]

    def _probabilities(self, query: Tensor, key: Tensor, block: _Block, out: Tensor | None = None) -> Tensor:
        """Softmax of a block, `[h, queries, keys]` fp32, in the flat memory `out` where it is given."""
        rows = query.index_select(1, self.queries_at[block.queries] - self.before).float().mul_(self.rule.factor)
        logits = self.rule.cap(torch.bmm(rows, key[:, :, block.keys]))
        if self.seen is not None and self.seen.dtype != torch.bool:
            logits.add_(self._seen(block.queries, block.keys).float(), alpha=1 / self.rule.temperature)
        hidden = self._hidden(block.queries, block.edge)
        logits[:, :, block.edge.start - block.keys.start :].masked_fill_(hidden, LOW)
        found = torch.softmax(logits, 2, out=None if out is None else out.view(logits.shape))
        if self.seen is not None and block.edge == block.keys:
            found.masked_fill_(hidden.all(1)[:, None], 0)  # Queries that see nothing: LOW is finite.
        return found
