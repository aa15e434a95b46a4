"""The torch version of `attention_importance`: one row of the batch at a time, in blocks of queries.

Only the valid tokens of a row are looked at, so padding costs nothing and changes nothing. A block is one product of
queries and keys in fp32, one softmax, and one pass that adds up columns; keys that none of its queries sees are left
out, which halves the work of causal attention. Blocks are small enough for the caches of a CPU and share their memory.
"""

from collections.abc import Iterator
from typing import NamedTuple

import torch
from torch import Tensor

BLOCK = 1 << 20  # Logits in a block, and numbers in the fp32 keys of its heads, unless one query or one head has more.
QUERIES = 128  # In a block at most: with more of them, more products are hidden ones.
HELD = 40 << 20  # Bytes of probabilities that the power iteration holds; what is beyond is computed in every step.
SMALL = 4 << 20  # Numbers that a single query may hold for all rows and heads together.
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


class _Block(NamedTuple):
    """Consecutive valid queries, and the span of valid keys that they see.

    Attributes:
        queries: of the valid queries.
        keys: of the valid keys.
        edges: columns of the block, counted from its first, with what is hidden in them, `[queries, columns]`.
    """

    queries: slice
    keys: slice
    edges: tuple[tuple[slice, Tensor], ...]


def score(query: Tensor, key: Tensor, valid: Tensor | None, seen: Tensor | None, rule: Rule, reduction: str) -> Tensor:
    """Scores of one row's keys, `[Lk]` fp32; see `Row` for the arguments, and `attention_importance` for the rest."""
    scores = key.new_zeros(key.shape[1], dtype=torch.float32)
    if reduction != "pagerank":
        row = Row(query, key, valid, seen, rule, last=reduction == "last_query")
        scores[row.keys_at] = row.column_sum()
        return scores.div_(len(query)) if reduction == "last_query" else scores
    group = len(query) // len(key)
    for i in range(group):  # One query head of every key head at a time, since less is to be held.
        row = Row(query[i::group], key, valid, seen, rule)
        scores[row.keys_at] += row.pagerank()
    return scores.div_(len(query)).sqrt_()


def is_small(query: Tensor, key: Tensor) -> bool:
    """Whether `one_query` holds little memory."""
    copied = 0 if key.dtype == torch.float32 and key.is_contiguous() else key.numel()
    return copied + 3 * query.shape[0] * query.shape[1] * key.shape[2] <= SMALL


def one_query(query: Tensor, key: Tensor, valid: Tensor | None, rule: Rule) -> Tensor:
    """Probabilities of a single query, the last position, summed over heads: `[B, Lk]` fp32, all rows at once.

    Args:
        query: `[B, H, 1, K]`.
        key: `[B, Hkv, Lk, K]`.
        valid: `[B, Lk]` bool, or `None` for all.
        rule: what the query sees.
    """
    rows = query.to(torch.float32).view(len(key), key.shape[1], -1, key.shape[3]) * rule.factor
    logits = rule.cap(rows @ key.to(torch.float32).transpose(2, 3))
    hidden = None if valid is None else ~(valid & valid[:, -1:])
    if rule.window is not None and rule.window < key.shape[2]:
        far = torch.arange(key.shape[2], dtype=torch.int64, device=key.device) < key.shape[2] - rule.window
        hidden = far[None] if hidden is None else hidden | far
    if hidden is None:
        return logits.softmax(3).sum((1, 2))
    hidden = hidden[:, None, None]
    return logits.masked_fill_(hidden, LOW).softmax(3).masked_fill_(hidden, 0).sum((1, 2))


class Row:
    """One row of the batch, reduced to its valid tokens."""

    def __init__(
        self, query: Tensor, key: Tensor, valid: Tensor | None, seen: Tensor | None, rule: Rule, *, last: bool = False
    ) -> None:
        """Plan the blocks.

        Args:
            query: `[H, Lq, K]`, the last `Lq` of the `Lk` positions.
            key: `[Hkv, Lk, K]`.
            valid: `[Lk]` bool, or `None` for all.
            seen: `[Lq, Lk]`, bool or added to the logits, in place of the rule's `causal` and `window`.
            rule: what a query sees.
            last: whether only the last valid query counts.
        """
        self.query, self.key, self.seen, self.rule = query, key, seen, rule
        before = key.shape[1] - query.shape[1]
        self.padded = valid is not None and not bool(valid.all())
        self.keys_at = torch.arange(key.shape[1], dtype=torch.int64, device=key.device)
        if valid is not None and self.padded:
            self.keys_at = self.keys_at[valid]
        self.queries_at = self.keys_at[self.keys_at >= before]
        if last:
            self.queries_at = self.queries_at[-1:]
        self.n_keys, self.n_queries, self.before = len(self.keys_at), len(self.queries_at), before
        self.group = query.shape[0] // key.shape[0]
        self.height = max(1, min(self.n_queries, QUERIES, BLOCK // max(1, self.group * self.n_keys)))
        side = max(self.group * self.height, key.shape[2])
        self.heads = min(key.shape[0], max(1, BLOCK // max(1, side * self.n_keys)))
        self.blocks = list(self._plan())
        largest = max((self._size(block) for block in self.blocks), default=0)
        self.logits, self.scratch = key.new_empty(2, largest, dtype=torch.float32)

    def column_sum(self) -> Tensor:
        """Probabilities summed over heads and queries, `[n]` of the valid keys."""
        total = self.key.new_zeros(self.n_keys, dtype=torch.float32)
        for query, key in self._groups():
            for block in self.blocks:
                total[block.keys] += self._probabilities(query, key, block, self.scratch).flatten(0, 1).sum(0)
        return total

    def pagerank(self) -> Tensor:
        """Squares, summed over heads, of the uniform vector after `STEPS` steps `s <- s P`, `[n]` of the valid keys."""
        total = self.key.new_zeros(self.n_keys, dtype=torch.float32)
        fit = self.heads * HELD // (total.element_size() * max(1, sum(self._size(block) for block in self.blocks)))
        self.heads = max(1, min(self.heads, fit))  # So many that their probabilities need not be computed again.
        size = sum(self._size(block) for block in self.blocks)
        held = total.new_empty(min(size, HELD // total.element_size()))
        for query, key in self._groups():
            kept: list[Tensor] = []
            score = total.new_full((query.shape[0] * self.group, 1, self.n_keys), 1 / max(1, self.n_keys))
            for _ in range(STEPS):
                after = torch.zeros_like(score)
                for i, block in enumerate(self.blocks):
                    matrix = self._matrix(i, query, key, kept, held)
                    after[:, :, block.keys] += torch.bmm(score[:, :, block.queries], matrix)
                score = after
            total += score[:, 0].square().sum(0)
        return total

    def _plan(self) -> Iterator[_Block]:
        """The blocks; queries that see nothing may be in none."""
        for start in range(0, self.n_queries, self.height):
            queries = slice(start, min(start + self.height, self.n_queries))
            at = self.queries_at[queries]
            if self.seen is not None:
                some = (~self._mask(queries, slice(0, self.n_keys))[0]).any(0).nonzero()[:, 0].tolist()
                if some:
                    yield _Block(queries, slice(some[0], some[-1] + 1), ())
                continue
            low, low_end, high_start, high = 0, 0, self.n_keys, self.n_keys
            edges = []
            if self.rule.causal:
                high_start, high = torch.searchsorted(self.keys_at, at[[0, -1]], right=True).tolist()
            if self.rule.window is not None:
                low, low_end = torch.searchsorted(self.keys_at, at[[0, -1]] - self.rule.window, right=True).tolist()
                edges.append((slice(0, low_end - low), self.keys_at[low:low_end] <= at[:, None] - self.rule.window))
            if high_start < high:
                edges.append((slice(high_start - low, high - low), self.keys_at[high_start:high] > at[:, None]))
            yield _Block(queries, slice(low, high), tuple(edges))

    def _size(self, block: _Block) -> int:
        """Logits of a block, for as many heads as are worked on together."""
        size: int = (block.queries.stop - block.queries.start) * (block.keys.stop - block.keys.start)
        return self.heads * self.group * size

    def _groups(self) -> Iterator[tuple[Tensor, Tensor]]:
        """Heads that are worked on together: all queries `[h, G, Lq, K]`, and the valid keys `[h, K, n]` in fp32."""
        for start in range(0, self.key.shape[0], self.heads):
            key = self.key[start : start + self.heads]
            query = self.query[start * self.group : (start + len(key)) * self.group]
            if self.padded:
                key = key.index_select(1, self.keys_at)
            yield query.view(len(key), self.group, *query.shape[1:]), key.to(torch.float32).contiguous().transpose(1, 2)

    def _matrix(self, i: int, query: Tensor, key: Tensor, kept: list[Tensor], held: Tensor) -> Tensor:
        """Probabilities of block `i`: from `kept`, whose memory is `held`, else computed, and kept if there is room."""
        if i < len(kept):
            return kept[i]
        used = sum(matrix.numel() for matrix in kept)
        if i > len(kept) or used + self._size(self.blocks[i]) > len(held):
            return self._probabilities(query, key, self.blocks[i], self.scratch)
        kept.append(self._probabilities(query, key, self.blocks[i], held[used:]))
        return kept[i]

    def _probabilities(self, query: Tensor, key: Tensor, block: _Block, out: Tensor) -> Tensor:
        """Softmax of a block, `[h * G, queries, keys]` fp32, written to the beginning of the flat `out`."""
        at, key = self.queries_at[block.queries] - self.before, key[:, :, block.keys]
        rows = query.index_select(2, at).to(torch.float32).mul_(self.rule.factor)
        shape = len(key) * self.group, len(at), key.shape[2]
        logits, result = (memory[: shape[0] * shape[1] * shape[2]].view(shape) for memory in (self.logits, out))
        torch.bmm(rows.flatten(1, 2), key, out=logits.view(len(key), -1, shape[2]))
        self.rule.cap(logits)
        for columns, hidden in block.edges:
            logits[:, :, columns].masked_fill_(hidden, LOW)
        if self.seen is None:
            return torch.softmax(logits, 2, out=result)
        hidden, bias = self._mask(block.queries, block.keys)
        if bias is not None:
            logits.add_(bias, alpha=1 / self.rule.temperature)
        torch.softmax(logits.masked_fill_(hidden, LOW), 2, out=result)
        blind = hidden.all(1)  # These come out uniform, since LOW is finite.
        return result.masked_fill_(blind[:, None], 0) if bool(blind.any()) else result

    def _mask(self, queries: slice, keys: slice) -> tuple[Tensor, Tensor | None]:
        """What `seen` hides of a block, `[queries, keys]`, and what it adds to the logits."""
        assert self.seen is not None
        seen = self.seen.index_select(0, self.queries_at[queries] - self.before)
        seen = seen.index_select(1, self.keys_at[keys]) if self.padded else seen[:, keys]
        if seen.dtype == torch.bool:
            return ~seen, None
        return seen <= torch.finfo(seen.dtype).min / 2, seen.to(torch.float32)
