"""What layers share is made once."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any


class Memo:
    """Values made of an object, by the object itself and a further key."""

    def __init__(self) -> None:
        self._made: dict[tuple[int, int], tuple[Any, Any]] = {}

    def once(self, original: Any, make: Callable[[], Any], key: int = 0) -> Any:
        """``make()``, at the first call with this ``original`` and ``key``."""
        place = key, id(original)
        if place not in self._made:
            # What it is made of is held, so that its id stays its own.
            self._made[place] = make(), original
        return self._made[place][0]

    def clear(self) -> None:
        self._made.clear()
