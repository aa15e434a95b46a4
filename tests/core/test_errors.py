"""Bad input: each message says what was asked, what was found and what would work, and nothing is touched."""

import re
from typing import Any, ClassVar

import pytest
import torch
import transformers
from families import EVEN, FAMILIES, MROPE, batch, fresh, generate, implementations, tiny
from states import Same, logits, same_run, snapshot
from torch import Tensor, nn
from transformers import DynamicCache
from upstream import cache_of, encoder_output, pooled_in, with_cache, with_features

import tokenprune
from tokenprune import (
    BackendError,
    DivPrune,
    InputError,
    Method,
    OptionError,
    Random,
    TokenPruneError,
    UnknownMethodError,
    UnsupportedModelError,
)


def says(*parts: str) -> str:
    """A pattern that matches a text with all of `parts`, in any order."""
    return "(?s)" + "".join(f"(?=.*{re.escape(part)})" for part in parts)


def refused(model: Any, error: type[TokenPruneError], *parts: str, method: Any = "divprune", **options: Any) -> None:
    """`patch` raises `error` with all of `parts` in its message and leaves `model` as it was."""
    before = snapshot(model) if isinstance(model, nn.Module) else None
    with pytest.raises(error, match=says(*parts)) as caught:
        tokenprune.patch(model, method, **options)
    assert "\n" not in str(caught.value)
    if before is not None:
        assert snapshot(model) == before


@pytest.fixture(scope="module")
def llava() -> nn.Module:
    """A model that is patched by no test that goes well."""
    return tiny("llava")


# --- options --------------------------------------------------------------------------------------


@pytest.mark.parametrize(("keep", "parts"), [
    (0, ("keep", "at least 1", "got 0")),
    (-3, ("keep", "at least 1", "got -3")),
    (0.0, ("keep", "(0, 1]", "got 0.0")),
    (-0.5, ("keep", "(0, 1]", "got -0.5")),
    (1.5, ("keep", "(0, 1]", "got 1.5", "int")),
    (64.0, ("keep", "(0, 1]", "got 64.0", "use an int to count tokens")),
    (float("nan"), ("keep", "(0, 1]", "got nan")),
    (float("inf"), ("keep", "(0, 1]", "got inf")),
    (True, ("keep", "float in (0, 1]", "int", "got True")),
    (False, ("keep", "got False")),
    ("0.25", ("keep", "float in (0, 1]", "int", "got '0.25'")),
    (None, ("keep", "got None")),
    ([0.5], ("keep", "got [0.5]")),
])  # fmt: skip
@pytest.mark.parametrize("method", ["divprune", "random", "uniform"])
def test_a_keep_that_makes_no_sense_is_refused(llava, method, keep, parts):
    refused(llava, OptionError, *parts, method=method, keep=keep)


@pytest.mark.parametrize(("options", "parts"), [
    ({"keep": "auto"}, ("radius", "[0, 2]", "got None")),
    ({"keep": "auto", "radius": 2.5}, ("radius", "[0, 2]", "got 2.5")),
    ({"keep": "auto", "radius": -0.1}, ("radius", "[0, 2]", "got -0.1")),
    ({"keep": "auto", "radius": float("nan")}, ("radius", "[0, 2]", "got nan")),
    ({"keep": "auto", "radius": True}, ("radius", "[0, 2]", "got True")),
    ({"keep": "auto", "radius": "0.1"}, ("radius", "[0, 2]", "got '0.1'")),
    ({"keep": "auto", "radius": 0.1, "min_keep": 0}, ("min_keep", "at least 1", "got 0")),
    ({"keep": "auto", "radius": 0.1, "max_keep": 1.2}, ("max_keep", "(0, 1]", "got 1.2")),
    ({"keep": 0.5, "radius": 0.1}, ("radius", 'keep="auto"', "radius=0.1", "keep=0.5")),
    ({"keep": 0.5, "min_keep": 3}, ("min_keep", 'keep="auto"', "min_keep=3")),
    ({"max_keep": 3}, ("max_keep", 'keep="auto"', "max_keep=3")),
    ({"keep": "most"}, ("keep", "auto", "got 'most'")),
])  # fmt: skip
def test_the_options_of_keep_auto_are_checked_together(llava, options, parts):
    refused(llava, OptionError, *parts, **options)


def test_an_unknown_method_is_answered_with_the_known_ones(llava):
    refused(llava, UnknownMethodError, "unknown method 'best'", ", ".join(tokenprune.list_methods()), method="best")


def test_a_misspelt_method_is_answered_with_the_one_that_was_meant(llava):
    refused(llava, UnknownMethodError, "'divprun'", "did you mean 'divprune'?", method="divprun")
    refused(llava, UnknownMethodError, "'DivPrune'", "did you mean 'divprune'?", method="DivPrune")


def test_text_for_a_command_line_is_answered_with_what_patch_takes(llava):
    refused(llava, UnknownMethodError, 'give a list: ["divprune", "aim"]', method="divprune+aim")
    for text in ("divprune:keep=0.5", "divprune:keep=0.5+aim"):
        refused(llava, UnknownMethodError, f"list(parse_methods({text!r}))", method=text)


def test_an_unknown_keyword_is_answered_with_the_known_ones(llava):
    refused(llava, OptionError, "'divprune' has no option 'ratio'", "keep", "radius", "backend", ratio=0.5)
    refused(llava, OptionError, "'random' has no option 'radius'", "it has keep, seed", method="random", radius=0.5)
    refused(llava, OptionError, "'keeps', 'position'", keeps=0.5, position="packed")


def test_options_beside_an_instance_are_refused(llava):
    parts = ("['keep']", "DivPrune", "DivPrune(keep=0.3)")
    refused(llava, OptionError, *parts, method=DivPrune(keep=0.5), keep=0.3)
    refused(llava, OptionError, *parts, method=["random", DivPrune(keep=0.5)], keep=0.3)


@pytest.mark.parametrize("method", [[], (), None, 0.25, {"divprune"}, print], ids=repr)
def test_what_is_no_method_is_refused(llava, method):
    refused(llava, OptionError, "method", f"got {method!r}", ", ".join(tokenprune.list_methods()), method=method)


@pytest.mark.parametrize("method", [[3], ["divprune", None], [DivPrune], [["divprune"]]], ids=repr)
def test_a_list_with_something_else_among_the_methods_is_refused(llava, method):
    refused(llava, OptionError, f"got {method[-1]!r}", "divprune", "DivPrune(keep=0.25)", method=method)


class Typo(Method):
    """Takes part nowhere."""

    name: ClassVar[str] = "typo"

    def before_lm(self, signals: Any, budget: Any) -> Any:
        raise AssertionError


def test_a_method_that_takes_part_nowhere_is_refused(llava):
    refused(llava, OptionError, "Typo", "no site", "before_llm", method=Typo(keep=0.5))
    refused(llava, OptionError, "Typo", "no site", "before_llm", method=["divprune", Typo(keep=0.5)])


@pytest.mark.parametrize("positions", ["Packed", "", None, 1])
def test_an_unknown_word_for_positions_is_answered_with_the_known_ones(llava, positions):
    refused(llava, OptionError, "positions", "'original' or 'packed'", f"got {positions!r}", positions=positions)


@pytest.mark.parametrize("family", MROPE)
def test_packed_positions_are_refused_where_positions_have_axes(family):
    refused(
        tiny(family), OptionError, 'positions="packed"', family, "M-RoPE", 'positions="original"', positions="packed"
    )


@pytest.mark.parametrize(
    "family",
    [
        pytest.param(family, marks=() if family in ("llava", "gemma3", "idefics3") else pytest.mark.matrix)
        for family in FAMILIES
        if family not in MROPE
    ],
)
def test_packed_positions_are_taken_by_every_other_family(family):
    model = tiny(family, implementations(family)[0])
    assert tokenprune.patch(model, keep=0.5, positions="packed").positions == "packed"


@pytest.mark.parametrize("backend", ["cuda", "", None, "Torch"])
def test_an_unknown_backend_is_answered_with_the_known_ones(llava, backend):
    refused(llava, OptionError, "backend", "'auto', 'torch' or 'triton'", f"got {backend!r}", backend=backend)


def test_a_backend_that_cannot_run_here_is_named_and_never_replaced(monkeypatch):
    kernel = pytest.importorskip("tokenprune.kernels.common", exc_type=ImportError)
    monkeypatch.setattr(kernel, "INTERPRETED", False)
    model, prompt = tiny("llava"), batch("llava")
    cache = DynamicCache(config=model.config)
    with pytest.raises(BackendError, match=says("backend='triton'", "CUDA", "'torch'", "'auto'")):  # noqa: PT012
        session = tokenprune.patch(model, "divprune", keep=0.5, backend="triton")
        logits(model, prompt.inputs, **with_cache(cache))
    assert type(cache) is DynamicCache
    assert cache.get_seq_length() == 0
    assert session.traces == ()


def test_a_refused_patch_leaves_the_patch_before_it_in_force():
    model, prompt = tiny("llava"), batch("llava", EVEN)
    session = tokenprune.patch(model, "divprune", keep=3)
    refused(model, OptionError, "keep", keep=0)
    refused(model, OptionError, "positions", positions="some")
    refused(model, UnknownMethodError, "best", method="best")
    assert session.installed
    logits(model, prompt.inputs)
    assert session.traces[0].n_out == (3, 3)


@pytest.mark.parametrize(("error", "builtin"), [
    (OptionError, ValueError),
    (UnknownMethodError, KeyError),
    (UnsupportedModelError, TypeError),
    (InputError, ValueError),
    (BackendError, RuntimeError),
])  # fmt: skip
def test_errors_can_be_caught_without_knowing_the_library(error, builtin):
    assert issubclass(error, builtin)
    assert issubclass(error, TokenPruneError)
    assert str(error("a sentence with 'quotes'")) == "a sentence with 'quotes'"


# --- models ---------------------------------------------------------------------------------------


def on_meta(name: str, **fields: Any) -> nn.Module:
    """A model of transformers without weights, one layer deep."""
    cls = getattr(transformers, name)
    config = cls.config_class(**fields)
    for part in [config, *(getattr(config, field) for field in config.sub_configs)]:
        for field in (
            "num_hidden_layers",
            "num_layers",
            "num_global_layers",
            "encoder_layers",
            "decoder_layers",
            "n_layer",
        ):
            if isinstance(getattr(part, field, None), int):
                setattr(part, field, 1)
    with torch.device("meta"):
        return cls(config)


REASONS: dict[str, tuple[str, dict[str, Any]]] = {
    "MllamaForConditionalGeneration": ("cross-attention", {}),
    "Florence2ForConditionalGeneration": ("encoder-decoder", {}),
    "Blip2ForConditionalGeneration": ("Q-Former", {}),
    "InstructBlipForConditionalGeneration": ("Q-Former", {}),
    "InstructBlipVideoForConditionalGeneration": ("Q-Former", {}),
    "BlipForConditionalGeneration": ("cross-attention", {}),
    "Kosmos2ForConditionalGeneration": ("resampler", {}),
    "Llama4ForConditionalGeneration": ("chunked attention", {}),
    "Emu3ForConditionalGeneration": ("vocabulary ids", {"vocabulary_map": {"<image>": 5}}),
    "ChameleonForConditionalGeneration": ("vocabulary ids", {"vocabulary_map": {"<image>": 5}}),
    "JanusForConditionalGeneration": ("generates images", {}),
    "Gemma3nForConditionalGeneration": ("per-layer inputs", {"text_config": {"num_kv_shared_layers": 0}}),
    "Gemma4ForConditionalGeneration": (
        "per-layer inputs",
        {"text_config": {"num_hidden_layers": 1, "layer_types": ["full_attention"]}},
    ),
    "Ernie4_5_VLMoeForConditionalGeneration": ("every token", {}),
}


NAMED = ("MllamaForConditionalGeneration", "Florence2ForConditionalGeneration", "Blip2ForConditionalGeneration",
         "InstructBlipForConditionalGeneration", "Llama4ForConditionalGeneration")  # fmt: skip


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize(
    "name", [pytest.param(name, marks=() if name in NAMED else pytest.mark.matrix) for name in REASONS]
)
def test_a_model_that_is_known_not_to_work_is_refused_with_the_reason(name):
    reason, fields = REASONS[name]
    if not hasattr(transformers, name):
        pytest.skip("this version of transformers does not have it")
    model = on_meta(name, **fields)
    refused(
        model, UnsupportedModelError, f"{name} cannot be pruned", reason, "supported families are", "llava", "qwen2_vl"
    )
    refused(getattr(model, "model", model), UnsupportedModelError, reason)


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize(("name", "found"), [
    ("BertModel", "no text decoder"),
    ("LlamaModel", "no text decoder"),
    ("T5ForConditionalGeneration", "encoder-decoder"),
    ("WhisperForConditionalGeneration", "encoder-decoder"),
])  # fmt: skip
def test_a_model_without_visual_tokens_is_refused_by_what_it_lacks(name, found):
    refused(on_meta(name), UnsupportedModelError, name, found, "supported families are", "llava")


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("name", ["LlamaForCausalLM", "GPT2LMHeadModel"])
def test_a_model_of_text_takes_methods_that_prune_text_only(name):
    refused(on_meta(name), OptionError, "no visual tokens", "SpAtten(protect_text=False)")


def test_any_other_module_is_refused_by_name():
    refused(nn.Linear(2, 3), UnsupportedModelError, "Linear", "no text decoder", "supported families are")
    refused(nn.Sequential(nn.Linear(2, 3)), UnsupportedModelError, "Sequential", "supported families are")


def test_the_decoder_of_a_supported_model_by_itself_is_refused(llava):
    refused(llava.get_decoder(), UnsupportedModelError, "LlamaModel", "no text decoder apart from itself")
    refused(llava.model.vision_tower, OptionError, "CLIPVisionModel", "vision encoder", "tome", "spatten")


@pytest.mark.parametrize("model", ["llava-hf/llava-1.5-7b-hf", None, dict], ids=repr)
def test_what_is_no_module_is_refused(model):
    refused(model, UnsupportedModelError, "torch.nn.Module", f"got {type(model).__name__}")


PATCH_FIRST = ("compiled", "patch first, then compile", "tokenprune.patch(model, ...)", "torch.compile(model)")


@pytest.mark.parametrize("how", ["torch.compile", "module.compile", "decoder.compile", "decoder replaced", "forward"])
def test_a_compiled_model_is_refused_with_what_to_do(how):
    model = tiny("llava")
    if how == "torch.compile":
        model = torch.compile(model, backend="eager")
    elif how == "module.compile":
        model.compile(backend="eager")
    elif how == "decoder.compile":
        model.get_decoder().compile(backend="eager")
    elif how == "decoder replaced":
        model.model.language_model = torch.compile(model.model.language_model, backend="eager")
    else:  # a recipe of the documentation of transformers
        model.forward = torch.compile(model.forward, backend="eager")
    refused(model, UnsupportedModelError, *PATCH_FIRST)


# --- input ----------------------------------------------------------------------------------------


def poisoned(inputs: dict[str, Any], *, image: int, token: int, value: float) -> dict[str, Any]:
    """`inputs` with one value of one token of one image replaced."""
    inputs = fresh(inputs)
    pooled_in(inputs)[image][token, 3] = value
    return inputs


@pytest.mark.parametrize("value", [float("nan"), float("inf"), float("-inf")])
@pytest.mark.parametrize("method", ["divprune", "random", ["uniform", "divprune"]], ids=str)
def test_features_that_are_not_finite_are_refused_by_site_and_row(value, method):
    model, prompt = tiny("llava"), batch("llava")
    session = tokenprune.patch(model, method, keep=0.5)
    wanted = generate(model, prompt.inputs, 2)
    first = logits(model, prompt.inputs)
    traces, before, cache = session.traces, snapshot(model), DynamicCache(config=model.config)
    bad = poisoned(prompt.inputs, image=2, token=1, value=value)  # the third image is the only one of the second row
    with pytest.raises(InputError, match=says("before_llm", "row 1", "NaN or infinite")):
        logits(model, bad, **with_cache(cache))
    with pytest.raises(InputError, match=says("before_llm", "row 1")):
        generate(model, bad, 2)
    assert snapshot(model) == before
    assert session.traces is traces
    assert type(cache) is DynamicCache
    assert cache.get_seq_length() == 0
    assert torch.equal(logits(model, prompt.inputs, **with_cache(cache)), first)
    assert same_run(generate(model, prompt.inputs, 2), wanted)


def test_a_pruned_cache_goes_on_after_an_image_that_was_refused():
    model, first, second = tiny("llava"), batch("llava", EVEN), batch("llava", EVEN, seeds=(5, 6))
    tokenprune.patch(model, "divprune", keep=3)
    mask = torch.cat([first.inputs["attention_mask"], second.inputs["attention_mask"]], 1)
    turn = {**second.inputs, "attention_mask": mask}

    def chat(bad: bool) -> Tensor:
        cache = DynamicCache(config=model.config)
        logits(model, first.inputs, **with_cache(cache))
        if bad:
            before = [(layer.keys.clone(), layer.values.clone()) for layer in cache.layers]
            state = {name: Same(value) for name, value in vars(cache).items()}
            with pytest.raises(InputError, match="before_llm"):
                logits(model, poisoned(turn, image=0, token=0, value=float("nan")), **with_cache(cache))
            assert {name: Same(value) for name, value in vars(cache).items()} == state
            for layer, (keys, values) in zip(cache.layers, before, strict=True):
                assert torch.equal(layer.keys, keys)
                assert torch.equal(layer.values, values)
        return logits(model, turn, **with_cache(cache))

    assert torch.equal(chat(bad=True), chat(bad=False))


def test_features_that_are_not_finite_are_no_concern_of_a_paused_session():
    model, prompt = tiny("llava"), batch("llava")
    session = tokenprune.patch(model, "divprune", keep=0.5)
    with session.pause():
        assert logits(model, poisoned(prompt.inputs, image=2, token=1, value=float("nan"))).isnan().any()


@pytest.mark.parametrize("family", ["llava", "qwen2_vl", "gemma3", "molmo2", "idefics3"])
def test_a_prompt_without_an_image_is_left_alone_and_the_trace_says_so(family):
    model = tiny(family)
    inputs = batch(family).inputs
    inputs = {"input_ids": inputs["input_ids"].clamp(max=99), "attention_mask": inputs["attention_mask"]}
    with torch.no_grad():
        wanted = model(**inputs).logits
        ids = model.generate(**inputs, max_new_tokens=3, do_sample=False)
        session = tokenprune.patch(model, ["uniform", "divprune"], keep=0.5)
        out = model(**inputs)
        assert torch.equal(out.logits, wanted)
        assert type(cache_of(out)) is DynamicCache
        assert [(trace.method, trace.status, trace.reason) for trace in session.traces] == [
            ("uniform", "skipped", "no image in this call"),
            ("divprune", "skipped", "no image in this call"),
        ]
        assert torch.equal(model.generate(**inputs, max_new_tokens=3, do_sample=False), ids)
    assert {trace.status for trace in session.traces} == {"skipped"}
    assert "no image in this call" in str(session.report())
    assert "No tokens were pruned" in str(session.report())


def test_an_image_after_a_prompt_without_one_is_pruned():
    model, prompt = tiny("llava"), batch("llava", EVEN)
    session = tokenprune.patch(model, "divprune", keep=0.5)
    with torch.no_grad():
        model(input_ids=torch.tensor([[5, 6, 7]]))
    assert session.traces[0].status == "skipped"
    logits(model, prompt.inputs)
    assert session.traces[0].status == "applied"


def test_a_row_without_an_image_beside_one_with_an_image_keeps_all_of_its_text():
    model, prompt = tiny("llava"), batch("llava", ((3, (3, 4), 4), (9,)))
    alone = logits(model, batch("llava", ((9,),), seeds=(1,)).inputs | with_features())
    session = tokenprune.patch(model, "divprune", keep=0.5)
    positions = (prompt.inputs["attention_mask"].cumsum(-1) - 1).clamp(min=0)
    out = logits(model, {**prompt.inputs, "position_ids": positions})
    assert session.traces[0].n_in == (12, 0)
    assert session.traces[0].n_out == (6, 0)
    torch.testing.assert_close(out[1, -9:], alone[0], atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("method", ["divprune", "random", "uniform"])
@pytest.mark.parametrize("keep", [0.01, 0.5, 1, 7])
def test_an_image_of_one_token_keeps_it(method, keep):
    model, prompt = tiny("llava"), batch("llava", ((2, (1, 1), 3),))
    wanted = logits(model, prompt.inputs)
    session = tokenprune.patch(model, method, keep=keep)
    assert torch.equal(logits(model, prompt.inputs), wanted)
    assert session.traces[0].n_in == session.traces[0].n_out == (1,)


@pytest.mark.parametrize("method", ["divprune", "random", "uniform"])
@pytest.mark.parametrize("keep", [12, 13, 10_000])
def test_an_int_of_at_least_all_tokens_keeps_all(method, keep):
    model, prompt = tiny("llava"), batch("llava")
    wanted = logits(model, prompt.inputs)
    session = tokenprune.patch(model, method, keep=keep)
    assert torch.equal(logits(model, prompt.inputs), wanted)
    assert session.traces[0].n_in == session.traces[0].n_out == (16, 12, 8)


@pytest.mark.parametrize("value", [1.0, 0.0], ids=["equal", "zero"])
@pytest.mark.parametrize("options", [{"keep": 5}, {"keep": "auto", "radius": 0.1}], ids=str)
def test_an_image_all_of_whose_tokens_are_equal_is_pruned_like_any_other(value, options):
    model, prompt = tiny("llava"), batch("llava", EVEN)
    inputs = fresh(prompt.inputs)
    inputs |= with_features(encoder_output([torch.full((12, 32), value)] * 2))
    session = tokenprune.patch(model, "divprune", **options)
    assert logits(model, inputs).isfinite().all()
    (trace,) = session.traces
    due = 5 if value == 1.0 or options["keep"] == 5 else 12  # zero vectors are far from each other
    due = 1 if options["keep"] == "auto" and value == 1.0 else due
    assert trace.n_out == (due, due)
    assert (trace.kept_indices[0] - trace.visual_indices[0][0]).tolist() == list(range(due))
    assert trace.radius[0][0] == pytest.approx(0.0 if value == 1.0 or due == 12 else 1.0)


def test_an_empty_batch_fails_as_it_does_unpatched_and_leaves_nothing_behind():
    model, prompt = tiny("llava"), batch("llava")
    empty = {name: prompt.inputs[name][:0] for name in ("input_ids", "attention_mask")}
    with pytest.raises(RuntimeError) as wanted, torch.no_grad():
        model(**empty)
    session = tokenprune.patch(model, "divprune", keep=0.5)
    pruned, before = logits(model, prompt.inputs), snapshot(model)
    traces = session.traces
    with pytest.raises(RuntimeError, match=re.escape(str(wanted.value))), torch.no_grad():
        model(**empty)
    assert session.traces is traces
    assert snapshot(model) == before
    assert torch.equal(logits(model, prompt.inputs), pruned)


def test_a_mask_that_is_too_short_for_a_pruned_cache_is_refused():
    model, prompt = tiny("llava"), batch("llava")
    tokenprune.patch(model, Random(keep=0.5))
    cache = DynamicCache(config=model.config)
    logits(model, prompt.inputs, **with_cache(cache))
    length, step = cache.get_seq_length(), torch.tensor([[7], [8], [9]])
    short = torch.ones(3, cache.layers[0].keys.shape[2] + 1, dtype=torch.int64)
    with (
        pytest.raises(InputError, match=says("attention_mask", f"{short.shape[1]} columns", str(length))),
        torch.no_grad(),
    ):
        model(input_ids=step, attention_mask=short, **with_cache(cache))
    mask = torch.cat([prompt.inputs["attention_mask"], torch.ones_like(step)], 1)
    with torch.no_grad():
        assert model(input_ids=step, attention_mask=mask, **with_cache(cache)).logits.isfinite().all()
    assert cache.get_seq_length() == length + 1


def test_a_class_in_place_of_a_method_is_answered_with_the_call(llava):
    refused(llava, OptionError, "write DivPrune(...)", method=tokenprune.DivPrune)
