"""One decoding step that reads less, against sdpa over the whole KV and against the time that the bytes read take.

On a GPU all calls are captured in graphs, so that no launch by Python is timed; the bandwidth is that of a reduction
over a tensor of 1 GiB in the same run. Nothing is compared with the CPU's figures, which are of a small case.
"""

import statistics
import time
from collections.abc import Callable
from typing import Any

import pytest
import torch

from tokenprune.ops import Planes, decode_attention, quantize_planes

CUDA = torch.cuda.is_available()
DEVICE, DTYPE = ("cuda", torch.bfloat16) if CUDA else ("cpu", torch.float32)
HEADS, GROUPS, WIDTH, LENGTH = (32, 8, 128, 32768) if CUDA else (8, 2, 64, 4096)
# What is read of the KV that sdpa reads: the share of the tokens, of the values among them, and the bits.
KINDS: dict[str, tuple[float, float, float | None]] = {
    "all": (1, 1, None),
    "quarter": (0.25, 1, None),
    "quarter-values": (0.25, 0.25, None),
    "quarter-high": (0.25, 1, 0.0),
    "quarter-progressive": (0.25, 0.25, 0.1),
}


def repeatable(call: Callable[[], Any]) -> Callable[[], Any]:
    """The call, on a GPU as a graph that is captured once."""
    call()
    if not CUDA:
        return call
    for _ in range(2):
        call()
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        call()
    return graph.replay


def milliseconds(call: Callable[[], Any]) -> float:
    """Duration of one of ten calls in a row, which the device has then finished."""
    start = time.perf_counter()
    for _ in range(10):
        call()
    if CUDA:
        torch.cuda.synchronize()
    return (time.perf_counter() - start) * 100


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("batch", [1, 8] if CUDA else [1])
def test_decode_attention(batch: int, kind: str, record: Callable[..., None]) -> None:
    share, values, threshold = KINDS[kind]
    torch.manual_seed(0)
    query = torch.randn(batch, HEADS, 1, WIDTH, device=DEVICE, dtype=DTYPE)
    key, value = (torch.randn(batch, GROUPS, LENGTH, WIDTH, device=DEVICE, dtype=DTYPE) for _ in range(2))
    length = int(share * LENGTH)
    kept: list[torch.Tensor | Planes] = [x[:, :, :length].contiguous() for x in (key, value)]
    if threshold is not None:
        kept = [quantize_planes(x) for x in kept if isinstance(x, torch.Tensor)]
    n_values = None if values == 1 else int(values * length)
    buffer = torch.zeros(2**28 if CUDA else 2**22, device=DEVICE)

    def step() -> Any:
        return decode_attention(query, *kept, scale=WIDTH**-0.5, n_values=n_values, threshold=threshold)

    def dense() -> torch.Tensor:
        return torch.nn.functional.scaled_dot_product_attention(query, key, value, enable_gqa=True)

    if kind == "all":  # No time counts before its result is right.
        torch.testing.assert_close(step().output, dense(), atol=2e-2 if CUDA else 1e-5, rtol=2e-2 if CUDA else 1e-5)
    calls = {"op": repeatable(step), "sdpa": repeatable(dense), "sum": repeatable(lambda: buffer.sum())}
    times: dict[str, list[float]] = {name: [] for name in calls}
    for _ in range(20 if CUDA else 4):
        for name, call in calls.items():
            times[name].append(milliseconds(call))
    op, sdpa, total = (statistics.median(times[name][1:]) for name in calls)  # The first turn warms up.
    found = step()
    read = int(found.key_bytes.sum() + found.value_bytes.sum())
    floor = total * read / buffer.nbytes
    row = {
        "device": DEVICE,
        "dtype": str(DTYPE).removeprefix("torch."),
        "batch": batch,
        "kind": kind,
        "read_mib": round(read / 2**20, 2),
        "dense_mib": round(2 * key.nbytes / 2**20, 2),
        "recomputed": round(found.recomputed.float().mean().item(), 3),
        "op_ms": round(op, 4),
        "sdpa_ms": round(sdpa, 4),
        "floor_ms": round(floor, 4),
        "sdpa_over_op": round(sdpa / op, 2),
        "op_over_floor": round(op / floor, 2),
    }
    record(step, row)
