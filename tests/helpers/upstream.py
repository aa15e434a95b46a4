"""What tests and benches call by the names of the installed transformers: a rename there changes this file alone.

Which of several names holds is read from signatures, newest first, and never from a version. Nothing here comes from
the library, so that what is checked against it stays independent of it.
"""

import inspect
import warnings
from collections.abc import Callable
from functools import cache as once
from typing import Any

import torch
from torch import Tensor
from transformers import DynamicCache, LlamaConfig, LlamaForCausalLM, LlamaModel
from transformers.modeling_outputs import BaseModelOutputWithPooling
from transformers.models.llama.modeling_llama import LlamaDecoderLayer

# --- names of arguments -----------------------------------------------------------------------------------------------


def name_in(function: Callable[..., Any], *names: str) -> str:
    """The first of `names` that `function` takes.

    Raises:
        LookupError: it takes none of them; a rename that this file does not know yet.
    """
    taken = inspect.signature(function).parameters
    for name in names:
        if name in taken:
            return name
    raise LookupError(f"{function.__qualname__} takes none of {', '.join(names)}: it takes {', '.join(taken)}")


CACHES = ("cache", "past_key_values")  # of a forward, of generate and of an output
CACHE = name_in(LlamaModel.forward, *CACHES)
USE_CACHE = name_in(LlamaModel.forward, "use_cache")
EMBEDS = name_in(LlamaModel.forward, "inputs_embeds")
POSITIONS = name_in(LlamaModel.forward, "position_ids")
MASK = name_in(LlamaModel.forward, "attention_mask")
HIDDEN = name_in(LlamaDecoderLayer.forward, "hidden_states")
ROTARY = name_in(LlamaDecoderLayer.forward, "position_embeddings")
# Only some decoders have these, so that no signature is at hand for all.
DEEPSTACK, VISUAL_PLACES = "deepstack_visual_embeds", "visual_pos_masks"
FEATURES = "mm_encoder_outputs"  # no argument of transformers 5.17, whose encoders always run in the model's forward


# --- a cache ----------------------------------------------------------------------------------------------------------


def with_cache(cache: Any) -> dict[str, Any]:
    """The keyword that hands `cache` to a forward of a model, decoder or layer, or to ``generate``."""
    return {CACHE: cache}


def cache_of(output: Any) -> Any:
    """The cache in an output of a model or of ``generate``, or in keyword arguments; None where there is none."""
    return output.get(CACHE)


@once
def accepted_caches() -> tuple[str, ...]:
    """Those of `CACHES` by which a model takes a cache: an old name may go on being accepted, with a warning."""
    config = {"vocab_size": 4, "hidden_size": 4, "intermediate_size": 4, "num_hidden_layers": 1}
    model = LlamaForCausalLM(LlamaConfig(**config, num_attention_heads=1, pad_token_id=0, bos_token_id=1)).eval()

    def accepted(name: str) -> bool:
        cache = DynamicCache()
        with torch.no_grad(), warnings.catch_warnings():
            warnings.simplefilter("ignore", FutureWarning)
            model(torch.tensor([[1, 2]]), **{name: cache})
        return cache.get_seq_length() == 2

    return tuple(name for name in CACHES if accepted(name))


# --- features of images given beforehand ------------------------------------------------------------------------------


def encoder_output(pooled: Any, *, planes: Any = None, indicators: Tensor | None = None) -> Any:
    """What an encoder hands to the model.

    Args:
        pooled: features of the images, a list of `[N, D]` or `[images, N, D]`.
        planes: DeepStack planes, for Qwen3-VL.
        indicators: embeddings of the indicator tokens, for Ovis2.
    """
    if planes is not None:
        from transformers.models.qwen3_vl.modeling_qwen3_vl import BaseModelOutputWithDeepstackFeatures

        return BaseModelOutputWithDeepstackFeatures(pooler_output=pooled, deepstack_features=planes)
    if indicators is not None:
        from transformers.models.ovis2.modeling_ovis2 import BaseModelOutputWithVisualIndicatorFeatures

        return BaseModelOutputWithVisualIndicatorFeatures(pooler_output=pooled, visual_indicator_features=indicators)
    return BaseModelOutputWithPooling(pooler_output=pooled)


def pooled_of(output: Any) -> Any:
    """The features of the images in what an encoder handed out."""
    return output.pooler_output


def with_features(output: Any = None) -> dict[str, Any]:
    """The keyword that gives a model what is `encoder_output` of its images; without it, that there are none."""
    return {FEATURES: {} if output is None else {"image": output}}


def pooled_in(inputs: dict[str, Any]) -> Any:
    """The features of the images in the inputs of a model."""
    return pooled_of(inputs[FEATURES]["image"])


# --- training ---------------------------------------------------------------------------------------------------------


def turn_on_checkpointing(model: Any) -> None:
    """Have the layers of `model` run a second time for their gradients."""
    turn_on = getattr(model, "activation_checkpointing_enable", None) or model.gradient_checkpointing_enable
    turn_on()
