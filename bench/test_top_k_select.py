"""Top-k selection against `torch.topk` and a sort of its indices, which gives the same order, timed in turns.

That pair leaves open which of several equal scores is taken; the scores here are distinct, so both give the same. Calls
take turns among many tensors of scores: of one, a CPU learns by heart how its sorting branches.
"""

import statistics
import time
from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from tokenprune.ops import top_k_select

DEVICES = ["cpu", "cuda"] if torch.cuda.is_available() else ["cpu"]


def pair(scores: Tensor, k: int) -> Tensor:
    """What a user would write."""
    return scores.topk(k, dim=1).indices.sort(dim=1).values


def seconds(call: Callable[[Tensor], object], pool: list[Tensor], device: str) -> float:
    """Duration of one of several calls in a row, which the device has then finished."""
    calls = max(1, 20_000 // pool[0].numel()) if device == "cpu" else 10
    start = time.perf_counter()
    for i in range(calls):
        call(pool[i % len(pool)])
    if device == "cuda":
        torch.cuda.synchronize()
    return (time.perf_counter() - start) / calls


@pytest.mark.parametrize("keep", [0.1, 0.25, 0.5])
@pytest.mark.parametrize("n", [576, 2880, 8192, 32768])
@pytest.mark.parametrize("rows", [1, 8, 64])
@pytest.mark.parametrize("device", DEVICES)
def test_top_k_select(device: str, rows: int, n: int, keep: float, record: Callable[..., None]) -> None:
    generator = torch.Generator().manual_seed(0)
    n_tensors = max(2, min(64, 1_000_000 // (rows * n)))
    pool = [
        torch.stack([torch.randperm(n, generator=generator) for _ in range(rows)]).float().to(device)
        for _ in range(n_tensors)
    ]
    k = round(keep * n)

    def select(scores: Tensor) -> Tensor:
        return top_k_select(scores, k=k)

    for scores in pool:
        assert torch.equal(select(scores), pair(scores, k))  # No time counts before its result is right.
    calls = {"op": select, "pair": lambda scores: pair(scores, k)}
    times: dict[str, list[float]] = {name: [] for name in calls}
    for turn in range(max(20, min(200, 4_000_000 // (rows * n)))):
        turned = pool[turn % n_tensors :] + pool[: turn % n_tensors]
        for name, call in calls.items():
            times[name].append(seconds(call, turned, device))
    op, other = (statistics.median(times[name][1:]) for name in calls)  # The first turn warms up.
    row = {
        "device": device,
        "rows": rows,
        "n": n,
        "k": k,
        "op_us": round(1e6 * op, 1),
        "pair_us": round(1e6 * other, 1),
        "pair_over_op": round(other / op, 2),
    }
    record(lambda: select(pool[0]), row)
