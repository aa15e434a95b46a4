"""Which tokens of a forward are visual, and which of them make one image (or one frame)."""

from dataclasses import replace

import torch
from torch import Tensor, nn

from tokenprune.decoder.boundaries import Image, Placed
from tokenprune.errors import UnsupportedModelError
from tokenprune.upstream.calls import embedding_of
from tokenprune.upstream.check import version_of
from tokenprune.upstream.families import Family, axes_of, placeholder_id
from tokenprune.upstream.prompts import Prompt


def visible(images: list[Image], padding: Tensor | None) -> list[Image]:
    """The images of a forward without the tokens that the attention mask hides; an image of such alone is left out.

    Args:
        images: the images.
        padding: `[B, L]` bool on the CPU, False for hidden tokens, or None.
    """
    if padding is None:
        return images
    shown = [image.tokens[padding[image.row, image.tokens]] for image in images]
    return [
        replace(image, tokens=left, grid=None, n_hidden=n_hidden) if n_hidden else image
        for image, left in zip(images, shown, strict=True)
        if (n_hidden := len(image.tokens) - len(left)) < len(image.tokens)
    ]


def placeholders(root: nn.Module, prompt: Prompt, *, field: str) -> Tensor | None:
    """Where the placeholders of one kind stand, `[B, L]` bool; None where the model has no such kind.

    Args:
        root: the module that holds the text decoder.
        prompt: what it was called with.
        field: field of its config that holds the placeholder's id.
    """
    token_id = placeholder_id(root, field)
    if token_id is None:
        return None
    if prompt.ids is not None:
        return prompt.ids == token_id
    embeds = prompt.embeds
    if embeds is None:
        return None
    return torch.eq(embeds, embedding_of(root, token_id, like=embeds)).all(-1)


def has_merged_features(root: nn.Module, family: Family, prompt: Prompt, embeds: Tensor) -> bool:
    """Whether a call without image features that are known carries some: placeholders have the same embedding
    everywhere until features take their places. Who brings embeddings beside ids may have put them there.

    Args:
        root: the module that holds the text decoder.
        family: its family.
        prompt: what it was called with.
        embeds: what the decoder is to get, `[B, L, D]`.

    Raises:
        UnsupportedModelError: it does, and nobody brought embeddings.
    """
    if prompt.ids is None or prompt.ids.shape != embeds.shape[:2]:
        return False
    for field in family.ids:
        mask = placeholders(root, prompt, field=field)
        found = None if mask is None else embeds[mask.to(embeds.device)]
        if found is not None and len(found) > 1 and not bool((found == found[:1]).all()):
            if prompt.embeds is not None:
                return True
            raise UnsupportedModelError(
                f"{len(found)} visual tokens carry image features, and none of the arguments of {type(root).__name__} "
                f"is known to hold any: {', '.join(prompt.names)} (transformers {version_of()}); nothing was pruned"
            )
    return False


def find_images(
    root: nn.Module, family: Family, prompt: Prompt, positions: Tensor | None, at: Tensor | None = None
) -> list[Image]:
    """The images of a forward, by row and in the order of the sequence.

    Each image that the caller gave is one, with all of its tiles, and so is each frame of a video (two or more, where
    the model merges those); :mod:`tokenprune.decoder.boundaries` tells them apart.

    Args:
        root: the module that holds the text decoder.
        family: its family.
        prompt: what it was called with.
        positions: positions that the decoder is to get; with M-RoPE they tell frames and grids.
        at: where visual tokens stand, `[B, L]` bool, if not at placeholders.
    """
    axes = axes_of(positions)
    family = family if at is None else replace(family, apart=False)  # no processor put them there
    images: list[Image] = []
    for field in family.ids if at is None else family.ids[:1]:
        mask = placeholders(root, prompt, field=field) if at is None else at
        if mask is None:
            continue
        video = field.startswith("video") or prompt.has_only_videos
        rows = [row.nonzero()[:, 0] for row in mask.cpu()]
        images += Placed(root, family, prompt, rows, axes, video).images()
    images.sort(key=lambda image: (image.row, int(image.tokens[0])))
    seen: dict[int, int] = {}
    for found in images:
        found.ordinal = seen.get(found.row, 0)
        seen[found.row] = found.ordinal + 1
    return images
