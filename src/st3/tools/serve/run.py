"""Run the app on a socket until it is told to stop, and stop it in order."""

from __future__ import annotations

import os
import signal
import socket
from collections.abc import Callable
from types import FrameType
from typing import Any

import uvicorn

from st3.tools.serve.engine import Engine


class _Server(uvicorn.Server):
    """Told to stop once (SIGINT or SIGTERM) it takes no more connections and finishes its answers;
    twice, it gives them up, and their clients are told so; three times, it is gone.

    uvicorn's own second signal cuts the answers off instead, with a 500 and a traceback each.
    """

    def __init__(
        self, config: uvicorn.Config, engine: Engine, on_ready: Callable[[], None]
    ) -> None:
        super().__init__(config)
        self._engine, self._on_ready, self._signals = engine, on_ready, 0

    async def startup(self, sockets: list[socket.socket] | None = None) -> None:
        await super().startup(sockets)
        self._on_ready()

    def handle_exit(self, sig: int, frame: FrameType | None) -> None:
        # In the main thread, between any two instructions: nothing may be waited for here.
        self._signals += 1
        if self._signals == 1:
            self.should_exit = True
            if self._engine.busy:
                _say("finishing the answers under way; once more gives them up")
        elif self._signals == 2:
            self._engine.hurry()
        else:
            # Not uvicorn's way out, which cancels everything with tracebacks; and the engine's
            # thread may be within a kernel, and is not to be met by the interpreter's end.
            os._exit(128 + signal.SIGINT)


def serve(
    app: Any,
    engine: Engine,
    listener: socket.socket,
    grace: float,
    on_ready: Callable[[], None] = lambda: None,
) -> None:
    """Serve until a signal, then stop in order.

    Args:
        listener: a socket that listens.
        grace: seconds for the answers under way.
        on_ready: called when requests are answered.
    """
    config = uvicorn.Config(
        app,
        log_level="warning",
        server_header=False,
        timeout_graceful_shutdown=max(1, round(grace)),
        limit_concurrency=1024,  # connections; the queue's limit answers far earlier
        h11_max_incomplete_event_size=64 << 10,
    )
    server = _Server(config, engine, on_ready)
    server.run(sockets=[listener])


def _say(text: str) -> None:
    """To stderr, also from a signal's handler, where Python's own streams must not be used."""
    os.write(2, f"{text}\n".encode())
