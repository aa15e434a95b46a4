"""What is needed to run an evaluation again."""

from __future__ import annotations

import argparse
import datetime
import os
import platform
import subprocess
from pathlib import Path
from typing import Any

import torch
import transformers


def provenance(args: argparse.Namespace, n_processes: int) -> dict[str, Any]:
    """Command, commit, versions and machine."""
    head = subprocess.run(["git", "rev-parse", "HEAD"], capture_output=True, text=True, check=False)
    given = {name: value for name, value in vars(args).items() if value not in (None, False) and name != "output"}
    options = [f"--{name.replace('_', '-')}" + ("" if value is True else f" {value}") for name, value in given.items()]
    gpu = torch.cuda.get_device_name() if torch.cuda.is_available() else None
    return {
        "command": " ".join(["python bench/quality/evaluate.py", *options]),
        "commit": None if head.returncode else head.stdout.strip(),
        "date": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
        "torch": torch.__version__,
        "transformers": transformers.__version__,
        "machine": gpu or f"{_cpu()}, {os.cpu_count()} cores",
        "threads": torch.get_num_threads(),
        "processes": n_processes,
        "dtype": args.dtype,
        "images": args.images,
        "seed": args.seed,
    }


def _cpu() -> str:
    """Name of the processor where the system tells it."""
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
    except OSError:
        lines = []
    return next((line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")), platform.machine())
