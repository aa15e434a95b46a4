"""One greedy generation, timed or inspected, stage by stage; or one forward of a model without ``generate``.

The stages are the encoder (everything before the decoder: vision encoder, projector, embedding), the decoder over the
prompt with everything that pruning does in it, the head with the choice of the first token, and the decoding steps.
Both runs of a comparison take the same number of steps: the end of a sequence does not stop them.
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves

from tokenprune.errors import UnsupportedModelError
from tokenprune.report.measure import Meter, Stopwatch, kv_mib, latency_ms, watch_memory
from tokenprune.upstream.generating import GREEDY as GREEDY
from tokenprune.upstream.generating import (
    decoder_apart,
    decoder_layers,
    generate_greedily,
    logits_in,
    stored_by_layer,
    tokens_entering,
)

Marks = list[tuple[str, float]]
"""What a clock or a counter showed at the named moments of a generation, in order."""


@dataclass(frozen=True)
class Inspection:
    """Everything about one greedy generation that does not vary from run to run.

    Attributes:
        new_ids: generated ids, `[B, max_new_tokens]`, on the CPU.
        first_logits: logits of the first new token, `[B, V]`, fp32, on the CPU.
        amounts: memory and arithmetic, their unit last: `peak_mib` beyond weights and inputs; `resident_peak_mib` of
            the process, where the system tells it; `kv_mib` at the end, if the model kept a cache; billions of
            floating-point operations by stage as in :func:`stages_between`, from `encoder_flops_g` to `total_flops_g`.
        layer_tokens: length of the sequence that entered each decoder layer in the prefill, text and padding included;
            empty if the decoder shows no layers.
        layer_kv_mib: KV cache of each layer at the end; empty if the model kept none.
        remarks: sentences on what could not be found out, with the reason.
    """

    new_ids: Tensor
    first_logits: Tensor
    amounts: dict[str, float]
    layer_tokens: tuple[int, ...]
    layer_kv_mib: tuple[float, ...]
    remarks: tuple[str, ...] = ()


@dataclass(frozen=True)
class ForwardInspection:
    """What does not vary from run to run of a forward of a model without ``generate``, such as a vision transformer.

    Attributes:
        output: the first floating-point tensor that the model returned, rows first; None if there was none.
        amounts: `peak_mib`, `resident_peak_mib` where the system tells it, `total_flops_g`.
    """

    output: Tensor | None
    amounts: dict[str, float]


def time_generation(model: nn.Module, inputs: Mapping[str, Any], *, max_new_tokens: int) -> dict[str, float]:
    """Time one greedy generation of exactly `max_new_tokens` tokens; the end of a sequence does not stop it.

    Args:
        model: a transformers model with ``generate``.
        inputs: what the processor returned.
        max_new_tokens: tokens to generate.

    Returns:
        Milliseconds. `encoder_latency_ms`: everything before the decoder (vision encoder, embedding).
        `prefill_latency_ms`: the decoder over the prompt, selection included. Both are absent if the model shows no
        decoder. `first_token_latency_ms`: from the call to the first token, the two before included.
        `decode_latency_ms`: each token after the first; absent if there is none. `total_latency_ms`: end to end.
    """
    watch = Stopwatch(_devices(model)[0])
    with _marked(decoder_apart(model)[0], watch.mark):
        watch.mark("start")
        output = generate_greedily(model, inputs, max_new_tokens=max_new_tokens, on_token=lambda: watch.mark("token"))
        watch.mark("end")
        del output
    stages = stages_between(watch.read())
    if "prefill" in stages:
        stages["prefill"] += stages.pop("selection")
        del stages["head"]
    if "decode" in stages:
        stages["decode"] /= max_new_tokens - 1
    return {f"{stage}_latency_ms": spent for stage, spent in stages.items()}


def stages_between(marks: Marks) -> dict[str, float]:
    """What was spent in each stage; a prompt may come in chunks, then the decoder is entered again.

    Args:
        marks: "enter", "begin" and "leave" for each call of the decoder, "token" for each token, "end".

    Returns:
        In order: `encoder`, `selection` (before the decoder), `prefill` (the decoder over the prompt), `head`, these
        four if a decoder was called; `first_token` (up to it); `decode` if there are more tokens; `total`.
    """
    names = [name for name, _ in marks]
    prompt = marks[: names.index("token")]
    tokens = [value for name, value in marks if name == "token"]
    stages = {"first_token": tokens[0], "decode": tokens[-1] - tokens[0], "total": marks[-1][1]}
    if len(tokens) == 1:
        del stages["decode"]
    enter, begin, leave = ([value for key, value in prompt if key == name] for name in ("enter", "begin", "leave"))
    if not enter:
        return stages
    inside = sum(leave) - sum(enter)
    return {
        "encoder": enter[0],
        "selection": sum(begin) - sum(enter),
        "prefill": sum(leave) - sum(begin),
        "head": tokens[0] - enter[0] - inside,
        **stages,
    }


@contextmanager
def _marked(decoder: nn.Module | None, mark: Callable[[str], object]) -> Iterator[None]:
    """Within the block each call of `decoder` marks "enter", "begin" (after what other hooks do before it) and
    "leave"."""

    def hook(name: str, *_: object) -> None:
        mark(name)

    with ExitStack() as hooks:
        if decoder is not None:  # first in and last out: what pruning does belongs to the decoder
            hooks.enter_context(decoder.register_forward_pre_hook(partial(hook, "enter"), prepend=True))
            hooks.enter_context(decoder.register_forward_pre_hook(partial(hook, "begin")))
            hooks.enter_context(decoder.register_forward_hook(partial(hook, "leave")))
        yield


def inspect_generation(model: nn.Module, inputs: Mapping[str, Any], *, max_new_tokens: int) -> Inspection:
    """Run one greedy generation of exactly `max_new_tokens` tokens and note what it computed, held and returned."""
    logits: list[Tensor] = []
    marks: Marks = []
    (decoder, apart), meter = decoder_apart(model), Meter()

    def mark(name: str) -> None:
        marks.append((name, meter.flops))

    def note_logits(_module: nn.Module, _args: Any, output: Any) -> None:
        if "token" not in dict(marks):  # overwritten until the first token is chosen: a prompt may come in chunks
            logits[:] = [logits_in(output)[:, -1].detach().float().cpu()]

    with (
        model.register_forward_hook(note_logits),
        meter,
        _marked(decoder, mark),
        _layer_lengths(decoder) as lengths,
    ):
        read_memory = watch_memory(_devices(model), meter)
        output = generate_greedily(model, inputs, max_new_tokens=max_new_tokens, on_token=lambda: mark("token"))
        memory = read_memory()
    mark("end")
    if not logits:
        raise UnsupportedModelError(f"generate of {type(model).__name__} did not call the model it belongs to")
    stages = stages_between(marks)
    layers = [] if output.cache is None else stored_by_layer(output.cache)
    kv = {} if output.cache is None else {"kv_mib": kv_mib(layers)}
    return Inspection(
        new_ids=output.ids.cpu(),
        first_logits=logits[0],
        amounts={**memory, **kv, **{f"{stage}_flops_g": flops / 1e9 for stage, flops in stages.items()}},
        layer_tokens=tuple(lengths),
        layer_kv_mib=tuple(kv_mib([layer]) for layer in layers),
        remarks=tuple(filter(None, [apart, output.remark, _unseen(decoder, stages, lengths)])),
    )


def _unseen(decoder: nn.Module | None, stages: Mapping[str, float], lengths: Sequence[int]) -> str:
    """A sentence on what could not be seen of a decoder, or nothing."""
    name = type(decoder).__name__
    if decoder is not None and "prefill" not in stages:
        return f"The stages before the first token were not told apart: generate did not call the text decoder {name}."
    if decoder is not None and not lengths:
        return f"Tokens by layer were not counted: {name} shows no list of layers."
    return ""


@contextmanager
def _layer_lengths(decoder: nn.Module | None) -> Iterator[list[int]]:
    """Note the length of the sequence that enters each layer of `decoder` the first time."""
    layers = [] if decoder is None else decoder_layers(decoder)
    lengths = [0] * len(layers)

    def note(place: int, layer: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        lengths[place] = lengths[place] or tokens_entering(layer, args, kwargs)

    with ExitStack() as hooks:
        for place, layer in enumerate(layers):
            hooks.enter_context(layer.register_forward_pre_hook(partial(note, place), with_kwargs=True))
        yield lengths


def _forward(model: nn.Module, inputs: Tensor | Mapping[str, Any]) -> Any:
    with torch.no_grad():
        return model(**inputs) if isinstance(inputs, Mapping) else model(inputs)


def time_forward(model: nn.Module, inputs: Tensor | Mapping[str, Any]) -> dict[str, float]:
    """Milliseconds of a forward, as `forward_latency_ms`.

    Args:
        model: takes `inputs` as its one argument or, if it is a mapping, as its keyword arguments.
        inputs: what it is called with.
    """
    return {"forward_latency_ms": latency_ms(lambda: _forward(model, inputs), device=_devices(model)[0])}


def inspect_forward(model: nn.Module, inputs: Tensor | Mapping[str, Any]) -> ForwardInspection:
    """Run a forward and note what it computed, held and returned; arguments as in :func:`time_forward`."""
    with Meter() as meter:
        read_memory = watch_memory(_devices(model), meter)
        output = _forward(model, inputs)
        memory = read_memory()
    values = list(output.values()) if isinstance(output, Mapping) else output
    tensors = [leaf for leaf in tree_leaves(values) if isinstance(leaf, Tensor) and leaf.is_floating_point()]
    return ForwardInspection(next(iter(tensors), None), {**memory, "total_flops_g": meter.flops / 1e9})


def _devices(model: nn.Module) -> list[torch.device]:
    """Where the model's parameters are; a CPU for none."""
    return list(dict.fromkeys(parameter.device for parameter in model.parameters())) or [torch.device("cpu")]
