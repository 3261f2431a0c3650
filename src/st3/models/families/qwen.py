"""Qwen-VL and its kin: flat patches of images of any size, and a grid for each."""

from __future__ import annotations

from typing import Any

from st3.cost.vision import VisionDims
from st3.models.base import Family
from st3.models.tiled import Patches
from st3.models.ways import Merged


class QwenVL(Family):
    def project(self, tower: VisionDims, config: Any) -> VisionDims:
        return tower  # which holds its projector


_MROPE = "multimodal RoPE"
_STATES = "linear attention in three of four layers"
FAMILIES = (
    QwenVL("qwen2_vl", "Qwen2-VL", _MROPE, True, Patches(), way=Merged()),
    QwenVL("qwen2_5_vl", "Qwen2.5-VL", _MROPE, True, Patches(), way=Merged(windowed=True)),
    QwenVL("qwen3_vl", "Qwen3-VL", "DeepStack", True, Patches(), way=Merged()),
    QwenVL("qwen3_5", "Qwen3.5", _STATES, True, Patches(), way=Merged()),
    QwenVL("qwen3_5_moe", "Qwen3.5 MoE", _STATES, True, Patches(), way=Merged()),
    QwenVL("qwen3_vl_moe", "Qwen3-VL MoE", "DeepStack", True, Patches(), way=Merged()),
    Family(
        "qwen2_5_omni_thinker",
        "Qwen2.5-Omni (thinker)",
        "audio tokens are text",
        layout=Patches(),
    ),
    Family(
        "qwen3_omni_moe_thinker",
        "Qwen3-Omni (thinker)",
        "audio tokens are text",
        layout=Patches(),
    ),
    Family("cosmos3_edge", "Cosmos 3 Edge", layout=Patches()),
    Family("cosmos3_omni", "Cosmos 3 Omni", "DeepStack", layout=Patches()),
    Family("exaone4_5", "EXAONE 4.5", layout=Patches()),
    Family("hyperclovax_vision_v2", "HyperCLOVA X Vision", layout=Patches()),
    Family("video_llama_3", "VideoLLaMA 3", layout=Patches()),
)
