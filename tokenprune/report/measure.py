"""Instruments: latency, memory and arithmetic, measured the same way by reports, comparisons and benchmarks.

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
import re
import time
import weakref
from collections.abc import Callable, Hashable, Iterable, Mapping, Sequence
from contextlib import AbstractContextManager, suppress
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from tokenprune.errors import OptionError

MIB = 2.0**20
PROGRESS_DELAY_S = 3.0
PROCESS = Path("/proc/self")
Name = TypeVar("Name", bound=Hashable)
Result = TypeVar("Result")


def spread(samples: Sequence[float]) -> tuple[float, float, float]:
    """Median, 20 % and 80 % quantile, linearly interpolated."""
    median, low, high = np.quantile(samples, [0.5, 0.2, 0.8]).tolist()
    return median, low, high


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


def in_turn(
    sides: Mapping[Name, Callable[[], AbstractContextManager[Any]]],
    run: Callable[[Name], Result],
    *,
    repeats: int,
    label: str,
) -> dict[Name, list[Result]]:
    """Run several sides in turn, every other round backwards.

    A progress bar called `label` appears on stderr after three seconds, if that is a terminal and tqdm is installed.

    Args:
        sides: for each name, what makes the context in which it is run.
        run: called with a name, `repeats` times each.
        repeats: rounds.
        label: what is done.

    Returns:
        What `run` returned, by name; entry i of every name is of round i.

    Raises:
        OptionError: `repeats` is less than 1.
    """
    if repeats < 1:
        raise OptionError(f"repeats must be at least 1 to measure anything, got {repeats}")
    orders = list(sides), list(sides)[::-1]
    turns: Iterable[Name] = [name for turn in range(repeats) for name in orders[turn % 2]]
    with suppress(ImportError):
        from tqdm import tqdm

        turns = tqdm(turns, desc=label, disable=None, delay=PROGRESS_DELAY_S, leave=False)
    results: dict[Name, list[Result]] = {name: [] for name in sides}
    for name in turns:
        with sides[name]():
            results[name].append(run(name))
    return results


def latency_ms(call: Callable[[], object], *, device: torch.device | str) -> float:
    """Milliseconds that one call takes."""
    watch = Stopwatch(device)
    watch.mark("start")
    result = call()
    watch.mark("end")
    del result
    return watch.read()[-1][1]


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


def watch_memory(devices: Iterable[torch.device], meter: Meter) -> Callable[[], dict[str, float]]:
    """Watch memory from now on.

    Args:
        devices: where the tensors are.
        meter: follows them from now on; the peak is CUDA's allocator's if any device is one, else the meter's.

    Returns:
        A reader of `peak_mib` and, where the devices are CPUs and the system tells it (Linux), of `resident_peak_mib`.
    """
    devices = set(devices)
    gpus = [device for device in devices if device.type == "cuda"]
    for gpu in gpus:
        torch.cuda.synchronize(gpu)
        torch.cuda.reset_peak_memory_stats(gpu)
    before = sum(torch.cuda.memory_allocated(gpu) for gpu in gpus)
    has_resident = all(device.type == "cpu" for device in devices) and _forget_resident_peak()

    def read() -> dict[str, float]:
        peak = sum(torch.cuda.max_memory_allocated(gpu) for gpu in gpus) - before if gpus else meter.peak
        found = {"peak_mib": peak / MIB}
        status = (PROCESS / "status").read_text(encoding="utf-8", errors="replace") if has_resident else ""
        if line := re.search(r"^VmHWM:\s*(\d+) kB", status, re.MULTILINE):
            found["resident_peak_mib"] = int(line[1]) / 1024
        return found

    return read


def _forget_resident_peak() -> bool:
    """Let the high-water mark of this process's resident memory be what is resident now; False where that fails."""
    try:
        if (trim := getattr(ctypes.CDLL(None), "malloc_trim", None)) is not None:
            trim(0)
        (PROCESS / "clear_refs").write_bytes(b"5")
    except (OSError, TypeError):  # no such file; no libc under that name
        return False
    return True


def kv_mib(layers: Iterable[Iterable[Tensor]]) -> float:
    """Memory of the tensors that layers of a KV cache hold, in MiB; a storage that several share counts once."""
    storages = [tensor.untyped_storage() for layer in layers for tensor in layer]
    return sum({storage._cdata: storage.nbytes() for storage in storages}.values()) / MIB
