"""The KV cache in two planes against a cache that keeps everything and quantizes what is read, in `generate` too."""

import copy
import pickle
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from measuring import kv_mib
from transformers import DynamicCache, LlamaConfig, LlamaForCausalLM, StaticCache
from transformers.cache_utils import DynamicLayer
from upstream import cache_of, with_cache

from tokenprune import ops
from tokenprune.errors import InputError, UnsupportedModelError
from tokenprune.upstream import quantized_cache
from tokenprune.upstream.quantized_cache import PlanesLayer, use_planes

CONFIG = {
    "vocab_size": 97, "hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 2, "num_attention_heads": 4,
    "num_key_value_heads": 2, "max_position_embeddings": 256, "pad_token_id": 0, "bos_token_id": 1,
    "eos_token_id": None,
}  # fmt: skip


class Simulated(DynamicLayer):
    """Keeps everything as it came; tokens are rounded to 8 bits when they are read."""

    def update(self, key_states: torch.Tensor, value_states: torch.Tensor, *args: Any, **kwargs: Any) -> Any:
        return tuple(self.rounded(states) for states in super().update(key_states, value_states))

    def rounded(self, states: torch.Tensor) -> torch.Tensor:
        scale = states.abs().amax(-1, keepdim=True).clamp_min(1e-30) / 127
        return (states / scale).round() * scale


def simulated() -> DynamicCache:
    cache = DynamicCache()
    cache.layer_class_to_replicate = Simulated
    return cache


def in_planes(model: Any = None) -> DynamicCache:
    cache = DynamicCache() if model is None else DynamicCache(config=model.config)
    use_planes(cache)
    return cache


@pytest.fixture(scope="module")
def model() -> Any:
    torch.manual_seed(0)
    return LlamaForCausalLM(LlamaConfig(**CONFIG)).eval()


@pytest.fixture(scope="module")
def inputs() -> dict[str, torch.Tensor]:
    """Three rows, two of them padded on the left."""
    ids = torch.randint(2, 97, (3, 23), generator=torch.Generator().manual_seed(0))
    attention = (torch.arange(23) >= torch.tensor([[0], [5], [14]])).long()
    return {"input_ids": ids * attention, "attention_mask": attention}


def states(n: int, batch: int = 2, seed: int = 0) -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(batch, 2, n, 16, generator=generator), torch.randn(batch, 2, n, 16, generator=generator)


def filled(*lengths: int) -> tuple[Any, Any]:
    """A layer in planes and one that simulates it, with the same states."""
    layers = PlanesLayer(), Simulated()
    for seed, n in enumerate(lengths):
        for layer in layers:
            layer.update(*states(n, seed=seed))
    return layers


def read(layer: Any, rows: int = 2) -> list[torch.Tensor]:
    return list(layer.update(*states(1, batch=rows, seed=99)))


# --- in generate ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("beams", [1, 3])
def test_generate_is_that_of_a_simulation(model: Any, inputs: Any, beams: int) -> None:
    options = {"max_new_tokens": 12, "num_beams": beams, "do_sample": False, "output_scores": True}
    for cache in (in_planes(), in_planes(model)):
        got = model.generate(**inputs, **with_cache(cache), return_dict_in_generate=True, **options)
        want = model.generate(**inputs, **with_cache(simulated()), return_dict_in_generate=True, **options)
        assert cache_of(got) is cache
        assert all(type(layer) is PlanesLayer for layer in cache.layers)
        assert torch.equal(got.sequences, want.sequences)
        torch.testing.assert_close(torch.stack(got.scores), torch.stack(want.scores), atol=1e-5, rtol=1e-5)


def test_quantization_changes_the_logits_a_little(model: Any, inputs: Any) -> None:
    dense = model(**inputs).logits
    got = model(**inputs, **with_cache(in_planes())).logits
    assert not torch.equal(got, dense)
    torch.testing.assert_close(got, dense, atol=0.05, rtol=0.05)


def test_a_prompt_in_chunks_is_the_prompt_at_once(model: Any) -> None:
    ids = torch.arange(2, 32)[None]
    want = model(ids, **with_cache(in_planes())).logits[:, -1]
    cache = in_planes()
    for chunk in ids.split([11, 1, 18], dim=1):
        got = model(chunk, **with_cache(cache)).logits[:, -1]
    torch.testing.assert_close(got, want, atol=1e-5, rtol=1e-5)


def test_assisted_decoding_crops(model: Any) -> None:
    torch.manual_seed(1)
    assistant = LlamaForCausalLM(LlamaConfig(**CONFIG)).eval()
    ids = torch.arange(2, 22)[None]
    want = model.generate(ids, **with_cache(in_planes()), max_new_tokens=10, do_sample=False)
    got = model.generate(ids, **with_cache(in_planes()), max_new_tokens=10, do_sample=False, assistant_model=assistant)
    assert torch.equal(got, want)


def test_memory_falls(model: Any, inputs: Any) -> None:
    sizes = {}
    for name, cache in (("dense", DynamicCache()), ("planes", in_planes())):
        model(**inputs, **with_cache(cache))
        sizes[name] = kv_mib(cache) * 2**20
    vectors = 2 * 2 * 3 * 2 * 23  # Layers, keys and values, rows, heads, tokens.
    assert sizes["dense"] == vectors * 64
    assert sizes["planes"] == vectors * (16 + 4)


# --- the layer --------------------------------------------------------------------------------------------------------


def test_what_is_done_to_rows_is_done_to_all_that_is_stored() -> None:
    for name, argument, rows in (
        ("reorder_cache", torch.tensor([1, 1]), 2),
        ("batch_select_indices", torch.tensor([1]), 1),
        ("batch_repeat_interleave", 3, 6),
    ):
        layers = filled(9, 1, 4)
        for layer in layers:
            getattr(layer, name)(argument)
        torch.testing.assert_close(read(layers[0], rows), read(layers[1], rows))


@pytest.mark.parametrize("n", [0, 1, 3, 5, 14, 20])
def test_cropping_forgets_the_last_tokens(n: int) -> None:
    layer, _ = filled(9, 1, 4)
    before = [part.clone() for part in layer.update(*states(0))]
    layer.crop(-n)
    left = max(0, 14 - n)
    assert layer.get_seq_length() == left
    for part, want in zip(layer.update(*states(0)), before, strict=True):
        assert torch.equal(part, want[:, :, :left])


@pytest.mark.parametrize("n", [1, 8, 14, 20])
def test_a_positive_number_crops_what_it_crops_of_an_ordinary_layer(n: int) -> None:
    layer, plain = filled(9, 1, 4)
    try:
        plain.crop(n)
    except ValueError:
        with pytest.raises(ValueError, match="positive"):
            layer.crop(n)
    else:
        layer.crop(n)
    assert layer.get_seq_length() == plain.get_seq_length()


def test_resetting_forgets_everything() -> None:
    layer, _ = filled(9)
    layer.reset()
    assert layer.get_seq_length() == 0
    assert kv_mib(type("Cache", (), {"layers": [layer]})()) == 0
    again, want = layer.update(*states(5)), PlanesLayer().update(*states(5))
    assert torch.equal(again[0], want[0])


def test_taking_tokens() -> None:
    layer, _ = filled(9, 5)
    before = layer.update(*states(0))[0].clone()
    index = torch.tensor([[0, 4, 11, 12, 13], [2, 3, 11, 12, 13]])
    layer.take(index)
    assert torch.equal(layer.update(*states(0))[0], before.gather(2, index[:, None, :, None].expand(-1, 2, -1, 16)))
    layer.take(torch.tensor([[0, 4], [2, 3]]))
    assert layer.get_seq_length() == 2


def test_planes_are_those_of_all_tokens() -> None:
    layer = PlanesLayer()
    for part in zip(*(x.split([6, 1, 3], dim=2) for x in states(10)), strict=True):
        layer.update(*part)
    for planes, whole in zip(layer.planes(), states(10), strict=True):
        want = ops.quantize_planes(whole)
        assert torch.equal(planes.high, want.high)
        assert torch.equal(planes.low, want.low)
        assert torch.equal(planes.scale, want.scale)


def test_decode_attention_reads_the_planes(model: Any) -> None:
    layer, _ = filled(20)
    query = torch.randn(2, 4, 1, 16, generator=torch.Generator().manual_seed(5))
    got = ops.decode_attention(query, *layer.planes(), scale=0.25)
    want = torch.nn.functional.scaled_dot_product_attention(
        query, *layer.update(*states(0)), scale=0.25, enable_gqa=True
    )
    torch.testing.assert_close(got.output, want, atol=1e-5, rtol=1e-5)


def test_copies_and_pickles_go_on() -> None:
    cache = in_planes()
    cache.update(*states(7), 0)
    for other in (copy.deepcopy(cache), pickle.loads(pickle.dumps(cache))):
        other.update(*states(3, seed=1), 1)
        assert type(other.layers[1]) is PlanesLayer
        assert torch.equal(other.update(*states(1), 0)[0], copy.deepcopy(cache).update(*states(1), 0)[0])


def test_offloaded_layers_come_back() -> None:
    layer, other = filled(9)
    layer.offload()
    layer.prefetch()
    torch.testing.assert_close(read(layer), read(other))


# --- what is refused --------------------------------------------------------------------------------------------------


def test_caches_that_cannot_are_refused(model: Any) -> None:
    full = DynamicCache()
    full.update(*states(3), 0)
    for cache in (StaticCache(config=model.config, max_cache_len=20), full, object()):
        with pytest.raises(UnsupportedModelError):
            use_planes(cache)
    assert type(full.layers[0]) is DynamicLayer


@pytest.mark.parametrize("configured", [False, True])
def test_a_cache_that_was_emptied_is_one_to_start_with(model: Any, configured: bool) -> None:
    cache = in_planes(model if configured else None)
    use_planes(cache)  # It has kept nothing yet.
    for empty in (cache.reset, lambda: cache.crop(-9)):
        for i in range(2):
            cache.update(*states(9), i)
        with pytest.raises(UnsupportedModelError, match="holds 9 tokens already"):
            use_planes(cache)
        empty()
        use_planes(cache)
        assert [type(layer) for layer in cache.layers] == [PlanesLayer] * 2


def test_an_odd_width_is_refused() -> None:
    with pytest.raises(InputError, match="even K"):
        PlanesLayer().update(torch.ones(1, 1, 2, 7), torch.ones(1, 1, 2, 7))


def test_importing_the_module_imports_no_transformers() -> None:
    code = "import sys, tokenprune.upstream.quantized_cache; sys.exit('transformers' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], cwd=Path(__file__).parent).returncode == 0
    with pytest.raises(AttributeError, match="no attribute 'Nothing'"):
        quantized_cache.Nothing  # noqa: B018
