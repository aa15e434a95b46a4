"""Attention of one decoding step that reads less: fewer heads, fewer values, fewer bits (SpAtten, arXiv 2012.09852)."""

from typing import NamedTuple

import torch
from torch import Tensor

from tokenprune.errors import BackendError, InputError, OptionError
from tokenprune.ops.backend import find_kernel, uncast
from tokenprune.ops.checks import check_count, check_number, check_softcap, check_tensor
from tokenprune.ops.planes import Planes, dequantize_planes


class DecodedStep(NamedTuple):
    """What `decode_attention` found.

    Attributes:
        output: `[B, H, 1, K]` in the dtype of the query; 0 for pruned heads and for rows without a valid key.
        scores: `[B, L]` fp32, probabilities summed over the kept heads, before values are pruned.
        magnitude: `[B, H]` fp32, sum of the output's absolute values.
        recomputed: `[B, H]` bool, the rows that read the low planes because their distribution was flat.
        key_bytes: `[B, Hkv]` int64, bytes of keys read: valid ones, of KV heads that a kept head uses.
        value_bytes: `[B, Hkv]` int64, bytes of values read: those that any head of the group asks for.
        dense_bytes: `[B, Hkv]` int64, bytes of the valid keys and values in the dtype of the query.
    """

    output: Tensor
    scores: Tensor
    magnitude: Tensor
    recomputed: Tensor
    key_bytes: Tensor
    value_bytes: Tensor
    dense_bytes: Tensor


@torch.no_grad()
def decode_attention(
    query: Tensor,
    key: Tensor | Planes,
    value: Tensor | Planes,
    *,
    scale: float,
    valid: Tensor | None = None,
    heads: Tensor | None = None,
    n_values: int | Tensor | None = None,
    threshold: float | None = None,
    softcap: float | None = None,
    bias: Tensor | None = None,
    backend: str = "auto",
) -> DecodedStep:
    """Attention of the newest token, whose key and value are part of `key` and `value`, computed in fp32.

    - Pruned heads give zeros; the keys and values of a KV head are not read when its whole group is pruned.
    - Local value pruning (section III-B of the paper): each head reads the `n_values` values with the largest logits,
      ties to the lowest index; the probabilities are those of the softmax over all keys and are not renormalized.
    - Progressive quantization (section III-D): keys and values given as planes are read from the high planes. A head
      whose largest probability is then under `threshold` reads the low planes too and is computed again.
    - With a soft cap (Gemma 2, arXiv 2408.00118, section 2) logits become `softcap * tanh(logits / softcap)` before the
      softmax, those of both planes as those of the high ones. It keeps the order of the logits: the values that a head
      reads are chosen by the logits before it.
    - A bias is added to the logits under their cap: probabilities, and the values that are read, follow the sum.
    - A NaN or an infinity shows: where a kept head's product with a valid key is not finite, whatever the cap, the
      head's output and magnitude and the scores of all valid keys of that row are NaN. A value that is read and is not
      finite makes the outputs of all kept heads of its group that read any value not finite. What stands in keys that
      are not valid, in pruned heads and in values that no head of the group reads changes nothing.

    Args:
        query: `[B, H, 1, K]`, any float dtype.
        key: `[B, Hkv, L, K]`, of the query's dtype or as planes; head `h` uses KV head `h // (H / Hkv)`.
        value: likewise, tensor or planes independently of the keys.
        scale: factor of the logits.
        valid: `[B, L]` or `[B, Hkv, L]` bool, the keys that exist; all of them by default. It, `heads` and `n_values`
            may stand on another device.
        heads: `[H]` or `[B, H]` bool, the heads that are kept; all of them by default.
        n_values: values that each head reads, at least 1 (more than are valid: all): an int, or int64 `[B]`, whose
            values are not checked. All of them by default.
        threshold: probability from 0 to 1, which needs planes; 0 reads high planes only, and without one both are read.
        softcap: bound of the logits, positive; none by default.
        bias: `[B, L]`, any float dtype, finite; none by default. With one the torch version runs.
        backend: `"auto"`, `"torch"` or `"triton"`.

    Returns:
        A `DecodedStep`, on the device of the query.

    Raises:
        OptionError: `n_values`, `threshold`, `softcap` or `backend` is out of range.
        InputError: a shape or dtype is wrong.
        BackendError: the explicit backend cannot run here, or takes no bias.
    """
    batch, n_heads, groups = _check_shapes(query, key, value)
    length = key.shape[2]
    name = "decode_attention"
    check_tensor(name, "valid", valid, "torch.bool", (batch, length), (batch, groups, length))
    check_tensor(name, "heads", heads, "torch.bool", (n_heads,), (batch, n_heads))
    check_tensor(name, "bias", bias, "floats", (batch, length))
    check_softcap(name, softcap)
    _check_options(batch, key, n_values, threshold)
    if valid is not None:
        valid = (valid.unsqueeze(1) if valid.ndim == 2 else valid).expand(batch, groups, length).to(query.device)
    if heads is not None:
        heads = heads.expand(batch, n_heads).to(query.device)
    if isinstance(n_values, Tensor):
        n_values = n_values.to(query.device)
    if bias is not None and backend == "triton":
        raise BackendError("decode_attention takes a bias in its torch version alone; 'torch' and 'auto' work.")
    kernel = find_kernel(name, name, "torch" if bias is not None and backend == "auto" else backend, query)
    cap = None if softcap is None else float(softcap)
    sizes = (*_bytes(key, threshold), *_bytes(value, threshold), 2 * query.shape[3] * query.element_size())
    given = (query, key, value, float(scale), valid, heads, n_values, threshold, cap, sizes)
    with uncast(query):
        return DecodedStep(*(_decode(*given, bias) if kernel is None else kernel.launch(*given)))


def _decode(
    query: Tensor, key: Tensor | Planes, value: Tensor | Planes, scale: float, valid: Tensor | None,
    heads: Tensor | None, n_values: int | Tensor | None, threshold: float | None, softcap: float | None,
    sizes: tuple[int, ...], bias: Tensor | None,
) -> tuple[Tensor, ...]:  # fmt: skip
    """The specification: everything at its full length, what is not read filled with 0."""
    batch, n_heads, _, width = query.shape
    groups, length = key.shape[1:3]
    grouped = query.view(batch, groups, n_heads // groups, width).float() * scale
    shown = None if valid is None else valid.unsqueeze(2)
    kept = None if heads is None else heads.view(batch, groups, -1, 1)
    low = threshold is None

    logits = _logits(grouped, _read(key, low), shown)
    recomputed = torch.zeros(*grouped.shape[:3], 1, dtype=torch.bool, device=query.device)
    if threshold is not None:
        flat = _softmax(_cap(logits, softcap, bias), shown).amax(-1, keepdim=True) < threshold
        some = None if shown is None else shown.any(-1, keepdim=True)
        recomputed = _both(_both(flat, kept), some)
        logits = torch.where(recomputed, _logits(grouped, _read(key, True), shown), logits)
    capped = _cap(logits, softcap, bias)
    used = weight = _hide(_softmax(capped, shown), kept)
    chosen = None if shown is None else _both(shown, kept)
    if n_values is not None:  # a cap may make equal what was not
        chosen = _both(_both(_largest(logits if bias is None else capped, n_values), shown), kept)
        used = _hide(weight, chosen)
    read = None if chosen is None else chosen.any(2)
    output = used @ _read(value, low, read)
    if threshold is not None and isinstance(value, Planes):
        output = torch.where(recomputed, used @ _read(value, True, read), output)
    output = _hide(output, kept if chosen is None else chosen.any(-1, keepdim=True))

    whole = torch.full((batch, groups), length, dtype=torch.int64, device=query.device)
    n_valid = whole if valid is None else valid.sum(-1)
    n_keys = n_valid if kept is None else n_valid * kept.any(2).squeeze(-1)
    n_read = n_keys if read is None else read.sum(-1)
    key_size, low_key_size, value_size, low_value_size, dense_size = sizes
    key_bytes, value_bytes = n_keys * key_size, n_read * value_size
    if threshold is not None:
        key_bytes = key_bytes + n_keys * recomputed.any(2).squeeze(-1) * low_key_size
        n_low = n_keys * recomputed.any(2).squeeze(-1) if chosen is None else (chosen & recomputed).any(2).sum(-1)
        value_bytes = value_bytes + n_low * low_value_size
    return (
        output.view(query.shape).to(query.dtype),
        weight.sum((1, 2)),
        output.abs().sum(-1).view(batch, n_heads),
        recomputed.view(batch, n_heads),
        key_bytes,
        value_bytes,
        n_valid * dense_size,
    )


def _both(one: Tensor, other: Tensor | None) -> Tensor:
    return one if other is None else one & other


def _hide(x: Tensor, shown: Tensor | None, value: float = 0.0) -> Tensor:
    """`x` with `value` where it is not `shown` (None: all of it is)."""
    return x if shown is None else x.masked_fill(~shown, value)


def _read(x: Tensor | Planes, low: bool, mask: Tensor | None = None) -> Tensor:
    wide = dequantize_planes(x, low=low) if isinstance(x, Planes) else x.float()
    return wide if mask is None else _hide(wide, mask.unsqueeze(-1))


def _logits(query: Tensor, key: Tensor, shown: Tensor | None) -> Tensor:
    """Products, NaN for those that are not finite, which a cap or a softmax might hide; -inf for keys not valid."""
    logits = query @ key.transpose(-1, -2)
    return _hide(logits.add_(logits, alpha=0), shown, -torch.inf)


def _cap(logits: Tensor, softcap: float | None, bias: Tensor | None) -> Tensor:
    """Logits under their soft cap and with their bias; those of keys that are not valid stay -inf."""
    capped = logits
    if softcap is not None:
        capped = (logits / softcap).tanh_().mul_(softcap).masked_fill_(logits == -torch.inf, -torch.inf)
    return capped if bias is None else capped + bias[:, None, None].to(capped)


def _softmax(logits: Tensor, shown: Tensor | None) -> Tensor:
    """Along the last axis, 0 for keys that are not valid."""
    return _hide(logits.softmax(-1), shown)


def _largest(logits: Tensor, n_values: int | Tensor) -> Tensor:
    """Which entries are among the `n_values` largest of their row, ties to the lowest index."""
    n_values = n_values.view(-1, 1, 1, 1) if isinstance(n_values, Tensor) else n_values
    order = logits.argsort(dim=-1, descending=True, stable=True)
    rank = torch.arange(order.shape[-1], dtype=torch.int64, device=order.device).expand_as(order)
    return torch.empty_like(order).scatter_(-1, order, rank) < n_values


def _bytes(x: Tensor | Planes, threshold: float | None) -> tuple[int, int]:
    """Bytes of one vector as it is read first, and of the low plane, which a threshold leaves for later."""
    if isinstance(x, Tensor):
        return x.shape[-1] * x.element_size(), 0
    low = x.low.shape[-1]
    return x.high.shape[-1] + x.scale.element_size() + (low if threshold is None else 0), low


def _check_shapes(query: Tensor, key: Tensor | Planes, value: Tensor | Planes) -> tuple[int, int, int]:
    """Batch, heads and KV heads."""
    if query.ndim != 4 or query.shape[2] != 1 or not query.is_floating_point():
        raise InputError(
            "decode_attention takes one query per head, [B, H, 1, K] of a float dtype; "
            f"got {query.dtype} {list(query.shape)}."
        )
    batch, n_heads, _, width = query.shape
    for name, x in (("key", key), ("value", value)):
        shape = x.shape
        fits = len(shape) == 4 and shape[0] == batch and shape[1] > 0 and n_heads % shape[1] == 0
        fits = fits and shape[2] > 0 and shape[3] == width and shape == key.shape
        tensors = (x.high, x.low, x.scale) if isinstance(x, Planes) else (x,)
        if (
            not fits
            or (isinstance(x, Tensor) and x.dtype != query.dtype)
            or any(t.device != query.device for t in tensors)
        ):
            raise InputError(
                f"decode_attention needs key and value [{batch}, Hkv, L, {width}] with an Hkv that divides {n_heads}, "
                f"as planes or in {query.dtype}, on {query.device}; got as {name} a {type(x).__name__} "
                f"{list(shape)}{f' of {x.dtype}' if isinstance(x, Tensor) else ''} on {tensors[0].device}."
            )
    return batch, n_heads, key.shape[1]


def _check_options(batch: int, key: Tensor | Planes, n_values: int | Tensor | None, threshold: float | None) -> None:
    name = "decode_attention"
    if isinstance(n_values, Tensor):
        check_tensor(name, "n_values", n_values, "torch.int64", (batch,), error=OptionError)
    elif n_values is not None:
        check_count(name, "n_values", n_values, 1, 2**31 - 1)
    if threshold is None:
        return
    check_number(name, "threshold", threshold, "a probability from 0 to 1", 0, 1)
    if not isinstance(key, Planes):
        raise OptionError(
            "decode_attention was given a threshold for progressive quantization, but the keys are not in two planes; "
            "quantize_planes makes them, and without a threshold tensors are taken as they are."
        )
