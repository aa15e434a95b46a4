"""What looking after every call costs: that what comes in is known, and the KV cache as long as is written down.

The model of `test_prefill.py` with 24 layers, patched. The checks of one decoding step on a pruned cache (before the
decoder runs and after it) are called by themselves, in turn with whole steps.
"""

from collections.abc import Callable
from typing import Any

import torch
from measuring import alternate
from test_aim import N_LAYERS
from test_prefill import DEVICE, make_model, make_prompt, prefill, summary
from upstream import cache_of, with_cache

import tokenprune
from tokenprune.decoder.call import check_call
from tokenprune.decoder.pruned_cache import ledger_of
from tokenprune.upstream.decoder_call import DecoderCall
from tokenprune.upstream.facts import DecoderFacts

CALLS = 100  # of the checks in one timing, which is too short by itself


@torch.inference_mode()
def test_checks(record: Callable[..., None]) -> None:
    """The checks of one decoding step beside the step."""
    model: Any = make_model(n_layers=N_LAYERS)
    tokenprune.patch(model, "divprune", keep=0.25)
    cache = cache_of(prefill(model, make_prompt(576)))
    ledger, decoder = ledger_of(cache), model.get_decoder()
    assert ledger is not None
    facts, token = DecoderFacts(decoder), torch.full((1, 1), 7, device=DEVICE)
    given = DecoderCall(decoder, model.get_input_embeddings()(token), cache=cache)

    def step() -> None:
        model(input_ids=token, **with_cache(cache), logits_to_keep=1)

    def checks() -> None:
        for _ in range(CALLS):
            check_call(given, facts, ledger, unpacks=facts.flash)
            ledger.check(cache)

    times = alternate({"checks": checks, "step": step}, repeats=15, device=DEVICE)
    assert ledger.length is not None
    assert ledger.length > 624  # the steps went through the pruned cache
    share = times["checks"].over(times["step"])
    row = {"layers": N_LAYERS, "calls": CALLS, **summary(times)}
    row["checks_of_step"] = [round(share.quantile(fraction) / CALLS, 5) for fraction in (0.2, 0.5, 0.8)]
    record(checks, row)
