"""ST3: progressive visual token pruning in prefill (PVTP), annealing while decoding (VTA)."""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from fractions import Fraction
from typing import ClassVar

from st3.methods.policies.base import Policy, check_count, check_layer
from st3.methods.policies.registry import register, register_preset
from st3.methods.schedule import Anneal, Schedule, check_share, exact
from st3.methods.scores.base import Score
from st3.methods.scores.registry import score_named

TAPER = Fraction(3, 5)  # where final_keep is not given: the last share of the first one


@register
@dataclass(frozen=True)
class ST3(Policy):
    """ST3: drop more visual tokens the deeper the layer, and more as text is generated.

    At ``first_layer`` the share ``first_drop`` (the paper's P) of the original visual tokens
    leaves, and ``ratio`` (R) more at every ``stride`` (S) layers after it. Layer
    ``i >= first_layer`` keeps

        1 - P - R * floor((i - first_layer) / S)

    and ``ratio`` follows from ``final_keep`` (C) by the paper's eq. 9,

        C = 1 - P - R * floor((L - first_layer) / S).

    The corner: where S divides ``L - first_layer``, eq. 9 counts a drop that would fall right
    behind the last layer, so the last layer keeps C + R. Eq. 9 stays the definition of C.

    The defaults are those that lost the fewest answers of the bundled model at a mean share of 35 %
    (docs/policies.md); the paper's own settings are the presets ``st3-7b`` and ``st3-13b``.

    Args:
        first_layer: first decoder layer that sees fewer visual tokens (0-based, at least 1): the
            paper's 4th layer is 3.
        first_drop: share of the visual tokens dropped there.
        final_keep: share that eq. 9 leaves at the end; None: 60 % of what the first drop leaves.
        stride: decoder layers between drops.
        ratio: share dropped at each later drop; overrides ``final_keep``.
        anneal: the temporal rule.
        rerank_every: decode steps after which the visible visual tokens are ranked anew by the
            current token's attention; None keeps the ranking of the prefill.
        recall_every: the same over all stored visual tokens: what annealing had hidden may come
            back, and nothing is freed. Not together with ``rerank_every``.
        score: by what tokens are ranked, a name that :func:`st3.methods.scores.score_named` knows.
            The paper's is "attention", of the prompt's last token. It loses what that token does
            not look at, which counting and long descriptions need: the default adds a grid.

    Raises:
        ValueError: an argument out of range; from :meth:`schedule`, a layout that does not fit
            the model's number of layers.

    Source: arXiv 2412.20105 (AAAI 2025), eq. 9.
    """

    first_layer: int = 1
    first_drop: float = 0.6
    final_keep: float | None = None
    stride: int = 4
    ratio: float | None = None
    anneal: Anneal = field(default_factory=Anneal)
    rerank_every: int | None = None
    recall_every: int | None = None
    score: str = "mixed"

    name: ClassVar[str] = "st3"
    paper: ClassVar[str] = "arXiv 2412.20105 (AAAI 2025)"

    def __post_init__(self) -> None:
        check_layer("first_layer", self.first_layer)
        if self.first_layer < 1:
            raise ValueError(
                "first_layer must be at least 1: the score is read off the layer before"
            )
        check_share("first_drop", self.first_drop)
        if self.final_keep is not None:
            check_share("final_keep", self.final_keep)
        if self.ratio is not None:
            check_share("ratio", self.ratio)
        for name in ("stride", "rerank_every", "recall_every"):
            value = getattr(self, name)
            if name != "stride" and value is None:
                continue
            check_count(name, value)
        if self.rerank_every and self.recall_every:
            raise ValueError("rerank_every and recall_every exclude each other: give one of them")
        score_named(self.score)
        if not isinstance(self.anneal, Anneal):
            raise ValueError(f"anneal must be an st3.Anneal, got {self.anneal!r}")
        if self.ratio is None and self.last_share > self.first_share:
            raise ValueError(
                f"final_keep={self.final_keep} is more than first_drop={self.first_drop} leaves: "
                f"use at most {float(self.first_share):g}"
            )

    @property
    def first_share(self) -> Fraction:
        """What the first drop leaves, 1 - P."""
        return 1 - exact(self.first_drop)

    @property
    def last_share(self) -> Fraction:
        """Eq. 9's C."""
        if self.final_keep is None:
            return TAPER * self.first_share
        return exact(self.final_keep)

    def scorer(self) -> Score:
        return score_named(self.score)

    @property
    def rerank(self) -> int | None:
        return self.rerank_every or self.recall_every

    @property
    def recalls(self) -> bool:
        return self.recall_every is not None

    def drops_after_first(self, num_layers: int) -> int:
        """Eq. 9's count ``floor((L - first_layer) / S)`` of drops after the first."""
        return (num_layers - self.first_layer) // self.stride

    def ratio_for(self, num_layers: int) -> Fraction:
        """The paper's R on a model of ``num_layers`` layers, exact."""
        if self.ratio is not None:
            return exact(self.ratio)
        spread = self.first_share - self.last_share
        drops = self.drops_after_first(num_layers)
        if drops == 0:
            if spread == 0:
                return Fraction(0)
            raise ValueError(
                f"final_keep={float(self.last_share):g} cannot be reached: {num_layers} layers "
                f"leave no drop after layer {self.first_layer} at stride {self.stride}. Use a "
                f"smaller stride, or final_keep={float(self.first_share):g}"
            )
        return spread / drops

    def schedule(self, num_layers: int) -> Schedule:
        check_layer("first_layer", self.first_layer, num_layers)
        ratio = self.ratio_for(num_layers)
        shares = [Fraction(1)] * self.first_layer
        for layer in range(self.first_layer, num_layers):
            drops = (layer - self.first_layer) // self.stride
            shares.append(self.first_share - ratio * drops)
        if shares[-1] < 0:
            raise ValueError(
                f"ratio={self.ratio} drops more than everything on {num_layers} layers: the last "
                f"layer would keep {float(shares[-1]):.0%}. Use a smaller ratio or a larger stride"
            )
        return Schedule(tuple(shares), self.anneal)

    def at_budget(self, num_layers: int, mean_keep: float) -> ST3:
        """The ST3 policy whose visual share, averaged over the layers, is ``mean_keep``.

        The shape is kept (the last drop ends at the same part of what the first one leaves, 2 % in
        ``st3-7b``, 60 % by default) and its depth is scaled; budgets too high for that shape start
        with no first drop and a shallower slope.

        Raises:
            ValueError: a budget that the layers before ``first_layer`` already exceed.
        """
        check_share("mean_keep", mean_keep)
        first_layer, stride = self.first_layer, self.stride
        check_layer("first_layer", first_layer, num_layers)
        budget = exact(mean_keep) * num_layers
        drops = (num_layers - first_layer) // stride
        done = [
            Fraction((i - first_layer) // stride, max(drops, 1))
            for i in range(first_layer, num_layers)
        ]
        if budget < first_layer:
            raise ValueError(
                f"a mean share of {mean_keep:.1%} cannot be had: the first {first_layer} of "
                f"{num_layers} layers alone are {first_layer / num_layers:.1%}. Use a smaller "
                "first_layer"
            )
        tail = self.last_share / self.first_share if drops and self.first_share else Fraction(1)
        shape = sum((1 - (1 - tail) * part for part in done), Fraction(0))
        keep_first = (budget - first_layer) / shape
        if keep_first <= 1:
            keep_last = keep_first * tail
        else:
            keep_first = Fraction(1)
            slope = sum(done, Fraction(0))
            missing = num_layers - budget
            keep_last = 1 - missing / slope if slope else Fraction(1)
        # Twelve decimals: floats that read back as the same fraction, far below half a token.
        first_drop = round(float(1 - keep_first), 12)
        final_keep = min(round(float(keep_last), 12), float(1 - exact(first_drop)))
        return replace(self, first_drop=first_drop, final_keep=final_keep, ratio=None)


# The paper's settings for LLaVA-1.5-7B and 13B: 32 decoder layers end at C = 1 %, 40 layers at
# C = 5 % (R = 7 % and 5 %).
_PAPER = ST3(
    first_layer=3, first_drop=0.5, final_keep=0.05, anneal=Anneal(tau=128), score="attention"
)
register_preset("st3-7b", replace(_PAPER, final_keep=0.01))
register_preset("st3-13b", _PAPER)
