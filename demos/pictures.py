"""Pictures for the demo: read from files of all kinds, taken from scikit-image, or recovered from a model's inputs."""

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from PIL import Image
from torch import Tensor

from tokenprune.report.loading import one_line as one_line
from tokenprune.report.loading import read_image as read_image


class DemoError(Exception):
    """Something that the user can put right; shown as one line."""


def photograph() -> Image.Image:
    """The astronaut Eileen Collins, from scikit-image.

    Raises:
        DemoError: scikit-image is not installed.
    """
    try:
        from skimage import data
    except ImportError as error:
        raise DemoError('the built-in photograph needs scikit-image: pip install "tokenprune-vl[demo]"') from error
    return Image.fromarray(data.astronaut())


def seen_by(processor: Any, inputs: Mapping[str, Any], image: Image.Image) -> Image.Image:
    """What the model sees: the pixels it gets, where they are one plain image, else the image as it is."""
    return frames_seen(processor, inputs, [image])[0]


def frames_seen(processor: Any, inputs: Mapping[str, Any], frames: Sequence[Image.Image]) -> Sequence[Image.Image]:
    """What the model sees: the pixels it gets, where they are one plain image for each frame, else the frames."""
    pixels, images = inputs.get("pixel_values"), processor.image_processor
    if pixels is None and isinstance(inputs.get("pixel_values_videos"), Tensor):
        pixels, images = inputs["pixel_values_videos"], processor.video_processor
        pixels = pixels[0] if pixels.ndim == 5 else pixels
    mean, std = getattr(images, "image_mean", None), getattr(images, "image_std", None)
    plain = isinstance(pixels, Tensor) and pixels.ndim == 4 and pixels.shape[:2] == (len(frames), 3)
    if not plain or mean is None or std is None:
        return frames
    shown = pixels.float().cpu()
    if getattr(images, "do_normalize", True):
        shown = shown * torch.tensor(std)[:, None, None] + torch.tensor(mean)[:, None, None]
    values = (255 * shown.clamp(0, 1)).round().to(torch.uint8).permute(0, 2, 3, 1).numpy()
    return [Image.fromarray(value) for value in values]
