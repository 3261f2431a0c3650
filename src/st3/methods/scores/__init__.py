"""By what visual tokens are ranked: one score per file, found by name."""

from st3.methods.scores.attention import WORDS, Attention, attention_named
from st3.methods.scores.base import LayerView, Score, Stage, TokenView, needs_of, stage_of
from st3.methods.scores.class_attention import ClassAttention
from st3.methods.scores.dart import Dart
from st3.methods.scores.feather import Feather
from st3.methods.scores.greedy import ConditionalDPP, MaxMin
from st3.methods.scores.grid import Grid
from st3.methods.scores.hidden_change import HiddenChange
from st3.methods.scores.key_norm import KeyNorm
from st3.methods.scores.mixed import Mixed, mixed_named
from st3.methods.scores.random import RandomScore
from st3.methods.scores.text_raters import TextRaters
from st3.methods.scores.uniform import Uniform

SCORES: dict[str, Score] = {
    "attention": Attention(),
    "text-rows": Attention(rows="text"),
    "text-raters": TextRaters(),
    "key_norm": KeyNorm(),
    "hidden-change": HiddenChange(),
    "dart": Dart(),
    "feather": Feather(),
    "divprune": MaxMin(),
    "cdpruner": ConditionalDPP(),
    "visionzip": ClassAttention(),
    "grid": Grid(),
    "mixed": Mixed(),
    "uniform": Uniform(),
    "random": RandomScore(),
}


def score_named(name: str) -> Score:
    """The score called ``name``: one of :data:`SCORES`, "attention" with options behind it, such as
    "attention-max", "text-rows-visual-heads" or "attention-debiased-lazy4", or "mixed" with the
    number of tokens of which one is the attention's, "mixed2".

    Raises:
        ValueError: for an unknown name, or options that exclude each other.
    """
    score = SCORES.get(name) or attention_named(name) or mixed_named(name)
    if score is None:
        words = [word for word in WORDS if not word.startswith("lazy")]
        raise ValueError(
            f"unknown score {name!r}: use one of {', '.join(SCORES)}, or attention with options, "
            f"joined by hyphens: {', '.join(words)}, lazy2 to lazy32, or mixed2, mixed3 ..."
        )
    return score


__all__ = [
    "SCORES",
    "Attention",
    "ClassAttention",
    "ConditionalDPP",
    "Dart",
    "Feather",
    "Grid",
    "HiddenChange",
    "KeyNorm",
    "LayerView",
    "MaxMin",
    "Mixed",
    "RandomScore",
    "Score",
    "Stage",
    "TextRaters",
    "TokenView",
    "Uniform",
    "needs_of",
    "score_named",
    "stage_of",
]
