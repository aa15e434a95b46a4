"""A patched model is not recorded into a graph, and copies of it run dense: each says so in one sentence."""

import contextlib
import copy
import io
import pickle
import threading
import warnings
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
import vits
from families import EVEN, batch, fresh, tiny
from states import hook_counts
from timm.models._features_fx import create_feature_extractor as timm_extractor
from timm.models.vision_transformer import Block
from torch import Tensor, nn
from torch.ao.quantization import quantize_dynamic
from torch.fx.experimental.proxy_tensor import make_fx
from torchvision.models.feature_extraction import create_feature_extractor
from vits import answer

import tokenprune
from tokenprune import running

COPIED = "is a copy of a patched one"
QUANTIZES = pytest.mark.filterwarnings("ignore:torch.quantize_per_tensor")  # torch.ao, in each forward


class Called(nn.Module):
    """A model by one tensor, which is all that some captures take."""

    def __init__(self, model: nn.Module, given: dict[str, Any], name: str) -> None:
        super().__init__()
        self.model, self.given, self.name = model, given, name

    def forward(self, x: Tensor) -> Tensor:
        output: Tensor = answer(self.model(**{**self.given, self.name: x}))
        return output


@contextlib.contextmanager
def quiet() -> Iterator[None]:
    """Within the block torch may say that torch.jit, torch.ao and the older ONNX export are deprecated."""
    with (
        contextlib.redirect_stdout(io.StringIO()),
        contextlib.redirect_stderr(io.StringIO()),
        warnings.catch_warnings(),
    ):
        warnings.simplefilter("ignore", DeprecationWarning)
        warnings.simplefilter("ignore", FutureWarning)
        yield


def call_by_proxy(model: nn.Module, x: Tensor) -> Any:
    graph = torch.fx.Graph()
    return model(torch.fx.Proxy(graph.placeholder("x"), torch.fx.proxy.GraphAppendingTracer(graph)))


# What somebody calls, and what the sentence says of it.
WAYS: dict[str, tuple[str, Callable[[nn.Module, Tensor], Any]]] = {
    "symbolic_trace": ("torch.fx.symbolic_trace", lambda model, x: torch.fx.symbolic_trace(model)),
    "torchvision": ("torch.fx.symbolic_trace", lambda model, x: create_feature_extractor(model, ["blocks.3"])),
    "timm": ("torch.fx.symbolic_trace", lambda model, x: timm_extractor(model, ["blocks.3"])),
    "proxy": ("torch.fx.symbolic_trace", call_by_proxy),
    "script": ("torch.jit.script", lambda model, x: torch.jit.script(model)),
    "trace": ("torch.jit.trace", lambda model, x: torch.jit.trace(model, x, strict=False)),
    "onnx": ("torch.onnx.export", lambda model, x: torch.onnx.export(model, (x,), io.BytesIO(), dynamo=False)),
    "export": ("torch.export", lambda model, x: torch.export.export(model, (x,), strict=False)),
    "strict export": ("torch.export", lambda model, x: torch.export.export(model, (x,), strict=True)),
    "make_fx": ("make_fx", lambda model, x: make_fx(lambda x: model(x))(x)),
    "symbolic make_fx": (
        "make_fx",
        lambda model, x: make_fx(lambda x: model(x), tracing_mode="symbolic", _allow_non_fake_inputs=True)(x),
    ),
    "make_fx before dispatch": ("make_fx", lambda model, x: make_fx(lambda x: model(x), pre_dispatch=True)(x)),
}
ENCODERS = ("trace", "export", "strict export", "make_fx")  # transformers' own cannot be recorded by the others


def check_refused(model: nn.Module, whole: nn.Module, x: Tensor, way: str, session: tokenprune.Session) -> None:
    """That recording `model`, of which `whole` runs the patched part, raises the sentence and leaves no trace."""
    said, record = WAYS[way]
    with torch.no_grad():
        wanted, traces = whole(x), session.traces
        with pytest.raises(tokenprune.UnsupportedModelError) as caught, quiet():
            record(model, x)
        told = f"{said} records the forward of {type(session.model).__name__} into a graph"
        assert str(caught.value).startswith(told)
        assert "tokenprune.unpatch(model) before tracing" in str(caught.value)
        assert session.traces is traces
        assert running.current(object) is None
        assert running.innermost() is None
        assert torch.equal(whole(x), wanted)
    assert session.traces is not traces
    assert any(trace.n_out < trace.n_in for trace in session.traces)


@pytest.mark.parametrize("way", WAYS)
def test_a_patched_encoder_of_timm_is_not_recorded(way):
    model, x = vits.tiny("timm vit"), vits.inputs("timm vit")["x"]
    with torch.no_grad():
        dense = model(x)
    check_refused(model, model, x, way, tokenprune.patch(model, "tome", r=3))
    tokenprune.unpatch(model)
    assert hook_counts(model) == {}
    with torch.no_grad():
        assert torch.equal(model(x), dense)


METHODS: dict[str, dict[str, Any]] = {"tome": {"r": 3}, "spatten": {"tokens": 0.6, "heads": (1.0, 0.67, 0.67, 0.34)}}


def check_encoder(name: str, way: str, method: str) -> None:
    model, given = vits.tiny(name), vits.inputs(name)
    options = {"tokens": 0.6} if name in vits.AT_END and method == "spatten" else METHODS[method]
    session = tokenprune.patch(model, method, **options)
    if way in ENCODERS:
        whole = Called(model, given, next(iter(given)))
        check_refused(whole, whole, given[whole.name], way, session)
    else:
        check_refused(model, model, given["x"], way, session)


@pytest.mark.parametrize(("name", "way", "method"), [
    ("hf vit", "trace", "spatten"), ("hf clip", "strict export", "tome"), ("timm eva02", "symbolic_trace", "spatten"),
])  # fmt: skip
def test_no_patched_encoder_is_recorded(name, way, method):
    check_encoder(name, way, method)


@pytest.mark.matrix
@pytest.mark.parametrize("name", vits.NAMES)
def test_no_patched_encoder_is_recorded_in_any_way(name):
    for way in ("symbolic_trace", "trace", "strict export") if name.startswith("timm") else ("trace", "strict export"):
        check_encoder(name, way, ("tome", "spatten")[vits.NAMES.index(name) % 2])


@pytest.mark.parametrize(("method", "way"), [
    ("divprune", "trace"), ("divprune", "strict export"), ("fastv", "export"), ("fastv", "make_fx"),
])  # fmt: skip
def test_a_patched_vision_language_model_is_not_recorded(method, way):
    model, inputs = tiny("llava"), batch("llava", EVEN).inputs
    session = tokenprune.patch(model, method, keep=0.5)

    whole = Called(model, fresh(inputs), "input_ids")
    check_refused(whole, whole, inputs["input_ids"], way, session)


def test_a_paused_model_is_not_recorded_either():
    model = vits.tiny("timm vit")
    session = tokenprune.patch(model, "tome", r=3)
    with session.pause(), pytest.raises(tokenprune.UnsupportedModelError, match=r"torch\.fx\.symbolic_trace records"):
        torch.fx.symbolic_trace(model)


def test_an_unpatched_model_is_recorded_as_ever():
    model, x = vits.tiny("timm vit"), vits.inputs("timm vit")["x"]
    other = vits.inputs("timm vit", seed=1)["x"]
    tokenprune.patch(model, "tome", r=3)
    with torch.no_grad():
        merged = model(other)
        tokenprune.unpatch(model)
        graph = torch.fx.symbolic_trace(model)
        exported = torch.export.export(model, (x,)).module()
        torch.testing.assert_close(graph(other), model(other))
        torch.testing.assert_close(exported(other), model(other))
        assert (model(other) - merged).abs().max() > 1e-3


class WholeBlocks(torch.fx.Tracer):
    """Blocks stay modules, with their hooks."""

    def is_leaf_module(self, m: nn.Module, module_qualified_name: str) -> bool:
        return isinstance(m, Block) or super().is_leaf_module(m, module_qualified_name)


def test_a_graph_that_calls_whole_blocks_merges_by_the_values_of_each_call():
    model = vits.tiny("timm vit")
    session = tokenprune.patch(model, "tome", r=3)
    graph = torch.fx.GraphModule(model, WholeBlocks().trace(model))
    for seed in range(3):
        x = vits.inputs("timm vit", seed=seed)["x"]
        with torch.no_grad():
            assert torch.equal(graph(x), model(x))
        assert [trace.n_out for trace in session.traces] == [(13, 13), (10, 10), (7, 7), (4, 4)]


def test_a_model_runs_while_another_thread_exports():
    model, x = vits.tiny("timm vit"), vits.inputs("timm vit")["x"]
    session = tokenprune.patch(model, "tome", r=3)
    wanted, found = model(x), list[Tensor]()
    traces = session.traces

    class Waiting(nn.Module):
        def forward(self, y: Tensor) -> Tensor:
            assert torch.compiler.is_exporting()
            other = threading.Thread(target=lambda: found.append(model(x)))
            other.start()
            other.join()
            return y + 1

    torch.export.export(Waiting(), (x,), strict=False)
    torch.testing.assert_close(found[0], wanted)  # other sums than outside of an export, patched or not
    assert session.traces is not traces


# --- copies ---------------------------------------------------------------------------------------


def through_bytes(model: nn.Module) -> nn.Module:
    torch.save(model, file := io.BytesIO())
    file.seek(0)
    loaded: nn.Module = torch.load(file, weights_only=False)
    return loaded


def quantized(model: nn.Module, *, inplace: bool = False) -> nn.Module:
    with quiet():
        made: nn.Module = quantize_dynamic(model, {nn.Linear}, inplace=inplace)
    return made


COPIES: dict[str, Callable[[nn.Module], nn.Module]] = {
    "deepcopy": copy.deepcopy,
    "pickle": lambda model: pickle.loads(pickle.dumps(model)),
    "torch.save": through_bytes,
    "quantize_dynamic": quantized,
    "copy of a copy": lambda model: copy.deepcopy(pickle.loads(pickle.dumps(copy.deepcopy(model)))),
}


def logits(model: nn.Module) -> Tensor:
    with torch.no_grad():
        output: Tensor = model(**fresh(batch("llava", EVEN).inputs)).logits
    return output


@QUANTIZES
@pytest.mark.parametrize("way", COPIES)
def test_a_copy_says_once_that_it_runs_dense(way):
    model = tiny("llava")
    wanted = logits(quantized(model) if way == "quantize_dynamic" else model)
    tokenprune.patch(model, "fastv", keep=0.5)
    for _ in range(2):
        twin = COPIES[way](model)
        with pytest.warns(UserWarning, match=f"this LlavaForConditionalGeneration {COPIED}") as told:
            assert torch.equal(logits(twin), wanted)
        assert len([one for one in told if COPIED in str(one.message)]) == 1
        assert torch.equal(logits(twin), wanted)


@QUANTIZES
@pytest.mark.parametrize("way", COPIES)
def test_a_copy_that_is_patched_or_unpatched_has_nothing_to_say(way):
    model = tiny("llava")
    tokenprune.patch(model, "fastv", keep=0.5)
    one, other = COPIES[way](model), COPIES[way](model)
    session = tokenprune.patch(one, "divprune", keep=0.25)
    logits(one)
    assert session.traces[0].n_out < session.traces[0].n_in
    tokenprune.unpatch(other)
    logits(other)


def test_a_copy_of_an_encoder_says_it_too():
    model, given = vits.tiny("hf vit"), vits.inputs("hf vit")
    tokenprune.patch(model, "tome", r=3)
    with pytest.warns(UserWarning, match=f"this ViTForImageClassification {COPIED}"), torch.no_grad():
        copy.deepcopy(model)(**given)


def test_a_compiled_copy_says_it_too_and_is_one_graph():
    model, x = vits.tiny("timm vit"), vits.inputs("timm vit")["x"]
    with torch.no_grad():
        wanted = model(x)
        tokenprune.patch(model, "tome", r=3)
        torch._dynamo.reset()
        compiled = torch.compile(copy.deepcopy(model), backend="eager", fullgraph=True)
        with pytest.warns(UserWarning, match=COPIED):
            torch.testing.assert_close(compiled(x), wanted)
        torch.testing.assert_close(compiled(x), wanted)
    torch._dynamo.reset()


def test_a_copy_can_be_recorded_and_scripted_once_it_is_unpatched():
    model, x = vits.tiny("timm vit"), vits.inputs("timm vit")["x"]
    with torch.no_grad():
        wanted = model(x)
        tokenprune.patch(model, "tome", r=3)
        twin = copy.deepcopy(model)
        with pytest.raises(tokenprune.UnsupportedModelError, match=r"idle hooks left in it"), quiet():
            torch.jit.script(twin)
        tokenprune.unpatch(twin)
        torch.testing.assert_close(torch.fx.symbolic_trace(twin)(x), wanted)
        assert not any(hasattr(hook, "__name__") for hook in model._forward_pre_hooks.values())


# --- quantizers that put modules in the place of others ---------------------------------------------


@QUANTIZES
def test_a_model_that_is_quantized_in_place_and_then_patched_is_pruned():
    model, given = quantized(vits.tiny("hf vit"), inplace=True), vits.inputs("hf vit")
    session = tokenprune.patch(model, "tome", r=3)
    vits.run(model, given)
    assert [trace.n_out for trace in session.traces] == [(13, 13), (10, 10), (7, 7), (4, 4)]
    model = quantized(tiny("llava"), inplace=True)
    session, found = tokenprune.patch(model, "divprune", keep=0.5), logits(model)
    assert session.traces[0].n_out == (6, 6)
    other = tiny("llava")  # the decoder's hooks stand on modules that stay
    tokenprune.patch(other, "divprune", keep=0.5)
    assert torch.equal(logits(quantized(other, inplace=True)), found)


@QUANTIZES
def test_hooks_that_moved_to_other_modules_are_refused_and_unpatching_finds_them():
    model, given = vits.tiny("hf vit"), vits.inputs("hf vit")
    session = tokenprune.patch(model, "tome", r=3)
    quantized(model, inplace=True)
    with pytest.raises(tokenprune.UnsupportedModelError, match=r"took over the hooks.*quantize, and then patch"):
        vits.run(model, given)
    assert running.innermost() is None
    tokenprune.unpatch(model)
    assert not session.installed
    assert hook_counts(model) == {}
    dense = quantized(vits.tiny("hf vit"))
    assert torch.equal(answer(vits.run(model, given)), answer(vits.run(dense, given)))
