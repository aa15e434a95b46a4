"""What all benchmarks share: an anonymous description of the machine, and the rows that go to `bench/results/`."""

import os
import platform
import sys
from collections.abc import Callable
from importlib import metadata
from pathlib import Path
from typing import Any

import pytest
import torch

Record = Callable[..., None]

# Benchmarks share helpers among them, and with the tests what transformers renames and instruments around a call.
sys.path.insert(0, str(Path(__file__).parent))
sys.path.append(str(Path(__file__).parents[1] / "tests" / "helpers"))


def _cpu_model() -> str:
    lines = Path("/proc/cpuinfo").read_text().splitlines() if Path("/proc/cpuinfo").exists() else []
    return next(
        (line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")), platform.processor()
    )


def _version(name: str) -> str | None:
    try:
        return metadata.version(name)
    except metadata.PackageNotFoundError:
        return None


def pytest_benchmark_generate_machine_info() -> dict[str, Any]:
    """Replace pytest-benchmark's description, which names the host."""
    return {
        "cpu": _cpu_model(),
        "cores": len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count(),
        "threads": torch.get_num_threads(),
        "load_average": os.getloadavg()[0],
        "gpu": torch.cuda.get_device_name() if torch.cuda.is_available() else None,
        "system": platform.system(),
        "python": platform.python_version(),
        **{name: _version(name) for name in ("torch", "transformers", "triton")},
    }


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Where a launcher started several processes, each takes its share of the benchmarks, on a GPU of its own."""
    items[:] = items[int(os.environ.get("RANK", "0")) :: int(os.environ.get("WORLD_SIZE", "1"))]
    if torch.cuda.is_available():
        torch.cuda.set_device(int(os.environ.get("LOCAL_RANK", "0")) % torch.cuda.device_count())


@pytest.fixture
def record(benchmark: Any) -> Record:
    """`record(call, *rows)`: let pytest-benchmark time `call` once and file `rows` under its name; they are printed."""

    def write(call: Callable[[], object], *rows: dict[str, Any]) -> None:
        benchmark.pedantic(call, rounds=1)
        benchmark.extra_info["rows"] = rows
        for row in rows:
            print("\n" + "  ".join(f"{name}={value}" for name, value in row.items()))

    return write
