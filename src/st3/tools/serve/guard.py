"""What stands in front of every page: who may ask at all, request ids, the log of requests, and
bodies that nobody reads."""

from __future__ import annotations

import asyncio
import contextlib
import hmac
import logging
import re
import secrets
import time
from collections.abc import Callable
from urllib.parse import quote

from fastapi.responses import JSONResponse
from starlette.datastructures import Headers, MutableHeaders
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from st3.tools.serve.errors import ServeError, unavailable
from st3.tools.serve.page import is_open
from st3.tools.serve.settings import Settings

log = logging.getLogger("st3.tools.serve")
access = logging.getLogger("st3.access")

REQUEST_ID = "x-request-id"
_ID = re.compile(r"[\w.:-]{1,100}", re.ASCII)
# A body that is refused unread is thrown away for so long: where a connection is closed on a client
# which still sends, the client's system may throw away the reply.
_DRAIN_SECONDS = 2.0
_QUIET = ("/health", "/metrics")  # asked every few seconds by machines


class Guard:
    """ASGI middleware. The Host and the key are checked on what was sent: the URL that starlette
    makes of a request holds its Host header, so that a forged one changes the path.

    Args:
        responded: called with the path and status of each response.
    """

    def __init__(
        self, app: ASGIApp, settings: Settings, responded: Callable[[str, int], None]
    ) -> None:
        self.app, self.settings, self.responded = app, settings, responded

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self.app(scope, receive, send)
            return
        request = _Exchange(scope, receive, send, self.responded)
        try:
            self._check_host(request.headers)
            self._check_key(request.headers, scope["path"])
        except ServeError as error:
            response = JSONResponse(error.body(), error.status, headers=error.headers)
            await response(scope, request.receive, request.send)
        else:
            await self._answer(scope, request)
        finally:
            request.log()

    async def _answer(self, scope: Scope, request: _Exchange) -> None:
        try:
            await self.app(scope, request.receive, request.send)
        except asyncio.CancelledError:  # the server's time to stop is up
            if request.status:
                raise
            error = unavailable("the server was shut down before this answer was complete")
            await JSONResponse(error.body(), 503, headers=error.headers)(
                scope, request.receive, request.send
            )
        except Exception:  # a fault of the server's; uvicorn would log it and cut the connection
            log.exception("request %s failed", request.id)
            if request.status:
                raise
            error = ServeError(500, "internal_error", "the server failed")
            await JSONResponse(error.body(), 500)(scope, request.receive, request.send)

    def _check_host(self, headers: Headers) -> None:
        # Starlette's TrustedHostMiddleware answers in another form than OpenAI's, and before 1.0
        # it cannot read [::1].
        allowed = self.settings.allowed_hosts
        host = headers.get("host", "")
        name = host[: host.find("]") + 1] if host.startswith("[") else host.partition(":")[0]
        if allowed and name.lower() not in allowed:
            raise ServeError(421, "invalid_host", "this server is not known by that name")

    def _check_key(self, headers: Headers, path: str) -> None:
        key = self.settings.api_key
        if key is None or path == "/health" or (self.settings.page and is_open(path)):
            return
        kind, _, given = headers.get("authorization", "").partition(" ")
        same = hmac.compare_digest(given.strip().encode(), key.encode())
        if kind.lower() != "bearer" or not same:
            raise ServeError(
                401, "invalid_api_key", "send the server's key as Authorization: Bearer KEY",
                headers={"WWW-Authenticate": "Bearer"},
            )  # fmt: skip


class _Exchange:
    """One request and its response, on their way through."""

    def __init__(
        self, scope: Scope, receive: Receive, send: Send, responded: Callable[[str, int], None]
    ) -> None:
        self.scope, self.headers = scope, Headers(scope=scope)
        self._receive, self._send, self._responded = receive, send, responded
        self._began = time.monotonic()
        self.status = 0
        given = self.headers.get(REQUEST_ID, "")
        self.id = given if _ID.fullmatch(given) else f"req-{secrets.token_hex(12)}"
        length = self.headers.get("content-length", "0")
        self._unread = "transfer-encoding" in self.headers or length.strip("0") != ""

    async def receive(self) -> Message:
        message = await self._receive()
        if message["type"] == "http.disconnect" or not message.get("more_body", False):
            self._unread = False
        return message

    async def send(self, message: Message) -> None:
        if message["type"] == "http.response.start":
            self.status = message["status"]
            headers = MutableHeaders(scope=message)
            headers[REQUEST_ID] = self.id
            if self._unread:
                await self._drain()
            if self._unread:  # else it would wait for the rest of the body, for ever
                headers["connection"] = "close"
            self._responded(self.scope["path"], self.status)
        await self._send(message)

    async def _drain(self) -> None:
        if "expect" in self.headers or self.status == 408:  # nothing is on its way
            return
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(_DRAIN_SECONDS):
                while self._unread:
                    await self.receive()

    def log(self) -> None:
        path = self.scope["path"]
        if not access.isEnabledFor(logging.INFO) or (path in _QUIET and self.status == 200):
            return
        client = self.scope.get("client")
        access.info(
            "%s %s %s %s %.3fs %s",
            client[0] if client else "-",
            self.scope["method"],
            quote(path[:200]),
            self.status or "-",
            time.monotonic() - self._began,
            self.id,
        )
