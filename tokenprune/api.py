"""``patch`` and ``unpatch``: build the methods, find the adapter, check everything, then install."""

import dataclasses
import difflib
from collections.abc import Sequence
from contextlib import ExitStack
from typing import Any

import torch
from torch import nn

from tokenprune.decoder.adapter import DecoderAdapter
from tokenprune.encoder.adapter import EncoderAdapter, find_encoder
from tokenprune.encoder.run_state import SITE as INSIDE_ENCODER
from tokenprune.encoder.tower import MultimodalAdapter
from tokenprune.errors import OptionError, TokenPruneError, UnknownMethodError, UnsupportedModelError
from tokenprune.hooks import forget_idle_hooks, sessions_on
from tokenprune.methods import METHODS, Method
from tokenprune.methods.base import options_of
from tokenprune.methods.options import one_of
from tokenprune.session import Session
from tokenprune.upstream.attention import tensor_parallel
from tokenprune.upstream.calls import text_decoder
from tokenprune.upstream.check import needs_proof, note_proof, tested, version_of
from tokenprune.upstream.encoders import TOWERS, encoder_refusal
from tokenprune.upstream.families import FAMILIES, family_of, is_encoder_decoder, refusal, takes_images, untabled

Adapter = DecoderAdapter | EncoderAdapter | MultimodalAdapter
"""Knows where the sites of a family of models are: `preflight` refuses what they cannot honour, `hooks` says what has
to be installed for a session. Neither touches the model."""
_POSITIONS = one_of("original", "packed")


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
    methods = _methods_of(method, options)
    _POSITIONS("positions", positions)
    model = unwrapped(model)
    with ExitStack() as stack:
        for earlier in sessions_on(model):
            stack.enter_context(earlier.suspended())  # what replaces it sees the model as it was
        adapter: Adapter = find_adapter(model)
        if isinstance(adapter, EncoderAdapter):
            methods = tuple(one.in_encoder() for one in methods)
        sites = _sites_of(methods)
        if self_check and isinstance(adapter, DecoderAdapter):
            _prove_newer(adapter)
        if INSIDE_ENCODER in sites and isinstance(adapter, DecoderAdapter):
            adapter = MultimodalAdapter(adapter)
        _refuse_split(model, sites)
        adapter.preflight(sites=sites, positions=positions)
        session = Session(model, methods, adapter.family, positions=positions)
        hooks = adapter.hooks(session)
    unpatch(model)
    session.install(hooks)
    return session


def unpatch(model: nn.Module) -> None:
    """Take every hook of :func:`patch` out of `model`; the model is as it was. Does nothing on a model that is not
    patched."""
    model = unwrapped(model)
    for session in sessions_on(model):
        session.remove()
    for module in model.modules():
        forget_idle_hooks(module)


def list_methods() -> tuple[str, ...]:
    """Names that :func:`patch` takes."""
    return tuple(sorted(METHODS))


def list_families() -> tuple[str, ...]:
    """Families of models that :func:`patch` takes, as transformers' `model_type` has them; vision encoders of timm
    begin with `timm_`."""
    return tuple(sorted([family.name for family in FAMILIES] + [tower.name for tower in TOWERS]))


def _methods_of(method: object, options: dict[str, Any]) -> tuple[Method, ...]:
    """What :func:`patch` was given, as methods.

    Raises:
        OptionError: that is no method and no list of some, or an option is unknown or out of range.
        UnknownMethodError: no method has a name that was given.
    """
    if isinstance(method, str | Method | type):
        return (build_method(method, **options),)
    if not isinstance(method, Sequence) or not method:
        raise OptionError(
            f"give a method or a list of at least one, got {method!r}; known methods are {', '.join(list_methods())}"
        )
    return tuple(build_method(one, **options) for one in method)


def build_method(method: object, **options: Any) -> Method:
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


def _sites_of(methods: tuple[Method, ...]) -> tuple[str, ...]:
    """The sites at which `methods` take part.

    Raises:
        OptionError: one takes part nowhere.
    """
    for one in methods:
        if not one.sites():
            raise OptionError(
                f"method {type(one).__name__} takes part at no site; a method defines a function named after one, such "
                "as before_llm"
            )
    return tuple(dict.fromkeys(site for one in methods for site in one.sites()))


def unwrapped(model: Any) -> nn.Module:
    """The model inside of ``DistributedDataParallel``, ``DataParallel`` or a pipeline; any other one as it is.

    Raises:
        UnsupportedModelError: it is no model.
    """
    inner = model
    if isinstance(model, nn.DataParallel | nn.parallel.DistributedDataParallel):
        inner = model.module
    elif not isinstance(model, nn.Module):
        inner = getattr(model, "model", None)
    if not isinstance(inner, nn.Module):
        raise UnsupportedModelError(f"patch takes a torch.nn.Module, got {type(model).__name__}")
    return inner


def find_adapter(model: nn.Module) -> DecoderAdapter | EncoderAdapter:
    """The adapter for `model`, which knows where its sites are and makes the hooks; touches nothing.

    Raises:
        UnsupportedModelError: there is none; says what was found and what is supported.
    """
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
    known = family_of(model) or family_of(root)  # a wrapper has other ancestors than what it wraps
    family = known or untabled(root, model)
    if family is None:
        raise UnsupportedModelError(
            f"{name} has no placeholder token for images (image_token_id in its config), so its visual tokens cannot "
            f"be found; {supported}"
        )
    adapter = DecoderAdapter(root, decoder, family, model)
    if known is None and family.ids:
        _prove(adapter, f"{name} is not in the table of families and", supported)
    return adapter


def _refuse_compiled(model: nn.Module) -> None:
    if any(
        isinstance(module, torch._dynamo.OptimizedModule)
        or getattr(module, "_compiled_call_impl", None) is not None
        or hasattr(module.__dict__.get("forward"), "_torchdynamo_orig_callable")
        for module in model.modules()
    ):
        raise UnsupportedModelError(
            f"{type(model).__name__} is compiled, and hooks added after torch.compile are ignored; patch first, then "
            "compile: tokenprune.patch(model, ...); model = torch.compile(model)"
        )


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


def _prove_newer(adapter: DecoderAdapter) -> None:
    """Run the self-check where transformers is newer than the tested ones, once for each class of decoder.

    Raises:
        UnsupportedModelError: it fails.
    """
    if adapter.row.ids and needs_proof(adapter.decoder):
        subject = f"transformers {version_of()} is newer than the tested ones, and {type(adapter.decoder).__name__}"
        _prove(adapter, subject, f"install {tested()}, or give self_check=False at your own risk")
        note_proof(adapter.decoder)


def _prove(adapter: DecoderAdapter, subject: str, advice: str) -> None:
    """Run the self-check on the decoder of `adapter`.

    Raises:
        UnsupportedModelError: it fails.
    """
    from tokenprune.testing import self_check

    try:
        self_check(adapter)
    except TokenPruneError as error:
        raise UnsupportedModelError(f"{subject} failed the self-check: {error}; {advice}") from error
    except Exception as error:
        found = f"its decoder cannot be called as one that is known ({type(error).__name__}: {error})"
        raise UnsupportedModelError(f"{subject} {found}; {advice}") from error
