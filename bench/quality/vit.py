"""The small vision transformer, a stock timm `VisionTransformer`, and the images that it is trained and measured on.

An image holds one real handwritten digit over 10-16 % of it, in one of six colours at a random place, among twelve
coloured fragments of other digits, on a coloured background with noise: the task is to name the digit.
"""

from __future__ import annotations

import json
from pathlib import Path

import timm
import torch
from network import PIXEL_MEAN, PIXEL_STD, sine_positions
from safetensors.torch import save_file
from scenes import GRID, IMAGE, PATCH, SceneConfig
from torch import Tensor, nn

SCENES = SceneConfig(digits=(1, 1), size=(31.0, 38.0), fragments=12)
CLASSES = 10
ARCHITECTURE = "vit_tiny_patch16_224"
WIDTH = 128
ARGUMENTS = {
    "img_size": IMAGE,
    "patch_size": PATCH,
    "embed_dim": WIDTH,
    "depth": 8,
    "num_heads": 2,
    "mlp_ratio": 3.0,
    "num_classes": CLASSES,
}


def build_model() -> nn.Module:
    """A freshly initialised model; its position embeddings start as 2-D sines and cosines."""
    model: nn.Module = timm.create_model(ARCHITECTURE, **ARGUMENTS)
    with torch.no_grad():
        model.patch_embed.proj.weight.normal_(0, (3 * PATCH * PATCH) ** -0.5)
        model.pos_embed[:, 1:] = 0.5 * sine_positions(GRID, WIDTH)
    return model


def normalise(pixels: Tensor) -> Tensor:
    """What the model is given for pixels in [0, 1]."""
    return (pixels - PIXEL_MEAN) / PIXEL_STD


def export(model: nn.Module, folder: Path) -> None:
    """Write a half-precision copy that `timm.create_model("local-dir:FOLDER", pretrained=True)` loads."""
    folder.mkdir(parents=True, exist_ok=True)
    weights = {name: value.detach().half().contiguous() for name, value in model.state_dict().items()}
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
    config = {
        "architecture": ARCHITECTURE,
        "num_classes": CLASSES,
        "num_features": WIDTH,
        "global_pool": "token",
        "model_args": {name: value for name, value in ARGUMENTS.items() if name != "num_classes"},
        "pretrained_cfg": {
            "input_size": [3, IMAGE, IMAGE],
            "fixed_input_size": True,
            "interpolation": "bilinear",
            "crop_pct": 1.0,
            "mean": [PIXEL_MEAN] * 3,
            "std": [PIXEL_STD] * 3,
            "num_classes": CLASSES,
            "pool_size": None,
            "first_conv": "patch_embed.proj",
            "classifier": "head",
            "label_names": [str(digit) for digit in range(CLASSES)],
        },
    }
    (folder / "config.json").write_text(json.dumps(config, indent=1) + "\n", encoding="utf-8")


def load(folder: Path) -> nn.Module:
    """The exported model in fp32."""
    model: nn.Module = timm.create_model(f"local-dir:{folder}", pretrained=True)
    return model.float().eval()
