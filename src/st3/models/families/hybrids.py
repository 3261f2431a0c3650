"""Families of one kind each, some of whose decoder layers have a state in place of attention."""

from __future__ import annotations

from st3.models.base import Family

FAMILIES = (
    Family("lfm2_vl", "LFM2-VL", "short convolutions in most layers"),
    Family("minicpmv4_6", "MiniCPM-V 4.6", "linear attention in three of four layers"),
)
