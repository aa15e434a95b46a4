"""Fuzz: options x families x inputs, most of them sensible and some not. Whatever is asked, either it is refused with
an error of the library before anything was touched, or every logit is that of an independent dense computation.

`TOKENPRUNE_FUZZ_SEED` chooses other cases; the seed in force is printed with the number of cases.
"""

import copy
import os
import sys
from collections import Counter
from dataclasses import dataclass
from functools import cache
from typing import Any

import pytest
import torch
from families import FAMILIES, MROPE, Batch, Row, batch, fresh, generate, implementations, tiny
from hypothesis import HealthCheck, given, note, seed, settings
from hypothesis import strategies as st
from oracle import check_steps
from oracle_layers import alive_by_layer, layered_logits, layers_of
from test_state import hook_counts
from torch import Tensor, nn

import tokenprune
from tokenprune.schedule import count

SEED = int(os.environ.get("TOKENPRUNE_FUZZ_SEED", "0"))
CASES = 50  # for each family: 1,050 together
STEPS = 2
TOLERANCE = 2e-4


@dataclass(frozen=True)
class Case:
    """One call of `patch` and what runs after it."""

    methods: tuple[tuple[str, tuple[tuple[str, Any], ...]], ...]
    positions: str
    implementation: str
    rows: tuple[Row, ...]
    mode: str
    forced: bool

    def build(self) -> list[tokenprune.Method]:
        return [tokenprune.api.build_method(name, **dict(options)) for name, options in self.methods]


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
    },
    "spatten": {"tokens": st.sampled_from([0.3, 0.6, 0.9, 1.0])},
}


@st.composite
def methods(draw: st.DrawFn) -> tuple[str, tuple[tuple[str, Any], ...]]:
    name = draw(st.sampled_from([name for name in tokenprune.list_methods() if name in OPTIONS]))
    options = {key: draw(values) for key, values in OPTIONS[name].items()}
    if draw(st.integers(0, 11)) == 0:
        options[draw(st.sampled_from([*options, "keep", "nonsense"]))] = draw(BAD)
    return name, tuple(options.items())


@st.composite
def rows(draw: st.DrawFn) -> tuple[Row, ...]:
    found: list[Row] = []
    for _ in range(draw(st.integers(1, 3))):
        parts: list[Any] = [draw(st.integers(1, 5))]
        for _ in range(draw(st.sampled_from([1, 1, 2, 0] if found else [1, 2]))):
            parts += [(draw(st.integers(1, 4)), draw(st.integers(1, 4))), draw(st.integers(1, 4))]
        found.append(tuple(parts))
    return tuple(found)


def cases(family: str) -> st.SearchStrategy[Case]:
    return st.builds(
        Case,
        methods=st.lists(methods(), min_size=1, max_size=2).map(tuple),
        positions=st.sampled_from(["original"] * (8 if family in MROPE else 2) + ["packed"]),
        implementation=st.sampled_from(implementations(family)),
        rows=rows(),
        mode=st.sampled_from(["generate", "generate", "forward", "no cache"]),
        forced=st.booleans(),
    )


@cache
def models(family: str, implementation: str) -> tuple[nn.Module, nn.Module]:
    """A model that is never patched and one that is patched again and again."""
    dense = tiny(family, implementation)
    return dense, copy.deepcopy(dense)


def check_traces(session: tokenprune.Session, case: Case, prompt: Batch) -> None:
    """Counts are those that `keep` says, text stays, and what is kept is part of what came."""
    ids = prompt.inputs["input_ids"]
    left = [(row == 100).nonzero()[:, 0].tolist() for row in ids]
    keeps = {name: dict(options).get("keep") for name, options in case.methods}
    once = len(keeps) == len(case.methods)
    for trace in session.traces:
        assert trace.status == "applied", trace
        assert trace.overhead_ms >= 0
        for row, visual in enumerate(left):
            assert trace.visual_indices[row].tolist() == visual
            kept = trace.kept_indices[row].tolist()
            assert sorted(set(kept)) == kept
            assert set(kept) <= set(visual)
            assert (len(visual), len(kept)) == (trace.n_in[row], trace.n_out[row])
            if trace.site == "before_llm":
                assert sum(trace.images[row]) == len(visual)
                if once and trace.method != "aim":
                    assert len(kept) == sum(count(keeps[trace.method], size) for size in trace.images[row])
            left[row] = kept


def check_logits(
    dense: nn.Module, family: str, case: Case, out: Any, wanted: Any, session: tokenprune.Session, prompt: Batch
) -> None:
    """Against a dense run on the kept tokens, or at full length with a mask for each layer."""
    if not session.traces:  # methods may be told to leave everything alone
        torch.testing.assert_close(tuple(out.logits), tuple(wanted.logits), atol=0, rtol=0)
        return
    sites = {trace.site for trace in session.traces if trace.n_in != trace.n_out}
    packed = case.positions == "packed"
    if sites <= {"before_llm"} and case.mode == "generate":
        check_steps(dense, family, out, session.traces, prompt, STEPS, packed=packed, tolerance=TOLERANCE)
    elif case.mode == "generate" and not packed:
        steps = torch.stack(out.logits, 1)
        _check_layered(dense, family, steps[:, 0], session, prompt)
    elif not packed:
        _check_layered(dense, family, out.logits[:, -1], session, prompt)


def _check_layered(dense: nn.Module, family: str, last: Tensor, session: tokenprune.Session, prompt: Batch) -> None:
    n_layers = len(layers_of(dense.get_decoder()))
    for row, parts in enumerate(prompt.rows):
        single = batch(family, (parts,), seeds=(row,))
        length = single.inputs["input_ids"].shape[1]
        alive = alive_by_layer(session.traces, row, prompt.pads[row], length, n_layers)
        wanted = layered_logits(dense, family, single, alive)[-1]
        torch.testing.assert_close(last[row], wanted, atol=TOLERANCE, rtol=TOLERANCE)


def run(model: nn.Module, case: Case, prompt: Batch) -> Any:
    if case.mode == "generate":
        return generate(model, prompt.inputs, STEPS)
    with torch.no_grad():
        return model(**fresh(prompt.inputs), **({"use_cache": False} if case.mode == "no cache" else {}))


def check(family: str, case: Case, seen: Counter[str]) -> None:
    dense, model = models(family, case.implementation)
    prompt = batch(family, case.rows)
    wanted = run(dense, case, prompt)
    try:
        session = tokenprune.patch(model, case.build(), positions=case.positions)
    except tokenprune.TokenPruneError as error:
        note(f"refused: {error}")
        assert hook_counts(model) == {}
        seen["refused"] += 1
        return
    try:
        session.forced = case.forced
        out = run(model, case, prompt)
        assert bool(out.logits[0].isfinite().all())
        assert torch.stack(tuple(out.logits)).shape == torch.stack(tuple(wanted.logits)).shape
        check_traces(session, case, prompt)
        merged = any(name == "aim" and dict(options).get("merge") is not None for name, options in case.methods)
        if not merged:
            check_logits(dense, family, case, out, wanted, session, prompt)
        seen["merged" if merged else case.mode] += 1
    finally:
        tokenprune.unpatch(model)
    assert hook_counts(model) == {}
    again = run(model, case, prompt)
    assert all(map(torch.equal, tuple(again.logits), tuple(wanted.logits)))


@pytest.mark.matrix
@pytest.mark.parametrize("family", FAMILIES)
def test_any_case_is_refused_or_right(family: str, capsys: pytest.CaptureFixture[str]) -> None:
    seen: Counter[str] = Counter()
    number = SEED * len(FAMILIES) + FAMILIES.index(family)

    @seed(number)
    @settings(max_examples=CASES, database=None, deadline=None, suppress_health_check=list(HealthCheck))
    @given(cases(family))
    def one(case: Case) -> None:
        check(family, case, seen)

    one()
    with capsys.disabled():
        sys.stdout.write(f"\nfuzz {family}: seed {number}, {sum(seen.values())} cases: {dict(seen)}\n")
    assert sum(seen.values()) >= CASES
    assert seen["refused"] <= 0.8 * CASES


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
