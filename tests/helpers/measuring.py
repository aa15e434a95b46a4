"""The library's instruments around a call, for benchmarks and tests: latencies in turn, arithmetic, peak memory."""

from collections.abc import Callable, Mapping, Sequence
from contextlib import nullcontext

import torch

from tokenprune.report.measure import Meter, Timing, in_turn, latency_ms, watch_memory


def alternate(
    candidates: Mapping[str, Callable[[], object]],
    *,
    repeats: int = 5,
    warmup: int = 1,
    device: torch.device | str = "cpu",
) -> dict[str, Timing]:
    """Time several callables in turn, each `repeats` times after `warmup` untimed calls.

    Returns:
        Latencies by name; sample i of every candidate was taken in round i.
    """
    for call in [*candidates.values()] * warmup:
        call()
    times = in_turn(
        dict.fromkeys(candidates, nullcontext),
        lambda name: latency_ms(candidates[name], device=device),
        repeats=repeats,
        label="latency",
    )
    return {name: Timing(tuple(taken)) for name, taken in times.items()}


def flops_g(call: Callable[[], object]) -> float:
    """Billions of floating-point operations of one call."""
    with Meter() as meter:
        call()
    return meter.flops / 1e9


def peak_mib(call: Callable[[], object], *, devices: Sequence[torch.device] = ()) -> float:
    """Largest memory that one call holds beyond what was allocated before it, in MiB, over `devices` (none: CPU)."""
    meter = Meter()
    on_gpu = any(device.type == "cuda" for device in devices)
    with nullcontext() if on_gpu else meter:
        read = watch_memory(devices, meter)
        call()
        return read()["peak_mib"]
