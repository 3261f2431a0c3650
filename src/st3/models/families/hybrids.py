"""Families of one kind each whose decoder layers are not all alike."""

from __future__ import annotations

from st3.models.base import Family

FAMILIES = (
    Family("apertus1p5", "Apertus 1.5", "images and sounds are tokens of a vocabulary"),
    Family("granite4_vision", "Granite 4 Vision", "image features between late layers"),
    Family("lfm2_vl", "LFM2-VL", "short convolutions in most layers"),
    Family("lfm3_vl", "LFM3-VL", "short convolutions in most layers"),
    Family("minicpmv4_7", "MiniCPM-V 4.7", "linear attention in three of four layers"),
    Family("minicpm_ocr", "MiniCPM OCR", "linear attention in three of four layers"),
    Family("minicpmv4_6", "MiniCPM-V 4.6", "linear attention in three of four layers"),
)
