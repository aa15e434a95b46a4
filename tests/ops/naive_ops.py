"""Naive versions of the ops: plain loops that read like pseudo-code, slow, and the oracles of the tests beside."""

import math

import torch


def max_min_select(tokens: torch.Tensor, k: int) -> tuple[list[int], list[float]]:
    """Greedy max-min of the cosine distance, in fp64.

    Args:
        tokens: `[N, D]`, all of them valid.
        k: tokens to choose, `1 <= k <= N`.

    Returns:
        The tokens in the order in which they were chosen, and the covering radius after each choice.
    """
    distance = cosine_distance(tokens).tolist()
    n = len(distance)
    nearest = [min((distance[i][j] for j in range(n) if j != i), default=0.0) for i in range(n)]
    chosen = [_farthest(nearest)]
    gap = list(distance[chosen[0]])  # To the nearest chosen token.
    radius = [max(gap)]
    while len(chosen) < k:
        left = [-1.0 if i in chosen else gap[i] for i in range(n)]
        chosen.append(_farthest(left))
        gap = [min(gap[i], distance[chosen[-1]][i]) for i in range(n)]
        radius.append(max(gap))
    return chosen, radius


def cosine_distance(tokens: torch.Tensor) -> torch.Tensor:
    """`[N, N]` in fp64, 0 on the diagonal; below 2^-20 it counts as 0, and a zero vector has cosine 0 to all others."""
    tokens = tokens.double()
    unit = tokens / torch.linalg.vector_norm(tokens, dim=1, keepdim=True).clamp_min(1e-12)
    distance: torch.Tensor = 1 - unit @ unit.T
    distance[distance < 2.0**-20] = 0
    return distance.fill_diagonal_(0)


def top_k_select(row: list[float], k: int, valid: list[bool]) -> list[int]:
    """The `k` largest valid entries of a row in ascending order; ties to the lowest index, a NaN below everything."""

    def rank(i: int) -> tuple[bool, float, int]:
        return math.isnan(row[i]), 0.0 if math.isnan(row[i]) else -row[i], i

    return sorted(sorted((i for i in range(len(row)) if valid[i]), key=rank)[:k])


def decode_attention(
    query: torch.Tensor, keys: list[torch.Tensor], values: list[torch.Tensor], scale: float, valid: list[bool],
    n_values: int | None, threshold: float | None, softcap: float | None = None,
) -> tuple[torch.Tensor, torch.Tensor, bool, list[int]]:  # fmt: skip
    """One decoding step of one head, in fp64.

    Args:
        query: `[K]`.
        keys: `[L, K]`, coarse ones and, after them, fine ones; with no threshold the last ones are taken.
        values: likewise.
        scale: factor of the logits.
        valid: which keys exist.
        n_values: how many values are read, None for all.
        threshold: a largest probability below it asks for the fine keys and values.
        softcap: c of logits that become c tanh(logits / c), None where they stay.

    Returns:
        Output `[K]`, probabilities `[L]`, whether the fine ones were asked for, and which values were read. The
        probabilities of all valid keys are NaN if the product with one of them is not finite.
    """

    def probabilities(key: torch.Tensor) -> list[float]:
        logits = [scale * float(query.double() @ key[j].double()) for j in range(len(key))]
        if not all(math.isfinite(logits[j]) for j in range(len(key)) if valid[j]):
            return [math.nan if valid[j] else 0.0 for j in range(len(key))]
        if softcap is not None:
            logits = [softcap * math.tanh(logit / softcap) for logit in logits]
        top = max((logits[j] for j in range(len(key)) if valid[j]), default=0.0)
        weight = [math.exp(logits[j] - top) if valid[j] else 0.0 for j in range(len(key))]
        return [w / (sum(weight) or 1.0) for w in weight]

    level = -1 if threshold is None else 0
    p = probabilities(keys[level])
    flat = threshold is not None and any(valid) and max(p[j] for j in range(len(p)) if valid[j]) < threshold
    if flat:
        level = -1
        p = probabilities(keys[level])
    read = top_k_select(p, len(p) if n_values is None else n_values, valid)
    output = torch.zeros(query.shape, dtype=torch.float64, device="cpu")
    for j in read:
        output += p[j] * values[level][j].double()
    return output, torch.tensor(p, dtype=torch.float64, device="cpu"), flat, read


def _farthest(distance: list[float]) -> int:
    return distance.index(max(distance))  # The first one of several.


def bipartite_match(
    keys: torch.Tensor, r: int, protected: list[bool] | None = None, valid: list[bool] | None = None
) -> tuple[list[int], list[int]]:
    """Merge the `r` most similar tokens at even positions into ones at odd positions, in fp64.

    Args:
        keys: `[N, D]`.
        r: tokens to merge away.
        protected: N of them, tokens that neither merge nor are merged into.
        valid: N of them, tokens that take part and whose positions are counted.

    Returns:
        The positions at which groups stand, in ascending order, and the group of every token.
    """
    n = len(keys)
    places = [i for i in range(n) if valid is None or valid[i]]
    free = [i for i in places if protected is None or not protected[i]]
    sources = [i for i in places[::2] if i in free]
    destinations = [i for i in places[1::2] if i in free]
    unit = keys.double() / torch.linalg.vector_norm(keys.double(), dim=1, keepdim=True).clamp_min(1e-12)
    best = []
    for i in sources:  # No product of matrices: it rounds equal columns differently.
        values = (unit[destinations] * unit[i]).sum(1).clamp_max(1 - 2.0**-20).tolist()
        if values:
            best.append((max(values), i, destinations[values.index(max(values))]))
    best.sort(key=lambda entry: (-entry[0], entry[1]))
    target = {i: j for _, i, j in best[:r]}
    index = [i for i in range(n) if i not in target]
    return index, [index.index(target.get(i, i)) for i in range(n)]


def merge_tokens(
    x: torch.Tensor, assign: list[int], n_out: int, weight: list[float] | None = None
) -> tuple[torch.Tensor, list[float]]:
    """The weighted mean `[n_out, D]` of every group of the tokens `x` `[N, D]` and the groups' weights, in fp64."""
    total = torch.zeros(n_out, x.shape[1], dtype=torch.float64, device="cpu")
    size = [0.0] * n_out
    for i, group in enumerate(assign):
        share = 1.0 if weight is None else weight[i]
        total[group] += x[i].double() * share
        size[group] += share
    return total / torch.tensor(size, dtype=torch.float64, device="cpu")[:, None], size


def attention_importance(
    query: torch.Tensor, key: torch.Tensor, seen: torch.Tensor, scale: float, reduction: str,
    softcap: float | None = None,
) -> torch.Tensor:  # fmt: skip
    """Attention that keys get, in fp64, from the whole attention matrices of one row without padding.

    Args:
        query: `[H, Lq, K]`.
        key: `[Hkv, Lk, K]`.
        seen: `[Lq, Lk]` bool, the keys that a query sees; each sees one at least.
        scale: factor of the logits.
        reduction: `"column_sum"`, `"last_query"` or `"pagerank"`.
        softcap: c of logits that become c tanh(logits / c), None where they stay.

    Returns:
        `[Lk]` fp64, all NaN if a query that counts sees a product that is not finite.
    """
    heads = []
    for h in range(len(query)):
        logits = query[h].double() @ key[h // (len(query) // len(key))].double().T * scale
        for i in range(len(logits)):
            if (reduction != "last_query" or i == len(logits) - 1) and not logits[i][seen[i]].isfinite().all():
                return torch.full((key.shape[1],), torch.nan, dtype=torch.float64, device="cpu")
        logits = logits.masked_fill(~logits.isfinite(), 0)  # No query that counts sees these.
        logits = logits if softcap is None else softcap * (logits / softcap).tanh()
        weight = (logits - logits.amax(1, keepdim=True)).exp() * seen
        matrix = weight / weight.sum(1, keepdim=True)
        score = torch.full((len(matrix),), 1 / len(matrix), dtype=torch.float64, device="cpu")
        for _ in range(5 if reduction == "pagerank" else 0):
            score = score @ matrix
        heads.append({"column_sum": matrix.sum(0), "last_query": matrix[-1], "pagerank": score}[reduction])
    stacked = torch.stack(heads)
    if reduction == "pagerank":
        return stacked.square().mean(0).sqrt()
    return stacked.sum(0) if reduction == "column_sum" else stacked.mean(0)
