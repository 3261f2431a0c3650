"""A random LLaVA small enough for the tests of commands: folder, processor and all."""

from __future__ import annotations

from pathlib import Path

import torch
from PIL import Image, ImageDraw
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import (
    CLIPImageProcessor,
    CLIPVisionConfig,
    LlamaConfig,
    LlavaConfig,
    LlavaForConditionalGeneration,
    LlavaProcessor,
    PreTrainedTokenizerFast,
)

SIDE = 4  # the visual tokens of an image form a SIDE x SIDE grid
LAYERS = 8  # enough for ST3 to drop twice: at layers 3 and 7
WORDS = [
    "describe",
    "the",
    "image",
    "in",
    "detail",
    "what",
    "is",
    "at",
    "top",
    "left",
    "red",
    "blue",
    "green",
    "and",
    "a",
    "of",
    "right",
    "user",
]
SPECIAL = ["<pad>", "<unk>", "<s>", "</s>", "<image>"]
CHAT = (
    "<s> {% for m in messages %}{% for c in m['content'] %}"
    "{% if c['type'] == 'image' %}<image> {% else %}{{ c['text'] }} {% endif %}"
    "{% endfor %}{% endfor %}"
)


def save_tiny_llava(folder: Path, seed: int = 2) -> Path:
    """Write model and processor to `folder`, loadable with the Auto classes, and return it."""
    vocabulary = {word: i for i, word in enumerate([*SPECIAL, *WORDS, ".", "?"])}
    tokens = Tokenizer(models.WordLevel(vocabulary, unk_token="<unk>"))
    tokens.pre_tokenizer = pre_tokenizers.Whitespace()
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=tokens,
        pad_token="<pad>",
        unk_token="<unk>",
        bos_token="<s>",
        eos_token="</s>",
        additional_special_tokens=["<image>"],
    )
    size = {"height": 8 * SIDE, "width": 8 * SIDE}
    processor = LlavaProcessor(
        image_processor=CLIPImageProcessor(size=size, do_center_crop=False),
        tokenizer=tokenizer,
        patch_size=8,
        vision_feature_select_strategy="default",
        num_additional_image_tokens=1,
        image_token="<image>",
        chat_template=CHAT,
    )
    config = LlavaConfig(
        vision_config=CLIPVisionConfig(
            hidden_size=16,
            intermediate_size=32,
            num_hidden_layers=2,
            num_attention_heads=2,
            image_size=8 * SIDE,
            patch_size=8,
        ),
        text_config=LlamaConfig(
            vocab_size=len(vocabulary),
            hidden_size=32,
            intermediate_size=64,
            num_hidden_layers=LAYERS,
            num_attention_heads=4,
            num_key_value_heads=2,
            pad_token_id=vocabulary["<pad>"],
            bos_token_id=vocabulary["<s>"],
            eos_token_id=vocabulary["</s>"],
        ),
        image_token_index=vocabulary["<image>"],
    )
    torch.manual_seed(seed)
    model = LlavaForConditionalGeneration(config)
    with torch.no_grad():  # at their default size the weights are too small to make answers vary
        for weight in model.parameters():
            if weight.ndim > 1:
                weight.mul_(6)
    model.generation_config.pad_token_id = vocabulary["<pad>"]
    model.save_pretrained(folder)
    processor.save_pretrained(folder)
    return folder


def save_picture(path: Path) -> Path:
    image = Image.new("RGB", (120, 80), "white")
    draw = ImageDraw.Draw(image)
    draw.rectangle((5, 5, 40, 30), fill="red")
    draw.ellipse((70, 40, 115, 75), fill="blue")
    image.save(path)
    return path
