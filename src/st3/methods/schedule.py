"""How many visual tokens each decoder layer keeps, and how many it still shows while decoding.

Pure integers: nothing here knows a tensor, a model or a score. Shares are exact fractions of the
ORIGINAL number of visual tokens of a prompt, so that the counts of a layer never depend on the
rounding of an earlier one.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Sequence
from dataclasses import dataclass
from fractions import Fraction
from typing import Literal, get_args

Curve = Literal["cosine", "half_cosine", "linear", "exponential", "none"]
CURVES: tuple[str, ...] = get_args(Curve)


@functools.lru_cache(maxsize=1024)  # asked for at every layer of every decode step
def exact(value: float | Fraction) -> Fraction:
    """The fraction a person means by a decimal: ``exact(0.07) == Fraction(7, 100)``."""
    return value if isinstance(value, Fraction) else Fraction(str(value))


def check_share(name: str, value: float | Fraction) -> None:
    """Raise ``ValueError`` unless ``value`` is a number in [0, 1]."""
    if isinstance(value, bool) or not isinstance(value, (int, float, Fraction)):
        raise ValueError(f"{name} must be a number between 0 and 1, got {value!r}")
    if not 0 <= value <= 1:  # also refuses nan
        raise ValueError(f"{name} must lie between 0 and 1, got {value}")


@dataclass(frozen=True)
class Anneal:
    """Temporal rule (VTA): the share of a layer's visual KV entries that decode step ``t`` sees.

    Args:
        curve: ``cosine`` is the quarter wave ``cos(pi t / 2 tau)``, ``half_cosine`` is
            ``(1 + cos(pi t / tau)) / 2``, ``linear`` is ``1 - t / tau``, ``exponential`` is
            ``exp(-t / tau)``; the first three reach 0 at ``t = tau``. ``none`` never shrinks.
        tau: period in generated tokens.
        floor: share of the prompt's original visual tokens under which no layer is annealed
            (a layer that has fewer keeps what it has).

    Raises:
        ValueError: unknown curve, ``tau`` not positive, ``floor`` outside [0, 1].

    Source: ST3 (arXiv 2412.20105), section on visual token annealing. The printed equation is not
    restated here: the quarter wave is this project's reading of "along a cosine".
    """

    curve: Curve = "cosine"
    tau: float = 256
    floor: float = 0.05

    def __post_init__(self) -> None:
        if self.curve not in CURVES:
            raise ValueError(
                f"unknown annealing curve {self.curve!r}: use one of {', '.join(CURVES)}"
            )
        number = isinstance(self.tau, (int, float)) and not isinstance(self.tau, bool)
        if not number or not 0 < self.tau < math.inf:
            raise ValueError(f"anneal tau must be a positive number of tokens, got {self.tau!r}")
        check_share("anneal floor", self.floor)
        if self.curve == "none":  # all of them are the same, whatever they were made from
            object.__setattr__(self, "tau", Anneal.tau)
            object.__setattr__(self, "floor", Anneal.floor)

    def factor(self, step: int) -> float:
        """The curve at decode step ``step`` (0 is the prefill), between 0 and 1."""
        if step <= 0 or self.curve == "none":
            return 1.0
        if self.curve == "exponential":
            return math.exp(-step / self.tau)
        if step >= self.tau:
            return 0.0
        if self.curve == "linear":
            return 1.0 - step / self.tau
        if self.curve == "half_cosine":
            return 0.5 * (1.0 + math.cos(math.pi * step / self.tau))
        return math.cos(math.pi * step / (2 * self.tau))


NO_ANNEAL = Anneal(curve="none")


def round_share(share: Fraction, count: int) -> int:
    """``share * count`` rounded half up, in exact arithmetic."""
    return (2 * share.numerator * count + share.denominator) // (2 * share.denominator)


@dataclass(frozen=True)
class Schedule:
    """The counts of a method on a model of ``num_layers`` decoder layers.

    Args:
        shares: for each decoder layer (0-based) the share of the original visual tokens that
            enters it; never rises with depth.
        anneal: how decode steps shrink what a layer shows.
        anneal_from: first decoder layer that is annealed.
        counted: whether shares are of those visual tokens that a prompt's own data keep, and not of
            all: the rest leaves before layer 0, and shares are what is kept at most.

    Raises:
        ValueError: no layers, a share outside [0, 1], or shares that rise with depth.
    """

    shares: tuple[Fraction, ...]
    anneal: Anneal = NO_ANNEAL
    anneal_from: int = 0
    counted: bool = False

    def __post_init__(self) -> None:
        if not self.shares:
            raise ValueError("a schedule needs at least one decoder layer")
        for layer, share in enumerate(self.shares):
            check_share(f"the share of layer {layer}", share)
            if layer and share > self.shares[layer - 1]:
                raise ValueError(
                    f"layer {layer} would keep more visual tokens than layer {layer - 1}: "
                    "dropped tokens cannot come back, let the shares fall with depth"
                )

    @classmethod
    def from_shares(
        cls, shares: Sequence[float | Fraction], anneal: Anneal = NO_ANNEAL
    ) -> Schedule:
        """A schedule from one share per decoder layer.

        Args:
            shares: in 0..1, of the original visual tokens; never rising.
            anneal: how decode steps shrink what a layer shows.

        Raises:
            ValueError: as the class.
        """
        return cls(tuple(exact(share) for share in shares), anneal)

    @property
    def num_layers(self) -> int:
        return len(self.shares)

    @property
    def mean_share(self) -> float:
        """Mean over the layers of the share that enters them: the budget used for fair tables."""
        return float(sum(self.shares) / len(self.shares))

    @functools.cached_property  # asked for at every layer of every decode step
    def anneals(self) -> bool:
        return self.anneal.curve != "none" and any(self.shares[self.anneal_from :])

    @property
    def drops(self) -> bool:
        """Whether anything is ever dropped, in prefill or decode."""
        return self.shares[-1] < 1 or self.anneals or self.counted

    def prunes(self, layer: int) -> bool:
        """Whether visual tokens leave right before ``layer``."""
        if not layer:
            return self.counted or self.shares[0] < 1
        return self.shares[layer] < self.shares[layer - 1]

    def kept(self, layer: int, n_visual: int) -> int:
        """Visual tokens that enter ``layer`` in prefill, of ``n_visual``: a prompt's original ones,
        or those that its data keep."""
        return round_share(self.shares[layer], n_visual)

    def visible(self, layer: int, n_visual: int, step: int) -> int:
        """Visual KV entries of ``layer`` that decode step ``step`` sees (step 0 is the prefill;
        the first generated token that is fed back is step 1). Never rises with ``step``."""
        kept = self.kept(layer, n_visual)
        if not self.anneals or step <= 0 or layer < self.anneal_from:
            return kept
        curve = math.floor(kept * self.anneal.factor(step) + 0.5)
        floor = round_share(exact(self.anneal.floor), n_visual)
        return min(kept, max(curve, floor))

    def mean_visible(self, n_visual: int, steps: int) -> float:
        """Mean over layers and over decode steps 1..``steps`` of the visible share (0..1)."""
        if not n_visual or steps < 1:
            return self.mean_share
        total = sum(
            self.visible(layer, n_visual, step)
            for layer in range(self.num_layers)
            for step in range(1, steps + 1)
        )
        return total / (self.num_layers * steps * n_visual)
