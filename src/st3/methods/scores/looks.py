"""What scores want of the vision tower."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Literal


@dataclass(frozen=True)
class Look:
    """What a score wants of the vision tower.

    Attributes:
        of: "class", what its class token attends to (where it has none, as "received"); or
            "received", the attention that each patch receives, mean over all of the tower's tokens
            that see it. Both are means over the heads, and over the patches that become one token.
        depth: in which layer, as a share of all layers: 0.375 is the 9th of 24. None: the one whose
            output becomes the visual tokens.
    """

    of: Literal["class", "received"] = "class"
    depth: float | None = None


def looks_of(score: Any) -> tuple[Look, ...]:
    """What a score that needs "tower" wants of it."""
    looks: tuple[Look, ...] = getattr(score, "looks", (Look(),))
    return looks
