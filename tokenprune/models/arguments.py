"""The per-token arguments of a decoder: positions, DeepStack planes and whatever else has a row for every token."""

from typing import Any

import torch
from torch import Tensor, nn

from tokenprune.models.selection import Merged
from tokenprune.reduction import Keep


def all_positions(positions: Tensor | None, past: int, embeds: Tensor) -> Tensor:
    """Positions of all tokens of the call, `[B, L]` or `[3 or 4, B, L]`; where none are given, those the decoder
    would take."""
    n_rows, length = embeds.shape[:2]
    if positions is None:
        positions = torch.arange(past, past + length, device=embeds.device)[None]
    shape = (n_rows, length) if positions.ndim == 2 else (positions.shape[0], n_rows, length)
    return positions.expand(shape)


def merge_planes(kwargs: dict[str, Any], merged: list[Merged]) -> dict[str, Any]:
    """DeepStack's feature planes of the decoder's arguments, merged like the embeddings."""
    visual, planes = kwargs.get("visual_pos_masks"), kwargs.get("deepstack_visual_embeds")
    if visual is None or planes is None:
        return kwargs
    changed = []
    for plane in planes:
        whole = plane.new_zeros(*visual.shape, plane.shape[-1])
        whole[visual.to(plane.device)] = plane
        for one in merged:
            one.write(whole)
        changed.append(whole[visual.to(plane.device)])
    return {**kwargs, "deepstack_visual_embeds": changed}


def shorten_tensors(kwargs: dict[str, Any], keep: Keep) -> None:
    """Shorten every per-token argument of the decoder, in place of the dict. Masks over keys are not among them."""
    embeds = kwargs["inputs_embeds"]
    per_token = embeds.shape[:2]
    visual = kwargs.get("visual_pos_masks")
    planes = kwargs.get("deepstack_visual_embeds")
    if (
        visual is not None and planes is not None
    ):  # DeepStack: a feature plane has one row for each visual token of the batch
        number = (visual.flatten().cumsum(0) - 1).view_as(visual)
        left = keep.apply(visual)
        left = left if keep.valid is None else left & keep.valid.to(left.device)
        rows = keep.apply(number)[left]
        kwargs["deepstack_visual_embeds"] = [plane[rows.to(plane.device)] for plane in planes]
        kwargs["visual_pos_masks"] = left
    for name, value in kwargs.items():
        if name in ("attention_mask", "past_key_values", "visual_pos_masks", "deepstack_visual_embeds"):
            continue
        if name == "position_ids":
            kwargs[name] = keep.apply(value, dim=value.ndim - 1)
        elif isinstance(value, Tensor) and value.shape[:2] == per_token:
            kwargs[name] = keep.apply(value)


def stand_in(ids: Tensor, *, like: nn.Module) -> Tensor:
    """Embeddings `[B, L, 0]` of token ids `[B, L]`, for their shape and the dtype that `like` computes in."""
    return torch.empty(*ids.shape, 0, dtype=next(like.parameters()).dtype, device=ids.device)
