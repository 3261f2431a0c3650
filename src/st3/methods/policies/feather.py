"""FEATHER: attention without RoPE, with a grid at the first drop."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from st3.methods.policies.base import check_count
from st3.methods.policies.layouts import Staged
from st3.methods.policies.registry import register
from st3.methods.scores.base import Score
from st3.methods.scores.feather import Feather


@register
@dataclass(frozen=True)
class FEATHER(Staged):
    """FEATHER: two drops by the last token's attention without RoPE; the first spares a grid.

    Args:
        layers: first decoder layers (0-based) with fewer tokens; the paper's are 8 and 16 of 32.
        keep: shares left there; the default is what the ratio of 70 % and the stride of 3 of the
            code's only script come to for 576 tokens: 217 (30 %, and those of the grid that are
            not among them), then 19 (9 % of these).
        stride: rows and columns between the tokens of the grid.

    Source: arXiv 2412.13180 (ICCV 2025). Departures: the first drop leaves a fixed number, of which
    the grid is part, where the code adds the grid to a fixed number; see also
    :class:`st3.methods.scores.Feather`.
    """

    keep: tuple[float, ...] = (0.377, 0.033)
    stride: int = 3

    name: ClassVar[str] = "feather"
    paper: ClassVar[str] = "arXiv 2412.13180 (ICCV 2025)"
    paper_layers: ClassVar[tuple[int, ...]] = (8, 16)

    def __post_init__(self) -> None:
        super().__post_init__()
        check_count("stride", self.stride)

    def scorer(self) -> Score:
        return Feather(self.stride)
