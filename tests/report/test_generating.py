"""What a measured generation needs of upstream: found under any name, or an error or a remark says what is lacking."""

from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from families import batch, tiny
from measuring import kv_mib
from torch import nn
from transformers import DynamicCache
from upstream import USE_CACHE

import tokenprune
from tokenprune.errors import OptionError, UnsupportedModelError
from tokenprune.report.generation import inspect_generation, time_generation
from tokenprune.report.loading import n_visual

INPUTS = batch("llava", ((1, (2, 2), 3),)).inputs
Change = Callable[[dict[str, Any]], dict[str, Any]]


def returning(change: Change, monkeypatch: pytest.MonkeyPatch) -> nn.Module:
    """A model whose ``generate`` gives back what `change` makes of its output."""
    model = tiny("llava")
    generate = model.generate

    def changed(**kwargs: Any) -> Any:
        output = SimpleDict(change(dict(generate(**kwargs))))
        output.__dict__.update(output)
        return output

    monkeypatch.setattr(model, "generate", changed)
    return model


class SimpleDict(dict[str, Any]):
    """A mapping with attributes, as outputs of models are."""


def without_cache(output: dict[str, Any]) -> dict[str, Any]:
    return {name: value for name, value in output.items() if not hasattr(value, "layers")}


def test_a_cache_is_found_under_whatever_name_it_comes(monkeypatch: pytest.MonkeyPatch) -> None:
    def renamed(output: dict[str, Any]) -> dict[str, Any]:
        return {"memory" if hasattr(value, "layers") else name: value for name, value in output.items()}

    seen = inspect_generation(returning(renamed, monkeypatch), INPUTS, max_new_tokens=2)
    expected = inspect_generation(tiny("llava"), INPUTS, max_new_tokens=2)
    assert seen.amounts["kv_mib"] == expected.amounts["kv_mib"] > 0
    assert seen.remarks == expected.remarks == ()


def test_a_cache_that_is_not_found_is_told(monkeypatch: pytest.MonkeyPatch) -> None:
    model = returning(without_cache, monkeypatch)
    with tokenprune.patch(model, "uniform", keep=0.5) as session:
        report = session.report(INPUTS, max_new_tokens=2, repeats=1)
    assert "The KV cache was not measured" in " ".join(str(report).split())
    assert "sequences" in report.remarks[-1]
    with pytest.raises(OptionError, match="'kv_mib' was not measured"):
        report.cost("kv_mib")


def test_without_a_cache_wanted_nothing_is_told() -> None:
    seen = inspect_generation(tiny("llava"), {**INPUTS, USE_CACHE: False}, max_new_tokens=2)
    assert "kv_mib" not in seen.amounts
    assert seen.remarks == ()


def test_an_output_without_ids_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    model = returning(lambda output: {"tokens": output["sequences"]}, monkeypatch)
    with pytest.raises(
        UnsupportedModelError, match=r"no generated ids.*looked for sequences; transformers 5.* has tokens"
    ):
        time_generation(model, INPUTS, max_new_tokens=1)


def test_an_output_without_logits_is_refused() -> None:
    model = tiny("llava")
    model.register_forward_hook(lambda _module, _args, _output: SimpleDict(scores=1))
    with pytest.raises(UnsupportedModelError, match=r"no logits.*looked for logits.*has scores"):
        inspect_generation(model, INPUTS, max_new_tokens=1)


def test_a_model_that_cannot_generate_is_refused() -> None:
    with pytest.raises(UnsupportedModelError, match=r"Linear has no way to generate.*looked for generate"):
        time_generation(nn.Linear(1, 1), INPUTS, max_new_tokens=1)


def test_steps_that_nobody_tells_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    model = tiny("llava")
    generate = model.generate
    monkeypatch.setattr(
        model, "generate", lambda **kwargs: generate(**{k: v for k, v in kwargs.items() if k != "logits_processor"})
    )
    with pytest.raises(UnsupportedModelError, match="never called it"):
        time_generation(model, INPUTS, max_new_tokens=1)


@pytest.mark.parametrize("which", ["itself", "holds the vision encoder", "not called"])
def test_a_decoder_that_does_not_stand_apart_is_told(which: str, monkeypatch: pytest.MonkeyPatch) -> None:
    model = tiny("llava")
    found = {"itself": model, "holds the vision encoder": model.model, "not called": nn.Linear(1, 1)}[which]
    monkeypatch.setattr(model, "get_decoder", lambda: found)
    seen = inspect_generation(model, INPUTS, max_new_tokens=1)
    assert "prefill_flops_g" not in seen.amounts
    (remark,) = seen.remarks
    assert remark.startswith("The stages before the first token were not told apart")
    assert {"itself": "shows no text decoder apart", "not called": "did not call"}.get(which, which) in remark


def test_what_a_cache_holds_counts_under_any_name() -> None:
    cache = DynamicCache()
    cache.update(torch.zeros(1, 2, 3, 4), torch.zeros(1, 2, 3, 4), 0)
    expected = kv_mib(cache)
    held = vars(cache.layers[0])
    held["vault"] = {0: (held.pop("keys"),)}
    assert kv_mib(cache) == expected > 0
    with pytest.raises(UnsupportedModelError, match="KV cache list has no layers"):
        kv_mib([torch.zeros(1)])


def test_a_cache_is_no_input_of_a_report_under_any_name() -> None:
    with (
        tokenprune.patch(tiny("llava"), "divprune", keep=0.5) as session,
        pytest.raises(OptionError, match="must not hold memory"),
    ):
        session.report({**INPUTS, "memory": DynamicCache()})


def test_placeholders_that_the_config_does_not_name_are_refused() -> None:
    model = tiny("llava")
    assert n_visual(model, INPUTS) == 4
    with pytest.raises(UnsupportedModelError, match=r"no placeholder token.*image_token_id"):
        n_visual(SimpleNamespace(config=SimpleNamespace(picture_token_id=3)), INPUTS)
