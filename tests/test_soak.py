"""Soak: a thousand generations, patched and patched again, paused and interrupted, and nothing piles up."""

import gc
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from families import EVEN, RAGGED, Batch, batch, generate, tiny
from test_state import hook_counts
from torch import Tensor, nn

import tokenprune
from tokenprune.specs import parse_methods

GENERATIONS, WARM = 1000, 200
TURN = 10
METHODS = (
    "divprune:keep=0.5",
    "aim",
    "fastv",
    "spatten",
    "pyramiddrop",
    "uniform+random:keep=2",
    "aim:merge=None",
    "divprune",
)
PROMPTS = (batch("llava", RAGGED), batch("llava", EVEN), batch("llava", RAGGED[:1]))


def resident_mib() -> float:
    pages = int(Path("/proc/self/statm").read_text().split()[1])
    return pages * 4096 / 2**20


def held() -> dict[str, float]:
    """What is alive now."""
    gc.collect()
    tensors = [one for one in gc.get_objects() if type(one) in (Tensor, nn.Parameter)]
    return {"blocks": sys.getallocatedblocks(), "tensors": len(tensors), "resident_mib": resident_mib()}


def interrupted(model: nn.Module, prompt: Batch) -> None:
    def fail(*_args: Any) -> None:
        raise RuntimeError("interrupted")

    handle = model.get_decoder().layers[2].register_forward_pre_hook(fail)
    with pytest.raises(RuntimeError, match="interrupted"):
        generate(model, prompt.inputs, 2)
    handle.remove()


def turn(model: nn.Module, number: int) -> None:
    """So many generations with one method."""
    session = tokenprune.patch(model, list(parse_methods(METHODS[number % len(METHODS)])))
    for step in range(TURN):
        prompt = PROMPTS[step % len(PROMPTS)]
        if step == 7:
            interrupted(model, prompt)
        elif step == 8:
            with session.pause():
                generate(model, prompt.inputs, 2)
        else:
            generate(model, prompt.inputs, 2)
    session.report().to_dict()


@pytest.mark.matrix
@pytest.mark.skipif(not Path("/proc/self/statm").exists(), reason="resident memory is read from /proc")
def test_a_thousand_generations_leave_memory_flat(capsys: pytest.CaptureFixture[str]) -> None:
    model = tiny("llava")
    wanted = generate(model, PROMPTS[0].inputs, 2)
    for number in range(WARM // TURN):
        turn(model, number)
    before = held()
    for number in range(WARM // TURN, GENERATIONS // TURN):
        turn(model, number)
    after = held()
    tokenprune.unpatch(model)
    with capsys.disabled():
        sys.stdout.write(f"\nsoak: after {WARM} generations {before}, after {GENERATIONS} {after}\n")
    grown = {name: after[name] - before[name] for name in before}
    # One object more in each generation would be 800 blocks; a tensor kept alive would be seen at once.
    assert grown["blocks"] < (GENERATIONS - WARM) / 2
    assert grown["tensors"] <= 8  # the session in force holds the traces of its last prompt
    assert grown["resident_mib"] < 16
    assert hook_counts(model) == {}
    assert all(map(torch.equal, generate(model, PROMPTS[0].inputs, 2).logits, wanted.logits))
