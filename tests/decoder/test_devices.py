"""Masks and indices on another device than the data, and models split over two GPUs; no GPU is needed.

Fake tensors have shapes and devices but no values, and operands on different devices raise as on a GPU. What reads a
value raises too, so what an op hands to its backend is looked at where the torch version reads values. Whole models run
on tensors that have values, see `two_devices`.
"""

from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from families import RAGGED, batch, fresh, tiny
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode
from two_devices import on, split, values

import tokenprune
from tokenprune import ops
from tokenprune.errors import InputError
from tokenprune.ops import attention, decode, max_min, merging, top_k
from tokenprune.reduction import gather
from tokenprune.upstream.quantized_cache import PlanesLayer

HERE, THERE = torch.device("cuda:1"), torch.device("cuda:0")  # of the layer's states, of the embeddings


@pytest.fixture
def fake() -> Iterator[None]:
    with FakeTensorMode():
        yield


def states(*shape: int, device: torch.device = HERE) -> Tensor:
    return torch.empty(*shape, device=device)


def mask(*shape: int, device: torch.device = THERE) -> Tensor:
    return torch.ones(*shape, dtype=torch.bool, device=device)


def tensors(values: Any) -> list[Tensor]:
    return [value for value in values if isinstance(value, Tensor)]


@pytest.mark.usefixtures("fake")
def test_operands_on_two_devices_raise_here() -> None:
    with pytest.raises(RuntimeError, match="device"):
        states(3) + states(3, device=THERE)
    with pytest.raises(RuntimeError, match="device"):
        states(3).masked_fill(mask(3), 0)


# --- ops --------------------------------------------------------------------------------------------------------------


@pytest.mark.usefixtures("fake")
@pytest.mark.parametrize("reduction", ["column_sum", "last_query"])
@pytest.mark.parametrize("options", [{}, {"window": 3}, {"softcap": 2.0}], ids=str)
def test_importance_of_one_query_takes_valid_from_another_device(options: dict[str, Any], reduction: str) -> None:
    query, key = states(3, 4, 1, 8), states(3, 2, 9, 8)
    scores = ops.attention_importance(
        query, key, scale=1.0, valid=mask(3, 9), reduction=reduction, backend="torch", **options
    )
    assert (scores.device, scores.shape) == (HERE, (3, 9))


@pytest.mark.usefixtures("fake")
@pytest.mark.parametrize("reduction", ["column_sum", "last_query", "pagerank"])
@pytest.mark.parametrize("seen", [torch.bool, torch.float32], ids=str)
def test_importance_hands_its_backend_tensors_of_one_device(
    seen: torch.dtype, reduction: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    handed: list[Tensor] = []

    class Kernel:
        WIDEST = 256

        @staticmethod
        def launch(*arguments: Any, pagerank: bool) -> Tensor:
            handed.extend(tensors(arguments))
            return states(3, 9)

    monkeypatch.setattr(attention, "find_kernel", lambda *_: Kernel)
    query, key = states(3, 4, 9, 8), states(3, 2, 9, 8)
    bias = torch.zeros(1, 1, 9, 9, dtype=seen, device=THERE)
    scores = ops.attention_importance(query, key, scale=1.0, valid=mask(3, 9), seen=bias, reduction=reduction)
    assert [x.device for x in handed] == [HERE] * 5
    assert scores.device == HERE


@pytest.mark.usefixtures("fake")
def test_importance_of_queries_and_keys_on_two_devices_is_refused() -> None:
    query, key = states(3, 4, 9, 8), states(3, 2, 9, 8, device=THERE)
    with pytest.raises(InputError, match="on one device"):
        ops.attention_importance(query, key, scale=1.0)


@pytest.mark.usefixtures("fake")
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


@pytest.mark.usefixtures("fake")
def test_decode_attention_of_keys_on_another_device_is_refused() -> None:
    query, key = states(3, 4, 1, 8), states(3, 2, 9, 8, device=THERE)
    with pytest.raises(InputError, match=r"on cuda:1; got as key .* on cuda:0"):
        ops.decode_attention(query, key, key, scale=1.0)


# --- what takes an index ----------------------------------------------------------------------------------------------


@pytest.mark.usefixtures("fake")
@pytest.mark.parametrize("shape", [(3, 9, 8), (1, 9, 8)], ids=str)
@pytest.mark.parametrize("dim", [1, 2])
def test_gather_takes_an_index_from_another_device(dim: int, shape: tuple[int, ...]) -> None:
    x = states(*shape) if dim == 1 else states(5, *shape)
    taken = gather(x, torch.ones(3, 4, dtype=torch.int64, device=THERE), dim=dim)
    assert taken.device == HERE
    assert taken.shape[-3:] == (3, 4, 8)


def layer() -> Any:
    made = PlanesLayer()
    made.update(states(3, 2, 9, 8), states(3, 2, 9, 8))
    return made


@pytest.mark.usefixtures("fake")
@pytest.mark.parametrize(
    ("change", "n_rows", "n_tokens"),
    [
        (lambda x, index: x.take(index.expand(3, -1)), 3, 2),
        (lambda x, index: x.reorder_cache(index[0]), 2, 9),
        (lambda x, index: x.batch_select_indices(index[0]), 2, 9),
    ],
    ids=["take", "reorder", "select"],
)
def test_a_layer_in_planes_takes_an_index_from_another_device(
    change: Callable[[Any, Tensor], None], n_rows: int, n_tokens: int
) -> None:
    changed = layer()
    change(changed, torch.ones(1, 2, dtype=torch.int64, device=THERE))
    for planes in changed.planes():
        assert planes.shape == (n_rows, 2, n_tokens, 8)
        assert {x.device for x in (planes.high, planes.low, planes.scale)} == {HERE}


# --- whole models -----------------------------------------------------------------------------------------------------

TEXT = {"protect_text": False, "keep_first": 1, "keep_recent": 1}


def place(name: str) -> str:
    """The last two decoder layers of four, and what follows them, stand on the second device."""
    late = "language_model.layers.2" in name or "language_model.layers.3" in name
    return "cuda:1" if late or name == "lm_head" or name.endswith("language_model.norm") else "cuda:0"


def answers(model: Any, inputs: dict[str, Any]) -> tuple[Tensor, Tensor]:
    """Generated ids and logits."""
    options = {"max_new_tokens": 4, "do_sample": False, "output_logits": True, "return_dict_in_generate": True}
    found = model.generate(**inputs, **options)
    return values(found.sequences), torch.stack([values(step) for step in found.logits])


def test_operands_of_a_split_model_on_two_devices_raise() -> None:
    model = torch.nn.Sequential(torch.nn.Linear(3, 3), torch.nn.Linear(3, 3))
    x = torch.ones(2, 3)
    want = model(x).detach()
    with split(model, lambda name: "cuda:1" if name == "1" else "cuda:0"):
        there = model(on("cuda:0", x))
        with pytest.raises(RuntimeError, match="different devices"):
            there + on("cuda:0", x)
        with pytest.raises(RuntimeError, match="different devices"):
            there[on("cuda:0", torch.tensor([1]))]
        here = there.cpu()
    assert there.device == HERE
    assert torch.equal(here, want)


@pytest.mark.parametrize("implementation", ["sdpa", "eager"])
@pytest.mark.parametrize(
    ("method", "options"),
    [
        ("divprune", {"keep": 0.5}),
        ("fastv", {"keep": 0.5}),
        ("fastv", {"keep": 0.5, "layer": 3}),
        ("aim", {}),
        ("pyramiddrop", {}),
        ("spatten", {"tokens": 0.5}),
        ("spatten", {"tokens": 0.5, "interval": 1, **TEXT}),
        ("spatten", {"tokens": 0.5, "kv": "per_step", **TEXT}),
        ("spatten", {"heads": 0.5, "values": 0.5, "quantize": "4+4", "tokens": 0.5, "interval": 1, **TEXT}),
    ],
    ids=[
        "divprune",
        "fastv",
        "fastv-late",
        "aim",
        "pyramiddrop",
        "spatten",
        "spatten-text",
        "spatten-per-step",
        "spatten-everything",
    ],
)
def test_a_model_on_two_devices_answers_as_on_one(
    method: str, options: dict[str, Any], implementation: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    for module in (attention, decode, max_min, merging, top_k):  # A Triton kernel needs the GPU.
        monkeypatch.setattr(module, "find_kernel", lambda *_: None)
    inputs = batch("llava", RAGGED).inputs
    whole = tiny("llava", implementation)
    dense = answers(whole, fresh(inputs))
    tokenprune.patch(whole, method, **options)
    want = answers(whole, fresh(inputs))
    assert not torch.allclose(want[1], dense[1], atol=1e-2)
    with split(tiny("llava", implementation), place) as model:
        tokenprune.patch(model, method, **options)
        ids, logits = answers(model, on("cuda:0", fresh(inputs)))
    assert torch.equal(ids, want[0])
    torch.testing.assert_close(logits, want[1], atol=1e-4, rtol=1e-4)
