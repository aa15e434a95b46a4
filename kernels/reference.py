"""Naive versions of the ops: plain loops that read like pseudo-code, slow, and the oracle of the tests."""

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


def _farthest(distance: list[float]) -> int:
    return distance.index(max(distance))  # The first one of several.
