"""Bipartite matching of tokens, and merging by means of what it says."""

from typing import NamedTuple

import torch
from torch import Tensor

from tokenprune.errors import InputError
from tokenprune.ops.backend import find_kernel, product, uncast
from tokenprune.ops.checks import check_count, check_number, check_tensor
from tokenprune.reduction import add_at

_SAME = 1 - 2.0**-20  # Cosines above this differ by fp32 noise only and count as equal.
_BLOCK = 8 << 20  # Bytes of similarity that the torch version holds at once.


class BipartiteMatch(NamedTuple):
    """What `bipartite_match` found: M = N - r groups per row.

    Attributes:
        index: `[B, M]` int64, the position that each group stands at, ascending in each row.
        assign: `[B, N]` int64, the group (0 to M - 1) that each token goes to.
    """

    index: Tensor  # type: ignore[assignment]
    assign: Tensor


class MergedTokens(NamedTuple):
    """What `merge_tokens` made.

    Attributes:
        tokens: `[B, M, D]`, the weighted mean of each group, in the dtype of the tokens.
        size: `[B, M]` fp32, what the tokens of each group weigh together; their number where there are no weights.
    """

    tokens: Tensor
    size: Tensor


@torch.no_grad()
def bipartite_match(
    keys: Tensor, *, r: int, protected: Tensor | None = None, valid: Tensor | None = None, backend: str = "auto"
) -> BipartiteMatch:
    """Merge `r` tokens of every row into others that they resemble (ToMe, arXiv 2210.09461; AIM, arXiv 2412.03248).

    The tokens at even positions are sources, those at odd ones destinations. Every source looks for the destination of
    the highest cosine, and the `r` sources whose best cosine is highest merge into theirs. Ties go to the lowest
    position, on both sides. A group stands at the place of its destination, every other token at its own, so the
    spatial order stays.

    The cosine is accumulated in fp32 whatever the dtype; above 1 - 2^-20 it counts as equal, so that equal tokens tie.
    A vector that is zero, or holds a NaN or an infinity, has cosine 0 to every other one.

    Positions are counted among the valid tokens of a row: what is merged depends on those and on the options, never on
    the batch or the padding around them. The torch version holds at most 8 MiB (or one row of one source, where that is
    more) of the similarity at once, the Triton version none of it.

    Args:
        keys: `[B, N, D]`, what tokens are compared by; any float dtype, any strides.
        r: tokens to merge away per row.
        protected: `[N]` or `[B, N]` bool, tokens that neither merge nor are merged into; they count as positions.
        valid: `[B, N]` bool, the tokens that take part; all of them by default. An invalid token stays a group.
        backend: `"auto"`, `"torch"` or `"triton"`.

    Both masks may lie on the CPU whatever the device of the keys. A mask on a GPU is counted there, which synchronises.

    Returns:
        A `BipartiteMatch`, on the device of the keys; the identity for `r = 0`.

    Raises:
        OptionError: `r` is no int, or negative; there is no such backend.
        InputError: a shape or dtype is wrong, or a row has fewer than `r` sources that may merge.
        BackendError: the explicit backend cannot run here.
    """
    _check_tokens("bipartite_match", "keys", keys)
    check_number("bipartite_match", "r", r, "an int of at least 0", 0, whole=True)
    held = _held_tokens(keys, protected, valid)
    _check_possible(r, keys, held, valid)
    held = None if held is None else held.to(keys.device, non_blocking=True)
    valid = None if valid is None else valid.to(keys.device, non_blocking=True)
    kernel = find_kernel("bipartite_match", "bipartite_match", backend, keys)
    if kernel is not None:
        return BipartiteMatch(*kernel.launch(keys, None if held is None else ~held, valid, r))
    if valid is None:
        source, target = _pairs(keys, held, r)
    else:  # Each row by itself and without its padding: products of the shape that the row has alone.
        found = []
        for i, row in enumerate(valid):
            position = row.nonzero()[:, 0]
            some = None if held is None else held[i if len(held) > 1 else 0, position][None]
            found.append([position[one] for one in _pairs(keys[i, position][None], some, r)])
        source, target = (torch.cat(parts) for parts in zip(*found, strict=True))
    return BipartiteMatch(*_groups(source, target, keys.shape[1]))


def merge_tokens(
    x: Tensor, assign: Tensor, *, n_out: int, weight: Tensor | None = None, backend: str = "auto"
) -> MergedTokens:
    """The weighted mean of every group of tokens.

    Means are sums, in fp32 (fp64 for fp64 tokens) and in the order of the tokens, of each token times its share of its
    group's weight. A token that is a group by itself is copied as it is, and equal inputs give equal bits.

    The torch version lets gradients through to `x`, and `"auto"` takes it where they are wanted.

    Args:
        x: `[B, N, D]`, any float dtype, any strides.
        assign: `[B, N]` int64, the group (0 to `n_out` - 1) of each token; no group is empty.
        n_out: groups per row, M.
        weight: `[B, N]` fp32 above 0, what a token counts in its group (ToMe: its size); None where all count 1.
        backend: `"auto"`, `"torch"` or `"triton"`.

    Returns:
        A `MergedTokens`, on the device of `x`.

    Raises:
        OptionError: `n_out` or `backend` is out of range.
        InputError: a shape or dtype is wrong; on the CPU also where a group is empty or out of range. On a GPU the
            groups are not checked, since that would synchronise.
        BackendError: the explicit backend cannot run here.
    """
    _check_tokens("merge_tokens", "x", x)
    _check_groups(x, assign, n_out, weight)
    differentiated = torch.is_grad_enabled() and x.requires_grad
    if backend == "auto" and differentiated:
        backend = "torch"
    kernel = find_kernel("merge_tokens", "merge_tokens", backend, x)
    if kernel is not None:
        return MergedTokens(*kernel.launch(x, assign, n_out, weight))
    group = assign
    if len(x) > 1:
        group = assign + torch.arange(len(x), dtype=torch.int64, device=x.device)[:, None] * n_out
    group, flat = group.flatten(), x.reshape(-1, x.shape[2])
    with torch.no_grad():
        one = torch.ones_like(group, dtype=torch.float32) if weight is None else weight.float().flatten()
        size = add_at(one.new_zeros(len(x) * n_out), group, one)
        share = one / size[group]
    if x.device.type == "cpu" and not size.all():
        empty = int(size.argmin())
        raise InputError(
            f"merge_tokens needs at least one token in every group; group {empty % n_out} of row {empty // n_out} has "
            "none."
        )
    parts = flat.to(torch.promote_types(x.dtype, torch.float32)) * share[:, None]
    nothing = parts.new_full((len(size), x.shape[2]), -0.0)  # which changes no number that it is added to
    tokens = add_at(nothing, group, parts).to(x.dtype)
    return MergedTokens(tokens.view(len(x), n_out, x.shape[2]), size.view(len(x), n_out))


def _pairs(keys: Tensor, held: Tensor | None, r: int) -> tuple[Tensor, Tensor]:
    """The positions `[B, r]` of the sources that merge, and of what they merge into."""
    if r == 0:
        none = torch.empty(len(keys), 0, dtype=torch.int64, device=keys.device)
        return none, none
    best, partner = _best_partners(keys, held)
    top = best.sort(dim=1, descending=True, stable=True).indices[:, :r]
    return top * 2, partner.gather(1, top).mul_(2).add_(1)


def _groups(source: Tensor, target: Tensor, n: int) -> tuple[Tensor, Tensor]:
    """Where the groups stand, and which one each of `n` tokens goes to, when `source` goes into `target` `[B, r]`."""
    stays = torch.ones(len(source), n, dtype=torch.bool, device=source.device).scatter_(1, source, False)
    assign = stays.cumsum(1).sub_(1)
    assign.scatter_(1, source, assign.gather(1, target))
    return stays.nonzero()[:, 1].view(len(source), n - source.shape[1]), assign


def _best_partners(keys: Tensor, held: Tensor | None) -> tuple[Tensor, Tensor]:
    """The highest cosine `[B, S]` of every source, `-inf` for those that may not merge, and the destination it is of.

    Args:
        keys: `[B, N, D]`, all of them valid.
        held: `[1 or B, N]` bool, tokens that take no part.
    """
    with uncast(keys):
        keys = keys.detach().float()
        unit = (keys * keys.square().sum(2, keepdim=True).clamp_min_(1e-24).rsqrt_()).nan_to_num_(0, 0, 0)
        left, right = unit[:, ::2], unit[:, 1::2].transpose(1, 2)
        step = max(1, _BLOCK // (4 * len(keys) * right.shape[2]))
        parts = []
        for part in torch.split(left, step, dim=1):
            cosine = product(part, right).clamp_(max=_SAME)
            if held is not None:
                cosine.masked_fill_(held[:, None, 1::2], -torch.inf)
            parts.append(cosine.max(dim=2))
            del cosine  # Before the next one is made.
    best, partner = (torch.cat(some, 1) for some in zip(*parts, strict=True))
    return best if held is None else best.masked_fill_(held[:, ::2], -torch.inf), partner


def _check_tokens(op: str, name: str, x: Tensor) -> None:
    if x.ndim != 3 or not x.is_floating_point() or 0 in x.shape:
        raise InputError(
            f"{op} needs {name} [B, N, D] of a float dtype, none of them 0; got {x.dtype} {list(x.shape)}."
        )


def _held_tokens(keys: Tensor, protected: Tensor | None, valid: Tensor | None) -> Tensor | None:
    """The tokens that neither merge nor are merged into, `[1 or B, N]` bool; None where there are none."""
    rows, devices = tuple(keys.shape[:2]), (keys.device, torch.device("cpu"))
    check_tensor("bipartite_match", "protected", protected, "torch.bool", rows[1:], rows, devices=devices)
    check_tensor("bipartite_match", "valid", valid, "torch.bool", rows, devices=devices)
    if protected is not None and protected.ndim == 1:
        protected = protected[None]
    if valid is None:
        return protected
    return ~valid if protected is None else protected.to(valid.device) | ~valid


def _check_possible(r: int, keys: Tensor, held: Tensor | None, valid: Tensor | None) -> None:
    """Raise unless every row has `r` sources, and a destination to take them."""
    n = keys.shape[1]
    if held is None:
        possible = [(n + 1) // 2 if n > 1 else 0]
    else:
        taking = held.new_ones(1, n) if valid is None else valid.to(held.device)
        odd = taking.cumsum(1) % 2 == 0
        possible = ((~held & ~odd).sum(1) * (~held & odd).any(1)).tolist()
    least = min(possible)
    if least < r:
        where = f"row {possible.index(least)}" if len(possible) > 1 else "a row"
        raise InputError(
            f"bipartite_match was asked to merge r={r} tokens, but {where} has only {least} that may: of its "
            f"{n} positions the even ones merge into the odd ones, without those that are protected or "
            f"invalid; r may be at most {least} here."
        )


def _check_groups(x: Tensor, assign: Tensor, n_out: int, weight: Tensor | None) -> None:
    rows = tuple(x.shape[:2])
    check_count("merge_tokens", "n_out", n_out, 1, rows[1])
    check_tensor("merge_tokens", "assign", assign, "torch.int64", rows, devices=(x.device,))
    check_tensor("merge_tokens", "weight", weight, "floats", rows, devices=(x.device,))
    if x.device.type == "cpu":
        low, high = (int(bound) for bound in assign.aminmax())
        if low < 0 or high >= n_out:
            raise InputError(f"merge_tokens needs groups from 0 to n_out - 1 = {n_out - 1}; got {low} to {high}.")
