"""Several methods at several `keep` on the same questions: agreement with the dense model, latency and memory.

All candidates, the dense model among them, run in turn: a machine that slows down does so for all of them.
"""

import itertools
import statistics
from collections.abc import Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field
from functools import partial
from typing import TYPE_CHECKING, Any

from tokenprune.api import patch
from tokenprune.errors import OptionError, TokenPruneError, UnsupportedModelError
from tokenprune.methods.base import Method
from tokenprune.parsing import parse_methods, takes
from tokenprune.report.costs import drift
from tokenprune.report.generation import Inspection, inspect_generation, time_generation
from tokenprune.report.loading import Loaded, decode, interpolating, prepare, resized_inputs
from tokenprune.report.measure import in_turn, spread
from tokenprune.report.method_table import Comparison, Row
from tokenprune.schedule import check_keep
from tokenprune.upstream.generating import end_ids
from tokenprune.upstream.loading import prompt_counts

if TYPE_CHECKING:
    from PIL import Image

DENSE, RESIZE = "dense", "resize"
Inputs = Mapping[str, Any]


@dataclass(frozen=True)
class Candidate:
    """What is compared: methods in force, or none, on inputs for each question."""

    name: str
    keep: float | None
    inputs: tuple[Inputs, ...] = field(compare=False)
    methods: tuple[Method, ...] = ()


def candidates(
    loaded: Loaded, image: "Image.Image", questions: Sequence[str], methods: Sequence[str], keeps: Sequence[float]
) -> tuple[list[Candidate], list[str]]:
    """The dense model, then every method at every `keep`, or once where its own options say how much is kept; and
    notes on those that this model cannot do.

    Args:
        loaded: the model; it is patched and unpatched for each method once, so that what it refuses is known at once.
        image: what the questions are about.
        questions: in plain words.
        methods: as :func:`~tokenprune.parsing.parse_methods` reads them, or "resize".
        keeps: as methods take them.

    Raises:
        TokenPruneError: a method does not exist, an option is out of range, or the model refuses every method.
    """
    check_methods(methods, keeps)
    inputs = tuple(prepare(loaded, image, question) for question in questions)
    found, notes = [Candidate(DENSE, 1.0, inputs)], list[str]()
    refused: list[TokenPruneError] = []
    for text, keep in itertools.product(methods, keeps):
        try:
            if text == RESIZE:
                smaller = tuple(resized_inputs(loaded, image, question, keep=keep) for question in questions)
                candidate = Candidate(RESIZE, keep, smaller)
            else:
                candidate = _candidate(text, keep, inputs)
                patch(loaded.model, list(candidate.methods)).remove()
        except (OptionError, UnsupportedModelError) as error:
            notes.append(f"{text}: {error}")
            if text != RESIZE:
                refused.append(error)
            continue
        if candidate not in found:
            found.append(candidate)
    if refused and len(found) == 1:  # what every method but resize runs into is no remark
        raise refused[0]
    own = dict.fromkeys(one.name for one in found if one.keep is None)
    notes += [f"{name}: its own options say how much is kept, so it has one row, at that cost" for name in own]
    return found, list(dict.fromkeys(notes))


def check_methods(methods: Sequence[str], keeps: Sequence[float]) -> None:
    """Check that methods of these names can be built, without a model.

    Raises:
        OptionError: a `keep` or another option is out of range or unknown, or nothing is to be compared.
        UnknownMethodError: a method does not exist.
    """
    if not methods or not keeps:
        raise OptionError(f"at least one method and one keep are needed, got {list(methods)} and {list(keeps)}")
    for keep in keeps:
        check_keep(keep)
    for text, keep in itertools.product(methods, keeps):
        if text != RESIZE:
            _candidate(text, keep, ())


def _candidate(text: str, keep: float, inputs: tuple[Inputs, ...]) -> Candidate:
    """A method at a `keep`, or at none where the text's own options say how much is kept."""
    if takes(text, "keep"):
        return Candidate(text, keep, inputs, parse_methods(text, keep=keep))
    return Candidate(text, None, inputs, parse_methods(text))


def compare(
    loaded: Loaded,
    image: "Image.Image",
    questions: Sequence[str],
    *,
    methods: Sequence[str],
    keeps: Sequence[float],
    expected: Sequence[str] = (),
    max_new_tokens: int = 16,
    repeats: int = 3,
) -> Comparison:
    """Ask a model about an image with all visual tokens, and with each method at each `keep`.

    Args:
        loaded: the model and its processor.
        image: what the questions are about.
        questions: in plain words, at least one.
        methods: names, with options as :func:`~tokenprune.parsing.parse_methods` reads them, or "resize": the image
            itself made smaller.
        keeps: as methods take them.
        expected: right answers, one for each question, or none.
        max_new_tokens: greedy tokens of each answer.
        repeats: timed runs of each candidate, on the first question.

    Raises:
        TokenPruneError: an argument is out of range, a method does not exist, or the model refuses it.
    """
    if not questions or len(expected) not in (0, len(questions)):
        raise OptionError(
            f"at least one question is needed, and an expected answer for each of them or none; got {len(questions)} "
            f"questions and {len(expected)} answers"
        )
    shown, notes = candidates(loaded, image, questions, methods, keeps)

    inspect = partial(inspect_generation, loaded.model, max_new_tokens=max_new_tokens)
    time = partial(time_generation, loaded.model, max_new_tokens=max_new_tokens)
    sides = {place: partial(_in_force, loaded.model, one) for place, one in enumerate(shown)}
    inspected = in_turn(sides, lambda place: list(map(inspect, shown[place].inputs)), repeats=1, label="answers")
    timed = in_turn(sides, lambda place: time(shown[place].inputs[0]), repeats=repeats, label="latency")
    seen = [inspected[place][0] for place in sides]
    rows = [_row(loaded, shown[place], seen[place], timed[place], seen[0], expected) for place in sides]
    said = dict.fromkeys(remark for runs in seen for run in runs for remark in run.remarks)
    setting = {"max_new_tokens": max_new_tokens, "repeats": repeats}
    return Comparison(loaded.label, tuple(questions), tuple(expected), tuple(rows), (*notes, *said), setting)


def _in_force(model: Any, candidate: Candidate) -> AbstractContextManager[Any]:
    """Within it the model runs as the candidate."""
    if candidate.methods:
        return patch(model, list(candidate.methods))
    return interpolating(model) if candidate.name == RESIZE else nullcontext()


def _row(
    loaded: Loaded,
    candidate: Candidate,
    seen: Sequence[Inspection],
    timed: Sequence[Mapping[str, float]],
    dense: Sequence[Inspection],
    expected: Sequence[str],
) -> Row:
    """The row of a candidate: what was seen of it at each question, and timed at the first, beside the dense model."""
    drifts = [drift(theirs, ours, eos=end_ids(loaded.model)) for theirs, ours in zip(dense, seen, strict=True)]
    answers, wanted = (tuple(decode(loaded, one.new_ids[0]) for one in side) for side in (seen, dense))
    length, visual = prompt_counts(loaded.model, candidate.inputs[0])
    amounts, whole = seen[0].amounts, _prefill_flops_g(dense[0])
    latencies = {name: spread([run[name] for run in timed]) for name in timed[0]}
    return Row(
        method=candidate.name,
        keep=candidate.keep,
        visual_tokens=statistics.fmean(seen[0].layer_tokens) - (length - visual) if seen[0].layer_tokens else visual,
        prefill_share=_prefill_flops_g(seen[0]) / whole if whole else None,
        agreement=statistics.fmean(one.equal_tokens[0] / one.compared_tokens[0] for one in drifts),
        same_answers=statistics.fmean(map(str.__eq__, answers, wanted)),
        accuracy=statistics.fmean(map(_same, answers, expected)) if expected else None,
        first_token_kl=statistics.fmean(one.first_token_kl[0] for one in drifts),
        first_token_latency_ms=latencies["first_token_latency_ms"],
        decode_latency_ms=latencies.get("decode_latency_ms"),
        total_latency_ms=latencies["total_latency_ms"],
        kv_mib=amounts.get("kv_mib"),
        peak_mib=amounts["peak_mib"],
        total_flops_g=amounts["total_flops_g"],
        answers=answers,
    )


def _prefill_flops_g(seen: Inspection) -> float:
    """Arithmetic of the decoder over the prompt, choosing included; 0 if the model shows no decoder."""
    return sum(seen.amounts.get(f"{stage}_flops_g", 0.0) for stage in ("selection", "prefill"))


def _same(answer: str, expected: str) -> bool:
    """Equal up to case, blanks and a full stop."""
    one, other = (" ".join(text.casefold().split()).rstrip(".") for text in (answer, expected))
    return one == other
