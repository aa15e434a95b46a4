"""What has to be installed inside a decoder, found out before anything is touched."""

from dataclasses import dataclass, field
from typing import Any

import torch
from torch import nn

from tokenprune.decode import sliced_linear
from tokenprune.decode.eviction import check_layers
from tokenprune.decoder import between_layers as between
from tokenprune.decoder.checks import (
    Cuts,
    check_attention,
    check_checkpointing,
    check_decoder,
    check_entrance,
    check_planes,
)
from tokenprune.decoder.importance import swap
from tokenprune.decoder.state import Forward
from tokenprune.errors import OptionError
from tokenprune.hooks import Hook, Swap
from tokenprune.methods.base import Method
from tokenprune.running import Running, current
from tokenprune.session import Session
from tokenprune.signals import AttentionPlan, CachePlan, Probe, TextGuard
from tokenprune.upstream.attention import attention_of, has_sinks
from tokenprune.upstream.calls import check_forward
from tokenprune.upstream.facts import DecoderFacts, layers_of
from tokenprune.upstream.families import UNNAMED, is_text
from tokenprune.upstream.prompts import Prompt


@dataclass(frozen=True)
class DecoderPlan:
    """What the methods want inside a decoder.

    Attributes:
        hooks: what is to be installed on its layers.
        early: the hooks of layers before the first one that tokens are dropped before, which only a cache needs that
            was pruned there by an earlier patch.
        probes: for each layer that is to be probed what is wanted of its attention.
        guard: which text is kept where text is pruned too.
        plan: what is dropped from the cache while tokens are generated.
        attention: what is left out of every attention.
    """

    hooks: tuple[Hook | Swap, ...] = ()
    early: tuple[Hook, ...] = ()
    probes: dict[int, tuple[Probe, ...]] = field(default_factory=dict)
    guard: TextGuard | None = None
    plan: CachePlan | None = None
    attention: AttentionPlan | None = None

    def open(self, session: Session, outer: Running | None, prompt: Prompt) -> Forward:
        """The state of a forward that begins."""
        return Forward(
            session,
            outer,
            prompt,
            probes=self.probes,
            guard=self.guard,
            plan=self.plan,
            attention=self.attention,
        )


def plan_inside(
    session: Session, root: nn.Module, decoder: nn.Module, facts: DecoderFacts, *, has_images: bool
) -> DecoderPlan:
    """Plan what `session` does inside `decoder`; touches nothing.

    Raises:
        OptionError: the decoder cannot be pruned where the methods want it.
        UnsupportedModelError: it runs layers twice.
    """
    methods = session.methods_at("llm_layer")
    check_entrance(session, facts)
    if not methods and not facts.flash:
        return DecoderPlan()
    modules = find_layers(decoder, facts)
    last: list[Hook | Swap] = [
        Hook(module, "pre", between.unpacking_hook(session)) for module in modules if facts.flash
    ]
    if not methods:
        return DecoderPlan(tuple(last))
    cuts = plan_cuts(methods, len(modules))
    guard, plan = plan_text(methods, facts, n_layers=len(modules), has_images=has_images)
    probes = plan_probes(cuts, modules, plan)
    check_decoder(root, facts, cuts)
    hooks: list[Hook | Swap] = [Hook(decoder, "pre", _checking_hook(session, facts, modules))]
    inner = [Hook(module, "pre", between.layer_hook(session, i, cuts.get(i, ()))) for i, module in enumerate(modules)]
    first = min(cuts, default=len(modules)) if plan is None else 1
    hooks += inner[first:]
    if is_text(root):
        hooks.append(Hook(modules[-1], "post", between.restoring_hook(session)))
    attention = plan_attention(methods, modules)
    swapped = range(len(modules)) if attention is not None else probes
    hooks += [swap(module) for i in swapped if (module := attention_of(modules[i])) is not None]
    if attention is not None:
        check_checkpointing(decoder, *modules)
        hooks += plan_projections(session, attention, modules)
        if attention.threshold is not None:
            check_planes(facts)
    return DecoderPlan((*hooks, *last), tuple(inner[1:first]), probes, guard, plan, attention)


def plan_attention(methods: tuple[Method, ...], modules: list[nn.Module]) -> AttentionPlan | None:
    """What is left out of every attention, None where nothing is.

    Raises:
        OptionError: two methods want something, or a layer has no attention that can be pruned.
    """
    wanting = [(method.name, plan) for method in methods if (plan := method.attention_plan(len(modules)))]
    if not wanting:
        return None
    if len(wanting) > 1:
        raise OptionError(
            f"methods {wanting[0][0]!r} and {wanting[1][0]!r} both prune heads, values or bits; only one can"
        )
    for i, module in enumerate(modules):
        attention = attention_of(module)
        if attention is None:
            raise OptionError(
                f"method {wanting[0][0]!r} prunes heads or values, and layer {i} is a {type(module).__name__} without "
                "attention that can be pruned; give heads=1.0 and values=1.0"
            )
        if has_sinks(attention):
            raise OptionError(
                f"method {wanting[0][0]!r} prunes heads, values or bits, and decoding steps that do so compute a "
                f"plain softmax, but {type(attention).__name__} of layer {i} adds sinks to its logits; give heads=1.0, "
                "values=1.0 and quantize=None"
            )
    return wanting[0][1]


def _checking_hook(session: Session, facts: DecoderFacts, modules: list[nn.Module]) -> Any:
    """The hook of a decoder that looks whether its attention was changed, or checkpointing turned on, since."""

    def check(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        state = current(Forward, session)
        if state is None:
            return
        check_attention(facts)
        if torch.is_grad_enabled() and state.steering:
            check_checkpointing(*(one for one in (module, *modules) if one.training))

    return check


def plan_projections(session: Session, plan: AttentionPlan, modules: list[nn.Module]) -> list[Swap]:
    """What makes layers that keep fewer heads project no others; tells the session where that cannot be."""
    found, whole = list[Swap](), dict[str, list[int]]()
    for i, module in enumerate(modules):
        attention = attention_of(module)
        if plan.heads[i] == 1.0 or attention is None:
            continue
        swapped = sliced_linear.swaps(session, attention, i)
        if isinstance(swapped, str):
            whole.setdefault(swapped, []).append(i)
        else:
            found += swapped
    for reason, layers in whole.items():
        session.remark(
            f"Layers {', '.join(map(str, layers))} project all heads, because {reason}; pruned ones are zeroed, not "
            "skipped."
        )
    return found


def find_layers(decoder: nn.Module, facts: DecoderFacts) -> list[nn.Module]:
    """The decoder's layers.

    Raises:
        OptionError: they are not found.
        UnsupportedModelError: one does not take what pruning between layers works with.
    """
    layers = layers_of(decoder)
    if layers is None:
        raise OptionError(
            f"{facts.called} has no list of {facts.depth} layers to prune between; use a method that prunes before the "
            "decoder"
        )
    for layer in layers:
        check_forward(layer, "mask", "cache")  # rotary embeddings are not needed: positions may be in the embeddings
    facts.check_layers(layers)
    return layers


def plan_cuts(methods: tuple[Method, ...], n_layers: int) -> Cuts:
    """For each layer the methods that drop tokens before it runs (that is, after the layer before it).

    Raises:
        OptionError: a method's stages do not fit the decoder's depth.
    """
    cuts: Cuts = {}
    for method in methods:
        for stage in method.schedule(n_layers):
            if not 0 <= stage.layer < n_layers - 1:
                raise OptionError(
                    f"method {method.name!r} wants to prune after layer {stage.layer}, and tokens can be dropped "
                    f"in this decoder of {n_layers} layers after layers 0 to {n_layers - 2}"
                )
            cuts[stage.layer + 1] = (*cuts.get(stage.layer + 1, ()), (method, stage))
    return cuts


def plan_text(
    methods: tuple[Method, ...], facts: DecoderFacts, *, n_layers: int, has_images: bool
) -> tuple[TextGuard | None, CachePlan | None]:
    """Which text is kept where a method prunes text too, and what is dropped from the cache while tokens are generated.

    Raises:
        OptionError: the methods cannot go together, or not with this decoder.
    """
    texts = [method for method in methods if method.text is not None]
    others = [method for method in methods if method.text is None]
    if not has_images and others:
        raise OptionError(
            f"{facts.called} has no visual tokens, which is what method {others[0].name!r} drops; "
            f"SpAtten(protect_text=False) prunes text; {UNNAMED}"
        )
    if texts and len(methods) > 1:
        raise OptionError(
            f"method {texts[0].name!r} prunes text too, and no other method inside the decoder can be beside it; got "
            f"{', '.join(repr(method.name) for method in methods)}"
        )
    if not texts:
        return None, None
    plan = texts[0].cache_plan(n_layers)
    if plan is not None:
        check_layers(facts)
    return texts[0].text, plan


def plan_probes(cuts: Cuts, layers: list[nn.Module], plan: CachePlan | None = None) -> dict[int, tuple[Probe, ...]]:
    """For each layer that has to be probed what is wanted of its attention.

    A layer of linear attention has no probabilities: it takes the scores of the last layer before it that has
    some.

    Raises:
        OptionError: no layer before a cut has attention that can be probed.
    """
    wanted: dict[int, tuple[Probe, ...]] = {}
    if plan is not None:
        wanted = {i: (plan.probe,) for i, layer in enumerate(layers) if attention_of(layer) is not None}
    for first, group in cuts.items():
        for method, stage in group:
            if (probe := method.probe) is None or (stage.keep == 0 and not probe.cumulative):
                continue  # where all are dropped nobody asks which
            readable = [layer for layer in range(first) if attention_of(layers[layer]) is not None]
            if not readable:
                raise OptionError(
                    f"method {method.name!r} asks for the attention of layers up to {first - 1}, none of which "
                    f"({type(layers[0]).__name__}) has attention that can be read; choose later layers"
                )
            for layer in readable if probe.cumulative else readable[-1:]:
                if probe not in wanted.get(layer, ()):
                    wanted[layer] = (*wanted.get(layer, ()), probe)
    return wanted
