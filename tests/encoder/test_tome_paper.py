"""ToMe over whole encoders, from pixels to answer, against the paper written out (`vits.merged`): which tokens are
compared in a block depends on the order that the block before it left them in."""

from typing import Any

import pytest
import torch
from test_vit import First, removed
from torch import Tensor, nn
from vits import DEPTH, NAMES, PREFIX, Row, answer, attend, blocks_of, inputs, merge, merged, plain_blocks, run, tiny

import tokenprune
from tokenprune import ToMe

# With 1 to 5 tokens before the patches, blocks get odd and even counts; some remove half of the patches, by a larger r.
SCHEDULES: dict[int, tuple[list[int], ...]] = {16: ([3] * DEPTH, [3, 8, 2, 0]), 9: ([2, 0, 3, 1], [1, 6, 0, 1])}
CASES = [(n_patches, r) for n_patches, schedules in SCHEDULES.items() for r in schedules]


def to_double(given: dict[str, Any]) -> dict[str, Any]:
    return {key: value.double() if value.is_floating_point() else value for key, value in given.items()}


def plain_rows(name: str, model: nn.Module, given: dict[str, Any], *how: Any) -> list[list[Row]]:
    """Every row of the images after every block of an unpatched encoder, told `how` to merge."""
    got: list[Tensor] = []
    handle = blocks_of(model)[0].register_forward_pre_hook(lambda module, args: got.append(args[0]))
    run(model, given)
    handle.remove()
    return merged(name, model, given, got[0], *how)


def answer_of(model: nn.Module, given: dict[str, Any], rows: list[list[Row]]) -> Tensor:
    """What an unpatched encoder makes of rows behind its last block."""

    def replace(module: nn.Module, args: Any, output: Any) -> Any:
        x = torch.stack([row[-1].spread() for row in rows])
        return (x, *output[1:]) if isinstance(output, tuple) else x

    handle = blocks_of(model)[-1].register_forward_hook(replace)
    found = answer(run(model, given))
    handle.remove()
    return found


def apart(found: Tensor, wanted: Tensor) -> float:
    return float((found - wanted).abs().max() / wanted.abs().max())


@pytest.mark.parametrize("proportional", [True, False])
@pytest.mark.parametrize(("n_patches", "r"), CASES)
@pytest.mark.parametrize("name", NAMES)
def test_the_whole_encoder_is_the_paper(name: str, n_patches: int, r: list[int], proportional: bool) -> None:
    model, given = tiny(name, n_patches).double(), to_double(inputs(name, n_patches))
    told = removed(r, n_patches), proportional
    paper, spatial = (plain_rows(name, model, given, *told, order) for order in ("paper", "spatial"))
    wanted, other = answer_of(model, given, paper), answer_of(model, given, spatial)
    session = tokenprune.patch(model, ToMe(r=r, proportional=proportional))
    assert apart(answer(run(model, given)), wanted) <= 1e-5
    for trace, rows in zip(session.traces, zip(*paper, strict=True), strict=True):
        assert trace.n_out == tuple(len(row.x) - PREFIX.get(name, 1) for row in rows)
    assert apart(other, wanted) > 1e-3
    single, images = tiny(name, n_patches), inputs(name, n_patches)
    tokenprune.patch(single, ToMe(r=r, proportional=proportional))
    assert apart(answer(run(single, images)), wanted) <= 1e-4


def test_tokens_that_are_alike_merge_in_the_order_of_the_paper() -> None:
    name = "timm siglip"
    model, given = tiny(name).double(), to_double(inputs(name, n_rows=1))
    given["x"][:] = given["x"][:, :, :8, :8].repeat(1, 1, 4, 4)
    model.pos_embed.data.zero_()
    session = tokenprune.patch(model, "tome", r=3)
    run(model, given)
    tokenprune.unpatch(model)
    rows = plain_rows(name, model, given, [3] * DEPTH)[0]
    for trace, row in zip(session.traces, rows, strict=True):
        groups = [{i for i, one in enumerate(trace.assignment[0].tolist()) if one == at} for at in range(len(row.x))]
        assert groups == row.in_place().groups


@torch.no_grad()
def test_what_another_method_drops_is_gone_from_the_order_too() -> None:
    name = "timm vit"
    model, given = tiny(name).double(), to_double(inputs(name, n_rows=1))
    got: list[Tensor] = []
    handle = model.blocks[0].register_forward_pre_hook(lambda module, args: got.append(args[0][0]))
    run(model, given)
    handle.remove()
    (x,) = got
    sizes, places, groups = [1.0] * len(x), list(range(len(x))), [{i} for i in range(len(x))]
    for plain, r, n_kept in zip(plain_blocks(name, model, given), (3, 2, 3, 1), (11, 7, 2, 1), strict=True):
        added, metric = attend(plain, x, sizes, places, 1)
        x, sizes, places, groups = merge(x + added, metric, sizes, places, groups, r, 1)
        last = sorted(places)[n_kept]
        kept = [i for i, place in enumerate(places) if place <= last]
        x, sizes, places, groups = x[kept], *([some[i] for i in kept] for some in (sizes, places, groups))
        x = x + plain.mlp(plain.norm2(x))
    session = tokenprune.patch(model, [ToMe(r=[3, 2, 3, 1]), First(keep=9)])
    assert (run(model, given)[0] - model.head(model.norm(x[0]))).abs().max() <= 1e-5
    assert [trace.n_out for trace in session.traces[1::2]] == [(11,), (7,), (2,), (1,)]
