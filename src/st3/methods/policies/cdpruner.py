"""CDPruner: diverse and relevant tokens, chosen before the decoder."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from st3.methods.policies.layouts import BeforeDecoder
from st3.methods.policies.registry import register
from st3.methods.scores.base import Score
from st3.methods.scores.cdpruner import ConditionalDPP


@register
@dataclass(frozen=True)
class CDPruner(BeforeDecoder):
    """CDPruner: before the decoder, keep what a conditional determinantal point process picks.

    Args:
        keep: share kept; papers report 192, 128 and 64 of 576 tokens (0.333, 0.222, 0.111).

    Source: arXiv 2506.10967 (NeurIPS 2025); departures: see
    :class:`st3.methods.scores.ConditionalDPP`.
    """

    name: ClassVar[str] = "cdpruner"
    paper: ClassVar[str] = "arXiv 2506.10967 (NeurIPS 2025)"

    def scorer(self) -> Score:
        return ConditionalDPP()
