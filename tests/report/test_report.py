"""Reports: what they say is exact, what they time is never asserted, and they leave nothing behind."""

import copy
import json
import re
from collections.abc import Iterator
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, replace
from itertools import pairwise
from typing import Any

import pytest
import torch
from families import EVEN, RAGGED, batch, fresh, generate, tiny
from torch import nn
from upstream import CACHES

import tokenprune
from tokenprune.errors import OptionError
from tokenprune.report import report
from tokenprune.report.costs import Cost, break_even, drift
from tokenprune.report.generation import inspect_generation
from tokenprune.report.measure import MIB
from tokenprune.signals import Trace

ROWS = ((3, (8, 8), 4), (2, (8, 8), 5))
NEW_TOKENS = 4


@dataclass
class Fake:
    """A session without a library behind it."""

    model: Any
    traces: tuple[Trace, ...] = ()
    traffic: Any = None
    methods: tuple[Any, ...] = (tokenprune.DivPrune(keep=0.25),)
    installed: bool = True
    remarks: tuple[str, ...] = ()

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


def test_methods_are_told_with_what_can_be_set() -> None:
    methods = (tokenprune.AIM(), tokenprune.SpAtten(tokens=0.5), tokenprune.DivPrune())
    told = report.build(Fake(nn.Identity(), methods=methods)).methods
    assert told == ("AIM()", "SpAtten(tokens=0.5)", "DivPrune(keep=0.25)")


def test_a_skipped_site_is_shown_with_its_reason() -> None:
    model = tiny("llava")
    with tokenprune.patch(model, "divprune", keep=0.5) as session, torch.no_grad():
        model(input_ids=torch.tensor([[5, 6, 7]]))
        result = session.report()
    assert result.sites[0].status == "skipped"
    for text in (str(result), result.to_markdown(), result._repr_html_()):
        assert f"skipped, {result.sites[0].reason}" in text
        assert "No tokens were pruned" in text


def test_tokens_and_kv_bytes_are_exact(measured: tuple[nn.Module, Any, Any]) -> None:
    result = measured[2]
    tokens, kv = result.cost("visual_tokens"), result.cost("kv_mib")
    assert (tokens.dense, tokens.pruned, tokens.saved, tokens.factor) == (128, 32, 0.75, 4.0)
    per_token = 2 * 4 * 2 * 2 * 8 * 4  # keys and values, layers, rows, key heads, head width, bytes
    assert kv.dense * MIB == per_token * (64 + 7 + NEW_TOKENS - 1)
    assert kv.pruned * MIB == per_token * (16 + 7 + NEW_TOKENS - 1)


def _decoder_flops(model: nn.Module, n_tokens: int) -> int:
    """Of a prefill of two rows of `n_tokens`: linear layers and attention."""
    decoder = model.get_decoder()
    weights = sum(module.weight.numel() for module in decoder.modules() if isinstance(module, nn.Linear))
    attention = 4 * 4 * n_tokens**2 * 4 * 8
    return 2 * (2 * n_tokens * weights + attention)


def test_flops_by_stage_are_those_of_the_formula() -> None:
    model = tiny("llava")
    with tokenprune.patch(model, "uniform", keep=0.25) as session:
        result = session.report(batch("llava", ROWS).inputs, max_new_tokens=1, repeats=1)
    flops = result.cost("prefill_flops_g")
    assert flops.dense * 1e9 == pytest.approx(_decoder_flops(model, 71), rel=0.02)
    assert flops.pruned * 1e9 == pytest.approx(_decoder_flops(model, 23), rel=0.02)
    head = 2 * 2 * model.lm_head.weight.numel() / 1e9
    assert result.cost("head_flops_g").dense == result.cost("head_flops_g").pruned == head
    assert result.cost("encoder_flops_g").dense == result.cost("encoder_flops_g").pruned


def test_flops_of_the_selection_are_counted_apart(measured: tuple[nn.Module, Any, Any]) -> None:
    model, _, result = measured
    similarities = 2 * 2 * 64 * 64 * 32
    assert result.cost("selection_flops_g").dense == 0
    assert result.cost("selection_flops_g").pruned * 1e9 > 0.5 * similarities  # each pair of tokens once
    assert result.cost("prefill_flops_g").pruned * 1e9 == pytest.approx(_decoder_flops(model, 23), rel=0.02)


def test_stages_add_up(measured: tuple[nn.Module, Any, Any]) -> None:
    result = measured[2]
    for side in ("dense", "pruned"):
        parts = [f"{stage}_flops_g" for stage in ("encoder", "selection", "prefill", "head", "decode")]
        total = sum(getattr(result.cost(part), side) for part in parts)
        assert total == pytest.approx(getattr(result.cost("total_flops_g"), side))


def test_every_latency_has_a_median_within_its_range(measured: tuple[nn.Module, Any, Any]) -> None:
    result = measured[2]
    names = [cost.name for cost in result.costs if cost.name.endswith("latency_ms")]
    parts = ["encoder", "prefill", "first_token", "decode", "total", "selection"]
    assert names == [f"{part}_latency_ms" for part in parts]
    for name in names:
        cost = result.cost(name)
        assert cost.dense_range[0] <= cost.dense <= cost.dense_range[1]
        assert cost.pruned_range[0] <= cost.pruned <= cost.pruned_range[1]
    selection = result.cost("selection_latency_ms")
    assert selection.dense == 0 < selection.pruned <= result.cost("first_token_latency_ms").pruned
    assert result.cost("peak_mib").pruned < result.cost("peak_mib").dense
    assert result.cost("resident_peak_mib").pruned > 100  # torch alone


def test_layers_tell_tokens_and_kv_bytes_exactly(measured: tuple[nn.Module, Any, Any]) -> None:
    result = measured[2]
    per_token = 2 * 2 * 2 * 8 * 4 / MIB
    for number, layer in enumerate(result.layers):
        assert (layer.layer, layer.visual_in, layer.visual_out) == (number, 32, 32)
        assert (layer.dense_tokens, layer.pruned_tokens) == (71, 23)
        assert layer.dense_kv_mib == per_token * (71 + NEW_TOKENS - 1)
        assert layer.pruned_kv_mib == per_token * (23 + NEW_TOKENS - 1)
    assert len(result.layers) == 4
    (row,) = [line.split() for line in str(result).splitlines() if line.startswith("0-3 ")]
    assert row[1:5] == ["32", "32", "71", "23"]


def _inside(layer: int, n_in: int, n_out: int) -> Trace:
    return Trace("llm_layer", layer, "aim", (n_in, n_in), (n_out, n_out), overhead_ms=1.0)


def test_many_layers_stand_in_one_table() -> None:
    counts = (40, 40, 40, 30, 20, 20, 0)
    traces = [Trace("before_llm", None, "aim", (80, 80), (40, 40))]
    traces += [_inside(layer, *pair) for layer, pair in enumerate(pairwise(counts), start=2)]
    result = report.build(Fake(nn.Linear(1, 1), tuple(traces)))
    rows = [line.split() for line in str(result).splitlines()]
    assert ["2-3", "80", "80", "100.0", "%", "2.00"] in rows
    assert ["4", "80", "60", "75.0", "%", "1.00"] in rows
    assert ["7", "40", "0", "0.0", "%", "1.00"] in rows
    assert not any(row[:1] == ["llm_layer"] for row in rows)
    assert [(layer.visual_in, layer.visual_out) for layer in result.layers] == [
        *[(80, 80)] * 4, (80, 60), (60, 40), (40, 40), (40, 0)
    ]  # fmt: skip


def test_break_even_is_where_selection_eats_the_savings() -> None:
    def costs(*, pruned: float, selection: float) -> list[Cost]:
        names = {"visual_tokens": (100, 25), "selection_latency_ms": (0.0, selection), "encoder_latency_ms": (2.0, 2.0)}
        times = {"prefill_latency_ms": (20.0, 9.0), "first_token_latency_ms": (23.0, pruned)}
        return [Cost(name, *pair) for name, pair in {**names, **times, "total_latency_ms": (40.0, 30.0)}.items()]

    found = break_even(costs(pruned=11.0, selection=3.0))
    assert found is not None
    assert found.saved_ms_per_token == pytest.approx(15 / 75)
    assert found.visual_tokens == pytest.approx(20)  # 20 tokens: 15 dropped, 0.2 ms each, are the 3 ms of choosing
    assert found.dominant == "prefill"
    assert found.shares == pytest.approx({"encoder": 0.05, "prefill": 0.5, "head": 0.025, "decode": 0.425})
    nothing = break_even(costs(pruned=27.0, selection=3.0))
    assert nothing is not None
    assert nothing.visual_tokens is None
    assert break_even([cost for cost in costs(pruned=9.0, selection=1.0) if cost.name != "visual_tokens"]) is None


def test_break_even_is_told(measured: tuple[nn.Module, Any, Any]) -> None:
    result = measured[2]
    for text in (str(result), result.to_markdown(), result._repr_html_()):
        assert "Break-even" in text
        assert f"{result.break_even.dominant.replace('_', ' ')} takes the most" in text.replace("\n  ", " ")
    assert json.loads(result.to_json())["break_even"]["dominant"] == result.break_even.dominant


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
    costs = (Cost("first_token_latency_ms", 123456.7, 12345.6, (123400.1, 123999.9), (12345.1, 12345.9)),)
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
    with pytest.raises(OptionError, match="'speed' was not measured; measured: visual_tokens, encoder_latency_ms"):
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
        *(({"input_ids": IDS, name: None}, {}, f"must not hold {name}") for name in CACHES),
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


def test_a_vision_transformer_is_measured_by_its_forward() -> None:
    from vits import inputs, tiny

    model, x = tiny("timm registers"), inputs("timm registers")["x"]
    session = tokenprune.patch(model, "tome", r=2)
    found = session.report(x, repeats=2)
    assert found.cost("forward_latency_ms").dense > 0
    assert found.cost("total_flops_g").factor > 1
    assert {site.site for site in found.sites} == {"encoder_block"}
    assert "cosine of the outputs" in str(found)
    assert session.installed
    with pytest.raises(OptionError, match="must be a tensor or map"):
        session.report([x])


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


@pytest.mark.parametrize("method", ["divprune", "fastv"])
def test_drafts_that_are_verified_leave_the_prompts_traces_in_the_report(method):
    model, drafter = tiny("llava"), tiny("llava")
    session = tokenprune.patch(model, method, keep=0.5, **({"layer": 1} if method == "fastv" else {}))
    drafter.generation_config.num_assistant_tokens = 2
    inputs = batch("llava", EVEN[:1]).inputs
    generate(model, inputs, 6)
    wanted = [(trace.status, trace.n_in, trace.n_out) for trace in session.traces]
    assert not session.later_traces
    generate(model, inputs, 6, assistant_model=drafter)
    assert [(trace.status, trace.n_in, trace.n_out) for trace in session.traces] == wanted
    assert session.traces[-1].status == "applied"
    assert session.later_traces
    said = " ".join(str(session.report()).split())
    assert f"{len(session.later_traces)} later calls of several tokens continued this prompt" in said
    with torch.no_grad():
        model(input_ids=inputs["input_ids"][:, :3])
    assert {trace.status for trace in session.traces} == {"skipped"}
    assert not session.later_traces
