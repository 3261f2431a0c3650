"""Families that came late, or have an input format of their own."""

from __future__ import annotations

import torch
import transformers as tr
from torch import Tensor
from transformers import PreTrainedConfig, PreTrainedModel

from .base import (
    BREAK,
    IMAGE,
    PATCH,
    VIDEO,
    VISION_END,
    VISION_START,
    Batch,
    Family,
    I,
    Vision,
    pixels,
    text,
    tiny,
    vision,
)
from .idefics import Idefics
from .llava import FixedSize
from .mistral import Pixtral, tower


class Molmo2(Family):
    """The whole image (2 by 2 tokens), then two crops side by side (2 by 4 tokens), each token
    pooled from 4 patches, whose indices go through the whole batch. Features are added to the
    placeholders' embeddings. All image tokens of a row attend to each other."""

    def image(self, model: PreTrainedModel, segment: I, rng: torch.Generator) -> Vision:
        crops, side = 3, 4
        patches = pixels(crops, side * side, 3 * PATCH * PATCH, rng=rng)
        whole = torch.arange(side * side).view(side, side)
        high = torch.arange(side * side, 3 * side * side).view(2, side, side)
        high = high.permute(1, 0, 2).reshape(side, 2 * side)
        pooled = [
            grid.unfold(0, 2, 2).unfold(1, 2, 2).flatten(2).flatten(0, 1) for grid in (whole, high)
        ]
        ids = [VISION_START, *([IMAGE] * 2 + [BREAK]) * 2, VISION_END]
        ids += [VISION_START, *([IMAGE] * 4 + [BREAK]) * 2, VISION_END]
        tensors = {
            "pixel_values": patches,
            "image_token_pooling": torch.cat(pooled),
            "image_grids": torch.tensor([[2, 2, 2, 4]]),
            "image_num_crops": torch.tensor([crops]),
        }
        return Vision(ids, tensors)

    def collate(self, per_row: list[list[Vision]]) -> dict[str, Tensor]:
        seen = 0
        for image in (image for row in per_row for image in row):
            image.tensors["image_token_pooling"] += seen
            seen += image.tensors["pixel_values"].shape[:2].numel()
        return super().collate(per_row)

    def extras(self, model: PreTrainedModel, batch: Batch) -> dict[str, Tensor]:
        kinds = torch.tensor([IMAGE, BREAK, VISION_START, VISION_END])
        return {"mm_token_type_ids": torch.isin(batch["input_ids"], kinds).long()}


def _molmo2() -> PreTrainedConfig:
    from transformers.models.molmo2.configuration_molmo2 import (
        Molmo2AdapterConfig,
        Molmo2TextConfig,
        Molmo2VisionConfig,
    )

    heads = {"num_attention_heads": 2, "num_key_value_heads": 2, "head_dim": 8}
    return tr.Molmo2Config(
        vision_config=vision(
            Molmo2VisionConfig, image_size=[16, 16], num_position_embeddings=16, **heads
        ),
        adapter_config=tiny(
            Molmo2AdapterConfig,
            heads,
            hidden_size=16,
            intermediate_size=24,
            text_hidden_size=32,
            vision_feature_layer=[1, 0],
        ),
        text_config=text(Molmo2TextConfig, additional_vocab_size=8),
        image_start_token_id=VISION_START,
        low_res_image_start_token_id=VISION_START,
        image_end_token_id=VISION_END,
        image_patch_id=IMAGE,
        frame_start_token_id=16,
        frame_end_token_id=17,
        tie_word_embeddings=False,
    )


class GraniteDocling(Idefics):
    """Tiles with a mask of those that are there; vision features join the first layers, too."""

    def collate(self, per_row: list[list[Vision]]) -> dict[str, Tensor]:
        made = super().collate(per_row)
        if made:
            made["pixel_attention_mask"] = (made["pixel_values"] != 0).any(-1).any(-1).any(-1)
        return made


def _granite_docling() -> PreTrainedConfig:
    from transformers.models.granite_docling.configuration_granite_docling import (
        GraniteDoclingTextConfig,
        GraniteDoclingVisionConfig,
    )

    return tr.GraniteDoclingConfig(
        vision_config=vision(
            GraniteDoclingVisionConfig,
            image_size=32,
            num_hidden_layers=4,
            scale_factor=2,
            deepstack_visual_indexes=[1, 2, 3],
            use_fine_route=False,
        ),
        text_config=text(
            GraniteDoclingTextConfig,
            embedding_multiplier=1.0,
            logits_scaling=1.0,
            residual_multiplier=1.0,
            attention_multiplier=8**-0.5,
        ),
        image_token_id=IMAGE,
        pad_token_id=0,
        tie_word_embeddings=False,
    )


def _lighton_ocr() -> PreTrainedConfig:
    return tr.LightOnOcrConfig(
        vision_config=tower(),
        text_config=text(tr.Qwen3Config),
        image_token_id=IMAGE,
        spatial_merge_size=2,
        tie_word_embeddings=False,
    )


class PerceptionLM(FixedSize):
    """pixel_values [images, tiles, 3, H, W]."""

    def image(self, model: PreTrainedModel, segment: I, rng: torch.Generator) -> Vision:
        return Vision([IMAGE] * 16, {"pixel_values": pixels(1, 1, 3, 16, 16, rng=rng)})


def _perception_lm() -> PreTrainedConfig:
    tower_ = vision(tr.SiglipVisionConfig)  # in place of the timm tower, which needs that package
    tower_.model_args = {"embed_dim": 16}
    return tr.PerceptionLMConfig(
        vision_config=tower_,
        vision_use_cls_token=False,
        text_config=text(tr.LlamaConfig),
        image_token_id=IMAGE,
        video_token_id=VIDEO,
    )


class FastVlm(FixedSize):
    """A convolutional tower (a ResNet here, in place of timm's): feature maps of 4 by 4."""

    side, tokens = 32, 16


def _fast_vlm() -> PreTrainedConfig:
    tower_ = tr.ResNetConfig(
        embedding_size=8, hidden_sizes=[16, 16], depths=[1, 1], layer_type="basic"
    )
    tower_.hidden_size = 16
    return tr.FastVlmConfig(
        vision_config=tower_,
        text_config=text(tr.Qwen2Config),
        image_token_index=IMAGE,
        tie_word_embeddings=False,
    )


FAMILIES = [
    Molmo2("molmo2", _molmo2),
    GraniteDocling("granite_docling", _granite_docling, dynamic_size=True),
    Pixtral("lighton_ocr", _lighton_ocr, dynamic_size=True),
    PerceptionLM("perception_lm", _perception_lm),
    FastVlm("fast_vlm", _fast_vlm),
]
