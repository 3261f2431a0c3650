"""Runs in turn, and the statistics of pairs."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import TypeVar

T = TypeVar("T")


@dataclass
class Deadline:
    """Work that is cut into rounds stops behind it. ``seconds`` None: never."""

    seconds: float | None = None

    def __post_init__(self) -> None:
        self._start = time.monotonic()

    @property
    def left(self) -> float:
        """Seconds left; infinite without a limit."""
        if self.seconds is None:
            return float("inf")
        return self.seconds - (time.monotonic() - self._start)


def in_turn(
    runs: Mapping[str, Callable[[], T]],
    rounds: int,
    on_run: Callable[[], None] = lambda: None,
    deadline: Deadline | None = None,
) -> dict[str, list[T]]:
    """Call all ``runs`` in each round, A B C, B C A, C A B ..., so that a change of the machine's
    load meets all of them. Whole rounds only; behind the deadline none is begun (but the first)."""
    names = list(runs)
    results: dict[str, list[T]] = {name: [] for name in names}
    for done in range(rounds):
        if done and deadline is not None and deadline.left <= 0:
            break
        shift = done % len(names)
        for name in names[shift:] + names[:shift]:
            results[name].append(runs[name]())
            on_run()
    return results


@dataclass(frozen=True)
class Ratio:
    """How many times faster: the reference's time over the other's.

    Attributes:
        paired: median of the ratios within each round.
        minima: ratio of the two smallest times.
        spread: (largest - smallest) / median of the ratios within each round.
    """

    paired: float
    minima: float
    spread: float


def speed_up(reference: Sequence[float], other: Sequence[float]) -> Ratio | None:
    """None where one of the two has no samples.

    Raises:
        ValueError: samples of different numbers of rounds, which cannot be paired.
    """
    if not reference or not other:
        return None
    if len(reference) != len(other):
        raise ValueError(f"{len(reference)} and {len(other)} rounds cannot be paired")
    pairs = [a / b for a, b in zip(reference, other, strict=True)]
    middle = statistics.median(pairs)
    return Ratio(middle, min(reference) / min(other), (max(pairs) - min(pairs)) / middle)


def median(values: Sequence[float]) -> float | None:
    return statistics.median(values) if values else None
