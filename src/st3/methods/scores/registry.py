"""The scores by name, registered by a decorator."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, TypeVar

from st3.methods.scores.base import Score

C = TypeVar("C", bound=Callable[..., Any])

SCORES: dict[str, Score] = {}
"""The registered scores by name, with their default arguments."""


def register(cls: C) -> C:
    """Class decorator: make a score with its default arguments known under its ``name``.

    Where options can stand in a score's name, the class has a class method ``named(name)``, which
    returns the score that a name says or None, and ``forms``, a text that describes these names.
    """
    score: Score = cls()
    SCORES[score.name] = score
    return cls


def score_named(name: str) -> Score:
    """The score called ``name``: one of :data:`SCORES`, or one with options in its name, such as
    "attention-max", "text-rows-visual-heads" or "mixed2".

    Raises:
        ValueError: for an unknown name, or options that exclude each other.
    """
    if name in SCORES:
        return SCORES[name]
    for score in SCORES.values():
        named: Callable[[str], Score | None] | None = getattr(score, "named", None)
        found = named(name) if named is not None else None
        if found is not None:
            return found
    forms = [score.forms for score in SCORES.values() if hasattr(score, "forms")]
    raise ValueError(
        f"unknown score {name!r}: use one of {', '.join(SCORES)}, or {', or '.join(forms)}"
    )
