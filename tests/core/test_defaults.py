"""What a program sets for all of its tensors changes nothing in what the library computes.

Loading scripts set a device, a dtype or a mode for everything that follows, and some never set it back. The law is read
off the syntax trees: what makes a tensor says on which device and in which dtype. Types are not seen there, so whole
models run under every default as well, and the operations that the library calls meanwhile are looked at.
"""

import ast
import random
import sys
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, ExitStack, contextmanager, nullcontext
from dataclasses import replace
from functools import cache, partial
from pathlib import Path
from typing import Any

import families
import numpy as np
import pytest
import torch
import vits
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode
from torch.utils._pytree import tree_leaves
from two_devices import on, split
from upstream import cache_of

import tokenprune
from tokenprune import ops
from tokenprune.reduction import Merge
from tokenprune.upstream import check

ROOT = Path(__file__).resolve().parents[2]
FILES = sorted(path for folder in ("tokenprune", "kernels") for path in (ROOT / folder).rglob("*.py"))

# --- the law ----------------------------------------------------------------------------------------------------------

# What `torch.NAME(...)` makes is on the default device, in the default dtype, or both, unless the call says otherwise.
# A dtype that follows from the values (of `arange`, `tensor`, `full`) is named as well: 1 becomes 1.0 soon enough.
FACTORIES = frozenset(
    (
        *("arange", "as_tensor", "asarray", "empty", "empty_permuted", "empty_strided", "eye", "full", "linspace"),
        *("logspace", "normal", "ones", "rand", "randint", "randn", "randperm", "range", "scalar_tensor", "tensor"),
        *("tril_indices", "triu_indices", "zeros", "bartlett_window", "blackman_window", "hamming_window"),
        *("hann_window", "kaiser_window", "sparse_coo_tensor", "sparse_csr_tensor", "sparse_compressed_tensor"),
        *("fft.fftfreq", "fft.rfftfreq", "nested.nested_tensor"),
    )
)
# Not in it, for they take both from a tensor or an array: `*_like`, `x.new_*`, `from_numpy`, `where` of a tensor and a
# number, `nonzero` and what else gives indices (int64, the device of `x`).
NEEDS = {
    **dict.fromkeys(FACTORIES, ("device", "dtype")),
    "Generator": ("device",),
    "frombuffer": ("dtype",),  # the CPU
    "from_file": ("dtype",),
    "load": ("map_location",),  # without it tensors go to the default device
}
# Classes of `torch.nn` that make no parameters of their own.
NO_PARAMETERS = ("Module", "ModuleList", "ModuleDict", "Sequential", "Identity", "Parameter", "Buffer")
# Always the default's.
DEFAULT_TYPED = frozenset(
    (
        *("Tensor", "FloatTensor", "DoubleTensor", "HalfTensor", "BFloat16Tensor", "IntTensor", "LongTensor"),
        *("BoolTensor", "get_default_dtype", "get_default_device"),
    )
)
# What belongs to the program, its random numbers among it.
SETTERS = frozenset(
    (
        *("set_default_device", "set_default_dtype", "set_default_tensor_type", "set_float32_matmul_precision"),
        *("set_num_threads", "set_printoptions", "manual_seed", "seed", "set_rng_state"),
        *("use_deterministic_algorithms", "set_deterministic_debug_mode", "autograd.set_detect_anomaly"),
    )
)


def dotted(node: ast.AST) -> str:
    """`torch.fft.fftfreq` of an attribute, with `nn.` for `torch.nn.`; "" of anything but names and dots."""
    if isinstance(node, ast.Name):
        return node.id
    inner = dotted(node.value) if isinstance(node, ast.Attribute) else ""
    return f"{inner}.{node.attr}".replace("torch.nn.", "nn.") if inner and isinstance(node, ast.Attribute) else ""


def is_number(node: ast.AST) -> bool:
    """Whether an expression is a Python number by its looks."""
    if isinstance(node, ast.UnaryOp):
        return is_number(node.operand)
    if isinstance(node, ast.Call):
        return dotted(node.func) in ("float", "int", "bool", "len")
    return isinstance(node, ast.Constant) or dotted(node) in ("torch.inf", "torch.nan", "torch.pi", "math.inf")


def wrong_call(node: ast.Call) -> str:
    """What a call leaves to a default, "" for nothing."""
    root, _, name = dotted(node.func).partition(".")
    given = {keyword.arg for keyword in node.keywords}
    wanted: tuple[str, ...] = ()
    if root == "torch":
        wanted = NEEDS.get(name, ())
        if name in DEFAULT_TYPED:
            return "has the default device or dtype"
        if name in SETTERS:
            return "belongs to the program"
        if name in ("where", "full_like") and len(node.args) == 3 and all(map(is_number, node.args[1:])):
            return "of two Python numbers has the default dtype"
        if name in ("finfo", "iinfo") and not node.args:
            return "without a dtype is the default's"
    elif root == "nn" and name[:1].isupper() and name not in NO_PARAMETERS:
        wanted = ("device", "dtype")
    elif root == "Tensor" and not name:
        return "has the default device and dtype"
    elif (root == "open" and not name) or (
        isinstance(node.func, ast.Attribute) and node.func.attr in ("read_text", "write_text")
    ):
        wanted = ("encoding",)  # else the locale's
    missing = [keyword for keyword in wanted if keyword not in given]
    return f"without {' and '.join(missing)}" if missing else ""


def left_to_defaults(source: str) -> Iterator[str]:
    """What a Python file makes by the defaults of the program, and where it sets them."""
    tree = ast.parse(source)
    called = {id(node.func) for node in ast.walk(tree) if isinstance(node, ast.Call)}
    for node in ast.walk(tree):
        found = ""
        if isinstance(node, ast.ImportFrom) and (node.module or "").partition(".")[0] == "torch":
            hidden = (FACTORIES | DEFAULT_TYPED | SETTERS | {"Generator"}) - {"Tensor"}
            names = [alias.name for alias in node.names if alias.name in hidden]
            found = f"imports {', '.join(names)} by name" if names else ""
        elif isinstance(node, ast.Import):
            renamed = [alias.name for alias in node.names if alias.name == "torch" and alias.asname]
            found = "imports torch by another name" if renamed else ""
        elif isinstance(node, ast.Call) and (wrong := wrong_call(node)):
            found = f"{ast.unparse(node.func)} {wrong}"
        elif isinstance(node, ast.Attribute) and id(node) not in called and dotted(node).startswith("torch."):
            handed_on = dotted(node).removeprefix("torch.") in FACTORIES
            found = f"{ast.unparse(node)} handed on, so that nobody sees how it is called" if handed_on else ""
        if found:
            yield f"line {node.lineno}: {found}"


@pytest.mark.parametrize("path", FILES, ids=lambda path: path.relative_to(ROOT).as_posix())
def test_no_tensor_is_made_without_device_and_dtype(path: Path) -> None:
    assert list(left_to_defaults(path.read_text(encoding="utf-8"))) == []


@pytest.mark.parametrize(
    "source",
    [
        *(f"torch.{name}(3)" for name in sorted(FACTORIES)),
        "torch.zeros(3, dtype=torch.float32)",
        "torch.zeros(3, device=x.device)",
        "torch.zeros(3, **options)",
        "torch.as_tensor([1], device=x.device)",
        "torch.Generator()",
        "torch.load(path)",
        "torch.where(mask, 0.0, -torch.inf)",
        "torch.finfo().min",
        "torch.Tensor([1.0])",
        "Tensor(3)",
        "torch.FloatTensor(3)",
        "dtype = torch.get_default_dtype()",
        "torch.nn.Linear(3, 3)",
        "nn.Linear(3, 3, device=x.device)",
        "torch.set_default_dtype(torch.float16)",
        "torch.manual_seed(0)",
        "from torch import zeros",
        "import torch as th",
        "functools.partial(torch.zeros, 3)",
        "make = torch.empty",
        "path.read_text()",
        "open(path)",
    ],
)
def test_the_law_sees_what_breaks_it(source: str) -> None:
    assert len(list(left_to_defaults(source))) == 1


@pytest.mark.parametrize(
    "source",
    [
        "torch.zeros(3, dtype=torch.float32, device='cpu')",
        "torch.zeros_like(x)",
        "x.new_zeros(3)",
        "torch.from_numpy(array)",
        "torch.where(mask, x, 0.0)",
        "torch.finfo(x.dtype).min",
        "nn.Parameter(x)",
        "class A(nn.Module): pass",
        "isinstance(x, torch.Tensor)",
        "path.read_text(encoding='utf-8')",
        "Image.open(path)",
    ],
)
def test_the_law_lets_pass_what_keeps_it(source: str) -> None:
    assert list(left_to_defaults(source)) == []


class Promotions(TorchFunctionMode):
    """Notes where the library's own lines turn ints or bools into floats of the default dtype: ``ints * 0.5``,
    ``ints / 2``, ``ints.sqrt()``."""

    def __init__(self) -> None:
        super().__init__()
        self.found: set[str] = set()

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        output = func(*args, **(kwargs or {}))
        given = tree_leaves((args, kwargs))
        tensors = [x for x in given if isinstance(x, Tensor)]
        told = any(isinstance(x, torch.dtype) for x in given) or func.__name__ in (
            "float",
            "double",
            "half",
            "bfloat16",
        )
        if tensors and not told and not any(x.is_floating_point() for x in tensors):
            made = any(isinstance(x, Tensor) and x.is_floating_point() for x in tree_leaves(output))
            if made and (line := caller()) is not None:
                self.found.add(f"{line}: {func.__name__}")
        return output


def caller() -> str | None:
    """The line of the library that calls torch, None where somebody else's does."""
    frame: Any = sys._getframe(2)
    while frame is not None and Path(torch.__file__).parent in Path(frame.f_code.co_filename).parents:
        frame = frame.f_back
    path = None if frame is None else Path(frame.f_code.co_filename)
    return f"{path.relative_to(ROOT)}:{frame.f_lineno}" if path in FILES else None


# --- whole models under the defaults ----------------------------------------------------------------------------------

TEXT = {"protect_text": False, "keep_first": 1, "keep_recent": 1, "tokens": 0.53}
DECODER: dict[str, dict[str, Any]] = {
    "aim": {},
    "divprune": {"keep": 0.5},
    "divprune by radius": {"keep": "auto", "radius": 0.3},
    "fastv": {"keep": 0.5, "layer": 1},
    "pyramiddrop": {},
    "random": {"keep": 0.5},
    "spatten": {"heads": 0.5, "values": 0.53, "quantize": "4+4", "interval": 1, **TEXT},
    "spatten by step": {"kv": "per_step", **TEXT},
    "uniform": {"keep": 0.5},
}
ENCODER: dict[str, dict[str, Any]] = {
    "tome": {"r": 3},
    "spatten": {"tokens": 0.5, "heads": 0.7},
}


def test_every_method_is_here() -> None:
    assert {name.partition(" ")[0] for name in (*DECODER, *ENCODER)} == set(tokenprune.list_methods())


@contextmanager
def set_to(setter: Callable[[Any], Any], value: Any, before: Any) -> Iterator[None]:
    setter(value)
    try:
        yield
    finally:
        setter(before)


@contextmanager
def strict() -> Iterator[None]:
    """What people switch on to find faults: everything that is not quite right raises."""
    with ExitStack() as stack:
        stack.enter_context(set_to(torch.use_deterministic_algorithms, True, False))
        stack.enter_context(set_to(torch.set_warn_always, True, False))
        stack.enter_context(torch.autograd.set_detect_anomaly(True))
        stack.enter_context(np.errstate(all="raise"))
        yield


DEFAULTS: dict[str, "Default"] = {
    # "meta" is as far from the CPU as a GPU is. Within ``with torch.device("meta")`` the same code of torch runs.
    "device": lambda: set_to(torch.set_default_device, "meta", None),
    "float16": lambda: set_to(torch.set_default_dtype, torch.float16, torch.float32),
    "float64": lambda: set_to(torch.set_default_dtype, torch.float64, torch.float32),
    "inference": torch.inference_mode,
    "strict": strict,
}
EVERY_DEFAULT = pytest.mark.parametrize("default", DEFAULTS)


def seen(session: tokenprune.Session | None) -> Any:
    """What traces and report say of the last forward, without times."""
    if session is None:
        return None
    traces = [vars(replace(trace, overhead_ms=0.0)) for trace in session.traces]
    assert not any(x.requires_grad for x in tensors_in(traces))
    report = session.report()
    assert str(report)
    return listed(traces), listed([vars(replace(site, overhead_ms=0.0)) for site in report.sites]), report.traffic


def listed(values: Any) -> Any:
    """`values` with lists in place of tensors, to be compared."""
    if isinstance(values, Tensor):
        return values.tolist()
    if isinstance(values, dict):
        return {key: listed(value) for key, value in values.items()}
    return [listed(value) for value in values] if isinstance(values, list | tuple) else values


def tensors_in(root: Any) -> list[Tensor]:
    """Every tensor that hangs on an object, however deep."""
    found, pending, known = [], [root], {}
    while pending:
        one = pending.pop()
        if id(one) in known or isinstance(one, type | str):
            continue
        known[id(one)] = one
        if isinstance(one, Tensor):
            found.append(one)
        elif isinstance(one, dict):
            pending += one.values()
        elif isinstance(one, list | tuple | set):
            pending += one
        elif isinstance(one, nn.Module) or (hasattr(one, "__dict__") and not callable(one)):
            pending += vars(one).values()
    return found


Default = Callable[[], AbstractContextManager[Any]]


@contextmanager
def nothing_drawn() -> Iterator[None]:
    """The random numbers of the program are for the program."""

    def states() -> Any:
        return torch.get_rng_state().tolist(), [*map(str, np.random.get_state())], random.getstate()

    before = states()
    yield
    assert states() == before


def generated(method: str | None, default: Default, *, family: str = "llava") -> Any:
    """What a model that is patched and called under a default gives: tensors, and what it says of them."""
    model = families.tiny(family, families.implementations(family)[0])
    prompt = families.batch(family).inputs
    inputs, again = families.fresh(prompt), families.fresh(prompt)
    with nothing_drawn(), default(), torch.no_grad():
        session = None
        if method is not None:
            session = tokenprune.patch(model, method.partition(" ")[0], **DECODER[method])
        logits = model(**inputs).logits
        said = seen(session)
        options = {"do_sample": False, "output_logits": True, "return_dict_in_generate": True}
        out = model.generate(**again, max_new_tokens=3, **options)
        said = said, seen(session)
    lasting = tensors_in([cache_of(out), model, [] if session is None else session.traces])
    assert {x.device.type for x in lasting} == {"cpu"}
    return [logits, out.sequences, *out.logits], said


def encoded(name: str, method: str | None, default: Default) -> Any:
    """The same of a vision encoder."""
    model, inputs = vits.tiny(name), vits.inputs(name)
    with nothing_drawn(), default(), torch.no_grad():
        session = None if method is None else tokenprune.patch(model, method, **ENCODER[method])
        output = vits.answer(model(**inputs))
        said = seen(session)
    assert {x.device.type for x in tensors_in([model, [] if session is None else session.traces])} == {"cpu"}
    return [output], said


plainly = cache(partial(generated, default=nullcontext))
encoded_plainly = cache(partial(encoded, default=nullcontext))


def check_same(found: Any, wanted: Any) -> None:
    (tensors, said), (others, told) = found, wanted
    for one, other in zip(tensors, others, strict=True):
        assert (one.dtype, one.device) == (other.dtype, other.device)
        assert torch.equal(one, other)
    assert said == told


@EVERY_DEFAULT
@pytest.mark.parametrize("method", [None, *DECODER], ids=lambda method: method or "dense")
def test_a_model_gives_the_same_under_every_default(method: str | None, default: str) -> None:
    check_same(generated(method, DEFAULTS[default]), plainly(method))


@EVERY_DEFAULT
@pytest.mark.parametrize("method", [None, *ENCODER], ids=lambda method: method or "dense")
@pytest.mark.parametrize("name", ["timm eva02", "hf dinov2"])
def test_an_encoder_gives_the_same_under_every_default(name: str, method: str | None, default: str) -> None:
    check_same(encoded(name, method, DEFAULTS[default]), encoded_plainly(name, method))


@pytest.mark.parametrize("method", DECODER)
def test_the_library_leaves_no_dtype_of_a_decoder_to_promotion(method: str) -> None:
    watch = Promotions()
    generated(method, lambda: watch)
    assert watch.found == set()


@pytest.mark.parametrize("method", ENCODER)
def test_the_library_leaves_no_dtype_of_an_encoder_to_promotion(method: str) -> None:
    watch = Promotions()
    encoded("timm vit", method, lambda: watch)
    assert watch.found == set()


@cache
def measured(default: str | None) -> Any:
    """What a report counts under a default, and the drift that it sees."""
    model, inputs = families.tiny("llava"), families.fresh(families.batch("llava").inputs)
    with nullcontext() if default is None else DEFAULTS[default]():
        report = tokenprune.patch(model, "spatten", **TEXT).report(inputs, max_new_tokens=2, repeats=1)
        assert str(report)
    assert report.drift is not None
    costs = {cost.name: (cost.dense, cost.pruned) for cost in report.costs if cost.name.startswith(("flops", "kv"))}
    assert costs
    return costs, report.drift.equal_tokens, report.drift.compared_tokens, report.drift.first_token_kl


@EVERY_DEFAULT
def test_what_is_measured_under_a_default_is_what_is_measured_without_it(default: str) -> None:
    (*counts, divergence), (*wanted, wanted_divergence) = measured(default), measured(None)
    assert counts == wanted
    assert divergence == pytest.approx(wanted_divergence, abs=1e-6)  # torch counts in inference mode by other kernels


@EVERY_DEFAULT
def test_the_self_check_and_the_check_of_methods_pass_under_a_default(
    default: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(check, "TESTED", ("5.0", "5.1"))
    monkeypatch.setattr(check, "_PROVEN", set())
    with DEFAULTS[default]():
        tokenprune.patch(families.tiny("llava"), "divprune", keep=0.5)
        for method, options in [*DECODER.items(), *ENCODER.items()]:
            tokenprune.testing.check_method(tokenprune.api.build_method(method.partition(" ")[0], **options))


@pytest.mark.matrix
@pytest.mark.parametrize("family", families.FAMILIES)
def test_a_model_of_every_family_gives_the_same_under_a_default_device_and_dtype(family: str) -> None:
    method = "divprune" if family in ("gemma3", "paligemma2", "mistral3", "aya_vision") else "spatten by step"
    wanted = generated(method, nullcontext, family=family)
    check_same(generated(method, DEFAULTS["float16"], family=family), wanted)
    try:
        generated(None, DEFAULTS["device"], family=family)
    except NotImplementedError:  # transformers makes the masks of sliding windows on the default device
        assert method == "divprune"
    else:
        check_same(generated(method, DEFAULTS["device"], family=family), wanted)


# --- products of fewer bits -------------------------------------------------------------------------------------------

WHOLE: dict[str, dict[str, Any]] = {
    "aim": {"merge": 1.0, "prune": None},
    "divprune": {"keep": 1.0},
    "fastv": {"keep": 1.0, "layer": 1},
    "pyramiddrop": {"keep": 1.0},
    "random": {"keep": 1.0},
    "spatten": {"tokens": 1.0, "protect_text": False, "interval": 1},
    "uniform": {"keep": 1.0},
}
COARSE: dict[str, "Default"] = {
    "medium": lambda: set_to(torch.set_float32_matmul_precision, "medium", "highest"),
    "autocast": lambda: torch.autocast("cpu", torch.bfloat16),
}


@pytest.mark.parametrize("coarse", COARSE)
@pytest.mark.parametrize("method", WHOLE)
def test_a_model_that_keeps_all_is_the_dense_one_in_products_of_fewer_bits(method: str, coarse: str) -> None:
    prompt = families.batch("llava").inputs

    def answers(patched: bool) -> list[Tensor]:
        model = families.tiny("llava")
        if patched:
            tokenprune.patch(model, method, **WHOLE[method])
        with COARSE[coarse]():
            out = families.generate(model, prompt, 3)
        return [out.sequences, *out.logits]

    for found, wanted in zip(answers(True), answers(False), strict=True):
        assert found.dtype == wanted.dtype
        assert torch.equal(found, wanted)


def repeated(n: int, width: int, *, spread: float) -> Tensor:
    """`n` random vectors, each followed by itself, `[1, 2 n, width]`; `spread` of them, the rest is common to all."""
    generator = torch.Generator().manual_seed(0)
    rows = torch.randn(width, generator=generator) + spread * torch.randn(n, width, generator=generator)
    return rows.repeat_interleave(2, 0)[None]


def test_equal_vectors_are_equal_in_products_of_fewer_bits() -> None:
    """On a processor without such products nothing changes, and nothing can fail."""
    apart, close = repeated(128, 96, spread=100.0), repeated(128, 96, spread=0.05)

    def answers() -> list[Tensor]:
        cover = ops.max_min_cover(apart, radius=1e-5, max_k=256)
        assert cover.n_kept.tolist() == [128]
        assert ops.max_min_cover(close, radius=1e-5, max_k=256).n_kept.tolist() == [128]
        return [cover.order, *ops.bipartite_match(close, r=100), *ops.bipartite_match(close.half(), r=100)]

    with COARSE["medium"]():
        found = answers()
    assert all(map(torch.equal, found, answers()))


def test_a_merge_on_a_gpu_multiplies_no_matrices() -> None:
    """Their products may have the ten bits of TF32 there."""
    x = torch.randn(2, 64, 48, generator=torch.Generator().manual_seed(0))
    merge = Merge(*ops.bipartite_match(x, r=20))
    with COARSE["medium"](), split(nn.Identity(), lambda name: "cuda:0"):
        found = merge.apply(on("cuda:0", x)).cpu()
    assert torch.equal(found, merge.apply(x))
