"""How much attention every key gets."""

import torch
from torch import Tensor

from tokenprune.errors import BackendError, InputError, OptionError
from tokenprune.ops.attention_rows import Row, Rule, one_query
from tokenprune.ops.backend import find_kernel, uncast
from tokenprune.ops.checks import LARGEST, LEAST_POSITIVE, check_number, check_softcap, check_tensor

REDUCTIONS = ("column_sum", "last_query", "pagerank")


@torch.no_grad()
def attention_importance(
    query: Tensor,
    key: Tensor,
    *,
    scale: float,
    causal: bool = True,
    valid: Tensor | None = None,
    window: int | None = None,
    seen: Tensor | None = None,
    reduction: str = "column_sum",
    temperature: float = 1.0,
    softcap: float | None = None,
    backend: str = "auto",
) -> Tensor:
    """Score every key by the attention it gets, without ever holding an attention matrix.

    With `P = softmax(query key^T scale / temperature)` per head over the keys that a query sees:

    - `"column_sum"`: `P` summed over heads and valid queries (SpAtten, arXiv 2012.09852, section III-A).
    - `"last_query"`: the last valid query's row of `P`, mean over heads (FastV, arXiv 2403.06764). It reads the keys
      once and costs next to nothing.
    - `"pagerank"`: five steps `s <- s P` per head from the uniform vector over the `n` valid tokens of a row, then the
      root mean square over heads (AIM, arXiv 2412.03248, whose temperature is 0.1).

    Padding takes no part, neither as queries nor as keys; its scores are 0. A query that sees nothing contributes
    nothing. What a row gets depends on its valid tokens alone. Products and sums are taken in fp32 whatever the dtype.

    A NaN or an infinity is told: if a query that counts (a valid one; for `"last_query"` the last of them) sees a key
    whose product with it is not finite in any head, or a NaN or +inf in `seen`, the scores of all valid tokens of that
    row of the batch are NaN. The product is not finite where the query or the key holds a NaN or an infinity. What
    stands in padding, in queries that do not count and in keys that no such query sees changes nothing.

    The torch version holds at most 64 MB beside its arguments up to 4,096 keys, whatever the number of heads: 21 MB
    without page-rank, 50 MB with it, since probabilities are held over its steps, and 12 MB more with `seen`. Longer
    rows add what one head's keys take in fp32. It works on one row of the batch after the other, and on a GPU it
    synchronises for each. The Triton version never does, and holds a few numbers per head and token.

    Args:
        query: `[B, H, Lq, K]`, any float dtype, any strides: the last `Lq` of the `Lk` positions.
        key: `[B, Hkv, Lk, K]`, of the same dtype; `H` is a multiple of `Hkv`, query head `h` reads key head `h // G`.
        scale: factor of the logits, usually `K ** -0.5`.
        causal: whether a query sees only the keys up to its own position.
        valid: `[B, Lk]` bool, the tokens that are not padding; all of them by default. It may stand on another device.
        window: a query sees only keys with `query position - key position < window`; all by default.
        seen: `[B or 1, 1, Lq, Lk]`, which keys a query sees, in place of `causal` and `window`: bool, or a float that
            is added to the logits before the temperature, where -inf and the lowest of its dtype hide a key. It may
            stand on another device.
        reduction: `"column_sum"`, `"last_query"` or `"pagerank"`.
        temperature: divides the logits, for all reductions.
        softcap: c of products times `scale` that become `c tanh(product / c)` (Gemma 2), before `seen` is added and the
            temperature divides; none by default.
        backend: `"auto"`, `"torch"` or `"triton"`.

    Returns:
        `[B, Lk]` fp32, on the device of the key.

    Raises:
        OptionError: `scale`, `window`, `reduction`, `temperature`, `softcap` or `backend` is out of range.
        InputError: a shape or dtype is wrong, query and key are on two devices, or `"pagerank"` is asked for fewer
            queries than keys.
        BackendError: the explicit backend cannot run here, or not with these arguments.
    """
    name = "attention_importance"
    if reduction not in REDUCTIONS:
        raise OptionError(f"attention_importance knows the reductions {', '.join(REDUCTIONS)}; got {reduction!r}.")
    check_number(name, "scale", scale, "a finite number", -LARGEST)
    check_number(name, "temperature", temperature, "a positive, finite number", LEAST_POSITIVE)
    if window is not None:
        check_number(name, "window", window, "an int of at least 1, or None,", 1, whole=True)
    check_softcap(name, softcap)
    _check_tensors(query, key)
    n_rows, n_queries, n_keys = len(key), query.shape[2], key.shape[2]
    check_tensor(name, "valid", valid, "torch.bool", (n_rows, n_keys))
    check_tensor(name, "seen", seen, "torch.bool or floats", (n_rows, 1, n_queries, n_keys), (1, 1, n_queries, n_keys))
    if reduction == "pagerank" and query.shape[2] != key.shape[2]:
        raise InputError(
            f"attention_importance needs as many queries as keys for 'pagerank', got {query.shape[2]} and "
            f"{key.shape[2]}; 'column_sum' and 'last_query' work here."
        )
    kernel = find_kernel(name, name, backend, key)
    valid = None if valid is None else valid.to(key.device)
    seen = None if seen is None else seen.to(key.device).expand(n_rows, -1, -1, -1)
    rule = Rule(scale, temperature, causal, window, softcap)
    before = torch.full((n_rows,), n_keys - n_queries, dtype=torch.int64, device=key.device)
    if reduction == "last_query":
        query, seen, before = _last(query, valid, seen, before)
    if kernel is not None and query.shape[3] <= kernel.WIDEST:
        scores: Tensor = kernel.launch(query, key, valid, seen, before, *rule, pagerank=reduction == "pagerank")
    elif backend == "triton":
        raise BackendError(
            f"attention_importance was asked for backend='triton' with heads of width {query.shape[3]}; Triton's are "
            f"at most {kernel.WIDEST} wide, 'torch' and 'auto' work here."
        )
    else:
        with uncast(key):
            scores = _score(query, key, valid, seen, before, rule, pagerank=reduction == "pagerank")
    if reduction == "last_query":
        scores.div_(query.shape[1])
    # Which scores became NaN is up to the backend; all of a row are told.
    broken: Tensor = scores.isnan().any(1, keepdim=True)
    return scores.masked_fill_(broken if valid is None else broken & valid, torch.nan)


def _last(
    query: Tensor, valid: Tensor | None, seen: Tensor | None, before: Tensor
) -> tuple[Tensor, Tensor | None, Tensor]:
    """The last valid query of every row, what it sees, and its position; without one, the first, which is not valid."""
    at = torch.arange(query.shape[2], dtype=torch.int64, device=query.device)
    at = at[-1:].expand(len(query)) if valid is None else (valid[:, -len(at) :] * at).amax(1)
    place = at[:, None, None, None]
    if seen is not None:
        seen = seen.gather(2, place.expand(-1, -1, -1, seen.shape[3]))
    return query.gather(2, place.expand(-1, query.shape[1], -1, query.shape[3])), seen, before + at


def _score(
    query: Tensor, key: Tensor, valid: Tensor | None, seen: Tensor | None, before: Tensor, rule: Rule, *, pagerank: bool
) -> Tensor:
    """The torch version: column sums, or page-rank importance, `[B, Lk]`."""
    if query.shape[2] == 1 and not pagerank:
        return one_query(query, key, valid, seen, before, rule)
    scores = key.new_empty(key.shape[0], key.shape[2], dtype=torch.float32)
    for i in range(len(key)):
        row = Row(query[i], key[i], None if valid is None else valid[i], None if seen is None else seen[i, 0], rule)
        scores[i] = row.pagerank() if pagerank else row.column_sum()
    return scores


def _check_tensors(query: Tensor, key: Tensor) -> None:
    fits = query.ndim == key.ndim == 4 and 0 not in (*query.shape[1:], *key.shape[1:])
    fits = fits and query.shape[0] == key.shape[0] and query.shape[3] == key.shape[3]
    fits = fits and query.shape[1] % key.shape[1] == 0 and query.shape[2] <= key.shape[2]
    if not fits or not query.is_floating_point() or query.dtype != key.dtype or query.device != key.device:
        raise InputError(
            "attention_importance needs query [B, H, Lq, K] and key [B, Hkv, Lk, K] of one float dtype on one device, "
            "with H a multiple of Hkv, 1 <= Lq <= Lk and K >= 1; "
            f"got {query.dtype} {list(query.shape)} on {query.device}, {key.dtype} {list(key.shape)} on {key.device}."
        )
