"""Vision encoders: ToMe against the paper written out (`vits.py`), halves of blocks, and the laws of state."""

from typing import Any

import pytest
import torch
from torch import Tensor, nn
from vits import AT_END, DEPTH, NAMES, PREFIX, blocks_of, inputs, merged, run, tiny

import tokenprune

HALVED = tuple(name for name in NAMES if name not in AT_END)
SCHEDULES = {16: 3, 9: [2, 0, 3, 1]}


class Watch:
    """What every block got and returned in the last forward, seen by hooks that stand behind those of the library."""

    def __init__(self, model: nn.Module) -> None:
        self.got: dict[int, Tensor] = {}
        self.gave: dict[int, Tensor] = {}
        for number, block in enumerate(blocks_of(model)):
            block.register_forward_hook(lambda module, args, output, at=number: self._note(at, args, output))

    def _note(self, number: int, args: Any, output: Any) -> None:
        self.got[number], self.gave[number] = args[0], output[0] if isinstance(output, tuple) else output


def removed(r: Any, n_patches: int) -> list[int]:
    found = []
    for one in r if isinstance(r, list) else [r] * DEPTH:
        found.append(min(one, n_patches // 2))
        n_patches -= found[-1]
    return found


@pytest.mark.parametrize("n_patches", [16, 9])
@pytest.mark.parametrize("name", HALVED)
def test_tome_is_the_paper_written_out(name, n_patches):
    model, given, r = tiny(name, n_patches), inputs(name, n_patches), SCHEDULES[n_patches]
    session = tokenprune.patch(model, "tome", r=r)
    watch = Watch(model)
    run(model, given)
    rows = merged(name, model, given, watch.got[0], removed(r, n_patches))
    prefix = PREFIX.get(name, 1)
    for layer in range(DEPTH):
        wanted = torch.stack([row[layer].spread() for row in rows])
        assert watch.gave[layer].shape == wanted.shape
        assert (watch.gave[layer] - wanted).abs().max() <= 1e-5 * max(1, float(wanted.abs().max()))
        trace = session.traces[layer]
        if not removed(r, n_patches)[layer]:
            assert trace.status == "skipped"
            continue
        assert trace.place == "between attention and MLP"
        assert trace.n_out == tuple(len(row[layer].x) - prefix for row in rows)
        for found, row in zip(trace.assignment, rows, strict=True):
            groups = [{i for i in range(n_patches) if found[i] == group} for group in range(trace.n_out[0])]
            assert groups == [{i - prefix for i in group} for group in row[layer].groups[prefix:]]
