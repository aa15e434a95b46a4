"""Calls of a model that is patched now and then: each is written down, and its traces and logits are checked."""

import copy
import random
from collections.abc import Iterator
from contextlib import contextmanager
from functools import cache as once
from typing import Any

import families
import pytest
import torch
from families import DIM, IMAGE, fresh, generate
from hybrid import CONFIG
from soak_talk import HYBRID, NEVER, Talk
from states import hook_counts
from torch import nn
from upstream import EMBEDS, POSITIONS, cache_of

import tokenprune
from tokenprune.schedule import count, share

FAMILIES = ("llava", "qwen3_vl", "gemma3", HYBRID)


@contextmanager
def known_hybrid() -> Iterator[None]:
    """Within the block the tables of the tests know the hybrid family."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(families.CONFIGS, HYBRID, CONFIG)
        patch.setattr(families, "MROPE", (*families.MROPE, HYBRID))
        yield


@once
def models(family: str, implementation: str, window: int | None) -> tuple[nn.Module, nn.Module, nn.Module]:
    """A model that is never patched, one that is patched again and again, and one that drafts for it."""
    dense = families.tiny(family, implementation, **({"text_config": {"sliding_window": window}} if window else {}))
    helper = copy.deepcopy(dense)
    with torch.no_grad():
        for parameter in helper.lm_head.parameters():
            parameter.add_(0.05 * torch.randn(parameter.shape, generator=torch.Generator().manual_seed(5)))
    return dense, copy.deepcopy(dense), helper


class Calls:
    """A model and what is in force on it; `log` tells what was done, `seed` how everything is drawn."""

    def __init__(self, seed: int) -> None:
        self.seed, self.rng = seed, random.Random(seed)
        self.family = FAMILIES[seed % len(FAMILIES)]
        implementation = self.rng.choice(("sdpa", "sdpa", "eager"))
        window = self.rng.choice((None, 9, 24)) if self.family == "gemma3" else None
        self.dense, self.model, self.helper = models(self.family, implementation, window)
        self.config, self.hooks = self.dense.get_decoder().config, hook_counts(self.model)
        self.window = self.config.sliding_window if self.family == "gemma3" else NEVER
        self.session: tokenprune.Session | None = None
        self.talk: Talk | None = None
        self.paused = False
        self.log = [" ".join(map(str, filter(None, (self.family, implementation, window))))]
        torch.manual_seed(seed)

    def note(self, *words: Any) -> None:
        self.log[-1] += "".join(f" {word}" for word in words)

    def methods(self, kind: Any) -> list[Any]:
        """Those of the methods in force that are of a kind."""
        return [one for one in (self.session.methods if self.session is not None else ()) if isinstance(one, kind)]

    @property
    def inside(self) -> bool:
        """Whether tokens leave inside the decoder."""
        return self.session is not None and bool(self.session.methods_at("llm_layer"))

    @property
    def evicts(self) -> bool:
        """Whether text leaves."""
        return any(not one.protect_text and one.tokens != 1.0 for one in self.methods(tokenprune.SpAtten))

    @property
    def heads(self) -> Any:
        """The fraction of the heads that each layer keeps, None where none leaves."""
        found = [one.heads for one in self.methods(tokenprune.SpAtten) if one.heads != 1.0]
        return found[0] if found and not self.paused else None

    @contextmanager
    def watched(self, talk: Talk, *, first_only: bool = False) -> Iterator[None]:
        """Within the block calls of the model are written down in `talk`; behind it their logits are compared."""
        before: dict[str, Any] = {}

        def enter(module: nn.Module, args: Any, kwargs: dict[str, Any]) -> None:
            cache = cache_of(kwargs)
            before.update(
                past=0 if cache is None else int(cache.get_seq_length()), traces=self.session and self.session.traces
            )

        def leave(module: nn.Module, args: Any, kwargs: dict[str, Any], out: Any) -> None:
            past, ids = before["past"], kwargs.get("input_ids")
            if first_only and past:
                return
            ids = talk.ids[:, past : past + kwargs[EMBEDS].shape[1]] if ids is None else ids
            talk.hear(past, ids, self.dense)
            for trace in self._checked_traces(talk, before["traces"], past):
                talk.drop(trace, past, self.session)
            talk.evict(cache_of(out), may=self.evicts)
            if self.heads is not None:
                talk.steer(self.dense, self.heads, past)
            talk.answer(out.logits)

        handles = [
            self.model.register_forward_pre_hook(enter, with_kwargs=True),
            self.model.register_forward_hook(leave, with_kwargs=True),
        ]
        try:
            yield
        finally:
            for handle in handles:
                handle.remove()
        talk.compare(self.dense)

    def _checked_traces(self, talk: Talk, before: Any, past: int) -> Any:
        """The traces of a call that left tokens out: they belong to its images, and a call without has no new ones."""
        if self.session is None:
            return ()
        traces, spots = self.session.traces, talk.spots[:, past : talk.n]
        new, texts = bool(spots.any()), self.evicts and not self.paused and talk.n - past > 1
        if self.paused or (past and not new):
            assert traces is before, "a call that brings no image has new traces"
            return self.session.later_traces[-1] if texts else ()
        if all(isinstance(one, tokenprune.SpAtten) and one.tokens == 1.0 for one in self.session.methods):
            return ()  # heads leave no traces
        assert traces is not before, "a call that brings a prompt has no new traces"
        if not new and not texts:
            assert {(trace.status, trace.reason) for trace in traces} <= {("skipped", "no image in this call")}
            return ()
        left = [row.nonzero()[:, 0].tolist() for row in spots]
        entered = list(map(len, left))
        for trace in traces:
            if trace.site == "before_llm" and not new:
                assert trace.status == "skipped"
                continue
            assert trace.status == "applied", trace
            method = next(one for one in self.session.methods if one.name == trace.method)
            for row, (seen, kept) in enumerate(zip(trace.visual_indices, trace.kept_indices, strict=True)):
                if texts and trace.site == "llm_layer":  # from here on text is among what may go
                    assert {i for i in seen.tolist() if spots[row, i]} <= set(left[row]), "what left has come back"
                    left[row] = seen.tolist()
                assert seen.tolist() == left[row], "a trace speaks of tokens that are not there"
                left[row] = kept.tolist()
                assert sorted({*left[row]}) == left[row]
                assert {*left[row]} <= {*seen.tolist()}
                if trace.site == "before_llm":
                    keep = method.merge if trace.method == "aim" else method.keep
                    assert len(kept) == sum(count(keep, size) for size in trace.images[row])
                elif trace.method == "fastv":
                    assert len(kept) == min(len(seen), share(method.keep, entered[row]))
            texts = texts and trace.site != "llm_layer"
            entered = list(map(len, left)) if trace.site == "before_llm" else entered
        return [trace for trace in traces if trace.status == "applied"]

    def forward(self, talk: Talk, start: int, **options: Any) -> Any:
        """The model's forward for all tokens of `talk` from `start` on."""
        inputs = fresh(talk.inputs(start, whole=False))
        if start or self.family not in families.MROPE:
            inputs[POSITIONS] = talk.positions(self.model, start)
        with torch.no_grad():
            return self.model(**{**inputs, **options})

    def generate(self, talk: Talk, start: int, n: int, **options: Any) -> Any:
        """``generate`` for all tokens of `talk`, of which `start` are in the cache."""
        talk.positions(self.model, start)
        return generate(self.model, talk.inputs(start, whole=True), n, **options)

    def draw(self, talk: Talk, parts: list[list[Any]]) -> None:
        """Append to each row of `talk` text (its length) and pictures (rows and columns), padded on the left."""
        rows, pictures, length = [], [], max(sum(length_of(one) for one in row) for row in parts)
        for row in parts:
            text = [
                torch.randint(5, 95, (one,)) if isinstance(one, int) else torch.full((length_of(one),), IMAGE)
                for one in row
            ]
            rows.append(torch.cat([torch.zeros(length - sum(map(len, text)), dtype=torch.int64), *text]))
            pictures.append([(*one, torch.randn(length_of(one), DIM)) for one in row if not isinstance(one, int)])
        ids = torch.stack(rows)
        talk.add(ids, (ids != 0).long(), ids == IMAGE, pictures)

    def picture(self) -> tuple[int, int]:
        return self.rng.randint(1, 4), self.rng.randint(1, 4)

    def prompt(self, n_rows: int, *, even: bool = False) -> Talk:
        """A conversation that begins with a prompt; `even`: one image of one size a row."""
        talk, same, rows = Talk.begin(self.family, n_rows, self.config), self.picture(), list[list[Any]]()
        for row in range(n_rows):
            rows.append([self.rng.randint(1, 6)])
            for _ in range(1 if even else self.rng.choice((0, 1, 1, 2) if row else (1, 1, 2, 3))):
                rows[-1] += [same if even else self.picture(), self.rng.randint(1, 5)]
        self.draw(talk, rows)
        self.note(*rows)
        return talk


def length_of(part: Any) -> int:
    """How many tokens a part of a row has."""
    return part if isinstance(part, int) else part[0] * part[1]
