"""Soak: a thousand generations, patched and patched again, paused and interrupted, and nothing piles up; random
sequences of calls, each of them right or refused (`tests/helpers/soak.py` runs any number of these)."""

import gc
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from families import EVEN, RAGGED, Batch, batch, generate, tiny
from soak import Soak, soak
from soak_calls import FAMILIES, known_hybrid
from states import hook_counts
from torch import Tensor, nn
from transformers import DynamicCache, StaticCache
from upstream import with_cache

import tokenprune
from tokenprune import AIM, FastV, SpAtten
from tokenprune.decoder import masks, pruned_cache
from tokenprune.parsing import parse_methods
from tokenprune.upstream.facts import DecoderFacts

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


# --- sequences of calls -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("seeds", [range(8), pytest.param(range(8, 58), marks=pytest.mark.matrix)], ids=str)
def test_random_sequences_of_calls_are_right_or_refused(seeds: range, capsys: pytest.CaptureFixture[str]) -> None:
    wrong, taken = soak(seeds)
    with capsys.disabled():
        sys.stdout.write(f"\nsoak: seeds {seeds.start} to {seeds.stop - 1}: {dict(taken)}\n")
    assert not wrong, "\n".join(wrong)
    assert taken.total() >= 4 * len(seeds)


def sequence(family: str, *methods: tokenprune.Method, static: bool = False) -> None:
    """A prompt of ragged rows, some of them again in another order, text, new images, and text."""
    with known_hybrid():
        one = Soak(FAMILIES.index(family))
        one.session = tokenprune.patch(one.model, list(methods))
        try:
            talk = one.talk = one.prompt(3)
            kinds = {True: StaticCache, False: DynamicCache}
            talk.cache = kinds[static](config=one.model.config, **({"max_cache_len": 160} if static else {}))
            with one.watched(talk):
                one.generate(talk, 0, 3, **with_cache(talk.cache))
            talk.cache.reorder_cache(torch.tensor([2, 0, 1]))
            one.talk = talk.take([2, 0, 1])
            one.talk.cache = talk.cache
            for rows in ([[4]] * 3, [[2, (3, 4), 2]] * 3, [[1]] * 3):
                one.turn(rows, 2)
        finally:
            tokenprune.unpatch(one.model)


HEADS = SpAtten(tokens=1.0, heads=(1.0, 0.75, 0.5, 0.25))
FOUND: dict[str, Callable[[], None]] = {
    "rows in another order": lambda: sequence("llava", FastV(layer=1)),
    "merged tokens in steps with fewer heads": lambda: sequence("gemma3", AIM(prune=None, size_bias=True), HEADS),
    "a static cache of recurrent layers behind padding": lambda: sequence("qwen3_5", FastV(layer=3), static=True),
}
NEVER = property(lambda _: False, lambda *_: None)
FAULTS: dict[str, tuple[Any, ...]] = {
    "rows in another order": (pruned_cache.Ledger, "take_rows", lambda *_: None),
    "merged tokens in steps with fewer heads": (masks, "_biased", lambda block, *_: block),
    "a static cache of recurrent layers behind padding": (DecoderFacts, "recurrent", NEVER, False),
}


@pytest.mark.parametrize("name", FOUND)
def test_what_was_found_stays_right(name: str) -> None:
    FOUND[name]()


@pytest.mark.parametrize("name", FAULTS)
def test_a_fault_is_found(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(*FAULTS[name])
    with pytest.raises(AssertionError, match=r"logits are|a cache"):
        FOUND[name]()
