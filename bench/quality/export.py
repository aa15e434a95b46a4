"""Write the model folder: weights, configuration and a stock `LlavaProcessor` that needs no extra code to load."""

from __future__ import annotations

from pathlib import Path

import torch
from network import PIXEL_MEAN, PIXEL_STD
from questions import EOS, IMAGE_TOKEN, PAD, UNKNOWN, WORD_ID
from scenes import IMAGE, PATCH
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import (
    CLIPImageProcessor,
    GenerationConfig,
    LlavaForConditionalGeneration,
    LlavaProcessor,
    PreTrainedTokenizerFast,
)

CHAT_TEMPLATE = (
    "{% for message in messages %}{% if message['content'] is string %}{{ message['content'] }} "
    "{% else %}{% for part in message['content'] %}{% if part['type'] == 'image' %}<image> "
    "{% else %}{{ part['text'] }} {% endif %}{% endfor %}{% endif %}{% endfor %}"
)


def build_processor() -> LlavaProcessor:
    """A word-level tokenizer (words between white space) and an image processor that resizes to 96x96."""
    words = Tokenizer(models.WordLevel(WORD_ID, unk_token=UNKNOWN))
    words.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=words,
        pad_token=PAD,
        eos_token=EOS,
        unk_token=UNKNOWN,
        additional_special_tokens=[IMAGE_TOKEN],
        padding_side="left",
        model_max_length=1024,
        clean_up_tokenization_spaces=False,
        model_input_names=["input_ids", "attention_mask"],
    )
    images = CLIPImageProcessor(
        size={"height": IMAGE, "width": IMAGE},
        crop_size={"height": IMAGE, "width": IMAGE},
        do_center_crop=False,
        image_mean=[PIXEL_MEAN] * 3,
        image_std=[PIXEL_STD] * 3,
    )
    return LlavaProcessor(
        image_processor=images,
        tokenizer=tokenizer,
        patch_size=PATCH,
        vision_feature_select_strategy="default",
        num_additional_image_tokens=1,
        chat_template=CHAT_TEMPLATE,
    )


def export(model: LlavaForConditionalGeneration, folder: Path) -> None:
    """Save a half-precision copy of the model and its processor."""
    folder.mkdir(parents=True, exist_ok=True)
    copy = LlavaForConditionalGeneration(model.config)
    copy.load_state_dict(model.state_dict())
    copy.generation_config = GenerationConfig(
        eos_token_id=WORD_ID[EOS], pad_token_id=WORD_ID[PAD], max_new_tokens=8, do_sample=False
    )
    copy.set_attn_implementation("sdpa")
    copy.to(torch.float16).save_pretrained(folder)
    build_processor().save_pretrained(folder)
