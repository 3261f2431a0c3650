"""Schedules that several methods share, and what scales them to a budget."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from fractions import Fraction
from typing import Any, ClassVar, Self, TypeVar

from st3.methods.policies.base import Policy, check_layer, format_list
from st3.methods.schedule import Schedule, check_share, exact

P = TypeVar("P", bound=Policy)


@dataclass(frozen=True)
class Staged(Policy):
    """A method that drops at a few given layers.

    Args:
        layers: first decoder layers (0-based) that see fewer visual tokens, written "3/7/16"; None
            has those of the paper's 32 layers at the same depth.
        keep: share of the original visual tokens left at each of them, written "0.5/0.25".
    """

    layers: tuple[int, ...] | None = None
    keep: tuple[float, ...] = ()

    paper_layers: ClassVar[tuple[int, ...]] = ()

    def __post_init__(self) -> None:
        layers = self.paper_layers if self.layers is None else self.layers
        if not isinstance(layers, tuple) or not isinstance(self.keep, tuple):
            raise ValueError(
                "layers and keep must be tuples, such as layers=(3, 7), keep=(0.5, 0.2)"
            )
        if len(layers) != len(self.keep) or not layers:
            raise ValueError(
                f"{self.name!r} has {len(layers)} layers and {len(self.keep)} shares: give one "
                "share for each layer"
            )
        for layer in layers:
            check_layer("layers", layer)
        if layers[0] < 1 or list(layers) != sorted(set(layers)):
            raise ValueError(f"layers must rise and start at 1 or later, got {format_list(layers)}")
        for share in self.keep:
            check_share("keep", share)
        if list(self.keep) != sorted(self.keep, reverse=True):
            raise ValueError(f"keep must fall with depth, got {format_list(self.keep)}")

    def layers_for(self, num_layers: int) -> tuple[int, ...]:
        """The layers of the drops on a model of ``num_layers`` layers.

        Raises:
            ValueError: a model with too few layers.
        """
        if self.layers is not None:
            for layer in self.layers:
                check_layer("layers", layer, num_layers)
            return self.layers
        scaled: list[int] = []
        for layer in self.paper_layers:
            least = scaled[-1] + 1 if scaled else 1
            scaled.append(max(least, round(layer * num_layers / PAPER_LAYERS)))
        if scaled[-1] >= num_layers:
            raise ValueError(
                f"{len(scaled)} drops do not fit {num_layers} decoder layers: give layers and keep"
            )
        return tuple(scaled)

    def schedule(self, num_layers: int) -> Schedule:
        return stage_schedule(num_layers, self.layers_for(num_layers), self.keep)

    def at_budget(self, num_layers: int, mean_keep: float) -> Self:
        def scaled(factor: float) -> tuple[float, ...]:
            return tuple(min(1.0, round(factor * share, 12)) for share in self.keep)

        layers = self.layers_for(num_layers)
        check_within(mean_keep, num_layers, layers[0], "layers")
        first = next((share for share in reversed(self.keep) if share), None)
        if first is None:
            raise ValueError(f"keep={format_list(self.keep)} keeps nothing that could be scaled")
        factor = solve(
            lambda f: stage_schedule(num_layers, layers, scaled(f)).mean_share, mean_keep, 1 / first
        )
        return dataclasses.replace(self, keep=scaled(factor))


@dataclass(frozen=True)
class BeforeDecoder(Policy):
    """A method that drops tokens before the decoder's first layer.

    Args:
        keep: share of the visual tokens kept.
    """

    keep: float = 0.333

    def __post_init__(self) -> None:
        check_share("keep", self.keep)

    def schedule(self, num_layers: int) -> Schedule:
        return Schedule((exact(self.keep),) * num_layers)

    def at_budget(self, num_layers: int, mean_keep: float) -> Self:
        check_share("mean_keep", mean_keep)
        return dataclasses.replace(self, keep=mean_keep)


PAPER_LAYERS = 32  # of LLaVA-1.5-7B, on which the papers state their layers


def stage_schedule(
    num_layers: int, layers: Sequence[int], keep: Sequence[float | Fraction]
) -> Schedule:
    """All tokens, then ``keep[i]`` of them from ``layers[i]`` on."""
    shares = [Fraction(1)] * num_layers
    for layer, share in zip(layers, keep, strict=True):
        shares[layer:] = [exact(share)] * (num_layers - layer)
    return Schedule(tuple(shares))


def check_within(mean_keep: float, num_layers: int, first: int, name: str) -> None:
    """Raise ``ValueError`` for a budget that the layers before ``first`` alone exceed."""
    check_share("mean_keep", mean_keep)
    if exact(mean_keep) * num_layers < first:
        raise ValueError(
            f"a mean share of {mean_keep:.1%} cannot be had: the first {first} of {num_layers} "
            f"layers alone are {first / num_layers:.1%}. Use a smaller {name}"
        )


def with_keep(policy: P, num_layers: int, mean_keep: float, bound: str) -> P:
    """``policy`` with the largest ``keep`` whose mean share over the layers does not exceed
    ``mean_keep``.

    Args:
        bound: the argument that bounds the mean share at ``keep=1``.

    Raises:
        ValueError: a mean share above that, or outside of [0, 1].
    """
    check_share("mean_keep", mean_keep)

    def at(keep: float) -> P:
        changed: dict[str, Any] = {"keep": round(keep, 12)}
        return dataclasses.replace(policy, **changed)

    def mean_share(keep: float) -> float:
        return at(keep).schedule(num_layers).mean_share

    most = mean_share(1.0)
    if mean_keep > most + 1e-9:
        raise ValueError(
            f"a mean share of {mean_keep:.1%} cannot be had: with {bound}="
            f"{getattr(policy, bound):g} it is {most:.1%} at most. Use a larger {bound}"
        )
    return at(solve(mean_share, mean_keep, 1.0))


def solve(mean_share: Callable[[float], float], wanted: float, high: float) -> float:
    """The largest argument in [0, high], by bisection, at which the rising ``mean_share`` does not
    exceed ``wanted``."""
    low = 0.0
    if mean_share(high) <= wanted + 1e-12:
        return high
    for _ in range(60):
        middle = (low + high) / 2
        if mean_share(middle) <= wanted + 1e-12:
            low = middle
        else:
            high = middle
    return low
