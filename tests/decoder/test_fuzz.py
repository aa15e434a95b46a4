"""Fuzz: options x families x inputs, most of them sensible and some not. Whatever is asked, either it is refused with
an error of the library before anything was touched, or every logit is that of an independent dense computation.

Every token that is generated is compared, whatever is chosen on the way: the oracle follows the rules itself. A row is
left open only behind a choice between two candidates that are so close that rounding decides it, which is rare.

`TOKENPRUNE_FUZZ_SEED` chooses other cases; the seed in force is printed with the number of cases.
"""

import copy
import os
import sys
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import replace
from functools import cache
from typing import Any

import pytest
import torch
from families import FAMILIES, MROPE, Batch, Row, batch, fresh, generate, implementations, tiny
from fuzz_checks import NEVER, STEPS, TOWERS, Case, Oracle, check_traces, in_planes
from hypothesis import HealthCheck, Phase, given, note, seed, settings
from hypothesis import strategies as st
from oracle_planes import recorded_planes
from states import hook_counts
from test_pixels import plain
from torch import Tensor, nn
from upstream import FEATURES

import tokenprune

SEED = int(os.environ.get("TOKENPRUNE_FUZZ_SEED", "0"))
N_LAYERS = 4
CASES = 50  # for each family: 1,050 together
FRACTIONS = st.sampled_from([0.01, 0.1, 0.25, 1 / 3, 0.5, 0.75, 0.999, 1.0])
KEEPS = st.one_of(FRACTIONS, st.integers(1, 20), FRACTIONS)
BAD = st.sampled_from([0, -1, 0.0, 1.5, -0.25, float("nan"), float("inf"), True, None, "half", "auto", [0.5]])
OPTIONS: dict[str, dict[str, st.SearchStrategy[Any]]] = {
    "divprune": {"keep": KEEPS},
    "random": {"keep": KEEPS, "seed": st.integers(0, 2**63 - 1)},
    "uniform": {"keep": KEEPS},
    "fastv": {"keep": KEEPS, "layer": st.integers(1, 4)},
    "pyramiddrop": {
        "keep": FRACTIONS,
        "stages": st.sampled_from([(0.25, 0.5, 0.75), (0.5,), (1,), (1, 2, 3), (2, 1), (9,)]),
    },
    "aim": {
        "merge": st.sampled_from([None, 0.125, 0.5, 1.0, 3]),
        "prune": st.sampled_from([None, (0.25, 0.75), (0, 3), (1, 2), (0.4, 0.6), (2, 9), (0.8, 0.2)]),
        "importance": st.sampled_from(["pagerank", "column_sum", "last_query"]),
        "size_weighted": st.booleans(),
        "size_bias": st.booleans(),
    },
    "spatten": {
        "tokens": st.sampled_from([0.3, 0.6, 0.9, 1.0, 1.0, (1.0, 1.0, 0.5, 0.2)]),
        "heads": st.sampled_from([1.0] * 5 + [0.5, 0.75]),
        "values": st.sampled_from([1.0] * 4 + [0.2, 0.5]),
        "quantize": st.sampled_from([None, None, "4+4"]),
        "threshold": st.sampled_from([0.1, 0.0, 1.0, 1.0]),
        "protect_text": st.sampled_from([True, True, False]),
        "keep_first": st.sampled_from([0, 1, 4]),
        "keep_recent": st.sampled_from([1, 2, 5]),
        "kv": st.sampled_from(["persistent", "persistent", "per_step"]),
        "interval": st.sampled_from([1, 3, NEVER]),
    },
    "tome": {
        "r": st.one_of(st.integers(0, 5), st.tuples(st.integers(0, 4), st.just(-1.0)), st.just([0, 3]), st.just([2])),
        "proportional": st.booleans(),
        "restore": st.sampled_from([True, True, True, False]),
    },
}
NAMES = [name for name in tokenprune.list_methods() if name in OPTIONS and name != "tome"] + ["spatten"]


Drawn = tuple[str, tuple[tuple[str, Any], ...]]  # the name of a method and its options


@st.composite
def methods(draw: st.DrawFn, family: str) -> Drawn:
    name = draw(st.sampled_from([*NAMES, "tome", "tome"] if family in TOWERS else NAMES))
    options = {key: draw(values) for key, values in OPTIONS[name].items()}
    if options.get("protect_text") and draw(st.integers(0, 9)):
        options["kv"] = "persistent"
    if draw(st.integers(0, 11)) == 0:
        options[draw(st.sampled_from([*options, "keep", "nonsense"]))] = draw(BAD)
    return name, tuple(options.items())


def one_method(name: str, **fixed: Any) -> st.SearchStrategy[Drawn]:
    """`name` with random options, but those that are `fixed`."""
    drawn = {**OPTIONS[name], **{key: st.sampled_from(values) for key, values in fixed.items()}}
    return st.fixed_dictionaries(drawn).map(lambda options: (name, tuple(options.items())))


@st.composite
def rows(draw: st.DrawFn) -> tuple[Row, ...]:
    found: list[Row] = []
    for _ in range(draw(st.integers(1, 3))):
        parts: list[Any] = [draw(st.integers(1, 5))]
        for _ in range(draw(st.sampled_from([1, 1, 2, 0] if found else [1, 2]))):
            parts += [(draw(st.integers(1, 4)), draw(st.integers(1, 4))), draw(st.integers(1, 4))]
        found.append(tuple(parts))
    return tuple(found)


def seen_by_a_tower(case: Case) -> Case:
    """The case with images of 4 x 4 patches, where it has pixels."""
    squares = (tuple(part if isinstance(part, int) else (4, 4) for part in row) for row in case.rows)
    return replace(case, rows=tuple(squares)) if case.pixels else case


def cases(family: str, **fixed: st.SearchStrategy[Any]) -> st.SearchStrategy[Case]:
    drawn: dict[str, st.SearchStrategy[Any]] = {
        "methods": st.lists(methods(family), min_size=1, max_size=2).map(tuple),
        "positions": st.sampled_from(["original"] * (8 if family in MROPE else 2) + ["packed"]),
        "implementation": st.sampled_from(implementations(family)),
        "rows": rows(),
        "mode": st.sampled_from(["generate", "generate", "forward", "no cache"]),
        "forced": st.booleans(),
        "pixels": st.sampled_from([True, True, False]) if family in TOWERS else st.just(False),
    }
    return st.builds(Case, **{**drawn, **fixed}).map(seen_by_a_tower)


TEXT = {"tokens": [0.3, 0.6, (1.0, 1.0, 0.5, 0.2)], "protect_text": [False], "interval": [1, 3], "keep_recent": [1, 2]}
PLANES = {"quantize": ["4+4"], "threshold": [0.1, 0.3, 1.0]}
KEPT = {"kv": ["persistent"]}
# Of each kind a few cases that are no bad ones, in the families named, with the methods named.
KINDS: dict[str, tuple[tuple[str, ...], tuple[st.SearchStrategy[Drawn], ...]]] = {
    "divprune": (("llava", "qwen2_vl", "molmo2"), (one_method("divprune"),)),
    "random": (("llava_next", "glm4v"), (one_method("random"),)),
    "uniform": (("gemma3", "ovis2"), (one_method("uniform"),)),
    "fastv": (("idefics3", "aya_vision"), (one_method("fastv", layer=[1, 2, 3]),)),
    "pyramiddrop": (("mistral3", "paligemma2"), (one_method("pyramiddrop", stages=[(0.5,), (1, 2, 3), (1,)]),)),
    "aim": (("llava_onevision", "smolvlm"), (one_method("aim", prune=[None, (0.25, 0.75), (1, 2)]),)),
    "tome": (("vipllava", "paligemma"), (one_method("tome", r=[1, 3], restore=[True]),)),
    "two before": (
        ("internvl",),
        (one_method("divprune"), one_method("aim", merge=[0.5], prune=[None], size_bias=[True])),
    ),
    "before and inside": (("perception_lm", "qwen2_5_vl"), (one_method("uniform"), one_method("fastv", layer=[1, 3]))),
    "deepstack": (("qwen3_vl",), (one_method("random"), one_method("fastv", layer=[3]))),
    "visual": (("video_llava", "gemma3"), (one_method("spatten", protect_text=[True], tokens=[0.3, 0.6], **KEPT),)),
    "text": (("llava_next_video",), (one_method("spatten", **KEPT, **TEXT),)),
    "each step": (("idefics3",), (one_method("spatten", kv=["per_step"], **TEXT),)),
    "heads": (("gemma3", "llava"), (one_method("spatten", heads=[0.5, 0.75], **KEPT, protect_text=[True]),)),
    "values": (("paligemma2", "glm4v"), (one_method("spatten", values=[0.2, 0.5], **KEPT, protect_text=[True]),)),
    "planes": (("gemma3", "qwen2_vl"), (one_method("spatten", **PLANES, **KEPT, protect_text=[True]),)),
    "planes and text": (("llava", "internvl"), (one_method("spatten", **PLANES, **KEPT, **TEXT),)),
    "planes and values": (("smolvlm",), (one_method("spatten", **PLANES, **KEPT, values=[0.3]),)),
}


@cache
def models(family: str, implementation: str) -> tuple[nn.Module, nn.Module]:
    """A model that is never patched and one that is patched again and again."""
    dense = tiny(family, implementation)
    return dense, copy.deepcopy(dense)


def run(model: nn.Module, case: Case, prompt: Batch) -> Any:
    if case.mode == "generate":
        return generate(model, prompt.inputs, STEPS)
    with torch.no_grad():
        return model(**fresh(prompt.inputs), **({"use_cache": False} if case.mode == "no cache" else {}))


def check(family: str, case: Case, seen: Counter[str]) -> None:
    dense, model = models(family, case.implementation)
    prompt = batch(family, case.rows)
    n_images = sum(isinstance(part, tuple) for row in case.rows for part in row)
    if case.pixels:
        del prompt.inputs[FEATURES]
        prompt.inputs.update(plain(list(range(n_images))))
    wanted = run(dense, case, prompt)
    if case.pixels:
        run(model, case, prompt)  # transformers puts hooks of its own on a tower that runs for the first time
    before = hook_counts(model)
    try:
        session = tokenprune.patch(model, case.build(), positions=case.positions)
    except tokenprune.TokenPruneError as error:
        note(f"refused: {error}")
        assert hook_counts(model) == before
        seen["refused"] += 1
        return
    features: list[Tensor] = []
    try:
        session.forced = case.forced
        with watched(model, features) if case.pixels else nullcontext(), recorded_planes() as recorded:
            out = run(model, case, prompt)
        assert torch.stack(tuple(out.logits)).shape == torch.stack(tuple(wanted.logits)).shape
        check_traces(session, family, case, prompt)
        assert in_planes(case) or not recorded
        if not session.traces and all(map(untouched, session.methods)):  # they may be told to leave everything alone
            assert all(map(torch.equal, tuple(out.logits), tuple(wanted.logits)))
        oracle = Oracle(dense, family, prompt, features[-1] if features else None)
        seen += oracle.compare(session, case, out, recorded)
        seen[case.mode] += 1
    except tokenprune.UnsupportedModelError as error:
        if not in_planes(case):  # that all layers' caches slide is only seen once there is a cache
            raise
        note(f"refused: {error}")
        seen["refused"] += 1
    finally:
        tokenprune.unpatch(model)
    assert hook_counts(model) == before
    again = run(model, case, prompt)
    assert all(map(torch.equal, tuple(again.logits), tuple(wanted.logits)))


def untouched(method: tokenprune.Method) -> bool:
    """Whether a method without a trace changes nothing."""
    return method.attention_plan(N_LAYERS) is None and method.cache_plan(N_LAYERS) is None


@contextmanager
def watched(model: nn.Module, features: list[Tensor]) -> Iterator[None]:
    """Within the block what the decoder gets of the images is noted, `[images, patches, D]`."""
    projector = next(one for name, one in model.named_modules() if name.endswith("multi_modal_projector"))
    handle = projector.register_forward_hook(lambda module, args, output: features.append(output))
    try:
        yield
    finally:
        handle.remove()


def searched(family: str, found: st.SearchStrategy[Case], n: int, number: int) -> Counter[str]:
    """What became of `n` cases: how many ran and were refused, and how many logits were compared."""
    seen: Counter[str] = Counter()

    @seed(number)
    @settings(
        max_examples=n, phases=[Phase.generate], database=None, deadline=None, suppress_health_check=list(HealthCheck)
    )
    @given(found)
    def one(case: Case) -> None:
        check(family, case, seen)

    one()
    return seen


@pytest.mark.parametrize(("kind", "family"), [(kind, family) for kind in KINDS for family in KINDS[kind][0]])
def test_a_few_cases_of_each_kind_are_right(kind: str, family: str) -> None:
    drawn = cases(family, methods=st.tuples(*KINDS[kind][1]), mode=st.sampled_from(["generate", "generate", "forward"]))
    seen = searched(family, drawn, 5, SEED)
    assert seen["compared"] >= 5, seen


@pytest.mark.matrix
@pytest.mark.parametrize("family", FAMILIES)
def test_any_case_is_refused_or_right(family: str, capsys: pytest.CaptureFixture[str]) -> None:
    number = SEED * len(FAMILIES) + FAMILIES.index(family)
    seen = searched(family, cases(family), CASES, number)
    with capsys.disabled():
        sys.stdout.write(f"\nfuzz {family}: seed {number}, {dict(seen)}\n")
    assert sum(seen[name] for name in ("generate", "forward", "no cache", "refused")) >= CASES
    assert seen["refused"] <= 0.8 * CASES
    assert seen["open"] <= 0.25 * seen["compared"]


FOUND = {
    "the same method twice": Case(
        methods=(("uniform", (("keep", 1.0),)), ("uniform", (("keep", 1.0),))),
        positions="original",
        implementation="sdpa",
        rows=((3, (2, 1), 2, (1, 2), 2),),
        mode="generate",
        forced=True,
    ),
    "a row without an image beside one that has some": Case(
        methods=(("divprune", (("keep", 0.01),)),),
        positions="original",
        implementation="sdpa",
        rows=((1, (1, 1), 1), (1,)),
        mode="generate",
        forced=False,
    ),
}


@pytest.mark.parametrize("name", FOUND)
def test_what_was_found_stays_right(name: str) -> None:
    seen: Counter[str] = Counter()
    check("llava", FOUND[name], seen)
    assert seen["generate"] == 1
