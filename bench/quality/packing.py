"""Many questions about one image in one sequence: the image tokens once, then the questions side by side.

A question sees the image and itself only (block-diagonal mask) and its positions start where the image ends, so each
one is computed as if it stood alone behind the image.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from questions import IGNORE, PAD, WORD_ID, Block
from scenes import GRID
from torch import Tensor

N_IMAGE = GRID * GRID


@dataclass(frozen=True)
class Packed:
    """Text side of a packed batch.

    Attributes:
        ids: [B, T] word ids that go in.
        target: [B, T] word id to predict at each place, `IGNORE` where nothing is.
        bias: [1, 1, 144 + T, 144 + T] 0 where attention is allowed, -inf elsewhere.
        position_ids: [1, 144 + T].
    """

    ids: Tensor
    target: Tensor
    bias: Tensor
    position_ids: Tensor


def pack_blocks(blocks: list[Block]) -> Packed:
    """Put blocks of questions and their answers (teacher forcing) behind one image."""
    ids, target, lengths = [], [], []
    for block in blocks:
        answer = block.answer.masked_fill(~block.valid[:, None], IGNORE)
        ids += [block.question, block.answer[:, :-1].masked_fill(block.answer[:, :-1] == IGNORE, WORD_ID[PAD])]
        target += [torch.full_like(block.question[:, 1:], IGNORE), answer]
        lengths.append(block.question.shape[1] + block.answer.shape[1] - 1)
    bias, position_ids = _layout(tuple(lengths))
    return Packed(torch.cat(ids, 1), torch.cat(target, 1), bias, position_ids)


def _layout(lengths: tuple[int, ...]) -> tuple[Tensor, Tensor]:
    segment = torch.cat([torch.full((n,), i) for i, n in enumerate((N_IMAGE, *lengths))])
    place = torch.cat([torch.arange(N_IMAGE)] + [N_IMAGE + torch.arange(n) for n in lengths])
    same = segment[:, None] == segment[None]
    allowed = (same | (segment == 0)[None]) & (place[:, None] >= place[None])
    bias = torch.zeros(allowed.shape).masked_fill(~allowed, -torch.inf)
    return bias[None, None], place[None]
