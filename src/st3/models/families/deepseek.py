"""DeepSeek's families and those built alike."""

from __future__ import annotations

from st3.models.base import Family
from st3.models.layouts import Squares

FAMILIES = (
    Family("deepseek_vl", "DeepSeek-VL", layout=Squares()),
    Family("deepseek_vl_hybrid", "DeepSeek-VL (hybrid)", layout=Squares(placed=False)),
    Family("deepseek_ocr2", "DeepSeek-OCR 2"),
    Family("janus", "Janus (understanding)", layout=Squares()),
)
