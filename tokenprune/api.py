"""``patch`` and ``unpatch``: find the method and the adapter, check everything, then install."""

import dataclasses
import difflib
from collections.abc import Sequence
from contextlib import ExitStack
from typing import Any

import torch
from torch import nn

from tokenprune.decoder.adapter import DecoderAdapter
from tokenprune.encoder.adapter import EncoderAdapter
from tokenprune.encoder.find import find_encoder
from tokenprune.encoder.reducers import SITE as INSIDE_ENCODER
from tokenprune.encoder.tower import MultimodalAdapter
from tokenprune.engine import Adapter
from tokenprune.errors import OptionError, TokenPruneError, UnknownMethodError, UnsupportedModelError
from tokenprune.methods import METHODS, Method
from tokenprune.methods.base import options_of
from tokenprune.session import Session, forget_copied_hooks, session_of
from tokenprune.upstream.attention import tensor_parallel
from tokenprune.upstream.calls import text_decoder
from tokenprune.upstream.check import needs_proof, note_proof, tested, version_of
from tokenprune.upstream.encoders import TOWERS, encoder_refusal
from tokenprune.upstream.families import FAMILIES, family_of, is_encoder_decoder, refusal, takes_images, untabled

_POSITIONS = ("original", "packed")


def list_methods() -> tuple[str, ...]:
    """Names that :func:`patch` takes."""
    return tuple(sorted(METHODS))


def list_families() -> tuple[str, ...]:
    """Families of models that :func:`patch` takes, as transformers' `model_type` has them; vision encoders of timm
    begin with `timm_`."""
    return tuple(sorted([family.name for family in FAMILIES] + [tower.name for tower in TOWERS]))


def build_method(method: str | Method, **options: Any) -> Method:
    """Make a method out of its name and options.

    Raises:
        UnknownMethodError: no method has this name.
        OptionError: an option is unknown or out of range, or options come with a method that is built already.
    """
    if isinstance(method, Method):
        if options:
            raise OptionError(
                f"options {sorted(options)} were given beside {type(method).__name__}(...), which has its own; "
                f"write patch(model, {type(method).__name__}({', '.join(f'{k}={v!r}' for k, v in options.items())}))"
            )
        return method
    if not isinstance(method, str):
        called = f"; write {method.__name__}(...)" if isinstance(method, type) and issubclass(method, Method) else ""
        raise OptionError(
            f"a method is one of the names {list(list_methods())} or an instance such as "
            f"tokenprune.DivPrune(keep=0.25), got {method!r}{called}"
        )
    if method not in METHODS:
        raise UnknownMethodError(
            f"unknown method {method!r}; known methods are {', '.join(list_methods())}{_meant(method)}"
        )
    cls = METHODS[method]
    if unknown := sorted(set(options) - {entry.name for entry in dataclasses.fields(cls)}):
        has = ", ".join(options_of(cls))
        raise OptionError(f"method {method!r} has no option {', '.join(map(repr, unknown))}; it has {has}")
    return cls(**options)


def _meant(name: str) -> str:
    """What whoever asked for a method of this name may have meant."""
    if ":" in name:
        return (
            "; what command lines take is read by parse_methods of tokenprune.parsing: "
            f"patch(model, list(parse_methods({name!r})))"
        )
    if "+" in name:
        several = ", ".join(f'"{part.strip()}"' for part in name.split("+"))
        return f"; for several in a row give a list: [{several}]"
    close = difflib.get_close_matches(name, METHODS, n=1)
    return f"; did you mean {close[0]!r}?" if close else ""


def patch(
    model: nn.Module,
    method: str | Method | Sequence[str | Method] = "divprune",
    *,
    positions: str = "original",
    self_check: bool = True,
    **options: Any,
) -> Session:
    """Prune the visual tokens of `model` from now on, in place. Patching again replaces the first patch.

    Copies of a patched model are unpatched (``copy.deepcopy``, pickles, ``torch.ao.quantization.quantize_dynamic``) and
    warn when they run: patch the copy, or quantize first. What records the forward into a graph (``torch.jit``,
    ``torch.fx``, ``torch.export`` and the exports that stand on them) is refused; ``torch.compile`` after ``patch`` is
    not.

    Args:
        model: a vision-language model of transformers, or a vision encoder of timm or transformers, see
            :func:`list_families`; also inside of ``DistributedDataParallel``, ``DataParallel`` or a pipeline. Its
            class and parameters stay as they are. Hooks are added; probed attention modules get a proxy config, and
            those that prune heads sliced projections, until :func:`unpatch`.
        method: a name (see :func:`list_methods`), a method, or a list of them, applied one after the other.
        positions: `"original"`: kept tokens keep their positions. `"packed"`: positions are renumbered as if the
            dropped tokens had never been there.
        self_check: on a transformers newer than the newest tested minor, run the decoder on a few random tokens, dense
            and pruned, before anything is installed; once for each class of decoder in a process. It takes three short
            forwards.
        **options: options of the method, when it is given by name; `keep` is the one that matters.

    Returns:
        The session: traces, report, pause; as a context manager it unpatches at the end of the block.

    Raises:
        UnknownMethodError: no method has this name.
        OptionError: an option is unknown, out of range, or cannot be honoured by this model.
        UnsupportedModelError: the model is of a kind that cannot be pruned. In all three cases nothing was touched.
    """
    if isinstance(method, str | Method | type):
        methods: tuple[Method, ...] = (build_method(method, **options),)
    elif isinstance(method, Sequence) and method:
        methods = tuple(build_method(one, **options) for one in method)
    else:
        raise OptionError(
            f"give a method or a list of at least one, got {method!r}; known methods are {', '.join(list_methods())}"
        )
    if positions not in _POSITIONS:
        raise OptionError(f"positions must be one of {', '.join(map(repr, _POSITIONS))}, got {positions!r}")
    model = unwrapped(model)
    adapter = find_adapter(model)
    if isinstance(adapter, EncoderAdapter):
        methods = tuple(one.in_encoder() for one in methods)
    sites = tuple(dict.fromkeys(site for one in methods for site in one.sites()))
    if idle := [type(one).__name__ for one in methods if not one.sites()]:
        raise OptionError(
            f"method {idle[0]} takes part at no site; a method defines a function named after one, such as before_llm"
        )
    earlier = {one for module in model.modules() if (one := session_of(module)) is not None}
    if self_check and isinstance(adapter, DecoderAdapter):
        _prove_newer(adapter, earlier)
    if INSIDE_ENCODER in sites and isinstance(adapter, DecoderAdapter):
        adapter = MultimodalAdapter(adapter)
    _refuse_split(model, sites)
    adapter.preflight(sites=sites, positions=positions)
    session = Session(model, methods, adapter, positions=positions)
    with ExitStack() as stack:
        for one in earlier:
            stack.enter_context(one.lifted())  # else the plan would hold on to what takes their place
        session.plan()
    unpatch(model)
    session.install()
    return session


def unpatch(model: nn.Module) -> None:
    """Take every hook of :func:`patch` out of `model`; the model is as it was. Does nothing on a model that is not
    patched."""
    for module in unwrapped(model).modules():
        if (session := session_of(module)) is not None:
            session.remove()
        forget_copied_hooks(module)


def unwrapped(model: Any) -> Any:
    """The model inside of ``DistributedDataParallel``, ``DataParallel`` or a pipeline; anything else as it is."""
    if isinstance(model, nn.DataParallel | nn.parallel.DistributedDataParallel):
        return model.module
    inner = getattr(model, "model", None)
    return inner if not isinstance(model, nn.Module) and isinstance(inner, nn.Module) else model


def find_adapter(model: nn.Module) -> Adapter:
    """The adapter for `model`; touches nothing.

    Raises:
        UnsupportedModelError: there is none; says what was found and what is supported.
    """
    if not isinstance(model, nn.Module):
        raise UnsupportedModelError(f"patch takes a torch.nn.Module, got {type(model).__name__}")
    name = type(model).__name__
    _refuse_compiled(model)
    supported = f"supported families are {', '.join(list_families())}"
    if (refused := refusal(model)) is not None:
        raise UnsupportedModelError(f"{name} cannot be pruned: {refused[1]}; {supported}")
    if (reason := encoder_refusal(model)) is not None:
        raise UnsupportedModelError(f"{name} cannot be reduced: {reason}; {supported}")
    if family_of(model) is None and not takes_images(model) and (encoder := find_encoder(model)) is not None:
        return encoder
    if is_encoder_decoder(model):
        raise UnsupportedModelError(f"{name} is an encoder-decoder; only decoder-only models are pruned; {supported}")
    decoder = text_decoder(model)
    root = None if decoder is None else _parent(model, decoder)
    if decoder is None or root is None:
        raise UnsupportedModelError(
            f"{name} has no text decoder apart from itself (get_decoder), so there is no place before which to prune "
            f"(transformers {version_of()}); {supported}"
        )
    family = family_of(model) or family_of(root)  # a wrapper has other ancestors than what it wraps
    if family is None:
        return _untabled(model, root, decoder, supported)
    return DecoderAdapter(root, decoder, family, model)


def _untabled(model: nn.Module, root: nn.Module, decoder: nn.Module, supported: str) -> Adapter:
    """An adapter with defaults for a family that has no row, if it passes the self-check."""
    name = type(model).__name__
    family = untabled(root, model)
    if family is None:
        raise UnsupportedModelError(
            f"{name} has no placeholder token for images (image_token_id in its config), so its visual tokens cannot "
            f"be found; {supported}"
        )
    adapter = DecoderAdapter(root, decoder, family, model)
    if family.ids:
        _prove(adapter, f"{name} is not in the table of families and", supported)
    return adapter


def _prove_newer(adapter: DecoderAdapter, earlier: set[Session]) -> None:
    """Run the self-check where transformers is newer than the tested ones, once for each class of decoder.

    Raises:
        UnsupportedModelError: it fails.
    """
    if adapter.row.ids and needs_proof(adapter.decoder):
        called = type(adapter.decoder).__name__
        with ExitStack() as stack:
            for one in earlier:
                stack.enter_context(one.suspended())
            _prove(
                adapter,
                f"transformers {version_of()} is newer than the tested ones, and {called}",
                f"install {tested()}, or give self_check=False at your own risk",
            )
        note_proof(adapter.decoder)


def _prove(adapter: DecoderAdapter, subject: str, supported: str) -> None:
    """Run the self-check on the decoder of `adapter`.

    Raises:
        UnsupportedModelError: it fails.
    """
    from tokenprune.testing import self_check

    try:
        self_check(adapter)
    except TokenPruneError as error:
        raise UnsupportedModelError(f"{subject} failed the self-check: {error}; {supported}") from error
    except Exception as error:
        raise UnsupportedModelError(
            f"{subject} its decoder cannot be called as one that is known ({type(error).__name__}: {error}); "
            f"{supported}"
        ) from error


def _parent(model: nn.Module, child: nn.Module) -> nn.Module | None:
    """The module that holds `child` as a direct child."""
    return next((module for module in model.modules() if any(one is child for one in module.children())), None)


def _refuse_split(model: nn.Module, sites: Sequence[str]) -> None:
    """Under tensor parallelism only what enters the decoder is the same on all processes."""
    inside = [site for site in sites if site != "before_llm"]
    if inside and tensor_parallel(model):
        raise OptionError(
            f"the weights of {type(model).__name__} are split over several processes (tp_plan), each of which sees the "
            f"attention of its own heads only and would choose other tokens at {', '.join(inside)}; use a method that "
            "acts before the decoder alone, such as 'divprune' or AIM(prune=None)"
        )


def _refuse_compiled(model: nn.Module) -> None:
    compiled = any(
        isinstance(module, torch._dynamo.OptimizedModule)
        or getattr(module, "_compiled_call_impl", None) is not None
        or hasattr(module.__dict__.get("forward"), "_torchdynamo_orig_callable")
        for module in model.modules()
    )
    if compiled:
        raise UnsupportedModelError(
            f"{type(model).__name__} is compiled, and hooks added after torch.compile are ignored; patch first, then "
            "compile: tokenprune.patch(model, ...); model = torch.compile(model)"
        )
