"""Readers of documents that are like no other family."""

from __future__ import annotations

from st3.models.base import Family
from st3.models.layouts import Squares
from st3.models.tiled import Patches

FAMILIES = (
    Family("got_ocr2", "GOT-OCR 2", layout=Squares(placed=False)),
    Family("hunyuan_vl", "Hunyuan-VL", layout=Patches(reading=True, framed=True)),
    Family("paddleocr_vl", "PaddleOCR-VL", layout=Patches(reading=True)),
)
