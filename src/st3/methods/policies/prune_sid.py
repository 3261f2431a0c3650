"""PruneSID: groups by principal components, and unlike tokens of each, before the decoder."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from st3.methods.policies.layouts import BeforeDecoder
from st3.methods.policies.registry import register
from st3.methods.scores.base import Score
from st3.methods.scores.principal import Principal


@register
@dataclass(frozen=True)
class PruneSID(BeforeDecoder):
    """PruneSID: before the decoder, group the tokens by principal components, and keep of each
    group those that are unlike.

    Args:
        keep: share kept; the paper reports 192, 128 and 64 of 576 tokens (0.333, 0.222, 0.111).

    Source: arXiv 2603.09480 (ICLR 2026) and its code for Qwen2-VL; departures: see
    :class:`st3.methods.scores.Principal`. The share is given, and not found from the image.
    """

    name: ClassVar[str] = "prunesid"
    paper: ClassVar[str] = "arXiv 2603.09480 (ICLR 2026)"

    def scorer(self) -> Score:
        return Principal(self.keep)
