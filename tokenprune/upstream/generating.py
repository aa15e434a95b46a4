"""Greedy generation with ``generate``, and what is read off the model, its prompt and what comes back."""

import functools
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from torch import Tensor, nn
from torch.utils._pytree import tree_leaves

from tokenprune.errors import UnsupportedModelError
from tokenprune.upstream import facts
from tokenprune.upstream.caches import cache_in, is_cache
from tokenprune.upstream.calls import CACHE, bind, names_of, parameters_of, parts_of, text_decoder
from tokenprune.upstream.check import look_up, missing, need, need_attributes, version_of
from tokenprune.upstream.families import is_text

GREEDY: Mapping[str, object] = {
    "do_sample": False,
    "num_beams": 1,
    "num_return_sequences": 1,
    "eos_token_id": None,
    "stop_strings": None,
    "max_time": None,
    "return_dict_in_generate": True,
}
"""Arguments that make ``generate`` run a fixed number of greedy steps. They hold for one call, no config is touched."""
PROMPTS = ("input_ids", "inputs_embeds")
"""Names of a prompt among the inputs of ``generate``: ids or embeddings."""
_TAP, _LENGTH, _LOGITS, _IDS = "logits_processor", "max_new_tokens", "logits", "sequences"
_NOT_INPUTS = {*GREEDY, *CACHE, "cache_params", _TAP, _LENGTH, "max_length", "generation_config", "labels"}


@dataclass(frozen=True)
class Generated:
    """What one greedy generation returned.

    Attributes:
        ids: the new ids `[B, max_new_tokens]`.
        cache: the KV cache at the end, None where there is none that is made of layers.
        remark: why there is none though one was wanted; empty otherwise.
    """

    ids: Tensor
    cache: Any
    remark: str


@functools.cache
def _check_generate() -> None:
    """Check that ``generate`` takes what a measured run is called with. Looked at once."""
    generate = need("transformers", "GenerationMixin", role="way to generate").generate
    if _TAP not in (seen := names_of(generate)):
        raise missing("argument for a function that sees the logits", of="generate", wanted=[_TAP], seen=seen)
    config = need("transformers", "GenerationConfig", role="settings of generate")()
    need_attributes(config, (*GREEDY, _LENGTH), role="setting")


def generate_greedily(
    model: Any, inputs: Mapping[str, Any], *, max_new_tokens: int, on_token: Callable[[], None]
) -> Generated:
    """Generate exactly `max_new_tokens` tokens; the end of a sequence does not stop it.

    Args:
        model: a transformers model with ``generate``.
        inputs: what the processor returned. Dictionaries in it are not written to.
        max_new_tokens: tokens to generate.
        on_token: called before each token is chosen.

    Raises:
        UnsupportedModelError: something that is needed is not there under any name known.
    """
    generate = look_up(model, "generate", role="way to generate")
    _check_generate()
    lengths: list[int] = []

    def tap(ids: Tensor, scores: Tensor) -> Tensor:
        lengths.append(ids.shape[1])
        on_token()
        return scores

    processors = need("transformers", "LogitsProcessorList", role="list of functions that see the logits")
    fresh = {name: dict(value) if type(value) is dict else value for name, value in inputs.items()}
    output = generate(**fresh, **GREEDY, **{_LENGTH: max_new_tokens, _TAP: processors([tap])})
    ids = parts_of(output).get(_IDS)
    if not isinstance(ids, Tensor):
        raise missing("generated ids", of="what generate returned", wanted=[_IDS], seen=parts_of(output))
    if not lengths:
        raise UnsupportedModelError(
            f"generate of {type(model).__name__} took {_TAP} and never called it, so its steps cannot be told apart; "
            f"transformers {version_of()}"
        )
    by_default = getattr(getattr(model, "generation_config", None), "use_cache", None)
    cache, remark = _cache_of(output, wanted=inputs.get("use_cache", by_default) is not False)
    return Generated(ids[:, -max_new_tokens:], cache, remark)


def _cache_of(output: Any, *, wanted: bool) -> tuple[Any, str]:
    """The KV cache among what ``generate`` returned and, where one is wanted and not found, a sentence on that."""
    cache = cache_in(output)
    if hasattr(cache, "layers") or _halves(cache):
        return cache, ""
    found = f"it returned {', '.join(parts_of(output))}" if cache is None else f"it is a {type(cache).__name__}"
    why = f"The KV cache was not measured: generate gave back none that is made of layers ({found})."
    return None, why if wanted else ""


def stored_by_layer(cache: Any) -> list[list[Tensor]]:
    """The tensors that the layers of a KV cache hold, whatever they are called; counters are left out.

    Args:
        cache: a cache of transformers (anything with `layers`); an encoder-decoder cache has the layers of both halves.

    Raises:
        UnsupportedModelError: it is not made of layers.
    """
    parts = _halves(cache) or [cache]
    if lacking := [type(part).__name__ for part in parts if not hasattr(part, "layers")]:
        raise missing("layers", of=f"the KV cache {lacking[0]}", wanted=["layers"], seen=dir(parts[0]))
    layers = [layer for part in parts for layer in part.layers]
    return [[leaf for leaf in tree_leaves(vars(layer)) if isinstance(leaf, Tensor) and leaf.ndim] for layer in layers]


def _halves(cache: Any) -> list[Any]:
    """The caches that a cache holds instead of layers of its own (encoder-decoder models)."""
    return [part for part in getattr(cache, "__dict__", {}).values() if is_cache(part)]


def logits_in(output: Any) -> Tensor:
    """The logits `[B, L, V]` among what a model returned.

    Raises:
        UnsupportedModelError: there are none.
    """
    logits = getattr(output, _LOGITS, None)
    if not isinstance(logits, Tensor):
        raise missing("logits", of="what the model returned", wanted=[_LOGITS], seen=parts_of(output))
    return logits


def decoder_apart(model: nn.Module) -> tuple[nn.Module | None, str]:
    """The text decoder of a model, whose calls tell the stages of a generation apart; or None and a sentence on why."""
    decoder, name = text_decoder(model), type(model).__name__
    if decoder is None or decoder is model:
        return None, f"The stages before the first token were not told apart: {name} shows no text decoder apart."
    if not is_text(model) and not is_text(decoder):
        return None, (
            f"The stages before the first token were not told apart: {name} names {type(decoder).__name__} as its text "
            "decoder, which holds the vision encoder."
        )
    return decoder, ""


def decoder_layers(decoder: nn.Module) -> list[nn.Module]:
    """The layers of a text decoder; empty where they are not found."""
    lists = [list(child) for child in decoder.children() if isinstance(child, nn.ModuleList)]
    return facts.layers_of(decoder) or max(lists, key=len, default=[])


def tokens_entering(layer: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> int:
    """Length L of the hidden states `[B, L, D]` that a decoder layer is called with.

    Raises:
        UnsupportedModelError: they do not come first.
    """
    parameters = parameters_of(layer)
    given = bind(parameters, args, kwargs)
    states = next((given[name] for name in parameters if name in given), None)
    if not isinstance(states, Tensor) or states.ndim != 3:
        called = f"a call of {type(layer).__name__}"
        raise missing("hidden states", of=called, wanted=["a first argument [B, L, D]"], seen=kwargs)
    return states.shape[1]


def prompt_of(inputs: Mapping[str, Any]) -> Tensor | None:
    """The prompt among the inputs of ``generate``: ids `[B, L]` or embeddings `[B, L, D]`."""
    return next((found for name in PROMPTS if isinstance(found := inputs.get(name), Tensor)), None)


def not_inputs(inputs: Mapping[str, Any]) -> list[str]:
    """Names among the inputs of ``generate`` that are no part of a prompt: settings, labels, a KV cache."""
    return sorted(str(name) for name, value in inputs.items() if name in _NOT_INPUTS or is_cache(value))


def end_ids(model: Any) -> int | list[int] | None:
    """The ids that end a sequence, as the model's settings for ``generate`` have them."""
    config = getattr(model, "generation_config", None)
    found: int | list[int] | None = config and look_up(config, "eos_token_id", role="end of a sequence")
    return found
