"""The benchmarks themselves: shared out to several processes, each one runs once and its rows come together again."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]


def test_two_processes_share_the_benchmarks(tmp_path: Path) -> None:
    pytest.importorskip("accelerate")
    pytest.importorskip("pytest_benchmark")
    launch = [sys.executable, "-m", "accelerate.commands.accelerate_cli", "launch", "--multi_gpu"]
    launch += ["--num_processes", "2", "--main_process_port", "0", "--no_python", "sh", "-c"]
    asked = "bench/test_top_k_select.py -k '0.1 and (576 or 2880)' -p no:cacheprovider --benchmark-only"
    shell = f'"{sys.executable}" -m pytest {asked} --benchmark-json "{tmp_path}/bench-$RANK.json"'
    done = subprocess.run([*launch, shell], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    shares = [json.loads((tmp_path / f"bench-{rank}.json").read_text())["benchmarks"] for rank in (0, 1)]
    assert [len(share) for share in shares] == [3, 3]
    command = [sys.executable, "bench/collect.py", *(tmp_path / f"bench-{rank}.json" for rank in (0, 1))]
    subprocess.run([*command, "--into", tmp_path], cwd=ROOT, check=True, capture_output=True)
    rows = json.loads((tmp_path / "top_k_select.json").read_text())["rows"]
    assert sorted((row["rows"], row["n"]) for row in rows) == [(b, n) for b in (1, 8, 64) for n in (576, 2880)]
