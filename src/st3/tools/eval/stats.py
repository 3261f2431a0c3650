"""Bootstrap confidence intervals over images, paired for differences."""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

REPEATS = 2000
LEVEL = 0.95


@dataclass(frozen=True)
class Estimate:
    """A figure and its confidence interval; ``low`` and ``high`` are percentiles."""

    value: float
    low: float
    high: float

    def to_list(self) -> list[float]:
        return [self.value, self.low, self.high]


def ratio(sums: Tensor) -> Tensor:
    """First part over second, 0 where there is nothing: [..., 2] -> [...]."""
    return sums[..., 0] / sums[..., 1].clamp(min=1e-9)


@dataclass(frozen=True)
class Metric:
    """A figure that follows from sums over items.

    Attributes:
        parts: [items, k], of each item.
        clusters: of each item what it was drawn with, its image: questions about one image are no
            independent draws.
        value: [..., k] -> [...], the figure from summed parts.
    """

    parts: Tensor
    clusters: tuple[str, ...]
    value: Callable[[Tensor], Tensor] = ratio

    def sums(self) -> Tensor:
        """[clusters, k], clusters in order of their first item."""
        index = {name: i for i, name in enumerate(dict.fromkeys(self.clusters))}
        sums = torch.zeros(len(index), self.parts.shape[1], dtype=torch.float64)
        place = torch.tensor([index[name] for name in self.clusters])
        return sums.index_add(0, place, self.parts.double())

    def estimate(self) -> Estimate:
        """The figure over all items, with its interval."""
        sums = self.sums()
        drawn = self.value(_draws(len(sums)) @ sums)
        return _estimate(float(self.value(sums.sum(0))), drawn)

    def lower(self, level: float = LEVEL) -> float:
        """What the figure is not below, with this certainty: a one-sided bootstrap bound."""
        sums = self.sums()
        drawn = self.value(_draws(len(sums)) @ sums)
        return float(torch.quantile(drawn, 1 - level))

    def difference(self, other: Metric) -> Estimate:
        """This figure minus ``other``'s; both are drawn on the same images each time.

        Raises:
            ValueError: figures of different items.
        """
        if self.clusters != other.clusters:
            raise ValueError("a paired difference needs the same items on both sides")
        own, its = self.sums(), other.sums()
        weights = _draws(len(own))
        drawn = self.value(weights @ own) - other.value(weights @ its)
        return _estimate(float(self.value(own.sum(0)) - other.value(its.sum(0))), drawn)


@functools.lru_cache(maxsize=4)
def _draws(count: int) -> Tensor:
    """How often each of ``count`` clusters is drawn, with replacement: [REPEATS, count]. The same
    for the same count, so that figures compared with each other see the same draws."""
    rng = torch.Generator().manual_seed(0)
    drawn = torch.randint(count, (REPEATS, count), generator=rng)
    ones = torch.ones(REPEATS, count, dtype=torch.float64)
    return torch.zeros(REPEATS, count, dtype=torch.float64).scatter_add(1, drawn, ones)


def _estimate(value: float, drawn: Tensor) -> Estimate:
    edge = (1 - LEVEL) / 2
    low, high = torch.quantile(drawn, torch.tensor([edge, 1 - edge], dtype=torch.float64)).tolist()
    return Estimate(value, low, high)


def metric(rows: Sequence[Sequence[float] | Tensor], clusters: Sequence[str]) -> Metric:
    """A ratio of sums.

    Args:
        rows: (part, whole) of each item: its part of the numerator, and of the denominator.
        clusters: for each item what it shares with others, such as its image: items of a cluster
            are drawn together.
    """
    parts = torch.stack([torch.as_tensor(row, dtype=torch.float64) for row in rows])
    return Metric(parts, tuple(clusters))
