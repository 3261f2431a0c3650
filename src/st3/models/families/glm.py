"""GLM-V and ERNIE-VL: flat patches and grids, as Qwen-VL has them."""

from __future__ import annotations

from st3.models.base import Family
from st3.models.tiled import Patches

FAMILIES = (
    Family("glm4v", "GLM-4.1V", "multimodal RoPE", layout=Patches()),
    Family("glm4v_moe", "GLM-4.5V", "multimodal RoPE", layout=Patches()),
    Family("glm46v", "GLM-4.6V", "multimodal RoPE", layout=Patches()),
    Family("glm_ocr", "GLM-OCR", layout=Patches()),
    Family("ernie4_5_vl_moe", "ERNIE 4.5 VL", "experts by modality", layout=Patches()),
)
