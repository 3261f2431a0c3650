"""By what visual tokens are ranked: one score per file."""

from st3.scores.attention import LastRowAttention
from st3.scores.base import LayerView, Score
from st3.scores.random import RandomScore

__all__ = ["LastRowAttention", "LayerView", "RandomScore", "Score"]
