"""MMR: important tokens that are unlike each other, chosen before the decoder."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from st3.methods.policies.layouts import BeforeDecoder
from st3.methods.policies.registry import register
from st3.methods.schedule import check_share
from st3.methods.scores.base import Score
from st3.methods.scores.mmr import MarginalRelevance
from st3.methods.scores.registry import score_named


@register
@dataclass(frozen=True)
class MMR(BeforeDecoder):
    """MMR: before the decoder, keep what is important and unlike what is kept already.

    Args:
        keep: share kept.
        score: the importance, a score of the embeddings: likeness to the question, or "visionzip"
            for what the vision tower looks at.
        balance: weight of the importance, between 0 (diversity alone) and 1.

    Source: the rule of IDPruner, whose importance comes from a trained scorer; see
    :class:`st3.methods.scores.MarginalRelevance`. Inside of the decoder the same rule is a score,
    "mmr-attention" for example.
    """

    score: str = "relevance"
    balance: float = 0.5

    name: ClassVar[str] = "mmr"
    paper: ClassVar[str] = "IDPruner's selection, as in Tencent/AngelSlim"

    def __post_init__(self) -> None:
        super().__post_init__()
        score_named(self.score)
        check_share("balance", self.balance)

    def scorer(self) -> Score:
        return MarginalRelevance(score_named(self.score), self.balance)
