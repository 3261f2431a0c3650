"""Progressive pruning: the deeper the layer, the fewer visual tokens; fewer yet as text grows."""

from __future__ import annotations

from abc import abstractmethod
from dataclasses import dataclass, field, replace
from fractions import Fraction
from typing import Self

from st3.methods.policies.base import Policy, check_count, check_flag, check_layer
from st3.methods.schedule import Anneal, Schedule, check_share, exact, round_share
from st3.methods.scores.base import Score
from st3.methods.scores.registry import score_named

PAPER_FIRST_LAYER = 3  # the paper's 4th layer, of the 32 or 40 that it states it for
STRIDE = 4
PAPER_DEPTHS = (32, 40)  # of LLaVA-1.5-7B and 13B


@dataclass(frozen=True)
class Progressive(Policy):
    """Base of the methods that drop by ST3's eq. 9.

    At ``first_layer`` the share ``first_drop`` (the paper's P) of the original visual tokens
    leaves, and ``ratio`` (R) more at every ``stride`` (S) layers after it. Layer
    ``i >= first_layer`` keeps

        1 - P - R * floor((i - first_layer) / S)

    and ``ratio`` follows from ``final_keep`` (C) by the paper's eq. 9,

        C = 1 - P - R * floor((L - first_layer) / S).

    The corner: where S divides ``L - first_layer``, eq. 9 counts a drop that would fall right
    behind the last layer, so the last layer keeps C + R. Eq. 9 stays the definition of C.

    Args:
        first_layer: first decoder layer that sees fewer visual tokens (0-based, at least 1); None:
            the paper's, index 3 of 32 or 40 layers, at the same depth of other models.
        first_drop: share of the visual tokens dropped there.
        final_keep: share that eq. 9 leaves at the end; None: what the method has.
        stride: decoder layers between drops; None: 4 of 32 or 40 layers, scaled for other models.
        ratio: share dropped at each later drop; overrides ``final_keep``.
        anneal: the temporal rule.
        rerank_every: decode steps after which the visible visual tokens are ranked anew by the
            current token's attention; None keeps the ranking of the prefill.
        recall_every: the same over all stored visual tokens: what annealing had hidden may come
            back, and nothing is freed. Not together with ``rerank_every``.
        score: by what tokens are ranked, a name that :func:`st3.methods.scores.score_named` knows.
        per_head: whether each KV head anneals by its own query heads' attention.

    Raises:
        ValueError: an argument out of range; from :meth:`schedule`, a layout that does not fit
            the model's number of layers.
    """

    first_layer: int | None = None
    first_drop: float = 0.5
    final_keep: float | None = None
    stride: int | None = None
    ratio: float | None = None
    anneal: Anneal = field(default_factory=Anneal)
    rerank_every: int | None = None
    recall_every: int | None = None
    score: str = "attention"
    per_head: bool = False

    def __post_init__(self) -> None:
        check_layer("first_layer", self.first_layer)
        if self.first_layer == 0:
            raise ValueError(
                "first_layer must be at least 1: the score is read off the layer before"
            )
        check_share("first_drop", self.first_drop)
        if self.final_keep is not None:
            check_share("final_keep", self.final_keep)
        if self.ratio is not None:
            check_share("ratio", self.ratio)
        for name in ("stride", "rerank_every", "recall_every"):
            if getattr(self, name) is not None:
                check_count(name, getattr(self, name))
        if self.rerank_every and self.recall_every:
            raise ValueError("rerank_every and recall_every exclude each other: give one of them")
        score_named(self.score)
        check_flag("per_head", self.per_head)
        if not isinstance(self.anneal, Anneal):
            raise ValueError(f"anneal must be an st3.Anneal, got {self.anneal!r}")
        last = None if self.ratio is not None else self.final_keep
        if last is not None and exact(last) > self.first_share:
            raise ValueError(
                f"final_keep={last} is more than first_drop={self.first_drop} leaves: use at most "
                f"{float(self.first_share):g}"
            )

    @property
    def first_share(self) -> Fraction:
        """What the first drop leaves, 1 - P."""
        return 1 - exact(self.first_drop)

    @abstractmethod
    def default_last_share(self, num_layers: int) -> Fraction:
        """Eq. 9's C where ``final_keep`` is None, at most what the first drop leaves."""

    def last_share_for(self, num_layers: int) -> Fraction:
        """Eq. 9's C on a model of ``num_layers`` layers."""
        if self.final_keep is None:
            return self.default_last_share(num_layers)
        return exact(self.final_keep)

    def first_layer_for(self, num_layers: int) -> int:
        """The layer of the first drop on a model of ``num_layers`` layers.

        Raises:
            ValueError: it lies behind the model's last layer.
        """
        given = self.first_layer
        layer = at_depth(PAPER_FIRST_LAYER, num_layers) if given is None else given
        check_layer("first_layer", layer, num_layers)
        return layer

    def stride_for(self, num_layers: int) -> int:
        """The layers between drops on a model of ``num_layers`` layers."""
        return at_depth(STRIDE, num_layers) if self.stride is None else self.stride

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
        return (num_layers - self.first_layer_for(num_layers)) // self.stride_for(num_layers)

    def ratio_for(self, num_layers: int) -> Fraction:
        """The paper's R on a model of ``num_layers`` layers, exact."""
        if self.ratio is not None:
            return exact(self.ratio)
        last_share = self.last_share_for(num_layers)
        spread = self.first_share - last_share
        drops = self.drops_after_first(num_layers)
        if drops == 0:
            if spread == 0:
                return Fraction(0)
            raise ValueError(
                f"final_keep={float(last_share):g} cannot be reached: {num_layers} layers leave "
                f"no drop after layer {self.first_layer_for(num_layers)} at stride "
                f"{self.stride_for(num_layers)}. Use a smaller stride, or "
                f"final_keep={float(self.first_share):g}"
            )
        return spread / drops

    def schedule(self, num_layers: int) -> Schedule:
        first_layer, stride = self.first_layer_for(num_layers), self.stride_for(num_layers)
        ratio = self.ratio_for(num_layers)
        shares = [Fraction(1)] * first_layer
        for layer in range(first_layer, num_layers):
            shares.append(self.first_share - ratio * ((layer - first_layer) // stride))
        if shares[-1] < 0:
            raise ValueError(
                f"ratio={self.ratio} drops more than everything on {num_layers} layers: the last "
                f"layer would keep {float(shares[-1]):.0%}. Use a smaller ratio or a larger stride"
            )
        return Schedule(tuple(shares), self.anneal)

    def at_budget(self, num_layers: int, mean_keep: float) -> Self:
        """This policy with a visual share, averaged over the layers, of ``mean_keep``.

        The shape is kept (the last drop ends at the same part of what the first one leaves, 2 % in
        ``st3-7b``, 60 % in ``balanced``) and its depth is scaled; budgets too high for that shape
        start with no first drop and a shallower slope.

        Raises:
            ValueError: a budget that the layers before ``first_layer`` already exceed.
        """
        check_share("mean_keep", mean_keep)
        first_layer, stride = self.first_layer_for(num_layers), self.stride_for(num_layers)
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
        tail = Fraction(1)
        if drops and self.first_share:
            tail = self.last_share_for(num_layers) / self.first_share
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


def at_depth(layers: int, num_layers: int) -> int:
    """What ``layers`` of the paper's 32 or 40 decoder layers are in a model of ``num_layers``, at
    least 1."""
    if num_layers in PAPER_DEPTHS:
        return layers
    return max(1, round_share(Fraction(layers, PAPER_DEPTHS[0]), num_layers))
