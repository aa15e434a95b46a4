"""One greedy generation, timed or looked into.

Prefill latency is the time to the first token of ``generate``: vision encoder, embedding, the decoder over the prompt
and the head. The decoder's own part is reported beside it, with everything that pruning does in it. Both runs of a
comparison take the same number of steps: the end of a sequence does not stop them.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from tokenprune.measure import Meter, Stopwatch, kv_mib, watch_peak

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


@dataclass(frozen=True)
class Generation:
    """Where the time of one greedy generation went, in milliseconds.

    Attributes:
        prefill_ms: to the first token.
        encoder_ms: of it, before the decoder (vision encoder, embedding); None if the model shows no decoder.
        decoder_ms: of it, in the decoder over the prompt, selection included; likewise.
        decode_ms: per token after the first one; None if only one was generated.
        total_ms: all of it.
    """

    prefill_ms: float
    encoder_ms: float | None
    decoder_ms: float | None
    decode_ms: float | None
    total_ms: float


@dataclass(frozen=True)
class Inspection:
    """Everything about one greedy generation that does not vary from run to run.

    Attributes:
        new_ids: generated ids, `[B, max_new_tokens]`, on the CPU.
        first_logits: logits of the first new token, `[B, V]`, fp32, on the CPU.
        kv_mib: KV cache at the end; None if the model kept none.
        peak_mib: peak memory beyond weights and inputs.
        prefill_flops_g: billions of floating-point operations up to the first token.
        total_flops_g: the same for the whole generation.
    """

    new_ids: Tensor
    first_logits: Tensor
    kv_mib: float | None
    peak_mib: float
    prefill_flops_g: float
    total_flops_g: float


def _greedy(model: Any, inputs: Mapping[str, Any], max_new_tokens: int, on_token: Callable[[], None]) -> Any:
    """Generate; `on_token` is called before each token is chosen. Dictionaries among the inputs are not written to."""
    from transformers import LogitsProcessorList

    def tap(input_ids: Tensor, scores: Tensor) -> Tensor:
        on_token()
        return scores

    fresh = {name: dict(value) if type(value) is dict else value for name, value in inputs.items()}
    return model.generate(**fresh, **GREEDY, max_new_tokens=max_new_tokens, logits_processor=LogitsProcessorList([tap]))


def time_generation(model: nn.Module, inputs: Mapping[str, Any], *, max_new_tokens: int) -> Generation:
    """Time one greedy generation of exactly `max_new_tokens` tokens; the end of a sequence does not stop it.

    Args:
        model: a transformers model with ``generate``.
        inputs: what the processor returned.
        max_new_tokens: tokens to generate.
    """
    watch = Stopwatch(next((parameter.device for parameter in model.parameters()), torch.device("cpu")))
    get_decoder: Any = getattr(model, "get_decoder", None)
    decoder = get_decoder() if callable(get_decoder) else None
    handles = []
    try:
        if isinstance(decoder, nn.Module):  # first in and last out: what pruning does belongs to the decoder's time
            handles.append(decoder.register_forward_pre_hook(lambda *_: watch.mark("enter"), prepend=True))
            handles.append(decoder.register_forward_hook(lambda *_: watch.mark("leave")))
        watch.mark("start")
        output = _greedy(model, inputs, max_new_tokens, lambda: watch.mark("token"))
        watch.mark("end")
        del output
    finally:
        for handle in handles:
            handle.remove()
    return _generation(watch.read())


def _generation(marks: list[tuple[str, float]]) -> Generation:
    tokens = [moment for name, moment in marks if name == "token"]
    entered = [moment for name, moment in marks if name == "enter" and moment <= tokens[0]]
    left = [moment for name, moment in marks if name == "leave" and moment <= tokens[0]]
    return Generation(
        prefill_ms=tokens[0],
        encoder_ms=entered[0] if entered else None,
        decoder_ms=sum(left) - sum(entered) if entered else None,
        decode_ms=(tokens[-1] - tokens[0]) / (len(tokens) - 1) if len(tokens) > 1 else None,
        total_ms=marks[-1][1],
    )


def inspect_generation(model: nn.Module, inputs: Mapping[str, Any], *, max_new_tokens: int) -> Inspection:
    """Run one greedy generation of exactly `max_new_tokens` tokens and note what it computed, held and returned."""
    logits: list[Tensor] = []
    flops: list[int] = []

    def note_logits(_module: nn.Module, _args: Any, output: Any) -> None:
        if not flops:  # overwritten until the first token is chosen: a prompt may come in chunks
            logits[:] = [output.logits[:, -1].detach().float().cpu()]

    handle = model.register_forward_hook(note_logits)
    try:
        with Meter() as meter, watch_peak([parameter.device for parameter in model.parameters()], meter) as read:
            output = _greedy(model, inputs, max_new_tokens, lambda: flops.append(meter.flops))
            highest = read()
    finally:
        handle.remove()
    cache = getattr(output, "past_key_values", None)
    return Inspection(
        new_ids=output.sequences[:, -max_new_tokens:].cpu(),
        first_logits=logits[0],
        kv_mib=None if cache is None else kv_mib(cache),
        peak_mib=highest,
        prefill_flops_g=flops[0] / 1e9,
        total_flops_g=meter.flops / 1e9,
    )
