"""The library's instruments around a call, for benchmarks and tests: latencies in turn, arithmetic, peak memory."""

import statistics
from collections.abc import Callable, Mapping, Sequence
from contextlib import nullcontext
from dataclasses import dataclass

import torch

from tokenprune.report import measure
from tokenprune.report.measure import Meter, in_turn, latency_ms, watch_memory
from tokenprune.upstream.generating import stored_by_layer


@dataclass(frozen=True)
class Timing:
    """Latencies of one candidate in milliseconds, in the order they were taken (or ratios of such)."""

    samples: tuple[float, ...]

    @property
    def median(self) -> float:
        """Median of the samples."""
        return statistics.median(self.samples)

    def quantile(self, fraction: float) -> float:
        """Linearly interpolated quantile; `fraction` in [0, 1]."""
        return float(torch.tensor(self.samples, dtype=torch.float64, device="cpu").quantile(fraction))

    def over(self, other: "Timing") -> "Timing":
        """Ratios of the samples taken in the same rounds: less touched by drift than the ratio of two medians."""
        return Timing(tuple(mine / theirs for mine, theirs in zip(self.samples, other.samples, strict=True)))


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


def kv_mib(cache: object) -> float:
    """Memory that a KV cache holds, in MiB: storages of keys, values and recurrent states, each counted once.

    Args:
        cache: a cache of transformers (anything with `layers`); of an encoder-decoder cache both halves count.

    Raises:
        UnsupportedModelError: it is not made of layers.
    """
    return measure.kv_mib(stored_by_layer(cache))
