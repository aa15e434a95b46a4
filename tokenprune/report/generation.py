"""One greedy generation, timed or looked into, stage by stage.

The stages are the encoder (everything before the decoder: vision encoder, projector, embedding), the decoder over the
prompt with everything that pruning does in it, the head with the choice of the first token, and the decoding steps.
Both runs of a comparison take the same number of steps: the end of a sequence does not stop them.
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from tokenprune.errors import UnsupportedModelError
from tokenprune.report.flops import decoder_flops_g
from tokenprune.report.measure import Meter, Stopwatch, kv_mib, kv_mib_by_layer, watch_peak, watch_resident
from tokenprune.upstream.generating import GREEDY as GREEDY
from tokenprune.upstream.generating import (
    decoder_apart,
    decoder_layers,
    generate_greedily,
    logits_in,
    tokens_entering,
)


@dataclass(frozen=True)
class Generation:
    """Where the time of one greedy generation went, in milliseconds.

    Attributes:
        first_token_ms: to the first token.
        encoder_ms: of it, before the decoder (vision encoder, embedding); None if the model shows no decoder.
        prefill_ms: of it, in the decoder over the prompt, selection included; likewise.
        decode_ms: per token after the first one; None if only one was generated.
        total_ms: all of it.
    """

    first_token_ms: float
    encoder_ms: float | None
    prefill_ms: float | None
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
        resident_peak_mib: peak resident memory of the process; None on a GPU and where the system does not tell.
        flops_g: billions of floating-point operations by stage, in order: `encoder`, `selection` (before the decoder),
            `prefill` (the decoder over the prompt), `head`, `decode`; only `first_token` and `decode` if the model
            shows no decoder.
        formula_flops_g: what :func:`~tokenprune.report.flops.decoder_flops_g` says `prefill` should be; None if it does
            not know the decoder.
        layer_tokens: length of the sequence that entered each decoder layer in the prefill, text and padding included;
            empty if the decoder shows no layers.
        layer_kv_mib: KV cache of each layer at the end; empty if the model kept none.
        remarks: sentences on what could not be found out, with the reason.
    """

    new_ids: Tensor
    first_logits: Tensor
    kv_mib: float | None
    peak_mib: float
    resident_peak_mib: float | None
    flops_g: dict[str, float]
    formula_flops_g: float | None
    layer_tokens: tuple[int, ...]
    layer_kv_mib: tuple[float, ...]
    remarks: tuple[str, ...] = ()


@contextmanager
def _marked(decoder: nn.Module | None, mark: Callable[[str], object]) -> Iterator[None]:
    """Within the block each call of `decoder` marks "enter", "begin" (after what other hooks do before it) and
    "leave"."""
    handles = []
    try:
        if decoder is not None:  # first in and last out: what pruning does belongs to the decoder
            handles.append(decoder.register_forward_pre_hook(lambda *_: _none(mark("enter")), prepend=True))
            handles.append(decoder.register_forward_pre_hook(lambda *_: _none(mark("begin"))))
            handles.append(decoder.register_forward_hook(lambda *_: _none(mark("leave"))))
        yield
    finally:
        for handle in handles:
            handle.remove()


def _none(_result: object) -> None:
    """What a hook returns that changes nothing."""


def time_generation(model: nn.Module, inputs: Mapping[str, Any], *, max_new_tokens: int) -> Generation:
    """Time one greedy generation of exactly `max_new_tokens` tokens; the end of a sequence does not stop it.

    Args:
        model: a transformers model with ``generate``.
        inputs: what the processor returned.
        max_new_tokens: tokens to generate.
    """
    watch = Stopwatch(next((parameter.device for parameter in model.parameters()), torch.device("cpu")))
    with _marked(decoder_apart(model)[0], watch.mark):
        watch.mark("start")
        output = generate_greedily(model, inputs, max_new_tokens=max_new_tokens, on_token=lambda: watch.mark("token"))
        watch.mark("end")
        del output
    marks = watch.read()
    stages = _stages(marks)
    tokens = [moment for name, moment in marks if name == "token"]
    return Generation(
        first_token_ms=tokens[0],
        encoder_ms=stages.get("encoder"),
        prefill_ms=stages["selection"] + stages["prefill"] if "prefill" in stages else None,
        decode_ms=(tokens[-1] - tokens[0]) / (len(tokens) - 1) if len(tokens) > 1 else None,
        total_ms=marks[-1][1],
    )


def _stages(marks: list[tuple[str, float]]) -> dict[str, float]:
    """What was spent between the marks, by stage; a prompt may come in chunks, then the decoder is entered again."""
    first = next(value for name, value in marks if name == "token")
    prompt = marks[: next(place for place, (name, _) in enumerate(marks) if name == "token")]
    enter, begin, leave = ([value for key, value in prompt if key == name] for name in ("enter", "begin", "leave"))
    decode = marks[-1][1] - first
    if not enter:
        return {"first_token": first, "decode": decode}
    return {
        "encoder": enter[0],
        "selection": sum(begin) - sum(enter),
        "prefill": sum(leave) - sum(begin),
        "head": first - enter[0] - (sum(leave) - sum(enter)),
        "decode": decode,
    }


def inspect_generation(model: nn.Module, inputs: Mapping[str, Any], *, max_new_tokens: int) -> Inspection:
    """Run one greedy generation of exactly `max_new_tokens` tokens and note what it computed, held and returned."""
    logits: list[Tensor] = []
    marks: list[tuple[str, float]] = []
    (decoder, apart), meter = decoder_apart(model), Meter()

    def mark(name: str) -> None:
        marks.append((name, meter.flops))

    def note_logits(_module: nn.Module, _args: Any, output: Any) -> None:
        if "token" not in dict(marks):  # overwritten until the first token is chosen: a prompt may come in chunks
            logits[:] = [logits_in(output)[:, -1].detach().float().cpu()]

    devices = [parameter.device for parameter in model.parameters()]
    handle = model.register_forward_hook(note_logits)
    try:
        with (
            meter,
            watch_peak(devices, meter) as read,
            watch_resident(devices) as read_resident,
            _marked(decoder, mark),
            _layer_lengths(decoder) as lengths,
        ):
            output = generate_greedily(model, inputs, max_new_tokens=max_new_tokens, on_token=lambda: mark("token"))
            highest, resident = read(), read_resident()
    finally:
        handle.remove()
    mark("end")
    if not logits:
        raise UnsupportedModelError(f"generate of {type(model).__name__} did not call the model it belongs to")
    cache, rows = output.cache, logits[0].shape[0]
    stages, formula = _stages(marks), None if decoder is None else decoder_flops_g(decoder, rows=rows, lengths=lengths)
    remarks = [apart, output.remark, *_lacking(decoder, stages, lengths, formula)]
    return Inspection(
        new_ids=output.ids.cpu(),
        first_logits=logits[0],
        kv_mib=None if cache is None else kv_mib(cache),
        peak_mib=highest,
        resident_peak_mib=resident,
        flops_g={stage: flops / 1e9 for stage, flops in stages.items()},
        formula_flops_g=formula,
        layer_tokens=tuple(lengths),
        layer_kv_mib=() if cache is None else kv_mib_by_layer(cache),
        remarks=tuple(filter(None, remarks)),
    )


def _lacking(
    decoder: nn.Module | None, stages: Mapping[str, float], lengths: Sequence[int], formula: float | None
) -> Iterator[str]:
    """Sentences on what could not be found out, so that a report lacks it."""
    if decoder is None:
        return
    name = type(decoder).__name__
    if "prefill" not in stages:
        yield f"The stages before the first token were not told apart: generate did not call the text decoder {name}."
    elif not lengths:
        yield f"Tokens by layer were not counted: {name} shows no list of layers."
    elif formula is None:
        yield (
            f"The prefill has no formula to hold its arithmetic against: the layers of {name} are not all softmax "
            "attention, linear maps and norms of a known build."
        )


@contextmanager
def _layer_lengths(decoder: nn.Module | None) -> Iterator[list[int]]:
    """Note the length of the sequence that enters each layer of `decoder` the first time."""
    layers = [] if decoder is None else decoder_layers(decoder)
    lengths = [0] * len(layers)

    def hook(place: int) -> Callable[..., None]:
        def note(_module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
            if not lengths[place]:
                lengths[place] = tokens_entering(layers[place], args, kwargs)

        return note

    handles = [layer.register_forward_pre_hook(hook(i), with_kwargs=True) for i, layer in enumerate(layers)]
    try:
        yield lengths
    finally:
        for handle in handles:
            handle.remove()
