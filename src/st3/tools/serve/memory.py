"""Bytes that are promised before they are used, so that no crowd of requests takes them all."""

from __future__ import annotations

import contextlib
import threading
import time
from collections.abc import Iterator

from st3.tools.serve.errors import refused


class Memory:
    """So many bytes, for several threads.

    Attributes:
        total: how many there are.
        used: how many are promised now.
    """

    def __init__(self, total: int) -> None:
        self.total, self.used = total, 0
        self._freed = threading.Condition()

    def take(self, size: int) -> bool:
        """Promise ``size`` bytes, if there are so many free."""
        with self._freed:
            if self.used + size > self.total:
                return False
            self.used += size
            return True

    def give(self, size: int) -> None:
        """Bytes that were taken are free again."""
        with self._freed:
            self.used -= size
            self._freed.notify_all()

    @contextlib.contextmanager
    def hold(self, size: int, ends: float) -> Iterator[None]:
        """``size`` bytes inside of the block; waits for them until ``ends`` (monotonic seconds).

        Raises:
            ServeError: 400 for more than there are in all.
            TimeoutError: they did not come free in time.
        """
        if size > self.total:
            raise refused(
                f"preparing this request's images takes about {size >> 20} MiB; the server sets "
                f"{self.total >> 20} MiB aside for that: send fewer, smaller or less thin images",
                "messages.image_url",
                "image_too_large",
            )
        with self._freed:
            if not self._freed.wait_for(
                lambda: self.used + size <= self.total, max(0.0, ends - time.monotonic())
            ):
                raise TimeoutError
            self.used += size
        try:
            yield
        finally:
            self.give(size)
