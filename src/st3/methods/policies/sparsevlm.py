"""SparseVLM: text tokens that the image speaks to rate the visual ones."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from st3.methods.policies.layouts import Staged
from st3.methods.policies.registry import register
from st3.methods.scores.base import Score
from st3.methods.scores.text_raters import TextRaters


@register
@dataclass(frozen=True)
class SparseVLM(Staged):
    """SparseVLM: three drops, rated by the text tokens of above-mean visual relevance.

    Args:
        layers: first decoder layers (0-based) behind the paper's pruning layers 2, 6 and 15 of 32.
        keep: shares left there; the default is the code's 300, 200 and 110 of 576 tokens.

    Source: arXiv 2410.04417 (ICML 2025), the first version of its code ("SparseVLM+" rates
    otherwise). Departures: the number of tokens is given, as in the code, and not found from the
    attention's rank; dropped tokens are not clustered and put back ("recycled"); positions are
    kept, where the code numbers what is left anew.
    """

    keep: tuple[float, ...] = (0.521, 0.347, 0.191)

    name: ClassVar[str] = "sparsevlm"
    paper: ClassVar[str] = "arXiv 2410.04417 (ICML 2025)"
    paper_layers: ClassVar[tuple[int, ...]] = (3, 7, 16)

    def scorer(self) -> Score:
        return TextRaters()
