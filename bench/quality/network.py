"""The model: a stock `LlavaForConditionalGeneration`, 1.6 million parameters, and the forwards used to train it."""

from __future__ import annotations

import torch
from names import upstream
from packing import N_IMAGE, Packed
from questions import EOS, IMAGE_TOKEN, PAD, VOCABULARY, WORD_ID
from scenes import BACKGROUND_COLOUR, BACKGROUND_DIGIT, COLOURS, GRID, IMAGE, PATCH
from torch import Tensor, nn
from torch.nn import functional as F
from transformers import CLIPVisionConfig, LlamaConfig, LlavaConfig, LlavaForConditionalGeneration
from transformers.modeling_utils import AttentionInterface

WIDTH = 128
HEADS = 4
VOCABULARY_SIZE = 64
PIXEL_MEAN, PIXEL_STD = 0.25, 0.25


def plain_attention(
    module: nn.Module, query: Tensor, key: Tensor, value: Tensor, attention_mask: Tensor | None, scaling: float, **_
) -> tuple[Tensor, None]:
    """Matrix product, softmax, matrix product: on a CPU its backward is much faster than the fused attention's."""
    scores = torch.matmul(query * scaling, key.transpose(2, 3))
    if attention_mask is not None:
        scores = scores + attention_mask
    return torch.matmul(scores.softmax(-1), value).transpose(1, 2), None


def build_model(vision_layers: int = 4, text_layers: int = 4) -> LlavaForConditionalGeneration:
    """A freshly initialised model; position embeddings of the vision side start as 2-D sines and cosines."""
    vision = CLIPVisionConfig(
        hidden_size=WIDTH,
        intermediate_size=4 * WIDTH,
        num_hidden_layers=vision_layers,
        num_attention_heads=HEADS,
        image_size=IMAGE,
        patch_size=PATCH,
        hidden_act="gelu",
        projection_dim=WIDTH,
    )
    text = LlamaConfig(
        vocab_size=VOCABULARY_SIZE,
        hidden_size=WIDTH,
        intermediate_size=352,
        num_hidden_layers=text_layers,
        num_attention_heads=HEADS,
        num_key_value_heads=HEADS,
        max_position_embeddings=1024,
        pad_token_id=WORD_ID[PAD],
        bos_token_id=None,
        eos_token_id=WORD_ID[EOS],
        tie_word_embeddings=False,
    )
    config = LlavaConfig(
        vision_config=vision,
        text_config=text,
        image_token_index=WORD_ID[IMAGE_TOKEN],
        projector_hidden_act="gelu",
        vision_feature_select_strategy="default",
        vision_feature_layer=-1,
        image_seq_length=N_IMAGE,
        tie_word_embeddings=False,
    )
    model = LlavaForConditionalGeneration(config)
    assert len(VOCABULARY) <= VOCABULARY_SIZE
    with torch.no_grad():
        embeddings = model.model.vision_tower.embeddings
        embeddings.patch_embedding.weight.normal_(0, (3 * PATCH * PATCH) ** -0.5)
        embeddings.position_embedding.weight[1:] = 0.5 * sine_positions(GRID, WIDTH)
    return model


def sine_positions(grid: int, width: int) -> Tensor:
    """[grid * grid, width]: a quarter of the width each for sin and cos of row and column."""
    rate = 1 / 40 ** (torch.arange(width // 4) / (width // 4))
    angle = torch.arange(grid)[:, None] * rate
    axis = torch.cat((angle.sin(), angle.cos()), 1)
    rows = axis[:, None].expand(-1, grid, -1)
    columns = axis[None].expand(grid, -1, -1)
    return torch.cat((rows, columns), 2).reshape(grid * grid, width)


class Trainee(nn.Module):
    """The model together with the heads that only training uses.

    Attributes:
        llava: The model that is exported.
        digit_head, colour_head: What is in a patch.
        class_head: Which digits and colours are anywhere in the image, read from the class token.
    """

    def __init__(self, llava: LlavaForConditionalGeneration) -> None:
        super().__init__()
        AttentionInterface.register("plain", plain_attention)
        llava.set_attn_implementation("plain")
        self.llava = llava
        self.digit_head = nn.Linear(WIDTH, BACKGROUND_DIGIT + 1)
        self.colour_head = nn.Linear(WIDTH, BACKGROUND_COLOUR + 1)
        self.class_head = nn.Linear(WIDTH, BACKGROUND_DIGIT + len(COLOURS))

    def vision_layers(self, hidden: Tensor) -> Tensor:
        tower = self.llava.model.vision_tower
        hidden = tower.pre_layrnorm(hidden)
        for layer in tower.encoder.layers:
            hidden = layer(hidden, None)
        return hidden

    def windows(self, patches: Tensor, position: Tensor) -> Tensor:
        """Patches [M, n, 192] and their places [M, n] in the image -> hidden states [M, n, D], no class token."""
        embeddings = self.llava.model.vision_tower.embeddings
        hidden = F.linear(patches, embeddings.patch_embedding.weight.flatten(1))
        return self.vision_layers(hidden + embeddings.position_embedding(position + 1))

    def images(self, pixels: Tensor) -> Tensor:
        """[B, 3, 96, 96] -> hidden states [B, 145, D], the class token first."""
        return self.vision_layers(self.llava.model.vision_tower.embeddings(pixels))

    def answers(self, hidden: Tensor, packed: Packed) -> Tensor:
        """Vision hidden states [B, 145, D] and packed questions -> logits [B, T, V] at the text places."""
        inner = self.llava.model
        text = inner.language_model
        x = torch.cat((inner.multi_modal_projector(hidden[:, 1:]), text.embed_tokens(packed.ids)), 1)
        given = {
            upstream.MASK: packed.bias,
            upstream.POSITIONS: packed.position_ids,
            upstream.ROTARY: text.rotary_emb(x, packed.position_ids),
        }
        for layer in text.layers:
            x = layer(x, **given)
        return self.llava.lm_head(text.norm(x[:, N_IMAGE:]))

    def compile_layers(self) -> None:
        """Compile layer by layer: nearly twice as fast on two cores, and the parameters keep their names."""
        inner = self.llava.model
        for layer in (*inner.vision_tower.encoder.layers, *inner.language_model.layers):
            layer.compile(dynamic=False)
