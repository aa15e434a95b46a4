"""Attention importance against the attention beside it, timed in turns in one run, and the memory it takes.

The rival is `F.scaled_dot_product_attention`, causal, with the same queries and keys; on CUDA, its flash kernel.
"""

from collections.abc import Callable
from contextlib import nullcontext
from typing import Any

import pytest
import torch
from measuring import alternate, peak_mib
from torch.nn import functional as F
from torch.nn.attention import SDPBackend, sdpa_kernel

from tokenprune.ops import attention_importance
from tokenprune.report.measure import MIB

HEADS = 32
REDUCTIONS = ("last_query", "column_sum", "pagerank")
DEVICES = [("cpu", torch.float32), ("cpu", torch.bfloat16)]
if torch.cuda.is_available():
    DEVICES += [("cuda", torch.bfloat16)]


@pytest.mark.parametrize("width", [64, 128])
@pytest.mark.parametrize("n", [600, 3000, 4096])
@pytest.mark.parametrize(("device", "dtype"), DEVICES)
def test_attention_importance(device: str, dtype: torch.dtype, n: int, width: int, record: Callable[..., None]) -> None:
    random = torch.Generator().manual_seed(0)
    query, key, value = (torch.randn(1, HEADS, n, width, generator=random).to(device, dtype) for _ in range(3))

    def attend() -> object:
        with sdpa_kernel(SDPBackend.FLASH_ATTENTION) if device == "cuda" else nullcontext():
            return F.scaled_dot_product_attention(query, key, value, is_causal=True)

    def score(reduction: str) -> torch.Tensor:
        return attention_importance(query, key, scale=width**-0.5, reduction=reduction)

    total = {"last_query": 1.0, "column_sum": float(HEADS * n)}
    for reduction, want in total.items():  # No time counts before its result is right.
        assert score(reduction).sum().item() == pytest.approx(want, rel=1e-3)
    calls: dict[str, Callable[[], object]] = {"attention": attend}
    calls |= {reduction: lambda reduction=reduction: score(reduction) for reduction in REDUCTIONS}
    times = alternate(calls, repeats=3 if n > 1000 and device == "cpu" else 15, device=device)
    devices = [torch.device(device)] if device == "cuda" else []
    row: dict[str, Any] = {"device": device, "dtype": str(dtype).removeprefix("torch."), "n": n, "heads": HEADS}
    row |= {"width": width, "attention_ms": round(times["attention"].median, 3)}
    for reduction in REDUCTIONS:
        row |= {
            f"{reduction}_ms": round(times[reduction].median, 3),
            f"{reduction}_over_attention": round(times[reduction].over(times["attention"]).median, 3),
            f"{reduction}_peak_mb": round(peak_mib(lambda r=reduction: score(r), devices=devices) * MIB / 1e6, 1),
        }
    record(lambda: score("column_sum"), row)
