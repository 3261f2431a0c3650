"""Families whose decoder layers are not all alike: states, shared KV entries, late image features.

They are not among ``FAMILIES``: the reference of those hides tokens, which a state cannot be judged
by. Theirs is :mod:`tests.slow_hybrids`.
"""

from __future__ import annotations

import math
from typing import Any

import torch
import transformers as tr
from torch import Tensor
from transformers import PreTrainedConfig, PreTrainedModel

from .base import IMAGE, VIDEO, VISION_END, VISION_START, Batch, Family, I, Vision, text, vision
from .qwen import QWEN_IDS, Qwen3VL, rope
from .refused_configs import IDS, LINEAR, sub


class Delta(Qwen3VL):
    """A gated delta net in three of four layers."""

    def finish(self, model: PreTrainedModel) -> None:
        super().finish(model)
        slower_decay(model)


def slower_decay(model: PreTrainedModel) -> None:
    """Random decays are so fast that the sums of their logarithms over a chunk cost three digits:
    then even the bare model's padded rows are off by 3e-4."""
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if name.endswith("A_log"):
                parameter.add_(math.log(0.05))


class Lfm2Vl(Family):
    """I(h, w) in tokens, of 2 by 2 patches; patches of all images are padded to one number."""

    most = 480

    def image(self, model: PreTrainedModel, segment: I, rng: torch.Generator) -> Vision:
        h, w = segment.height or 3, segment.width or 4
        n = 4 * h * w
        values = torch.zeros(1, self.most, 3 * 4 * 4)
        values[0, :n] = torch.randn(n, 48, generator=rng)
        mask = torch.zeros(1, self.most, dtype=torch.long)
        mask[0, :n] = 1
        tensors = {
            "pixel_values": values,
            "spatial_shapes": torch.tensor([[2 * h, 2 * w]]),
            "pixel_attention_mask": mask,
        }
        return Vision([VISION_START, *[IMAGE] * (h * w), VISION_END], tensors)


class MiniCpm(Delta):
    """I(h, w) in tokens, of 4 by 4 patches: all patches of a batch lie in one long strip."""

    def image(self, model: PreTrainedModel, segment: I, rng: torch.Generator) -> Vision:
        h, w = segment.height or 3, segment.width or 4
        tensors = {
            "pixel_values": torch.randn(1, 3, 4, 4 * 16 * h * w, generator=rng),
            "target_sizes": torch.tensor([[4 * h, 4 * w]], dtype=torch.int),
        }
        return Vision([VISION_START, *[IMAGE] * (h * w), VISION_END], tensors)

    def extras(self, model: PreTrainedModel, batch: Batch) -> dict[str, Tensor]:
        return {}

    def collate(self, per_row: list[list[Vision]]) -> dict[str, Tensor]:
        images = [vision.tensors for row in per_row for vision in row]
        if not images:
            return {}
        return {
            "pixel_values": torch.cat([image["pixel_values"] for image in images], -1),
            "target_sizes": torch.cat([image["target_sizes"] for image in images]),
        }


def _qwen3_5() -> PreTrainedConfig:
    return tr.Qwen3_5Config(
        vision_config=vision(sub("qwen3_5", "vision_config"), num_position_embeddings=64),
        text_config=text(sub("qwen3_5", "text_config"), rope_parameters=rope((2, 1, 1)), **LINEAR),
        **QWEN_IDS,
    )


def _qwen3_5_moe() -> PreTrainedConfig:
    return tr.Qwen3_5MoeConfig(
        vision_config=vision(sub("qwen3_5_moe", "vision_config"), num_position_embeddings=64),
        text_config=text(
            sub("qwen3_5_moe", "text_config"),
            rope_parameters=rope((2, 1, 1)),
            shared_expert_intermediate_size=16,
            **LINEAR,
        ),
        **QWEN_IDS,
    )


def _lfm2_vl() -> PreTrainedConfig:
    return tr.Lfm2VlConfig(
        vision_config=vision(tr.Siglip2VisionConfig, num_patches=64),
        text_config=text(tr.Lfm2Config, layer_types=["conv", "conv", "full_attention", "conv"] * 2),
        projector_hidden_size=32,
        **IDS,
    )


def _minicpmv4_6() -> PreTrainedConfig:
    return tr.MiniCPMV4_6Config(
        vision_config=vision(sub("minicpmv4_6", "vision_config"), insert_layer_id=0),
        text_config=text(sub("qwen3_5", "text_config"), rope_parameters=rope((2, 1, 1)), **LINEAR),
        insert_layer_id=0,
        image_size=16,
        video_token_id=VIDEO,
        **IDS,
    )


LIVELY: dict[str, Any] = {"dynamic_size": True, "gain": 1.2}
FAMILIES = [
    Delta("qwen3_5", _qwen3_5, supports_video=True, **LIVELY),
    Delta("qwen3_5_moe", _qwen3_5_moe, supports_video=True, **LIVELY),
    MiniCpm("minicpmv4_6", _minicpmv4_6, **LIVELY),
    Lfm2Vl("lfm2_vl", _lfm2_vl, dynamic_size=True),
]
