"""Max-min selection against the straightforward loop and against one N x N x D product, all timed in turns in one run.

The first is what a user would write; the second is the floor of anything that looks at every pair of tokens once.
"""

import statistics
import time
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from tokenprune.ops import max_min_select

DEVICES = [("cpu", torch.float32)]
if torch.cuda.is_available():
    DEVICES += [("cuda", torch.float32), ("cuda", torch.bfloat16)]


def straightforward(tokens: Tensor, k: int) -> list[int]:
    """The loop as the pseudo-code of the paper has it: all distances, then a minimum over a growing set of columns."""
    unit = torch.nn.functional.normalize(tokens.float(), dim=1)
    distance = 1 - unit @ unit.T
    chosen = [int(distance.clone().fill_diagonal_(torch.inf).amin(1).argmax())]
    while len(chosen) < k:
        gap = distance[:, chosen].amin(1)
        gap[chosen] = -1
        chosen.append(int(gap.argmax()))
    return chosen


def assert_greedy(tokens: Tensor, order: Tensor) -> None:
    """Every choice is, in fp64, as far from the ones before it as any other token could have been."""
    unit = torch.nn.functional.normalize(tokens.double(), dim=1)
    distance = 1 - unit @ unit[order].T
    gap = distance[:, 0].clone()
    gap[order[0]] = -1
    for i in range(1, len(order)):
        assert gap[order[i]] >= gap.max() - 1e-6
        gap = torch.minimum(gap, distance[:, i])
        gap[order[i]] = -1


def seconds(call: Callable[[], object], device: str) -> float:
    """Duration of one call, which the device has then finished."""
    start = time.perf_counter()
    call()
    if device == "cuda":
        torch.cuda.synchronize()
    return time.perf_counter() - start


@pytest.mark.parametrize("keep", [0.1, 0.25])
@pytest.mark.parametrize("n", [576, 2880, 8192])
@pytest.mark.parametrize(("device", "dtype"), DEVICES)
def test_max_min_select(device: str, dtype: torch.dtype, n: int, keep: float, record: Callable[..., None]) -> None:
    x = torch.randn(1, n, 1024, generator=torch.Generator().manual_seed(0)).to(device, dtype)
    k, wide = round(keep * n), x[0].float()

    def select() -> Any:
        return max_min_select(x, k=k)

    assert_greedy(x[0], select().order[0])  # No time counts before its result is right.
    calls = {"op": select, "product": lambda: wide @ wide.T, "loop": lambda: straightforward(x[0], k)}
    slow = n > 4096  # There the loop takes a minute, and several where more is kept: once is enough.
    n_loops = 3 if not slow else int(keep < 0.2)
    times: dict[str, list[float]] = {name: [] for name in calls}
    for turn in range(6 if slow else 16):
        for name, call in calls.items():
            if name != "loop" or turn < n_loops:
                times[name].append(seconds(call, device))
    op, product = (statistics.median(times[name][1:]) for name in ("op", "product"))  # The first turn warms up.
    loop = statistics.median(times["loop"][1:] or times["loop"]) if n_loops else None
    row = {
        "device": device,
        "dtype": str(dtype).removeprefix("torch."),
        "n": n,
        "keep": keep,
        "op_ms": round(1000 * op, 3),
        "product_ms": round(1000 * product, 3),
        "op_over_product": round(op / product, 3),
    }
    if loop is not None:
        row |= {"loop_ms": round(1000 * loop, 3), "loop_over_op": round(loop / op, 2)}
    record(select, row)
