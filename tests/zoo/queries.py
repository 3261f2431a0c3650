"""A fixed number of learned queries per image: BLIP-2, InstructBLIP, Aria, Idefics 2."""

from __future__ import annotations

from typing import Any

import torch
import transformers as tr
from transformers import PreTrainedConfig, PreTrainedModel

from .base import (
    IMAGE,
    I,
    Vision,
    pixels,
    text,
    vision,
)
from .idefics import Idefics
from .llava import FixedSize


class Blip2(FixedSize):
    """12 learned queries per image, first in the prompt; no row without an image."""

    tokens = 12


class InstructBlip(Blip2):
    """The queries see the instruction, too."""

    def image(self, model: PreTrainedModel, segment: I, rng: torch.Generator) -> Vision:
        made = super().image(model, segment, rng)
        made.tensors["qformer_input_ids"] = torch.randint(30, 120, (1, 5), generator=rng)
        made.tensors["qformer_attention_mask"] = torch.ones(1, 5, dtype=torch.long)
        return made


QFORMER: dict[str, Any] = {
    "vocab_size": 120,
    "hidden_size": 16,
    "intermediate_size": 24,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "encoder_hidden_size": 16,
}


def _blip2() -> PreTrainedConfig:
    opt = text(tr.OPTConfig, ffn_dim=48, word_embed_proj_dim=32, dropout=0.0)
    return tr.Blip2Config(
        vision_config=vision(tr.Blip2VisionConfig),
        qformer_config=QFORMER,
        text_config=opt,
        num_query_tokens=12,
        image_token_index=IMAGE,
    )


def _instructblip() -> PreTrainedConfig:
    return tr.InstructBlipConfig(
        vision_config=vision(tr.InstructBlipVisionConfig),
        qformer_config=QFORMER,
        text_config=text(tr.LlamaConfig),
        num_query_tokens=12,
        image_token_index=IMAGE,
    )


class Aria(FixedSize):
    side = 24

    def image(self, model: PreTrainedModel, segment: I, rng: torch.Generator) -> Vision:
        tensors = {
            "pixel_values": pixels(1, 3, self.side, self.side, rng=rng),
            "pixel_mask": torch.ones(1, self.side, self.side, dtype=torch.bool),
        }
        return Vision([IMAGE] * 12, tensors)


def _aria() -> PreTrainedConfig:
    from transformers.models.aria.configuration_aria import AriaTextConfig

    return tr.AriaConfig(
        vision_config=vision(tr.Idefics3VisionConfig, image_size=24, model_type="idefics3_vision"),
        text_config=text(AriaTextConfig, moe_num_experts=4, moe_topk=2, moe_num_shared_experts=1),
        image_token_index=IMAGE,
        projector_patch_to_query_dict={36: 12},
        tie_word_embeddings=False,
    )


class Idefics2(Idefics):
    """A perceiver makes 12 tokens of each image."""

    side, tokens = 16, 12


def _idefics2() -> PreTrainedConfig:
    from transformers.models.idefics2.configuration_idefics2 import Idefics2VisionConfig

    return tr.Idefics2Config(
        vision_config=vision(Idefics2VisionConfig),
        perceiver_config={
            "hidden_size": 32,
            "resampler_n_latents": 12,
            "resampler_depth": 1,
            "resampler_n_heads": 4,
            "resampler_head_dim": 8,
            "num_key_value_heads": 2,
        },
        text_config=text(tr.MistralConfig, sliding_window=None),
        image_token_id=IMAGE,
        tie_word_embeddings=False,
    )


FAMILIES = [
    Blip2("blip_2", _blip2, multi_image=False, text_rows=False, model_type="blip-2"),
    InstructBlip("instructblip", _instructblip, multi_image=False, text_rows=False),
    Aria("aria", _aria),
    Idefics2("idefics2", _idefics2, dynamic_size=True),
]
