"""By what visual tokens are ranked: one score per file, found by name."""

from st3.scores.attention import LastRowAttention
from st3.scores.base import LayerView, Score
from st3.scores.key_norm import KeyNorm
from st3.scores.random import RandomScore
from st3.scores.uniform import Uniform

SCORES: dict[str, Score] = {
    "attention": LastRowAttention(),
    "key_norm": KeyNorm(),
    "random": RandomScore(),
    "uniform": Uniform(),
}


def score_named(name: str) -> Score:
    """The score called ``name``.

    Raises:
        ValueError: for an unknown name.
    """
    if name not in SCORES:
        raise ValueError(f"unknown score {name!r}: use one of {', '.join(SCORES)}")
    return SCORES[name]


__all__ = [
    "SCORES",
    "KeyNorm",
    "LastRowAttention",
    "LayerView",
    "RandomScore",
    "Score",
    "Uniform",
    "score_named",
]
