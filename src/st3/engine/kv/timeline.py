"""Logical time of a trimmed cache, as if nothing had been trimmed."""

from __future__ import annotations

from dataclasses import dataclass
from enum import Enum


class Phase(Enum):
    """What the forward pass under way does with a trimmed cache."""

    IDLE = "idle"
    PREFILL = "prefill"
    APPEND = "append"


@dataclass
class Timeline:
    """Shared by the layers of one cache: logical time, as if nothing had been trimmed.

    Attributes:
        phase: IDLE outside of a forward pass of the trimmed model.
        start: logical length before the pass.
        tokens: logical tokens of the pass.
        prompt: logical length of the prompt that annealing counts from.
        dense_from: logical length behind which every token has a column of its own.
    """

    phase: Phase = Phase.IDLE
    start: int = 0
    tokens: int = 0
    prompt: int = 0
    dense_from: int = 0

    @property
    def steps(self) -> int:
        """Decode steps behind the latest prompt with an image, when the pass is over."""
        return max(0, self.start + self.tokens - self.dense_from)

    def step(self, length: int) -> int:
        """Decode step of the token at logical position ``length``: the first generated is 1."""
        return length - self.prompt + 1
