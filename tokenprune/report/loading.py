"""A model with its processor from a folder or the hub, an image from a file, and the inputs of ``generate``: what the
command line, and anybody's script, needs before a model can be asked. Every mistake is a sentence of one line.

The image can also be made smaller, until it has about as many visual tokens as pruning would keep: the baseline that
prunes nothing. Two ways are tried. Models that take images of any size are given a smaller image. Models of one fixed
resolution are given smaller pixels by their image processor, and their position embeddings are interpolated by their
own vision encoder, where it can. A model that was trained on one resolution answers worse then than one trained on
many.
"""

import math
import re
import warnings
from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import nn

from tokenprune.errors import InputError, OptionError, TokenPruneError, UnsupportedModelError
from tokenprune.schedule import count
from tokenprune.upstream.loading import (
    ask_to_interpolate,
    image_mark,
    interpolators,
    load_pretrained,
    n_unknown,
    process,
    prompt_counts,
    smaller_pixels,
    text_of,
)

if TYPE_CHECKING:
    from PIL import Image

DTYPES = ("auto", "float32", "bfloat16", "float16")
DEVICES = ("auto", "cpu", "cuda")
NEAR = 0.35  # how far, of the wanted visual tokens, a smaller image may be from them


@dataclass(frozen=True)
class Loaded:
    """A model with its processor, and the name it was asked for by."""

    name: str
    model: Any
    processor: Any

    @property
    def label(self) -> str:
        """Name, class, device and dtype."""
        weight = next(self.model.parameters())
        return f"{self.name} ({type(self.model).__name__}, {weight.device.type}, {str(weight.dtype).split('.')[-1]})"


def one_line(error: BaseException) -> str:
    """The first sentence of an error."""
    text = " ".join(str(error).split()) or type(error).__name__
    return text.split(". ")[0].rstrip(".")[:300]


def load_model(name: str, *, device: str = "auto", dtype: str = "auto") -> Loaded:
    """Load a model and its processor.

    Args:
        name: a folder or a name on the hub; remote code is never run.
        device: `"auto"` is CUDA where there is some.
        dtype: `"auto"` is float32 on a CPU, and what the checkpoint says elsewhere.

    Raises:
        OptionError: there is no such model or device, or the model cannot be loaded.
        UnsupportedModelError: it does not turn images and text into text.
    """
    if device == "cuda" and not torch.cuda.is_available():
        raise OptionError("device cuda was asked for, but torch sees no CUDA device")
    path = Path(name)
    if path.is_file():
        raise OptionError(f"{name} is a file; a model is a folder or a name on the hub")
    blank = not name.strip()
    local = blank or name.count("/") > 1 or name[0] in "./~" or Path(path.parts[0]).is_dir()
    if blank or (local and not path.is_dir()):
        raise OptionError(f"there is no model folder {name or repr(name)}")
    device = ("cuda" if torch.cuda.is_available() else "cpu") if device == "auto" else device
    kind = ("float32" if device == "cpu" else "auto") if dtype == "auto" else dtype
    try:
        model, processor = load_pretrained(name, dtype=kind, device=device)
    except (UnsupportedModelError, torch.OutOfMemoryError):
        raise
    except Exception as error:  # a checkpoint can be wrong in as many ways as there are loaders
        raise OptionError(f"the model {name} cannot be loaded: {one_line(error)}") from error
    return Loaded(name, model, processor)


def read_image(path: str | Path) -> "Image.Image":
    """An image file as upright RGB: the first frame, transparency over white, 16 bits brought to 8.

    Raises:
        InputError: there is no such file, or Pillow is not installed, cannot read it or refuses its size.
    """
    try:
        from PIL import Image, ImageOps, UnidentifiedImageError
    except ImportError as error:
        raise InputError('reading images needs Pillow: pip install "tokenprune-vl[demo]", or pillow alone') from error
    if Path(path).is_dir():
        raise InputError(f"{path} is a folder, not an image")
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            warnings.simplefilter("error", Image.DecompressionBombWarning)
            with Image.open(path) as image:
                image.load()
                return _rgb(ImageOps.exif_transpose(image))
    except FileNotFoundError:
        raise InputError(f"there is no file {path}") from None
    except (Image.DecompressionBombWarning, Image.DecompressionBombError) as error:
        raise InputError(f"{path} is too large an image: {one_line(error)}") from error
    except UnidentifiedImageError:
        raise InputError(f"{path} is not an image that Pillow can read") from None
    except Exception as error:  # Pillow's plugins raise all kinds of errors on broken files
        raise InputError(f"{path} cannot be read: {one_line(error)}") from error


def _rgb(image: "Image.Image") -> "Image.Image":
    from PIL import Image

    if image.mode.startswith("I") or image.mode == "F":
        values = np.asarray(image).astype(np.float64)
        low, high = (0.0, 65535.0) if image.mode.startswith("I;16") else (values.min(), values.max())
        image = Image.fromarray((255 * (values - low) / max(high - low, 1e-12)).round().astype(np.uint8))
    if image.has_transparency_data:
        image = image.convert("RGBA")
        image = Image.alpha_composite(Image.new("RGBA", image.size, "white"), image)
    return image.convert("RGB")


def prepare(loaded: Loaded, image: "Image.Image", question: str, **processing: Any) -> dict[str, Any]:
    """Inputs of ``generate`` for one image and one question, on the model's device.

    Args:
        loaded: the model and its processor.
        image: what the question is about.
        question: in plain words; the prompt is made by the processor's chat template where it has one.
        **processing: further options of the image processor, such as `size`.

    Raises:
        InputError: the model's processor refuses them.
    """
    mark, weight = image_mark(loaded.processor), next(loaded.model.parameters())
    if mark in question:
        raise InputError(f"the question must not hold {mark}, which represents the image")
    try:
        inputs = process(loaded.processor, image, question, **processing)
    except UnsupportedModelError:
        raise
    except Exception as error:  # processors refuse odd sizes and shapes each in their own way
        raise InputError(
            f"the processor of {loaded.name} refuses this picture or question: {one_line(error)}"
        ) from error
    return dict(inputs.to(weight.device, dtype=weight.dtype))


def in_known_words(processor: Any, question: str) -> tuple[str, int]:
    """The question as it is or, where a small vocabulary lacks some of it, in lower case with marks set apart; and how
    many of its words are unknown even so."""
    simple = " ".join(re.findall(r"\w+|[^\w\s]", question.lower()))
    best = min(question, simple, key=lambda text: n_unknown(processor, text))
    return best, n_unknown(processor, best)


def decode(loaded: Loaded, ids: Any) -> str:
    """Generated ids of one row as text, up to the end of the sequence."""
    return text_of(loaded.model, loaded.processor, ids)


def n_visual(model: Any, inputs: Mapping[str, Any]) -> int:
    """Placeholders of visual tokens in a prompt.

    Raises:
        UnsupportedModelError: the prompt or the id of the placeholders is not found.
    """
    return prompt_counts(model, inputs)[1]


def resized_inputs(loaded: Loaded, image: "Image.Image", question: str, *, keep: float) -> dict[str, Any]:
    """Inputs of ``generate`` whose image is so much smaller that it has about `keep` of its visual tokens.

    Run them inside :func:`interpolating`.

    Raises:
        OptionError: neither way comes near that number of tokens with this model.
    """
    whole = n_visual(loaded.model, prepare(loaded, image, question))
    wanted = count(keep, whole)
    scale = math.sqrt(wanted / whole) if whole else 1.0
    size = [max(1, round(side * scale)) for side in image.size]
    ways: list[tuple[Any, dict[str, Any]]] = [(image.resize((size[0], size[1])), {})]
    smaller = smaller_pixels(loaded.model, loaded.processor, scale) if interpolators(loaded.model) else None
    if smaller is not None:
        ways.append((image, smaller))
    found: dict[float, dict[str, Any]] = {}
    for picture, options in ways:
        with suppress(TokenPruneError):
            inputs = prepare(loaded, picture, question, **options)
            found.setdefault(abs(n_visual(loaded.model, inputs) - wanted), inputs)
    nearest = min(found, default=math.inf)
    if nearest > max(1.0, NEAR * wanted):
        raise OptionError(
            f"{loaded.name} turns images of every size into about {whole} visual tokens, so a smaller image does not "
            f"bring them to {wanted}"
        )
    return found[nearest]


@contextmanager
def interpolating(model: nn.Module) -> Iterator[None]:
    """Within the block the vision encoder interpolates its position embeddings to the size of what it is given."""

    def ask(_module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[Any, dict[str, Any]]:
        return args, ask_to_interpolate(kwargs)

    with ExitStack() as hooks:
        for module in interpolators(model):
            hooks.enter_context(module.register_forward_pre_hook(ask, with_kwargs=True))
        yield
