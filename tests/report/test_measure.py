"""The instruments: what they count is exact, what they time is only checked for order and shape."""

import importlib.util
import json
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path

import pytest
import torch
from families import batch, fresh, tiny
from measuring import Timing, alternate, flops_g, kv_mib, peak_mib
from torch import Tensor, nn
from torch.nn.functional import scaled_dot_product_attention
from transformers import DynamicCache, EncoderDecoderCache, StaticCache
from upstream import FEATURES, with_cache, with_features

from tokenprune.errors import OptionError
from tokenprune.report.generation import inspect_generation, time_generation
from tokenprune.report.measure import (
    MIB,
    Meter,
    in_turn,
    watch_memory,
)


def test_sides_take_turns_in_their_contexts_and_every_other_round_runs_backwards() -> None:
    said: list[str] = []

    @contextmanager
    def around(name: str) -> Iterator[None]:
        said.append(name)
        yield
        said.append("left")

    sides = {name: partial(around, name) for name in "ab"}
    found = in_turn(sides, lambda name: said.append(name.upper()) or len(said), repeats=3, label="turns")
    assert "".join(name for name in said if name != "left") == "aAbBbBaAaAbB"
    assert said[:3] == ["a", "A", "left"]
    assert found == {"a": [2, 11, 14], "b": [5, 8, 17]}


@pytest.mark.parametrize("repeats", [0, -1])
def test_nothing_is_measured_without_a_repeat(repeats: int) -> None:
    with pytest.raises(OptionError, match="at least 1"):
        alternate({"call": lambda: None}, repeats=repeats)


def test_alternating_calls_are_warmed_up_and_sampled_in_turn() -> None:
    calls: list[str] = []
    times = alternate({"a": lambda: calls.append("a"), "b": lambda: calls.append("b")}, repeats=2, warmup=1)
    assert calls == ["a", "b", "a", "b", "b", "a"]
    assert [len(time.samples) for time in times.values()] == [2, 2]
    assert all(sample >= 0 for time in times.values() for sample in time.samples)


def test_a_timing_has_quantiles_and_ratios_by_round() -> None:
    time = Timing((4.0, 1.0, 2.0, 3.0, 5.0))
    assert time.median == 3.0
    assert [time.quantile(fraction) for fraction in (0.0, 0.25, 1.0)] == [1.0, 2.0, 5.0]
    assert Timing((2.0, 9.0)).over(Timing((1.0, 3.0))).samples == (2.0, 3.0)


@pytest.mark.parametrize("grad", [torch.no_grad, torch.inference_mode, torch.enable_grad])
def test_flops_of_a_linear_layer_are_counted_in_every_mode(grad: type) -> None:
    layer = nn.Linear(8, 16)
    with grad():
        assert flops_g(lambda: layer(torch.zeros(3, 5, 8))) == 2 * 15 * 8 * 16 / 1e9


@pytest.mark.parametrize("mask", [None, torch.ones(7, 9, dtype=torch.bool)], ids=["plain", "masked"])
@pytest.mark.parametrize("heads", [4, 2], ids=["all-heads", "grouped"])
def test_attention_counts_as_the_full_rectangle_whatever_kernel_runs(mask: Tensor | None, heads: int) -> None:
    query, key, value = torch.randn(2, 4, 7, 8), torch.randn(2, heads, 9, 8), torch.randn(2, heads, 9, 8)
    counted = flops_g(lambda: scaled_dot_product_attention(query, key, value, mask, enable_gqa=heads != 4))
    assert counted == 2 * 2 * 4 * 7 * 9 * (8 + 8) / 1e9


def test_fused_and_eager_attention_count_the_same() -> None:
    inputs = batch("llava").inputs
    models = [tiny("llava", implementation) for implementation in ("sdpa", "eager")]
    rotary = 2 * 3 * 4 * 2 * 3 * 4  # room for the rotary frequencies, a product with one summand
    counted = [flops_g(lambda model=model: model(**fresh(inputs))) for model in models]
    assert counted[0] == pytest.approx(counted[1], abs=rotary / 1e9)


def test_peak_follows_what_is_alive_and_not_what_was_there_before() -> None:
    before = torch.zeros(2**18)

    def call() -> Tensor:
        first = before + 1  # 1 MiB
        second = first + 1  # 2 MiB
        del first  # 1 MiB
        third = torch.empty(3 * 2**18)  # 4 MiB
        before.view(2, -1).add_(1)
        del second
        return third.view(3, -1)[1:]

    assert peak_mib(call) == 4.0
    with Meter() as meter:
        result = call()
        assert (meter.live, meter.peak) == (3 * MIB, 4 * MIB)
        del result
        assert meter.live == 0


@pytest.mark.skipif(sys.platform != "linux", reason="Linux tells the resident memory of a process")
def test_resident_peak_counts_what_was_held_meanwhile_and_forgets_what_was_before() -> None:
    torch.ones(100 << 18)  # 100 MiB
    read = watch_memory([torch.device("cpu")], Meter())
    before = read()
    torch.ones(40 << 18)
    after = read()
    assert 30 <= after["resident_peak_mib"] - before["resident_peak_mib"] <= 60
    assert watch_memory([torch.device("meta")], Meter())().keys() == {"peak_mib"}


def _filled(cache: DynamicCache, n_layers: int, n_tokens: int) -> DynamicCache:
    for layer in range(n_layers):
        cache.update(torch.zeros(2, 3, n_tokens, 8), torch.zeros(2, 3, n_tokens, 8), layer)
    return cache


def test_kv_bytes_are_those_of_the_storages() -> None:
    cache = _filled(DynamicCache(), n_layers=4, n_tokens=5)
    expected = 2 * 4 * 2 * 3 * 5 * 8 * 4 / MIB
    assert kv_mib(cache) == expected
    assert kv_mib(EncoderDecoderCache(cache, _filled(DynamicCache(), n_layers=4, n_tokens=10))) == 3 * expected
    assert kv_mib(DynamicCache()) == 0.0
    cache.layers[0].keys = cache.layers[0].keys[:, :, 1:]  # a view frees nothing
    assert kv_mib(cache) == expected


def test_a_static_cache_counts_with_its_full_length() -> None:
    model = tiny("llava")
    cache = StaticCache(config=model.config, max_cache_len=64)
    inputs = batch("llava").inputs
    with torch.no_grad():
        model(**fresh(inputs), **with_cache(cache))
    assert kv_mib(cache) == 2 * 4 * 3 * 2 * 64 * 8 * 4 / MIB


def test_generation_is_taken_apart_and_leaves_no_hook() -> None:
    model, inputs = tiny("llava"), batch("llava").inputs
    times = time_generation(model, inputs, max_new_tokens=3)
    stages = ("encoder", "prefill", "first_token", "decode", "total")
    assert list(times) == [f"{stage}_latency_ms" for stage in stages]
    encoder_ms, prefill_ms, first_token_ms, decode_ms, total_ms = times.values()
    assert 0 < encoder_ms + prefill_ms <= first_token_ms <= total_ms
    assert first_token_ms + 2 * decode_ms <= total_ms
    assert "decode_latency_ms" not in time_generation(model, inputs, max_new_tokens=1)
    assert not any(module._forward_hooks or module._forward_pre_hooks for module in model.modules())


def test_the_end_of_a_sequence_does_not_stop_a_measured_generation() -> None:
    model, inputs = tiny("llava"), batch("llava").inputs
    ids = inspect_generation(model, inputs, max_new_tokens=4).new_ids
    model.generation_config.eos_token_id = sorted(set(ids.flatten().tolist()))
    assert torch.equal(inspect_generation(model, inputs, max_new_tokens=4).new_ids, ids)


def test_inspection_agrees_with_a_forward_and_with_the_cache_it_left() -> None:
    model, inputs = tiny("llava"), batch("llava").inputs
    seen = inspect_generation(model, inputs, max_new_tokens=3)
    with torch.no_grad():
        expected = model(**fresh(inputs), use_cache=False)
    torch.testing.assert_close(seen.first_logits, expected.logits[:, -1])
    assert torch.equal(seen.new_ids[:, 0], expected.logits[:, -1].argmax(-1))
    length = inputs["input_ids"].shape[1] + 2
    kv_mib = seen.amounts["kv_mib"]
    assert kv_mib == 2 * 4 * 3 * 2 * length * 8 * 4 / MIB
    assert seen.amounts["peak_mib"] > kv_mib
    stages = ("encoder", "selection", "prefill", "head", "first_token", "decode", "total")
    assert [name for name in seen.amounts if "flops" in name] == [f"{stage}_flops_g" for stage in stages]
    assert seen.layer_tokens == (length - 2,) * 4
    assert seen.layer_kv_mib == (kv_mib / 4,) * 4


def test_inputs_are_not_written_to() -> None:
    model, inputs = tiny("llava"), batch("llava").inputs
    pixels = {
        "input_ids": torch.tensor([[5, *[100] * 16, 6]]),
        "pixel_values": torch.randn(1, 3, 32, 32),
        **with_features(),
    }
    for given in (inputs, pixels):
        keys, outputs = list(given), dict(given[FEATURES])
        inspect_generation(model, given, max_new_tokens=2)
        assert list(given) == keys
        assert given[FEATURES].keys() == outputs.keys()


def test_collected_rows_name_versions_and_commit_but_no_host() -> None:
    path = Path(__file__).parents[2] / "bench" / "collect.py"
    spec = importlib.util.spec_from_file_location("collect", path)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    run = {
        "datetime": "2026-01-02T03:04:05.678+00:00",
        "commit_info": {"id": "abc", "dirty": False, "project": "host", "branch": "main"},
        "machine_info": {"cpu": "a processor", "torch": "2"},
        "benchmarks": [
            {"fullname": "bench/test_one.py::test_a[1]", "name": "test_a[1]", "extra_info": {"rows": [{"ratio": 2.0}]}},
            {"fullname": "bench/test_two.py::test_b", "name": "test_b", "extra_info": {"rows": [{"ratio": 3.0}]}},
        ],
    }
    collected = module.collect(run)
    assert [collected[name]["rows"] for name in ("one", "two")] == [
        [{"bench": "test_a[1]", "ratio": 2.0}],
        [{"bench": "test_b", "ratio": 3.0}],
    ]
    assert collected["one"]["commit"] == "abc"
    assert collected["one"]["machine"]["cpu"] == "a processor"
    assert collected["one"]["date"] == "2026-01-02T03:04:05Z"
    assert "host" not in json.dumps(collected)
    assert [row["ratio"] for row in module.collect(run, run)["one"]["rows"]] == [2.0, 2.0]
