"""The Qwen-VL group: images of any size as flat patches and grids, rotary positions in 3D."""

from __future__ import annotations

import torch
from torch import Tensor
from transformers import PreTrainedModel, Qwen2_5_VLConfig

from .base import IMAGE, VIDEO, VISION_END, VISION_START, Batch, Family, I, V, Vision, pixels, text

PATCH, MERGE, FRAMES = 4, 2, 2  # FRAMES: frames that one temporal patch takes


class QwenVL(Family):
    """I(h, w) in merged tokens: h * w tokens, from (2h) * (2w) patches. V(f): f * 2 * 3 tokens."""

    def _patches(self, grid: tuple[int, int, int], rng: torch.Generator) -> dict[str, Tensor]:
        t, h, w = grid
        return {
            "pixels": pixels(t * h * w, 3 * FRAMES * PATCH * PATCH, rng=rng),
            "grid": torch.tensor([[t, h, w]]),
        }

    def image(self, model: PreTrainedModel, segment: I, rng: torch.Generator) -> Vision:
        h, w = segment.height or 3, segment.width or 4
        made = self._patches((1, h * MERGE, w * MERGE), rng)
        ids = [VISION_START, *[IMAGE] * (h * w), VISION_END]
        return Vision(ids, {"pixel_values": made["pixels"], "image_grid_thw": made["grid"]})

    def video(self, model: PreTrainedModel, segment: V, rng: torch.Generator) -> Vision:
        h, w = 2, 3
        made = self._patches((segment.frames, h * MERGE, w * MERGE), rng)
        ids = [VISION_START, *[VIDEO] * (segment.frames * h * w), VISION_END]
        return Vision(ids, {"pixel_values_videos": made["pixels"], "video_grid_thw": made["grid"]})

    def extras(self, model: PreTrainedModel, batch: Batch) -> dict[str, Tensor]:
        ids = batch["input_ids"]
        return {"mm_token_type_ids": (ids == IMAGE).int() + 2 * (ids == VIDEO).int()}


IDS = dict(
    image_token_id=IMAGE,
    video_token_id=VIDEO,
    vision_start_token_id=VISION_START,
    vision_end_token_id=VISION_END,
    tie_word_embeddings=False,
)
ROPE = {"rope_type": "default", "mrope_section": [1, 1, 2], "rope_theta": 10000.0}


def _qwen2_5_vl() -> Qwen2_5_VLConfig:
    return Qwen2_5_VLConfig(
        vision_config=dict(
            depth=3,
            hidden_size=16,
            intermediate_size=24,
            num_heads=2,
            patch_size=PATCH,
            spatial_merge_size=MERGE,
            temporal_patch_size=FRAMES,
            out_hidden_size=32,
            window_size=2 * PATCH * MERGE,
            fullatt_block_indexes=[1],
        ),
        text_config=text(rope_parameters=dict(ROPE)),
        **IDS,
    )


FAMILIES = [QwenVL("qwen2_5_vl", _qwen2_5_vl, supports_video=True, dynamic_size=True)]
