"""Models inside of wrappers that people put around them, before or after patching."""

from collections.abc import Iterator
from typing import Any

import pytest
import torch
import torch.distributed as dist
from families import batch, fresh, tiny
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.nn.parallel import DistributedDataParallel

import tokenprune


@pytest.fixture
def alone() -> Iterator[None]:
    """A process group of this process."""
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    yield
    dist.destroy_process_group()


class Pipeline:
    """What holds a model beside its processor and is no module."""

    def __init__(self, model: nn.Module) -> None:
        self.model = model


def logits(model: Any) -> torch.Tensor:
    with torch.no_grad():
        found: torch.Tensor = model(**fresh(batch("llava").inputs)).logits
    return found


@pytest.mark.parametrize("wrap", [nn.DataParallel, DistributedDataParallel, Pipeline])
def test_the_model_inside_of_a_wrapper_is_patched(wrap: Any, alone: None) -> None:
    plain = tiny("llava")
    dense = logits(plain)
    tokenprune.patch(plain, "divprune", keep=0.5)
    wanted = logits(plain)
    assert not torch.equal(wanted, dense)
    model = tiny("llava")
    wrapped = wrap(model)
    session = tokenprune.patch(wrapped, "divprune", keep=0.5)
    assert session.model is model
    assert torch.equal(logits(model if wrap is Pipeline else wrapped), wanted)
    assert session.traces[-1].n_out == (8, 6, 4)
    tokenprune.unpatch(wrapped)
    assert torch.equal(logits(model), dense)


@pytest.mark.parametrize("first", ["patch", "shard"])
def test_methods_inside_the_decoder_act_in_a_fully_sharded_model(first: str, alone: None) -> None:
    plain = tiny("llava")
    tokenprune.patch(plain, "fastv", layer=1)
    wanted = logits(plain)
    model = tiny("llava")
    mesh = init_device_mesh("cpu", (1,))
    if first == "patch":
        session = tokenprune.patch(model, "fastv", layer=1)
    for layer in model.get_decoder().layers:
        fully_shard(layer, mesh=mesh)
    fully_shard(model, mesh=mesh)
    if first == "shard":
        session = tokenprune.patch(model, "fastv", layer=1)
    torch.testing.assert_close(logits(model), wanted, atol=1e-5, rtol=1e-5)
    assert session.traces[-1].status == "applied"
