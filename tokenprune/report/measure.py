"""Instruments: latency, memory and arithmetic, measured the same way by the report, the benchmarks and the demos.

* Latency in milliseconds: wall time on a CPU, time between two events of the current stream on CUDA. Candidates that
  are compared run in turn (A B, B A, A B, ...), so that a machine that slows down or speeds up does so for all of them.
* Peak memory is what a call holds at most *beyond* what was allocated before it (so without weights and inputs). CUDA's
  allocator knows it. A CPU has no such counter: there the bytes of all tensors that operators create are followed,
  which is exact and repeatable but leaves out scratch memory inside an operator.
* Resident peak (CPU, Linux) is the largest resident memory of the process meanwhile, weights, interpreter and scratch
  memory included: what has to fit. Memory that the allocator holds free is given back before, where it can be; what
  cannot is counted, so that it varies by a few MiB.
* FLOPs come from the shapes that reach matrix products, convolutions and attention (2 per multiply-add; attention as
  the full rectangle, whether or not a kernel skips its masked half). What runs outside of torch's dispatcher (Triton,
  NumPy) is not seen. torch's own ``FlopCounterMode`` counts the same, but need not execute Triton kernels.
"""

import ctypes
import statistics
import time
import weakref
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from tokenprune.errors import OptionError
from tokenprune.upstream.generating import stored_by_layer

MIB = 2.0**20


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


class Stopwatch:
    """Named marks on the time line of one device; on CUDA they are events that are read at the end, nothing waits."""

    def __init__(self, device: torch.device | str) -> None:
        """Start without marks."""
        self.device = torch.device(device)
        self.marks: list[tuple[str, Any]] = []

    def mark(self, name: str) -> None:
        """Set a mark after everything enqueued so far."""
        if self.device.type == "cuda":
            event: Any = torch.cuda.Event(enable_timing=True)  # type: ignore[no-untyped-call]
            event.record(torch.cuda.current_stream(self.device))
            self.marks.append((name, event))
        else:
            synchronise(self.device)
            self.marks.append((name, time.perf_counter()))

    def read(self) -> list[tuple[str, float]]:
        """All marks with their milliseconds since the first one."""
        synchronise(self.device)
        origin = self.marks[0][1]
        if self.device.type == "cuda":
            return [(name, float(origin.elapsed_time(event))) for name, event in self.marks]
        return [(name, (moment - origin) * 1e3) for name, moment in self.marks]


def synchronise(device: torch.device) -> None:
    """Wait until everything enqueued on `device` is done; a CPU has nothing to wait for."""
    if device.type != "cpu":
        torch.accelerator.synchronize(device)


def rounds(names: Sequence[str], repeats: int) -> Iterator[str]:
    """`names` in turn, `repeats` times, every other round backwards.

    Raises:
        OptionError: `repeats` is less than 1.
    """
    if repeats < 1:
        raise OptionError(f"repeats must be at least 1 to measure anything, got {repeats}")
    for turn in range(repeats):
        yield from names if turn % 2 == 0 else reversed(names)


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
    samples: dict[str, list[float]] = {name: [] for name in candidates}
    for call in [call for _ in range(warmup) for call in candidates.values()]:
        call()
    for name in rounds(tuple(candidates), repeats):
        watch = Stopwatch(device)
        watch.mark("start")
        result = candidates[name]()
        watch.mark("end")
        samples[name].append(watch.read()[-1][1])
        del result
    return {name: Timing(tuple(values)) for name, values in samples.items()}


def latency_ms(
    call: Callable[[], object], *, repeats: int = 5, warmup: int = 1, device: torch.device | str = "cpu"
) -> Timing:
    """Latency of one callable; to compare several, see :func:`alternate`."""
    return alternate({"call": call}, repeats=repeats, warmup=warmup, device=device)["call"]


class Meter(TorchDispatchMode):
    """Counts the arithmetic and follows the bytes of everything that runs inside it.

    Attributes:
        flops: floating-point operations so far.
        live: bytes of the tensors created inside that are alive now.
        peak: largest value of `live` so far.
    """

    def __init__(self) -> None:
        """Start at zero."""
        super().__init__()  # type: ignore[no-untyped-call]
        self.flops, self.live, self.peak = 0, 0, 0
        self._known: set[int] = set()

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        """Run one operator; one that torch defines by others is taken apart unless its FLOPs are known."""
        kwargs = kwargs or {}
        formula = _formula(func)
        if formula is None:
            with self:
                result = func.decompose(*args, **kwargs)
            if result is not NotImplemented:
                return result
        for leaf in tree_leaves((args, kwargs)):
            self._follow(leaf, created=False)
        result = func(*args, **kwargs)
        if formula is not None:
            self.flops += int(formula(*args, **kwargs, out_val=result))
        for leaf in tree_leaves(result):
            self._follow(leaf, created=True)
        return result

    def _follow(self, leaf: object, *, created: bool) -> None:
        if not isinstance(leaf, Tensor) or leaf.layout != torch.strided:
            return
        storage = leaf.untyped_storage()
        key, size = storage._cdata, storage.nbytes() if created else 0
        if key not in self._known:
            self._known.add(key)
            self.live += size
            self.peak = max(self.peak, self.live)
            weakref.finalize(storage, self._forget, key, size).atexit = False

    def _forget(self, key: int, size: int) -> None:
        self._known.discard(key)
        self.live -= size


def _attention_flops(query: Tensor, key: Tensor, value: Tensor, *_args: object, **_kwargs: object) -> int:
    """One formula for every fused kernel, grouped-query attention and every version of torch."""
    return 2 * int(query.shape[:3].numel()) * key.shape[-2] * (key.shape[-1] + value.shape[-1])


def _formula(func: Any) -> Any:
    name = str(func._overloadpacket)
    fused = name.startswith("aten._scaled_dot_product_") and not name.endswith(("_backward", "_math"))
    from torch.utils.flop_counter import flop_registry  # imports triton, which importing tokenprune should not

    return _attention_flops if fused else flop_registry.get(func._overloadpacket)


def flops_g(call: Callable[[], object]) -> float:
    """Billions of floating-point operations of one call."""
    meter = Meter()
    with meter:
        call()
    return meter.flops / 1e9


@contextmanager
def watch_peak(devices: Sequence[torch.device], meter: Meter) -> Iterator[Callable[[], float]]:
    """Yield a reader of the peak so far in MiB: from CUDA's allocator if any device is one, else from `meter`."""
    gpus = [device for device in dict.fromkeys(devices) if device.type == "cuda"]
    for gpu in gpus:
        torch.cuda.synchronize(gpu)
        torch.cuda.reset_peak_memory_stats(gpu)
    before = {gpu: int(torch.cuda.memory_allocated(gpu)) for gpu in gpus}

    def read() -> float:
        peaks = [int(torch.cuda.max_memory_allocated(gpu)) - before[gpu] for gpu in gpus]
        return (sum(peaks) if gpus else meter.peak) / MIB

    yield read


@contextmanager
def watch_resident(devices: Sequence[torch.device]) -> Iterator[Callable[[], float | None]]:
    """Yield a reader of the process's largest resident memory so far in MiB.

    It reads None where the system does not tell (any but Linux), or where a device is no CPU.
    """
    process = Path("/proc/self")
    on_cpu = all(device.type == "cpu" for device in devices)
    try:
        if on_cpu:
            if (trim := getattr(ctypes.CDLL(None), "malloc_trim", None)) is not None:
                trim(0)
            (process / "clear_refs").write_bytes(b"5")  # the high-water mark becomes what is resident now
    except (OSError, TypeError):  # no such file; no libc under that name
        on_cpu = False

    def read() -> float | None:
        if not on_cpu:
            return None
        lines = (process / "status").read_text(encoding="utf-8", errors="replace").splitlines()
        return next((int(line.split()[1]) / 1024 for line in lines if line.startswith("VmHWM:")), None)

    yield read


def peak_mib(call: Callable[[], object], *, devices: Sequence[torch.device] = ()) -> float:
    """Largest memory that one call holds beyond what was allocated before it, in MiB, over `devices` (none: CPU)."""
    meter = Meter()
    on_gpu = any(device.type == "cuda" for device in devices)
    with nullcontext() if on_gpu else meter, watch_peak(devices, meter) as read:
        call()
        return read()


def kv_mib(cache: object) -> float:
    """Memory that a KV cache holds, in MiB: storages of keys, values and recurrent states, each counted once.

    Args:
        cache: a cache of transformers (anything with `layers`); of an encoder-decoder cache both halves count.

    Raises:
        UnsupportedModelError: it is not made of layers.
    """
    return _mib(leaf for layer in stored_by_layer(cache) for leaf in layer)


def kv_mib_by_layer(cache: object) -> tuple[float, ...]:
    """The same for each layer of the cache; a storage that layers share counts in each of them."""
    return tuple(map(_mib, stored_by_layer(cache)))


def _mib(tensors: Iterable[Tensor]) -> float:
    storages = (tensor.untyped_storage() for tensor in tensors)
    return sum({storage._cdata: storage.nbytes() for storage in storages}.values()) / MIB
