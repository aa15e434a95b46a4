"""Tensor parallelism of transformers, two processes on CPUs: methods before the decoder give what one process gives,
methods that look at attention are refused."""

import json
import os
import socket
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from families import batch, generate, tiny
from upstream import cache_of

import tokenprune
from tokenprune.parsing import parse_methods

WORKS = ("divprune", "uniform:keep=0.5", "divprune:keep=0.5+random:keep=0.5", "aim:prune=None")
REFUSED = ("fastv", "pyramiddrop", "spatten", "aim", "divprune+fastv")
STEPS = 3
PROCESSES = 2


def worker(folder: Path, family: str) -> None:
    """What each process does: run every method on its part of the model and write down what came out."""
    from transformers import AutoModelForImageTextToText
    from transformers.distributed import DistributedConfig

    plan = DistributedConfig(tp_plan="auto")
    model = AutoModelForImageTextToText.from_pretrained(folder, distributed_config=plan, dtype="float32").eval()
    inputs = batch(family).inputs
    found: dict[str, Any] = {"sharded": type(model.get_decoder().layers[0].self_attn.q_proj.weight).__name__}
    for text in WORKS:
        with tokenprune.patch(model, list(parse_methods(text))) as session:
            out = generate(model, inputs, STEPS)
        kept = [index.tolist() for index in session.traces[-1].kept_indices]
        heads = {layer.keys.shape[1] for layer in cache_of(out).layers}
        lengths = [layer.keys.shape[2] for layer in cache_of(out).layers]
        logits = torch.stack(out.logits).tolist()
        found[text] = {"kept": kept, "heads": sorted(heads), "lengths": lengths, "logits": logits}
    for text in REFUSED:
        try:
            tokenprune.patch(model, list(parse_methods(text)))
        except tokenprune.OptionError as error:
            found[text] = str(error)
    (folder / f"{os.environ['RANK']}.json").write_text(json.dumps(found))
    torch.distributed.destroy_process_group()


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port: int = probe.getsockname()[1]
        return port


@pytest.mark.matrix
@pytest.mark.parametrize("family", ["llava", "qwen2_vl"])
def test_a_model_split_over_two_processes_is_pruned_as_a_whole_one(family: str, tmp_path: Path) -> None:
    dense = tiny(family)
    dense.save_pretrained(tmp_path)
    common = {**os.environ, "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free_port()), "OMP_NUM_THREADS": "1"}
    common |= {"WORLD_SIZE": str(PROCESSES), "LOCAL_WORLD_SIZE": str(PROCESSES), "CUDA_VISIBLE_DEVICES": ""}
    command = [sys.executable, __file__, str(tmp_path), family]
    processes = [
        subprocess.Popen(
            command, env={**common, "RANK": str(rank), "LOCAL_RANK": str(rank)}, stderr=subprocess.PIPE, text=True
        )
        for rank in range(PROCESSES)
    ]
    try:
        errors = [process.communicate(timeout=600)[1] for process in processes]
    finally:
        for process in processes:
            process.kill()
    assert [process.returncode for process in processes] == [0] * PROCESSES, errors
    found = [json.loads((tmp_path / f"{rank}.json").read_text()) for rank in range(PROCESSES)]
    for part in found:
        assert part["sharded"] == "DTensor"
        for text in REFUSED:
            assert "split over several processes" in part[text]
    for text in WORKS:
        with tokenprune.patch(dense, list(parse_methods(text))) as session:
            wanted = generate(dense, batch(family).inputs, STEPS)
        lengths = [layer.keys.shape[2] for layer in cache_of(wanted).layers]
        heads = cache_of(wanted).layers[0].keys.shape[1] // PROCESSES
        for part in found:
            assert part[text]["kept"] == [index.tolist() for index in session.traces[-1].kept_indices]
            assert (part[text]["heads"], part[text]["lengths"]) == ([heads], lengths)
            logits = torch.tensor(part[text]["logits"])
            torch.testing.assert_close(logits, torch.stack(wanted.logits), atol=1e-4, rtol=1e-4)


if __name__ == "__main__":
    worker(Path(sys.argv[1]), sys.argv[2])
