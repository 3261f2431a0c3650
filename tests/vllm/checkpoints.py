"""Tiny random checkpoints of the families that the plug-in trims, processors and all.

They are as small as vLLM's CPU kernels allow (heads of 32) with images of several blocks of 32
tokens, so that trimming has something to free.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import (
    AutoModelForImageTextToText,
    CLIPImageProcessor,
    CLIPVisionConfig,
    InternVLConfig,
    InternVLProcessor,
    InternVLVisionConfig,
    LlamaConfig,
    LlavaConfig,
    LlavaNextConfig,
    LlavaNextImageProcessor,
    LlavaNextProcessor,
    LlavaProcessor,
    PreTrainedConfig,
    PreTrainedTokenizerFast,
    Qwen2_5_VLConfig,
    Qwen2_5_VLProcessor,
    Qwen2Config,
    Qwen2VLConfig,
    Qwen2VLImageProcessor,
    Qwen2VLProcessor,
    Qwen2VLVideoProcessor,
    Qwen3VLConfig,
    Qwen3VLProcessor,
    Qwen3VLVideoProcessor,
)
from transformers.models.got_ocr2.image_processing_got_ocr2 import GotOcr2ImageProcessor
from transformers.models.internvl.video_processing_internvl import InternVLVideoProcessor
from transformers.models.qwen2_5_vl.configuration_qwen2_5_vl import (
    Qwen2_5_VLTextConfig,
    Qwen2_5_VLVisionConfig,
)
from transformers.models.qwen2_vl.configuration_qwen2_vl import (
    Qwen2VLTextConfig,
    Qwen2VLVisionConfig,
)
from transformers.models.qwen3_vl.configuration_qwen3_vl import (
    Qwen3VLTextConfig,
    Qwen3VLVisionConfig,
)

from tests.zoo.base import VISION, randomise, tiny

LAYERS = 8
SPECIAL = ["<pad>", "<s>", "</s>", "<unk>", "<image>", "<|image_pad|>", "<|video_pad|>"]
SPECIAL += ["<|vision_start|>", "<|vision_end|>", "<img>", "</img>", "<IMG_CONTEXT>", "<video>"]
FIRST_WORD = 30
_VIDEO_PAD = "<|video_pad|>"
VOCABULARY = [*SPECIAL, *(f"<{i}>" for i in range(len(SPECIAL), FIRST_WORD))]
VOCABULARY += [f"w{i}" for i in range(FIRST_WORD, 120)]
ID = {word: i for i, word in enumerate(VOCABULARY)}
CHAT = (
    "{% for m in messages %}{% for c in m['content'] %}"
    "{% if c['type'] == 'image' %}IMAGE{% else %}{{ c['text'] }} {% endif %}"
    "{% endfor %}{% endfor %}"
)


@dataclass(frozen=True)
class Kind:
    """A family's checkpoint.

    Attributes:
        config: makes its config.
        processor: makes its processor from a tokenizer.
        image: what stands for one in a prompt.
        video: what stands for a video; None where it takes none.
        gain, seed: of the random weights, so that answers are not one word over and over, and no
            two words are equally likely.
    """

    config: Callable[[], PreTrainedConfig]
    processor: Callable[[Any], Any]
    image: str
    video: str | None = None
    gain: float = 2.0
    seed: int = 0

    def save(self, folder: Path) -> Path:
        """Write a checkpoint and return its folder."""
        torch.manual_seed(self.seed)
        model = AutoModelForImageTextToText.from_config(self.config(), dtype=torch.float32)
        randomise(model, self.gain)
        head = model.get_output_embeddings()
        with torch.no_grad():  # special tokens are never the argmax
            head.weight[:FIRST_WORD] = 0
        generation = model.generation_config
        generation.pad_token_id, generation.bos_token_id = ID["<pad>"], ID["<s>"]
        generation.eos_token_id = None
        model.save_pretrained(folder)
        _with_vision_model(folder / "model.safetensors")
        processor = self.processor(_tokenizer("<video>" if self.video == "<video>" else _VIDEO_PAD))
        processor.chat_template = CHAT.replace("IMAGE", f"{self.image} ")
        processor.save_pretrained(folder)
        return folder


def _with_vision_model(file: Path) -> None:
    """Name the weights of a CLIP tower as checkpoints on the hub do: transformers from 5.2x on
    reads those names as well as the shorter ones that it writes, vLLM 0.32 reads those alone."""
    tower = "vision_tower."
    weights = load_file(file)
    if any(f"{tower}pre_layrnorm" in name for name in weights):
        long = {name.replace(tower, f"{tower}vision_model."): of for name, of in weights.items()}
        save_file(long, file, metadata={"format": "pt"})


def _tokenizer(video: str) -> PreTrainedTokenizerFast:
    tokens = Tokenizer(models.WordLevel(ID, unk_token="<unk>"))
    tokens.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    return PreTrainedTokenizerFast(
        tokenizer_object=tokens,
        pad_token="<pad>",
        unk_token="<unk>",
        bos_token="<s>",
        eos_token="</s>",
        extra_special_tokens={
            **{f"special_{i}": word for i, word in enumerate(SPECIAL[4:])},
            "start_image_token": "<img>",
            "end_image_token": "</img>",
            "context_image_token": "<IMG_CONTEXT>",
            "video_token": video,
        },
    )


def _text(config_class: type[PreTrainedConfig], **changes: Any) -> PreTrainedConfig:
    return tiny(
        config_class,
        {
            "vocab_size": len(VOCABULARY),
            "hidden_size": 128,
            "intermediate_size": 96,
            "num_hidden_layers": LAYERS,
            "num_attention_heads": 4,
            "num_key_value_heads": 2,
            "head_dim": 32,
            "max_position_embeddings": 2048,
            "pad_token_id": ID["<pad>"],
            "bos_token_id": ID["<s>"],
            "eos_token_id": ID["</s>"],
            "tie_word_embeddings": False,
        },
        **changes,
    )


def _vision(config_class: type[PreTrainedConfig], **changes: Any) -> PreTrainedConfig:
    return tiny(config_class, {**VISION, "out_hidden_size": 128}, **changes)


def _size(side: int) -> dict[str, int]:
    return {"height": side, "width": side}


# LLaVA: 256 visual tokens an image; LLaVA-NeXT: tiles of 64 -----------------------------------


def _llava() -> PreTrainedConfig:
    return LlavaConfig(
        vision_config=_vision(CLIPVisionConfig, image_size=64, num_hidden_layers=3),
        text_config=_text(LlamaConfig),
        image_token_index=ID["<image>"],
    )


def _llava_processor(tokenizer: Any) -> Any:
    return LlavaProcessor(
        image_processor=CLIPImageProcessor(size=_size(64), do_center_crop=False),
        tokenizer=tokenizer,
        patch_size=4,
        vision_feature_select_strategy="default",
        num_additional_image_tokens=1,
    )


GRID = [[32, 64], [64, 32], [64, 64]]


def _llava_next() -> PreTrainedConfig:
    return LlavaNextConfig(
        vision_config=_vision(CLIPVisionConfig, image_size=32, num_hidden_layers=3),
        text_config=_text(LlamaConfig),
        image_token_index=ID["<image>"],
        image_grid_pinpoints=GRID,
    )


def _llava_next_processor(tokenizer: Any) -> Any:
    return LlavaNextProcessor(
        image_processor=LlavaNextImageProcessor(
            size={"shortest_edge": 32}, crop_size=_size(32), image_grid_pinpoints=GRID
        ),
        tokenizer=tokenizer,
        patch_size=4,
        vision_feature_select_strategy="default",
        num_additional_image_tokens=1,
    )


# Qwen-VL: as many tokens as the picture is large, 8 by 8 pixels each ----------------------------

QWEN_IDS = {
    "image_token_id": ID["<|image_pad|>"],
    "video_token_id": ID["<|video_pad|>"],
    "vision_start_token_id": ID["<|vision_start|>"],
    "vision_end_token_id": ID["<|vision_end|>"],
    "tie_word_embeddings": False,
}
PIXELS = {"shortest_edge": 96 * 96, "longest_edge": 96 * 160}


def _rope(*section: int, **more: Any) -> dict[str, Any]:
    rope = {"rope_type": "default", "mrope_section": list(section), "rope_theta": 10000.0}
    return {**rope, **more}


def _qwen2_vl() -> PreTrainedConfig:
    return Qwen2VLConfig(
        vision_config=_vision(Qwen2VLVisionConfig, hidden_size=128, embed_dim=32, mlp_ratio=2),
        text_config=_text(Qwen2VLTextConfig, rope_parameters=_rope(4, 6, 6)),
        **QWEN_IDS,
    )


def _qwen2_5_vl() -> PreTrainedConfig:
    return Qwen2_5_VLConfig(
        vision_config=_vision(
            Qwen2_5_VLVisionConfig, hidden_size=32, window_size=16, fullatt_block_indexes=[1]
        ),
        text_config=_text(Qwen2_5_VLTextConfig, rope_parameters=_rope(4, 6, 6)),
        **QWEN_IDS,
    )


def _qwen3_vl() -> PreTrainedConfig:
    return Qwen3VLConfig(
        vision_config=_vision(
            Qwen3VLVisionConfig,
            hidden_size=32,
            depth=4,
            num_position_embeddings=64,
            deepstack_visual_indexes=[1, 2, 3],
        ),
        text_config=_text(
            Qwen3VLTextConfig, rope_parameters=_rope(6, 5, 5, mrope_interleaved=True)
        ),
        **QWEN_IDS,
    )


def _qwen_processor(made: Any, video: Any, **colours: Any) -> Callable[[Any], Any]:
    """``colours``: mean and deviation, where those of videos are not those of images by default.
    Checkpoints have the same, and vLLM takes one for both."""

    def make(tokenizer: Any) -> Any:
        patches = {"patch_size": 4, "merge_size": 2, "temporal_patch_size": 2, "size": PIXELS}
        patches |= colours
        return made(Qwen2VLImageProcessor(**patches), tokenizer, video(**patches))

    return make


# InternVL: tiles of 64 tokens -------------------------------------------------------------------


def _internvl() -> PreTrainedConfig:
    return InternVLConfig(
        vision_config=_vision(InternVLVisionConfig, image_size=64),
        text_config=_text(Qwen2Config),
        image_token_id=ID["<IMG_CONTEXT>"],
        image_seq_length=64,
        tie_word_embeddings=False,
    )


def _internvl_processor(tokenizer: Any) -> Any:
    return InternVLProcessor(
        GotOcr2ImageProcessor(size=_size(64), crop_to_patches=True, min_patches=1, max_patches=4),
        tokenizer,
        InternVLVideoProcessor(size=_size(64)),
        image_seq_length=64,
    )


_QWEN_IMAGE = "<|vision_start|><|image_pad|><|vision_end|>"
_QWEN_VIDEO = "<|vision_start|><|video_pad|><|vision_end|>"
KINDS = {
    "llava": Kind(_llava, _llava_processor, "<image>"),
    "llava_next": Kind(_llava_next, _llava_next_processor, "<image>", seed=1),
    "qwen2_vl": Kind(
        _qwen2_vl,
        _qwen_processor(Qwen2VLProcessor, Qwen2VLVideoProcessor),
        _QWEN_IMAGE,
        _QWEN_VIDEO,
    ),
    "qwen2_5_vl": Kind(
        _qwen2_5_vl,
        _qwen_processor(Qwen2_5_VLProcessor, Qwen2VLVideoProcessor),
        _QWEN_IMAGE,
        _QWEN_VIDEO,
    ),
    "qwen3_vl": Kind(
        _qwen3_vl,
        _qwen_processor(
            Qwen3VLProcessor, Qwen3VLVideoProcessor, image_mean=[0.5] * 3, image_std=[0.5] * 3
        ),
        _QWEN_IMAGE,
        _QWEN_VIDEO,
        gain=3.0,
    ),
    "internvl": Kind(_internvl, _internvl_processor, "<IMG_CONTEXT>", "<video>"),
}
