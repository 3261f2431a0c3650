"""Attention of the prompt's last token, the score of ST3 and FastV."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from st3.scores.base import LayerView


@dataclass(frozen=True)
class LastRowAttention:
    """Softmax attention of the prompt's last token, mean over the query heads.

    Source: FastV (arXiv 2403.06764), whose choice of row and heads ST3 (arXiv 2412.20105) follows.
    """

    name: str = "last_row_attention"

    def __call__(self, view: LayerView) -> Tensor:
        attention = view.last_row_logits().softmax(dim=-1).mean(dim=1)
        return attention[:, view.first_column :]
