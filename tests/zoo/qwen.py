"""Images of any size as flat patches and grids, rotary positions in 3D: Qwen-VL and its kin."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedConfig, PreTrainedModel
from transformers.models.glm4v.configuration_glm4v import (
    Glm4vConfig,
    Glm4vTextConfig,
    Glm4vVisionConfig,
)
from transformers.models.glm4v_moe.configuration_glm4v_moe import (
    Glm4vMoeConfig,
    Glm4vMoeTextConfig,
    Glm4vMoeVisionConfig,
)
from transformers.models.qwen2_5_vl.configuration_qwen2_5_vl import (
    Qwen2_5_VLConfig,
    Qwen2_5_VLTextConfig,
    Qwen2_5_VLVisionConfig,
)
from transformers.models.qwen2_vl.configuration_qwen2_vl import (
    Qwen2VLConfig,
    Qwen2VLTextConfig,
    Qwen2VLVisionConfig,
)
from transformers.models.qwen3_vl.configuration_qwen3_vl import (
    Qwen3VLConfig,
    Qwen3VLTextConfig,
    Qwen3VLVisionConfig,
)
from transformers.models.qwen3_vl_moe.configuration_qwen3_vl_moe import (
    Qwen3VLMoeConfig,
    Qwen3VLMoeTextConfig,
    Qwen3VLMoeVisionConfig,
)

from .base import (
    IMAGE,
    PATCH,
    VIDEO,
    VISION_END,
    VISION_START,
    Batch,
    Family,
    I,
    V,
    Vision,
    pixels,
    text,
    vision,
)

MERGE, FRAMES = 2, 2  # FRAMES: frames that one temporal patch takes


class QwenVL(Family):
    """I(h, w) in merged tokens: h * w tokens, from (2h) * (2w) patches. V(f): f * 2 * 3 tokens."""

    frame_ids = False  # each frame of a video stands alone, with a timestamp before it
    video_id = VIDEO
    frames_per_patch = FRAMES

    def _patches(self, grid: tuple[int, int, int], rng: torch.Generator) -> Tensor:
        t, h, w = grid
        return pixels(t * h * w, 3 * self.frames_per_patch * PATCH * PATCH, rng=rng)

    def image(self, model: PreTrainedModel, segment: I, rng: torch.Generator) -> Vision:
        h, w = segment.height or 3, segment.width or 4
        grid = (1, h * MERGE, w * MERGE)
        ids = [VISION_START, *[IMAGE] * (h * w), VISION_END]
        tensors = {"pixel_values": self._patches(grid, rng), "image_grid_thw": torch.tensor([grid])}
        return Vision(ids, tensors)

    def video(self, model: PreTrainedModel, segment: V, rng: torch.Generator) -> Vision:
        h, w, frames = 2, 3, segment.frames
        grid = (frames, h * MERGE, w * MERGE)
        if self.frame_ids:
            ids: list[int] = []
            for frame in range(frames):
                ids += [31 + frame, VISION_START, *[self.video_id] * (h * w), VISION_END]
        else:
            ids = [VISION_START, *[self.video_id] * (frames * h * w), VISION_END]
        tensors = {
            "pixel_values_videos": self._patches(grid, rng),
            "video_grid_thw": torch.tensor([grid]),
        }
        return Vision(ids, tensors)

    def extras(self, model: PreTrainedModel, batch: Batch) -> dict[str, Tensor]:
        ids = batch["input_ids"]
        return {"mm_token_type_ids": (ids == IMAGE).int() + 2 * (ids == VIDEO).int()}


class Qwen3VL(QwenVL):
    frame_ids = True


class Glm4V(QwenVL):
    """A video's frames use the image's placeholder; only the token types tell them apart, so an
    image and a video cannot stand in one batch here."""

    frame_ids = True
    video_id = IMAGE

    def extras(self, model: PreTrainedModel, batch: Batch) -> dict[str, Tensor]:
        kind = 2 if "video_grid_thw" in batch else 1
        return {"mm_token_type_ids": kind * (batch["input_ids"] == IMAGE).int()}


IDS: dict[str, Any] = {
    "image_token_id": IMAGE,
    "video_token_id": VIDEO,
    "tie_word_embeddings": False,
}
QWEN_IDS = {**IDS, "vision_start_token_id": VISION_START, "vision_end_token_id": VISION_END}
GLM_IDS = {**IDS, "image_start_token_id": VISION_START, "image_end_token_id": VISION_END}


def rope(section: tuple[int, int, int] = (1, 1, 2), **changes: Any) -> dict[str, Any]:
    """mrope_section adds up to half of the head dimension (8)."""
    return {
        "rope_type": "default",
        "mrope_section": list(section),
        "rope_theta": 10000.0,
        **changes,
    }


def _qwen2_vl() -> PreTrainedConfig:
    return Qwen2VLConfig(
        vision_config=vision(Qwen2VLVisionConfig, hidden_size=32, embed_dim=16, mlp_ratio=2),
        text_config=text(Qwen2VLTextConfig, rope_parameters=rope()),
        **QWEN_IDS,
    )


def _qwen2_5_vl() -> PreTrainedConfig:
    return Qwen2_5_VLConfig(
        vision_config=vision(
            Qwen2_5_VLVisionConfig, window_size=2 * PATCH * MERGE, fullatt_block_indexes=[1]
        ),
        text_config=text(Qwen2_5_VLTextConfig, rope_parameters=rope()),
        **QWEN_IDS,
    )


QWEN3_VISION = {"depth": 4, "num_position_embeddings": 64, "deepstack_visual_indexes": [1, 2, 3]}


def _qwen3_vl() -> PreTrainedConfig:
    return Qwen3VLConfig(
        vision_config=vision(Qwen3VLVisionConfig, **QWEN3_VISION),
        text_config=text(Qwen3VLTextConfig, rope_parameters=rope((2, 1, 1))),
        **QWEN_IDS,
    )


def _qwen3_vl_moe() -> PreTrainedConfig:
    return Qwen3VLMoeConfig(
        vision_config=vision(Qwen3VLMoeVisionConfig, **QWEN3_VISION),
        text_config=text(Qwen3VLMoeTextConfig, rope_parameters=rope((2, 1, 1))),
        **QWEN_IDS,
    )


def _glm4v() -> PreTrainedConfig:
    return Glm4vConfig(
        vision_config=vision(Glm4vVisionConfig),
        text_config=text(Glm4vTextConfig, rope_parameters=rope()),
        **GLM_IDS,
    )


def _glm4v_moe() -> PreTrainedConfig:
    return Glm4vMoeConfig(
        vision_config=vision(Glm4vMoeVisionConfig),
        text_config=text(Glm4vMoeTextConfig, head_dim=16, rope_parameters=rope()),
        **GLM_IDS,
    )


FAMILIES = [
    QwenVL("qwen2_vl", _qwen2_vl, supports_video=True, dynamic_size=True),
    QwenVL("qwen2_5_vl", _qwen2_5_vl, supports_video=True, dynamic_size=True),
    Qwen3VL("qwen3_vl", _qwen3_vl, supports_video=True, dynamic_size=True),
    Qwen3VL("qwen3_vl_moe", _qwen3_vl_moe, supports_video=True, dynamic_size=True),
    Glm4V("glm4v", _glm4v, supports_video=True, dynamic_size=True),
    Glm4V("glm4v_moe", _glm4v_moe, supports_video=True, dynamic_size=True),
]
