"""Moved to :mod:`st3.models.class_attention`."""

from st3.models.class_attention import ClassAttentionTap

__all__ = ["ClassAttentionTap"]
