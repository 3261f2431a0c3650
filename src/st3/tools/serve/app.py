"""The HTTP side: OpenAI's chat completions, models, health and metrics."""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import Any

from fastapi import FastAPI, Request, Response
from fastapi.responses import JSONResponse
from starlette.exceptions import HTTPException
from starlette.middleware.cors import CORSMiddleware
from starlette.requests import ClientDisconnect

from st3.tools.serve.answer import Answer
from st3.tools.serve.engine import Engine
from st3.tools.serve.errors import ServeError, overloaded, unavailable
from st3.tools.serve.guard import REQUEST_ID, Guard
from st3.tools.serve.metrics import CONTENT_TYPE, Metrics
from st3.tools.serve.page import add_page
from st3.tools.serve.prepare import Preparer, check_model
from st3.tools.serve.settings import Settings
from st3.tools.serve.stream import ClientGone, EventStream, unless_gone
from st3.tools.serve.ticket import Failed, Finished

_CHAT = "/v1/chat/completions"


def create_app(engine: Engine, settings: Settings | None = None) -> FastAPI:
    """An ASGI app around a running engine; the app closes the engine when it is shut down."""
    settings = Settings() if settings is None else settings

    @asynccontextmanager
    async def lifespan(app: FastAPI) -> AsyncIterator[None]:
        yield
        await asyncio.to_thread(engine.close, settings.shutdown_timeout)
        server.preparer.close()

    # None of FastAPI's own pages: they would load scripts from elsewhere.
    app = FastAPI(title="st3", lifespan=lifespan, openapi_url=None, docs_url=None, redoc_url=None)
    server = Server(engine, settings)
    app.state.server = server
    app.add_api_route(_CHAT, server.chat, methods=["POST"], response_model=None)
    app.add_api_route("/v1/models", server.models, methods=["GET"], response_model=None)
    app.add_api_route("/v1/models/{name:path}", server.model, methods=["GET"], response_model=None)
    app.add_api_route("/health", server.health, methods=["GET"], response_model=None)
    app.add_api_route("/metrics", server.metrics_page, methods=["GET"], response_model=None)
    if settings.page:
        add_page(app, engine, settings)
    app.add_middleware(Guard, settings=settings, responded=server.responded)
    if settings.cors_origins:  # outermost: a browser asks for leave without a key
        app.add_middleware(
            CORSMiddleware,
            allow_origins=settings.cors_origins,
            allow_methods=["GET", "POST"],
            allow_headers=["*"],
            expose_headers=[REQUEST_ID, "Retry-After"],
        )
    app.add_exception_handler(ServeError, server.on_error)
    app.add_exception_handler(HTTPException, server.on_http_error)
    return app


class Server:
    """The routes of one app."""

    def __init__(self, engine: Engine, settings: Settings) -> None:
        self.engine, self.settings = engine, settings
        self.metrics = Metrics(engine)
        self.preparer = Preparer(engine, settings)
        self._created = int(time.time())

    # Routes -------------------------------------------------------------------------------------

    async def chat(self, http: Request) -> Response:
        if not self.engine.alive:
            raise unavailable()
        if http.headers.get("content-type", "").partition(";")[0].strip() != "application/json":
            # Also: a form of another site can send text/plain to a server on loopback, unasked.
            raise ServeError(415, "invalid_content_type", "send Content-Type: application/json")
        if http.headers.get("content-encoding", "identity").lower() != "identity":
            raise ServeError(415, "invalid_content_encoding", "send the body uncompressed")
        if self.engine.full or self.preparer.full:
            raise overloaded("the queue is full: try again later", 1)
        body = bytearray()
        try:
            await self._receive(http, body)
            asked, prompt = await unless_gone(http.receive, self.preparer.prompt(body))
        except (ClientDisconnect, ClientGone) as error:
            raise _gone() from error
        finally:
            self.preparer.bodies.give(len(body))
        answer = Answer(self.engine, prompt, self.settings.model_name, self._ended)
        if asked.stream:
            usage = asked.stream_options is not None and asked.stream_options.include_usage
            timeout = self.settings.send_timeout
            return EventStream(answer.chunks(usage), timeout, answer.ticket.cancel)
        try:
            return JSONResponse(await unless_gone(http.receive, answer.whole()))
        except ClientGone as error:
            raise _gone() from error
        finally:
            answer.ticket.cancel()

    async def models(self) -> Response:
        return JSONResponse({"object": "list", "data": [self._card()]})

    async def model(self, name: str) -> Response:
        check_model(name, self.settings)
        return JSONResponse(self._card())

    async def health(self) -> Response:
        stats = self.engine.stats()
        ok = self.engine.alive
        state = {"status": "ok" if ok else "shutting down", "running": stats.running,
                 "waiting": stats.waiting}  # fmt: skip
        return JSONResponse(state, 200 if ok else 503)

    async def metrics_page(self) -> Response:
        return Response(self.metrics.text(), media_type=CONTENT_TYPE)

    # Errors -------------------------------------------------------------------------------------

    async def on_error(self, http: Request, error: Any) -> Response:
        return JSONResponse(error.body(), error.status, headers=error.headers)

    async def on_http_error(self, http: Request, error: Any) -> Response:
        known = {404: "there is no such page", 405: "this page does not take this method"}
        message = known.get(error.status_code, str(error.detail))
        code = "not_found" if error.status_code == 404 else "invalid_request"
        shaped = ServeError(error.status_code, code, message, headers=dict(error.headers or {}))
        return await self.on_error(http, shaped)

    # --------------------------------------------------------------------------------------------

    async def _receive(self, http: Request, body: bytearray) -> None:
        """Add the body to ``body``, with its limits enforced while it comes. What has come counts,
        not what was announced: connections that send nothing keep nobody out."""
        limit, bodies = self.settings.max_body_bytes, self.preparer.bodies
        too_large = ServeError(413, "body_too_large", f"the body is larger than {limit} bytes")
        announced = http.headers.get("content-length", "")
        if announced.isascii() and announced.isdigit() and int(announced[:20]) > limit:
            raise too_large
        try:
            async with asyncio.timeout(self.settings.body_timeout):
                async for chunk in http.stream():
                    if len(body) + len(chunk) > limit:
                        raise too_large
                    if not bodies.take(len(chunk)):
                        raise overloaded("too many requests are being sent: try again later", 1)
                    body += chunk
        except TimeoutError as error:
            raise ServeError(408, "body_timeout", "the body did not come in time") from error

    def responded(self, path: str, status: int) -> None:
        if path == _CHAT:
            self.metrics.responded(status)

    def _card(self) -> dict[str, Any]:
        return {
            "id": self.settings.model_name,
            "object": "model",
            "created": self._created,
            "owned_by": "st3",
            "st3": {"policy": self.engine.policy, "kv_budget_bytes": self.engine.budget.total},
        }

    def _ended(self, event: Finished | Failed) -> None:
        if isinstance(event, Finished):
            self.metrics.finished(event)


def _gone() -> ServeError:
    return ServeError(499, "client_closed_request", "the client has gone")
