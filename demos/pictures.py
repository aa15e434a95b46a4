"""Pictures for the demo: read from files of all kinds, taken from scikit-image, or recovered from a model's inputs."""

import warnings
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image, ImageOps, UnidentifiedImageError
from torch import Tensor


class DemoError(Exception):
    """Something that the user can put right; shown as one line."""


def one_line(error: BaseException) -> str:
    """The first sentence of an error."""
    text = " ".join(str(error).split()) or type(error).__name__
    return text.split(". ")[0].rstrip(".")[:300]


def read_image(path: Path) -> Image.Image:
    """An image file as upright RGB: the first frame, transparency over white, 16 bits brought to 8.

    Raises:
        DemoError: there is no such file, or Pillow cannot read it or refuses its size.
    """
    if path.is_dir():
        raise DemoError(f"{path} is a folder, not an image")
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            warnings.simplefilter("error", Image.DecompressionBombWarning)
            with Image.open(path) as image:
                image.load()
                return _rgb(ImageOps.exif_transpose(image))
    except FileNotFoundError:
        raise DemoError(f"there is no file {path}") from None
    except (Image.DecompressionBombWarning, Image.DecompressionBombError) as error:
        raise DemoError(f"{path} is too large an image: {one_line(error)}") from error
    except UnidentifiedImageError:
        raise DemoError(f"{path} is not an image that Pillow can read") from None
    except Exception as error:  # Pillow's plugins raise all kinds of errors on broken files
        raise DemoError(f"{path} cannot be read: {one_line(error)}") from error


def _rgb(image: Image.Image) -> Image.Image:
    if image.mode.startswith("I") or image.mode == "F":
        values = np.asarray(image).astype(np.float64)
        low, high = (0.0, 65535.0) if image.mode.startswith("I;16") else (values.min(), values.max())
        image = Image.fromarray((255 * (values - low) / max(high - low, 1e-12)).round().astype(np.uint8))
    if image.has_transparency_data:
        image = image.convert("RGBA")
        image = Image.alpha_composite(Image.new("RGBA", image.size, "white"), image)
    return image.convert("RGB")


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
