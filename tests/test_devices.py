"""Masks and indices on another device than the data, as a model split over two GPUs has them; no GPU is needed.

Fake tensors have shapes and devices but no values, and operands on different devices raise as on a GPU. What reads a
value raises too, so what an op hands to its backend is looked at where the torch version reads values.
"""

from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode

from tokenprune import ops
from tokenprune.errors import InputError
from tokenprune.ops import attention
from tokenprune.reduction import gather
from tokenprune.upstream.quantized_cache import PlanesLayer

HERE, THERE = torch.device("cuda:1"), torch.device("cuda:0")  # of the layer's states, of the embeddings


@pytest.fixture(autouse=True)
def fake() -> Iterator[None]:
    with FakeTensorMode():
        yield


def states(*shape: int, device: torch.device = HERE) -> Tensor:
    return torch.empty(*shape, device=device)


def mask(*shape: int, device: torch.device = THERE) -> Tensor:
    return torch.ones(*shape, dtype=torch.bool, device=device)


def tensors(values: Any) -> list[Tensor]:
    return [value for value in values if isinstance(value, Tensor)]


def test_operands_on_two_devices_raise_here() -> None:
    with pytest.raises(RuntimeError, match="device"):
        states(3) + states(3, device=THERE)
    with pytest.raises(RuntimeError, match="device"):
        states(3).masked_fill(mask(3), 0)


# --- ops --------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("reduction", ["column_sum", "last_query"])
@pytest.mark.parametrize("options", [{}, {"window": 3}, {"softcap": 2.0}], ids=str)
def test_importance_of_one_query_takes_valid_from_another_device(options: dict[str, Any], reduction: str) -> None:
    query, key = states(3, 4, 1, 8), states(3, 2, 9, 8)
    scores = ops.attention_importance(
        query, key, scale=1.0, valid=mask(3, 9), reduction=reduction, backend="torch", **options
    )
    assert (scores.device, scores.shape) == (HERE, (3, 9))


@pytest.mark.parametrize("reduction", ["column_sum", "last_query", "pagerank"])
@pytest.mark.parametrize("seen", [torch.bool, torch.float32], ids=str)
def test_importance_hands_its_backend_tensors_of_one_device(
    seen: torch.dtype, reduction: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    handed: list[Tensor] = []

    class Kernel:
        WIDEST = 256

        @staticmethod
        def launch(*arguments: Any) -> Tensor:
            handed.extend(tensors(arguments))
            return states(3, 9)

    monkeypatch.setattr(attention, "find_kernel", lambda *_: Kernel)
    query, key = states(3, 4, 9, 8), states(3, 2, 9, 8)
    bias = torch.zeros(1, 1, 9, 9, dtype=seen, device=THERE)
    scores = ops.attention_importance(query, key, scale=1.0, valid=mask(3, 9), seen=bias, reduction=reduction)
    assert [x.device for x in handed] == [HERE] * 4
    assert scores.device == HERE


def test_importance_of_queries_and_keys_on_two_devices_is_refused() -> None:
    query, key = states(3, 4, 9, 8), states(3, 2, 9, 8, device=THERE)
    with pytest.raises(InputError, match="on one device"):
        ops.attention_importance(query, key, scale=1.0)


@pytest.mark.parametrize("planes", [False, True])
@pytest.mark.parametrize("valid", [(3, 9), (3, 2, 9)], ids=str)
@pytest.mark.parametrize("heads", [(4,), (3, 4)], ids=str)
def test_decode_attention_takes_masks_from_another_device(
    heads: tuple[int, ...], valid: tuple[int, ...], planes: bool
) -> None:
    query, key = states(3, 4, 1, 8), states(3, 2, 9, 8)
    stored: Any = ops.quantize_planes(key) if planes else key
    found = ops.decode_attention(
        query, stored, stored, scale=1.0, valid=mask(*valid), heads=mask(*heads),
        n_values=torch.ones(3, dtype=torch.int64, device=THERE), threshold=0.1 if planes else None, softcap=2.0,
        backend="torch",
    )  # fmt: skip
    assert {x.device for x in found} == {HERE}
    assert found.output.shape == query.shape


def test_decode_attention_of_keys_on_another_device_is_refused() -> None:
    query, key = states(3, 4, 1, 8), states(3, 2, 9, 8, device=THERE)
    with pytest.raises(InputError, match="on cuda:1; got as key .* on cuda:0"):
        ops.decode_attention(query, key, key, scale=1.0)


# --- what takes an index ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("shape", [(3, 9, 8), (1, 9, 8)], ids=str)
@pytest.mark.parametrize("dim", [1, 2])
def test_gather_takes_an_index_from_another_device(dim: int, shape: tuple[int, ...]) -> None:
    x = states(*shape) if dim == 1 else states(5, *shape)
    taken = gather(x, torch.ones(3, 4, dtype=torch.int64, device=THERE), dim=dim)
    assert taken.device == HERE
    assert taken.shape[-3:] == (3, 4, 8)


def layer(*, residual: int) -> Any:
    made = PlanesLayer(residual=residual)
    made.update(states(3, 2, 9, 8), states(3, 2, 9, 8))
    return made


@pytest.mark.parametrize(
    ("residual", "change", "n_rows", "n_tokens"),
    [
        (0, lambda x, index: x.take(index.expand(3, -1)), 3, 2),
        (5, lambda x, index: x.take(index.expand(3, -1)), 3, 2),
        (5, lambda x, index: x.reorder_cache(index[0]), 2, 9),
        (5, lambda x, index: x.batch_select_indices(index[0]), 2, 9),
    ],
    ids=["take", "take-newest", "reorder", "select"],
)
def test_a_layer_in_planes_takes_an_index_from_another_device(
    residual: int, change: Callable[[Any, Tensor], None], n_rows: int, n_tokens: int
) -> None:
    changed = layer(residual=residual)
    change(changed, torch.ones(1, 2, dtype=torch.int64, device=THERE))
    for planes in changed.planes():
        assert planes.shape == (n_rows, 2, n_tokens, 8)
        assert {x.device for x in (planes.high, planes.low, planes.scale)} == {HERE}
