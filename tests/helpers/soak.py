"""Random sequences of calls on tiny models, patched and patched again: every call against the dense oracle.

python tests/helpers/soak.py --seeds 0:500
"""

import argparse
import copy
import itertools
import pickle
import sys
import time
from collections import Counter
from collections.abc import Callable
from contextlib import nullcontext
from typing import Any

import pytest
import torch
from families import batch, generate
from soak_calls import Calls, known_hybrid, length_of
from soak_talk import HYBRID, NEVER, TOLERANCE, Talk
from states import Interrupt, hook_counts, same_run
from torch import nn
from transformers import DynamicCache, StaticCache
from upstream import MASK, cache_of, with_cache

import tokenprune
from tokenprune.decoder.pruned_cache import ledger_of

ROOM = 160  # of a static cache
OPTIONS: dict[str, dict[str, tuple[Any, ...]]] = {
    "divprune": {"keep": (0.25, 0.5, 0.75, 1, 3, 5)},
    "random": {"keep": (0.25, 0.5, 2, 4), "seed": (0, 1, 7)},
    "uniform": {"keep": (0.3, 0.5, 1, 4)},
    "fastv": {"keep": (0.25, 0.5, 2, 3), "layer": (1, 2, 3, 4)},
    "pyramiddrop": {"keep": (0.5, 0.75), "stages": ((0.25, 0.5, 0.75), (1,), (2, 3), (3,), (3, 4))},
    "aim": {
        "merge": (None, None, 0.5, 0.25, 3),
        "prune": (None, (1, 3), (2, 3), (2, 4), (0, 2), (0.25, 0.75)),
        "importance": ("pagerank", "column_sum", "last_query"),
        "size_weighted": (False, True),
        "size_bias": (False, True),
    },
    "spatten": {
        "tokens": (1.0, 0.6, 0.8, (1.0, 0.8, 0.6, 0.4), (1.0, 1.0, 1.0, 0.3), (1.0, 1.0, 1.0, 0.5, 0.5)),
        "heads": (1.0, 1.0, (1.0, 0.75, 0.5, 0.25), (1.0, 1.0, 0.5, 0.5)),
        "protect_text": (True, True, False),
        "keep_first": (0, 2),
        "keep_recent": (2, 5),
        "interval": (1, 4, NEVER),
    },
}
UNKNOWN = ("size_bias", "heads")
BEFORE, INSIDE = ("divprune", "random", "uniform", "aim"), ("fastv", "pyramiddrop", "aim", "spatten")


class Soak(Calls):
    """A random sequence of calls."""

    def run(self) -> Counter[str]:
        """Take all steps and tell which they were."""
        taken = [self.patch.__name__]
        self.log.append(taken[0])
        try:
            self.patch()
            for _ in range(self.rng.randint(3, 8)):
                step = self.choose()
                self.log.append(step.__name__)
                taken.append(step.__name__)
                step()
            self.unpatch()
        finally:
            tokenprune.unpatch(self.model)
        return Counter(taken)

    def choose(self) -> Callable[[], None]:
        weights: dict[Callable[[], None], int] = {self.new: 4, self.patch: 2, self.fail: 2, self.twin: 1}
        if self.talk is not None:
            weights |= {self.new: 2, self.text: 4, self.image: 4, self.crop: 2, self.copy: 2, self.rows: 2}
        if self.session is not None:
            weights |= {self.pause: 3, self.unpatch: 1}
        return self.rng.choices([*weights], [*weights.values()])[0]

    # --- patching -----------------------------------------------------------------------------------------------------

    def patch(self) -> None:
        """Methods with options, drawn until they are accepted; the patch before them is in force until then."""
        while True:
            one, other = self.rng.choice(BEFORE), self.rng.choice(INSIDE)
            names = self.rng.choice(([one], [other], [one, other] if one != other else [one]))
            drawn = [{key: self.rng.choice(values) for key, values in OPTIONS[name].items()} for name in names]
            if self.family == HYBRID:  # whose oracle knows neither
                drawn = [{key: value for key, value in given.items() if key not in UNKNOWN} for given in drawn]
            positions = self.rng.choice(("original", "original", "packed"))
            before, hooks = self.session, hook_counts(self.model)
            try:
                methods = [tokenprune.api.build_method(name, **given) for name, given in zip(names, drawn, strict=True)]
                self.session = tokenprune.patch(self.model, methods, positions=positions)
            except tokenprune.OptionError:
                assert hook_counts(self.model) == hooks
                assert before is None or before.installed
                continue
            told = [
                (name, *(f"{key}={value}" for key, value in given.items()))
                for name, given in zip(names, drawn, strict=True)
            ]
            return self.note(*itertools.chain(*told), positions)

    def unpatch(self) -> None:
        """The model is the one that it was."""
        tokenprune.unpatch(self.model)
        self.session = None
        assert hook_counts(self.model) == self.hooks
        self._check_dense(self.model)

    def _check_dense(self, model: nn.Module) -> None:
        prompt = batch(self.family, ((3, (3, 4), 4, (2, 2), 3), (6, (2, 2), 5)))
        wanted, out = (generate(one, prompt.inputs, 2) for one in (self.dense, model))
        assert same_run(out, wanted), "an unpatched model is not the dense one"

    def twin(self) -> None:
        """A copy of the model is unpatched."""
        traces = self.session and self.session.traces
        told = nullcontext() if self.session is None else pytest.warns(UserWarning, match="is a copy of a patched one")
        with told:
            self._check_dense(copy.deepcopy(self.model))
        assert self.session is None or self.session.traces is traces

    def pause(self) -> None:
        """A step without new pruning."""
        assert self.session is not None
        with self.session.pause():
            self.paused = True
            try:
                step = self.rng.choice([self.new] if self.talk is None else [self.new, self.text, self.image])
                self.note(step.__name__)
                step()
            finally:
                self.paused = False

    # --- steps --------------------------------------------------------------------------------------------------------

    def new(self) -> None:
        """A new prompt."""
        ways = ["forward", "dynamic", "given", "static", "sampled", "several"]
        ways += ["reset"] if self.talk is not None else []
        if self.paused or not (self.evicts or self.heads):
            ways += ["beams", "uncached"]
            ways += ["lookup", "assisted"] if self.family != HYBRID else []
            ways += ["chunked"] if self.family not in ("gemma3", HYBRID) else []
        way, n = self.rng.choice(ways), self.rng.randint(1, 4)
        self.note(way, n)
        alone, guessed = way in ("lookup", "assisted", "chunked"), way in ("lookup", "assisted")
        n_rows = len(self.talk.ids) if way == "reset" and self.talk is not None else self.rng.randint(1, 3)
        talk = whole = self.prompt(1 if alone else n_rows, even=way in ("several", "beams"))
        if way == "beams":
            return self._beams(talk, n)
        if way == "several":
            talk = talk.take([row for row in range(len(talk.ids)) for _ in range(2)])
        cache: Any = DynamicCache(config=self.model.config)
        if way == "static":
            cache = StaticCache(config=self.model.config, max_cache_len=ROOM)
        elif way == "reset":
            assert self.talk is not None
            cache = self.talk.cache
            cache.reset()
        kept = self._kept_by_a_forward(talk) if guessed or way == "uncached" else None
        options: dict[str, Any] = {
            "dynamic": {},
            "uncached": {"use_cache": False},
            "sampled": {"do_sample": True, "top_k": 5},
            "several": {"do_sample": True, "num_return_sequences": 2},
            "lookup": {"prompt_lookup_num_tokens": 3},
            "assisted": {"assistant_model": self.helper},
            "chunked": {"prefill_chunk_size": self.rng.randint(4, 12)},
        }.get(way, with_cache(cache))
        self.talk = None
        with self.watched(talk):
            if way == "forward" or (way in ("static", "reset") and self.rng.random() < 0.5):
                out = self.forward(talk, 0, **options)
            else:
                out = self.generate(whole, 0, n + 4 * guessed, **options)
        assert kept is None or kept == self._kept(), "other tokens were kept than without guesses and with a cache"
        if (cache := cache_of(out)) is not None:
            talk.cut(int(cache.get_seq_length()))  # rejected guesses have left it
            self.talk, talk.cache = talk, cache

    def _kept(self) -> Any:
        traces = () if self.session is None or self.paused else self.session.traces
        return [[row.tolist() for row in trace.kept_indices] for trace in traces]

    def _kept_by_a_forward(self, talk: Talk) -> Any:
        self.forward(talk.fork(None), 0)
        return self._kept()

    def _beams(self, talk: Talk, n: int) -> None:
        """Every returned beam scores as the unpatched model scores it."""
        self.talk, length = None, talk.ids.shape[1]
        wide = talk.take([row for row in range(len(talk.ids)) for _ in range(3)])
        with self.watched(wide, first_only=True):
            options = {"num_beams": 3, "num_return_sequences": 2, "output_scores": True, "length_penalty": 1.0}
            out = self.generate(talk, 0, n, **options)
        for i, ids in enumerate(out.sequences):
            one, more = wide.take([i // 2 * 3]), torch.ones(1, n - 1, dtype=torch.int64)
            one.add(ids[None, length:-1], more, more == 0, [[]])
            scores = one.reference(self.dense, 0, length + n - 1)[-n:].log_softmax(-1)
            off = scores.gather(1, ids[length:, None]).mean() - out.sequences_scores[i]
            assert abs(float(off)) <= TOLERANCE, f"beam {i}: its score is {float(off):.2g} off"

    def text(self) -> None:
        """The conversation goes on with text."""
        assert self.talk is not None
        if self.rng.random() < 0.2:
            for _ in range(3):
                self.turn([[1] for _ in self.talk.ids], 0)
        else:
            n = self.rng.randint(1, 6)
            self.turn([[n] for _ in self.talk.ids], self.rng.randint(0, 3))

    def image(self) -> None:
        """The conversation goes on with new images."""
        assert self.talk is not None
        if self.family == "gemma3" and isinstance(self.talk.cache, StaticCache):
            return  # the dense model is wrong here: the image blocks of the mask start at the wrong column
        rows: list[list[Any]] = [[self.rng.randint(1, 3), self.picture(), 1]]
        for _ in self.talk.ids[1:]:
            rows.append([self.rng.randint(1, 3), self.picture(), 1] if self.rng.random() < 0.7 else [1])
        length = max(sum(map(length_of, row)) for row in rows)
        for row in rows:
            row[-1] += length - sum(map(length_of, row))
        self.turn(rows, self.rng.randint(0, 3))

    def turn(self, rows: list[list[Any]], n: int) -> None:
        """The conversation goes on with `rows` by a forward or, with `n`, ``generate``; or that is refused, and it is
        as it was."""
        assert self.talk is not None
        talk, start = self.talk.fork(self.talk.cache), self.talk.n
        self.draw(talk, rows)
        self.note(f"generate {n}" if n else "forward", *rows)
        if isinstance(talk.cache, StaticCache) and talk.ids.shape[1] + n >= ROOM:
            return
        ledger, given = ledger_of(talk.cache), with_cache(talk.cache)
        refused = ledger is not None and (not self.inside if ledger.layered else self.session is None and ledger.differ)
        if refused:
            self.note("(refused)")
            with pytest.raises(tokenprune.InputError, match="not patched"):
                self.generate(talk, start, n, **given) if n else self.forward(talk, start, **given)
            assert talk.cache.get_seq_length() == start
            return
        try:
            with self.watched(talk):
                self.generate(talk, start, n, **given) if n else self.forward(talk, start, **given)
        except tokenprune.InputError as error:
            # Recurrent layers cannot have short rows filled up between two calls.
            if self.family != HYBRID or "different numbers of tokens" not in str(error):
                raise
            self.note("(refused)")
            assert talk.cache.get_seq_length() == start
            return
        talk.cut(talk.n)
        self.talk = talk

    def crop(self) -> None:
        """The last tokens are taken out of the cache; or that is refused, and it is as it was."""
        talk = self.talk
        assert talk is not None
        last = max(1, talk.n - self.rng.randint(1, 6))
        self.note(talk.n - last)
        if self.family == HYBRID or talk.n >= self.window:
            return  # no cache of transformers goes back from there
        lost = (talk.gone[..., last : talk.n] != NEVER) & (talk.mask[:, last : talk.n] != 0)
        part_of_an_image = bool(talk.spots[:, last:].any())
        if part_of_an_image and not bool(lost.any()):
            return  # that conversation could not be gone on with
        refused = None
        try:
            talk.cache.crop(last - talk.n)
        except tokenprune.InputError as error:
            refused = error
        if refused is not None:
            assert bool(lost.any()), refused
            assert "cropping" in str(refused)
            assert talk.cache.get_seq_length() == talk.n
            return
        assert not bool(lost.all(dim=1).any()), "what no row has was taken out"
        talk.cut(last)
        self.talk = None if part_of_an_image else talk

    def copy(self) -> None:
        """A copy of the conversation goes on, and then the conversation does, or the copy once more."""
        talk = self.talk
        assert talk is not None
        way = self.rng.choice((copy.deepcopy, lambda cache: pickle.loads(pickle.dumps(cache))))
        self.talk = talk.fork(way(talk.cache))
        self.text()
        self.talk = self.rng.choice((talk, self.talk))
        self.text()

    def rows(self) -> None:
        """Some of the rows go on, in another order, or each of them twice."""
        talk = self.talk
        assert talk is not None
        n_rows, ways = len(talk.ids), ["reorder_cache"]
        if self.family != HYBRID and not isinstance(talk.cache, StaticCache):
            ways += ["batch_select_indices", "batch_repeat_interleave"]
        way = self.rng.choice(ways)
        rows = self.rng.choices(range(n_rows), k=n_rows if way == "reorder_cache" else self.rng.randint(1, n_rows))
        rows = [row for row in range(n_rows) for _ in range(2)] if way == "batch_repeat_interleave" else rows
        self.note(way, rows)
        getattr(talk.cache, way)(2 if way == "batch_repeat_interleave" else torch.tensor(rows))
        self.talk = talk.take(rows)
        self.talk.cache = talk.cache

    def fail(self) -> None:
        """A call that raises in the middle leaves nothing behind."""
        layer, traces = self.rng.randrange(self.config.num_hidden_layers), self.session and self.session.traces
        going_on, short = self.talk is not None and self.rng.random() < 0.5, self.rng.random() < 0.3
        self.note("going on" if going_on else "anew", "short mask" if short and going_on else f"layer {layer}")
        talk = self.talk.fork(self.talk.cache) if going_on and self.talk is not None else self.prompt(2)
        ledger, options = ledger_of(talk.cache), {} if talk.cache is None else with_cache(talk.cache)
        if going_on:
            self.draw(talk, [[2] for _ in talk.ids])
            if short and ledger is not None and ledger.differ and self.family != "gemma3":  # which fills masks up
                with pytest.raises(tokenprune.InputError):
                    self.forward(talk, talk.n, **options, **{MASK: talk.mask[:, 3:]})
                return
        modules = self.model.get_decoder().layers[layer]
        Interrupt(modules)
        try:
            with pytest.raises((RuntimeError, tokenprune.InputError), match=r"interrupted|not patched") as raised:
                self.forward(talk, talk.n, **options)
        finally:
            modules._forward_pre_hooks.popitem()
        assert self.session is None or self.session.traces is traces
        if going_on and layer and isinstance(raised.value, RuntimeError):
            self.talk = None  # some layers have got tokens that others have not, which a pruned cache tells of
            if ledger is not None and self.session is not None and (self.family != HYBRID or layer > 1):
                with pytest.raises(tokenprune.InputError):
                    self.forward(talk, talk.n, **options)


def soak(seeds: range, *, tell: Callable[[str], Any] = lambda line: None) -> tuple[list[str], Counter[str]]:
    """Run the sequences of `seeds`.

    Returns:
        A line for each that went wrong, and how often each step was taken.
    """
    wrong, taken = list[str](), Counter[str]()
    with known_hybrid():
        for one in map(Soak, seeds):
            try:
                taken += one.run()
            except (Exception, pytest.fail.Exception) as error:
                told = f"{type(error).__name__}: {' '.join(str(error).split())[:200]}"
                wrong.append(f"seed {one.seed}: {' | '.join(one.log)} !! {told}")
                tell(wrong[-1])
    return wrong, taken


def main() -> int:
    """The command line."""

    def tell(line: str) -> None:
        sys.stdout.write(line + "\n")
        sys.stdout.flush()

    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", default="0:500", help="FIRST:END, or one seed (%(default)s)")
    first, _, end = parser.parse_args().seeds.partition(":")
    seeds, started = range(int(first), int(end or int(first) + 1)), time.process_time()
    wrong, taken = soak(seeds, tell=tell)
    steps = ", ".join(f"{name} {n}" for name, n in taken.most_common())
    tell(f"seeds {seeds.start} to {seeds.stop - 1}: {len(wrong)} wrong, {time.process_time() - started:.0f} s; {steps}")
    return int(bool(wrong))


if __name__ == "__main__":
    sys.exit(main())
