"""Idefics and SmolVLM: images padded per row (pixel_values [B, images, 3, H, W]), tiles of one
image apart from each other by row and column tokens."""

from __future__ import annotations

import torch
from torch import Tensor
from transformers import LlamaConfig, PreTrainedConfig, PreTrainedModel
from transformers.models.idefics3.configuration_idefics3 import (
    Idefics3Config,
    Idefics3VisionConfig,
)
from transformers.models.smolvlm.configuration_smolvlm import SmolVLMConfig, SmolVLMVisionConfig

from .base import BREAK, IMAGE, VISION_START, Family, I, Vision, pixels, text, vision


class Idefics(Family):
    """I(): one tile of 16 tokens. I(h, w): h * w tiles and the whole image, each with its
    separators."""

    side, tokens = 32, 16

    def image(self, model: PreTrainedModel, segment: I, rng: torch.Generator) -> Vision:
        tiles = segment.height * segment.width if segment.height and segment.width else 0
        ids: list[int] = []
        for tile in range(tiles):
            ids += [VISION_START, 16 + tile, *[IMAGE] * self.tokens]
        ids += [BREAK] if tiles else []
        ids += [VISION_START, *[IMAGE] * self.tokens, VISION_START]
        return Vision(ids, {"pixel_values": pixels(tiles + 1, 3, self.side, self.side, rng=rng)})

    def collate(self, per_row: list[list[Vision]]) -> dict[str, Tensor]:
        rows = [[v.tensors["pixel_values"] for v in row] for row in per_row]
        most = max((sum(len(made) for made in row) for row in rows), default=0)
        if not most:
            return {}
        out = torch.zeros(len(rows), most, 3, self.side, self.side)  # zeros: no image
        for r, row in enumerate(rows):
            if row:
                made = torch.cat(row)
                out[r, : len(made)] = made
        return {"pixel_values": out}


def _idefics3() -> PreTrainedConfig:
    return Idefics3Config(
        vision_config=vision(Idefics3VisionConfig, image_size=Idefics.side),
        text_config=text(LlamaConfig),
        image_token_id=IMAGE,
        pad_token_id=0,
        scale_factor=2,
    )


def _smolvlm() -> PreTrainedConfig:
    return SmolVLMConfig(
        vision_config=vision(SmolVLMVisionConfig, image_size=Idefics.side),
        text_config=text(LlamaConfig),
        image_token_id=IMAGE,
        pad_token_id=0,
        scale_factor=2,
    )


FAMILIES = [
    Idefics("idefics3", _idefics3, dynamic_size=True),
    Idefics("smolvlm", _smolvlm, dynamic_size=True),
]
