"""Sending to clients that may be slow, or gone."""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncGenerator, Callable, Coroutine
from typing import Any, TypeVar

from starlette.responses import Response
from starlette.types import Receive, Scope, Send

from st3.tools.serve.errors import unavailable

T = TypeVar("T")


class ClientGone(Exception):
    """The client has closed the connection."""


async def unless_gone(receive: Receive, work: Coroutine[Any, Any, T]) -> T:
    """The result of ``work``, which is cancelled as soon as the client disconnects.

    Raises:
        ClientGone: then.
    """
    working = asyncio.ensure_future(work)
    gone = asyncio.ensure_future(_disconnected(receive))
    try:
        await asyncio.wait({working, gone}, return_when=asyncio.FIRST_COMPLETED)
        if working.done():
            return working.result()
        raise ClientGone
    finally:
        working.cancel()
        gone.cancel()
        await asyncio.gather(working, gone, return_exceptions=True)


async def _disconnected(receive: Receive) -> None:
    while (await receive())["type"] != "http.disconnect":
        pass


class EventStream(Response):
    """Server-sent events to a client that has to take each within ``send_timeout`` seconds.

    Args:
        on_close: called when no more is sent, also if not one event was asked for.
    """

    def __init__(
        self,
        events: AsyncGenerator[bytes, None],
        send_timeout: float,
        on_close: Callable[[], None],
    ) -> None:
        headers = {"Cache-Control": "no-store", "X-Accel-Buffering": "no"}
        super().__init__(None, media_type="text/event-stream", headers=headers)
        del self.headers["content-length"]
        self._events = events
        self._timeout = send_timeout
        self._on_close = on_close

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        begun = False

        async def stream() -> None:
            nonlocal begun
            head = {"status": self.status_code, "headers": self.raw_headers}
            begun = True
            await self._send(send, {"type": "http.response.start", **head})
            async for event in self._events:
                body = {"type": "http.response.body", "body": event, "more_body": True}
                await self._send(send, body)
            end = {"type": "http.response.body", "body": b"", "more_body": False}
            await self._send(send, end)

        try:
            await unless_gone(receive, stream())
        except asyncio.CancelledError:  # the server's time to stop is up
            if not begun:
                raise
            error = unavailable("the server was shut down before this answer was complete")
            last = b"data: " + json.dumps(error.body()).encode() + b"\n\n"
            await send({"type": "http.response.body", "body": last, "more_body": False})
        except (ClientGone, TimeoutError):
            pass  # left unfinished, which is all that such a client can be told
        finally:
            self._on_close()  # a generator that never began runs none of its own clean-up
            await self._events.aclose()

    async def _send(self, send: Send, message: Any) -> None:
        async with asyncio.timeout(self._timeout):
            await send(message)
