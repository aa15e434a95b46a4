"""Reports: what they say is exact, what they time is never asserted, and they leave nothing behind."""

import copy
import json
import re
from collections.abc import Iterator
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, replace
from typing import Any

import pytest
import torch
from families import RAGGED, batch, fresh, tiny
from torch import nn

import tokenprune
from tokenprune import report
from tokenprune.comparison import Cost, drift
from tokenprune.errors import OptionError, UnsupportedModelError
from tokenprune.generation import inspect_generation
from tokenprune.measure import MIB
from tokenprune.signals import Trace

ROWS = ((3, (8, 8), 4), (2, (8, 8), 5))
NEW_TOKENS = 4


@dataclass
class Fake:
    """A session without a library behind it."""

    model: Any
    traces: tuple[Trace, ...] = ()
    methods: tuple[Any, ...] = (tokenprune.DivPrune(keep=0.25),)
    installed: bool = True

    def pause(self) -> AbstractContextManager[None]:
        return nullcontext()


@pytest.fixture(scope="module")
def measured() -> Iterator[tuple[nn.Module, Any, Any]]:
    """A patched model, its session and a measured report."""
    model = tiny("llava")
    with tokenprune.patch(model, "divprune", keep=0.25) as session:
        yield model, session, session.report(batch("llava", ROWS).inputs, max_new_tokens=NEW_TOKENS, repeats=2)


def test_without_a_forward_the_report_says_so() -> None:
    model = tiny("llava")
    with tokenprune.patch(model, "divprune", keep=0.25) as session:
        for text in (str(session.report()), session.report().to_markdown(), session.report()._repr_html_()):
            assert "No forward with a prompt has run" in text
            assert "DivPrune(keep=0.25)" in text


def test_the_last_forward_is_reported_row_by_row() -> None:
    model = tiny("llava")
    with tokenprune.patch(model, "divprune", keep=0.5) as session, torch.no_grad():
        model(**fresh(batch("llava", RAGGED).inputs))
        result = session.report()
    (site,) = result.sites
    assert (site.site, site.layer, site.method, site.status) == ("before_llm", None, "divprune", "applied")
    assert (site.n_in, site.n_out) == ((16, 12, 8), (8, 6, 4))
    assert site.images == ((12, 4), (12,), (4, 4))
    assert site.radius is not None
    assert [len(row) for row in site.radius] == [2, 1, 2]
    assert result.costs == ()
    lines = [line.split() for line in str(result).splitlines() if line.startswith("before_llm")]
    assert [line[4:8] for line in lines] == [["0", "2", "16", "8"], ["1", "1", "12", "6"], ["2", "2", "8", "4"]]


def test_a_skipped_site_is_shown_with_its_reason() -> None:
    model = tiny("llava")
    with tokenprune.patch(model, "divprune", keep=0.5) as session, torch.no_grad():
        model(input_ids=torch.tensor([[5, 6, 7]]))
        result = session.report()
    assert result.sites[0].status == "skipped"
    for text in (str(result), result.to_markdown(), result._repr_html_()):
        assert f"skipped, {result.sites[0].reason}" in text
        assert "Nothing was pruned" in text


def test_tokens_and_kv_bytes_are_exact(measured: tuple[nn.Module, Any, Any]) -> None:
    result = measured[2]
    tokens, kv = result.cost("visual_tokens"), result.cost("kv_mib")
    assert (tokens.dense, tokens.pruned, tokens.saved, tokens.factor) == (128, 32, 0.75, 4.0)
    per_token = 2 * 4 * 2 * 2 * 8 * 4  # keys and values, layers, rows, key heads, head width, bytes
    assert kv.dense * MIB == per_token * (64 + 7 + NEW_TOKENS - 1)
    assert kv.pruned * MIB == per_token * (16 + 7 + NEW_TOKENS - 1)


def _decoder_flops(model: nn.Module, n_tokens: int) -> int:
    """Of a prefill of two rows of `n_tokens`: linear layers, attention, and the head at the last position."""
    decoder = model.get_decoder()
    weights = sum(module.weight.numel() for module in decoder.modules() if isinstance(module, nn.Linear))
    attention = 4 * 4 * n_tokens**2 * 4 * 8
    return 2 * (2 * n_tokens * weights + attention + 2 * model.lm_head.weight.numel())


def test_flops_are_those_of_the_formula() -> None:
    model = tiny("llava")
    with tokenprune.patch(model, "uniform", keep=0.25) as session:
        flops = session.report(batch("llava", ROWS).inputs, max_new_tokens=1, repeats=1).cost("prefill_flops_g")
    assert flops.dense * 1e9 == pytest.approx(_decoder_flops(model, 71), rel=0.02)
    assert flops.pruned * 1e9 == pytest.approx(_decoder_flops(model, 23), rel=0.02)


def test_flops_of_the_selection_are_counted(measured: tuple[nn.Module, Any, Any]) -> None:
    model, _, result = measured
    similarities = 2 * 2 * 64 * 64 * 32
    assert result.cost("prefill_flops_g").pruned * 1e9 > _decoder_flops(model, 23) + 0.9 * similarities
    assert result.cost("total_flops_g").pruned > result.cost("prefill_flops_g").pruned


def test_every_latency_has_a_median_within_its_range(measured: tuple[nn.Module, Any, Any]) -> None:
    result = measured[2]
    names = [cost.name for cost in result.costs if cost.name.endswith("latency_ms")]
    parts = ["prefill", "encoder", "decoder_prefill", "decode", "total"]
    assert names == [f"{part}_latency_ms" for part in parts]
    for name in names:
        cost = result.cost(name)
        assert cost.dense_range[0] <= cost.dense <= cost.dense_range[1]
        assert cost.pruned_range[0] <= cost.pruned <= cost.pruned_range[1]
    assert result.cost("peak_mib").pruned < result.cost("peak_mib").dense


def test_drift_is_that_of_two_independent_runs(measured: tuple[nn.Module, Any, Any]) -> None:
    model, session, result = measured
    inputs = batch("llava", ROWS).inputs
    with torch.no_grad():
        pruned = model(**fresh(inputs)).logits[:, -1].double()
        with session.pause():
            dense = model(**fresh(inputs)).logits[:, -1].double()
    kl = nn.functional.kl_div(pruned.log_softmax(-1), dense.log_softmax(-1), reduction="none", log_target=True).sum(-1)
    assert result.drift.first_token_kl == pytest.approx(kl.tolist(), rel=1e-4)
    assert result.drift.compared_tokens == (NEW_TOKENS, NEW_TOKENS)


def test_keeping_everything_drifts_nowhere() -> None:
    model = tiny("llava")
    with tokenprune.patch(model, "divprune", keep=1.0) as session:
        result = session.report(batch("llava", ROWS).inputs, max_new_tokens=3, repeats=1)
    assert result.drift is not None
    assert result.drift.first_token_kl == (0.0, 0.0)
    assert result.drift.equal_tokens == result.drift.compared_tokens == (3, 3)
    assert result.cost("visual_tokens").saved == 0.0


def test_answers_are_compared_up_to_the_dense_end_of_sequence() -> None:
    seen = inspect_generation(tiny("llava"), batch("llava", ROWS).inputs, max_new_tokens=2)
    dense = replace(seen, new_ids=torch.tensor([[3, 9, 4, 4], [3, 4, 4, 9], [1, 2, 3, 4]]))
    pruned = replace(seen, new_ids=torch.tensor([[3, 9, 5, 5], [3, 5, 4, 9], [1, 2, 3, 4]]))
    result = drift(dense, pruned, eos=[9, 10])
    assert (result.equal_tokens, result.compared_tokens) == ((2, 1, 4), (2, 4, 4))
    assert drift(dense, pruned).compared_tokens == (4, 4, 4)


def test_json_round_trip(measured: tuple[nn.Module, Any, Any]) -> None:
    result = measured[2]
    data = json.loads(result.to_json())
    assert data == result.to_dict()
    assert data["sites"][0]["n_out"] == [16, 16]
    assert {cost["name"]: cost["saved"] for cost in data["costs"]}["visual_tokens"] == 0.75
    assert data["setting"]["max_new_tokens"] == NEW_TOKENS


def test_numbers_that_are_not_finite_become_null() -> None:
    trace = Trace("before_llm", None, "fake", (4,), (4,), radius=((float("-inf"),),))
    data = json.loads(report.build(Fake(nn.Linear(1, 1), (trace,))).to_json())
    assert data["sites"][0]["radius"] == [[None]]


def test_text_is_aligned_and_no_wider_than_a_hundred_columns(measured: tuple[nn.Module, Any, Any]) -> None:
    text = str(measured[2])
    assert max(map(len, text.splitlines())) <= 100
    lines = text.splitlines()
    start = next(place for place, line in enumerate(lines) if line.split() == ["dense", "pruned", "saved", "factor"])
    rows = lines[start : start + 1 + len(measured[2].costs)]
    assert len({len(row) for row in rows}) == 1
    assert re.search(r"visual_tokens +128 +32 +75\.0 % +4\.00x", text)


def test_a_wide_report_stays_within_its_columns() -> None:
    sites = tuple(
        Trace("encoder_block", 31, "a" * 40, (123456,) * 9, (12345,) * 9, images=((9,) * 99,) * 9) for _ in range(2)
    )
    wide = report.build(Fake(nn.Linear(1, 1), sites))
    costs = (Cost("decoder_prefill_latency_ms", 123456.7, 12345.6, (123400.1, 123999.9), (12345.1, 12345.9)),)
    text = str(replace(wide, costs=costs, setting={"device": "x" * 60}))
    assert max(map(len, text.splitlines())) <= 100
    assert "6 more rows are in to_dict()" in text


def test_markup_escapes_what_it_shows() -> None:
    trace = Trace("before_llm", None, "<b>|", status="skipped", reason="a < b")
    result = report.build(Fake(nn.Linear(1, 1), (trace,)))
    assert "&lt;b&gt;" in result._repr_html_()
    assert "a &lt; b" in result._repr_html_()
    assert "<b>\\|" in result.to_markdown()


def test_an_unmeasured_cost_is_named_with_those_that_exist(measured: tuple[nn.Module, Any, Any]) -> None:
    with pytest.raises(OptionError, match="'speed' was not measured; measured: visual_tokens, prefill_latency_ms"):
        measured[2].cost("speed")
    with pytest.raises(OptionError, match=r"call report\(inputs\)"):
        report.build(Fake(nn.Linear(1, 1))).cost("kv_mib")


IDS = torch.tensor([[5, 6]])


@pytest.mark.parametrize(
    ("inputs", "options", "message"),
    [
        ({"input_ids": IDS}, {"max_new_tokens": 0}, "max_new_tokens must be an int of at least 1, got 0"),
        ({"input_ids": IDS}, {"max_new_tokens": 2.0}, "max_new_tokens must be an int of at least 1, got 2.0"),
        ({"input_ids": IDS}, {"repeats": 0}, "repeats must be an int of at least 1, got 0"),
        ({"input_ids": IDS}, {"repeats": True}, "repeats must be an int of at least 1, got True"),
        ({}, {}, "inputs hold no prompt.*got nothing"),
        ({"input_ids": [[5, 6]]}, {}, r"inputs hold no prompt.*return_tensors=\"pt\".*got \['input_ids'\]"),
        ("a question", {}, "inputs must map argument names to tensors.*got str"),
        ({"input_ids": IDS, "past_key_values": None}, {}, "must not hold past_key_values"),
        ({"input_ids": IDS, "do_sample": True, "num_beams": 2}, {}, "must not hold do_sample, num_beams"),
    ],
)
def test_arguments_that_cannot_be_run_are_refused(inputs: Any, options: dict[str, Any], message: str) -> None:
    model = tiny("llava")
    with tokenprune.patch(model, "divprune", keep=0.5) as session, pytest.raises(OptionError, match=message):
        session.report(inputs, **options)


def test_a_session_that_has_ended_compares_nothing() -> None:
    model = tiny("llava")
    with tokenprune.patch(model, "divprune", keep=0.5) as session:
        pass
    with pytest.raises(OptionError, match="not patched by this session any more"):
        session.report({"input_ids": IDS})


def test_a_model_without_generate_is_refused() -> None:
    with pytest.raises(UnsupportedModelError, match=r"Linear has no generate\(\)"):
        report.build(Fake(nn.Linear(1, 1)), {"input_ids": IDS})


def _state(model: nn.Module) -> tuple[Any, ...]:
    hooks = [(len(module._forward_hooks), len(module._forward_pre_hooks)) for module in model.modules()]
    return hooks, model.config.to_dict(), model.generation_config.to_dict(), model.training, list(vars(model))


@pytest.mark.parametrize("fails_in", [None, "encoder", "decoder", "head"])
def test_a_report_leaves_the_model_as_it_was(fails_in: str | None, monkeypatch: pytest.MonkeyPatch) -> None:
    model, inputs = tiny("llava"), batch("llava", ROWS).inputs
    model.generation_config.do_sample = True
    model.generation_config.eos_token_id = 7
    parts = {"encoder": model.get_input_embeddings(), "decoder": model.get_decoder().layers[2], "head": model.lm_head}
    with tokenprune.patch(model, "divprune", keep=0.5) as session:
        before, given = copy.deepcopy(_state(model)), list(inputs)
        if fails_in is None:
            session.report(inputs, max_new_tokens=2, repeats=1)
        else:
            calls: list[int] = []
            original = parts[fails_in].forward

            def fail(*args: Any, **kwargs: Any) -> Any:
                calls.append(1)
                if len(calls) > 5:  # in the middle of a timed run
                    raise RuntimeError("out of luck")
                return original(*args, **kwargs)

            with monkeypatch.context() as patcher:
                patcher.setattr(parts[fails_in], "forward", fail)
                with pytest.raises(RuntimeError, match="out of luck"):
                    session.report(inputs, max_new_tokens=2, repeats=1)
        assert _state(model) == before
        assert list(inputs) == given
        assert session.active
