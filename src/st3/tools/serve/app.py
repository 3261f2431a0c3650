"""The HTTP side: OpenAI's chat completions, models, health and metrics."""

from __future__ import annotations

import asyncio
import hmac
import logging
from collections.abc import AsyncIterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import asynccontextmanager
from typing import Any

from fastapi import FastAPI, Request, Response
from fastapi.responses import JSONResponse
from starlette.exceptions import HTTPException
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from st3.tools.serve import images, schema
from st3.tools.serve.answer import Answer
from st3.tools.serve.engine import Engine
from st3.tools.serve.errors import ServeError, overloaded, refused, unavailable
from st3.tools.serve.metrics import CONTENT_TYPE, Metrics
from st3.tools.serve.sampling import Sampling
from st3.tools.serve.settings import Settings
from st3.tools.serve.stream import ClientGone, EventStream, unless_gone
from st3.tools.serve.ticket import Failed, Finished
from st3.tools.serve.ticket import Request as Prompt

log = logging.getLogger("st3.tools.serve")
_CHAT = "/v1/chat/completions"


def create_app(engine: Engine, settings: Settings | None = None) -> FastAPI:
    """An ASGI app around a running engine; the app closes the engine when it is shut down."""
    settings = Settings() if settings is None else settings

    @asynccontextmanager
    async def lifespan(app: FastAPI) -> AsyncIterator[None]:
        yield
        await asyncio.to_thread(engine.close, settings.shutdown_timeout)
        server.workers.shutdown(wait=False)

    # No pages of its own: they would load scripts from elsewhere.
    app = FastAPI(title="st3", lifespan=lifespan, openapi_url=None, docs_url=None, redoc_url=None)
    server = Server(engine, settings)
    app.state.server = server
    app.add_api_route(_CHAT, server.chat, methods=["POST"], response_model=None)
    app.add_api_route("/v1/models", server.models, methods=["GET"], response_model=None)
    app.add_api_route("/v1/models/{name:path}", server.model, methods=["GET"], response_model=None)
    app.add_api_route("/health", server.health, methods=["GET"], response_model=None)
    app.add_api_route("/metrics", server.metrics_page, methods=["GET"], response_model=None)
    app.add_middleware(Guard, server=server)
    app.add_exception_handler(ServeError, server.on_error)
    app.add_exception_handler(HTTPException, server.on_http_error)
    app.add_exception_handler(Exception, server.on_bug)
    return app


class Server:
    """The routes of one app."""

    def __init__(self, engine: Engine, settings: Settings) -> None:
        self.engine, self.settings = engine, settings
        self.metrics = Metrics(engine)
        self._preparing = 0
        # Few, because each may hold a request's decoded images.
        self.workers = ThreadPoolExecutor(2, thread_name_prefix="st3-prepare")

    # Routes -------------------------------------------------------------------------------------

    async def chat(self, http: Request) -> Response:
        if not self.engine.alive:
            raise unavailable()
        if http.headers.get("content-type", "").partition(";")[0].strip() != "application/json":
            # Also: a form of another site can send text/plain to a server on loopback, unasked.
            raise ServeError(415, "invalid_content_type", "send Content-Type: application/json")
        if self.engine.full or self._preparing >= self.engine.queue_limit:
            raise overloaded("the queue is full: try again later", 1)
        self._preparing += 1
        try:
            body = await self._body(http)
            loop = asyncio.get_running_loop()
            asked, prompt = await loop.run_in_executor(self.workers, self._prepare, body)
        finally:
            self._preparing -= 1
        answer = Answer(self.engine, prompt, self.settings.model_name, self._ended)
        if asked.stream:
            usage = asked.stream_options is not None and asked.stream_options.include_usage
            timeout = self.settings.send_timeout
            return EventStream(answer.chunks(usage), timeout, answer.ticket.cancel)
        try:
            return JSONResponse(await unless_gone(http.receive, answer.whole()))
        except ClientGone as error:
            raise ServeError(499, "client_closed_request", "the client has gone") from error
        finally:
            answer.ticket.cancel()

    async def models(self) -> Response:
        return JSONResponse({"object": "list", "data": [self._card()]})

    async def model(self, name: str) -> Response:
        self._check_model(name)
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

    async def on_bug(self, http: Request, error: Exception) -> Response:
        log.error("a request failed", exc_info=error)
        return await self.on_error(http, ServeError(500, "internal_error", "the server failed"))

    # Parts of a chat request --------------------------------------------------------------------

    async def _body(self, http: Request) -> bytes:
        """The body, with its limits enforced while it comes."""
        limit = self.settings.max_body_bytes
        too_large = ServeError(413, "body_too_large", f"the body is larger than {limit} bytes")
        announced = http.headers.get("content-length", "")
        if announced.isascii() and announced.isdigit() and int(announced[:20]) > limit:
            raise too_large
        data = bytearray()
        try:
            async with asyncio.timeout(self.settings.body_timeout):
                async for chunk in http.stream():
                    data += chunk
                    if len(data) > limit:
                        raise too_large
        except TimeoutError as error:
            raise ServeError(408, "body_timeout", "the body did not come in time") from error
        return bytes(data)

    def _prepare(self, body: bytes) -> tuple[schema.ChatRequest, Prompt]:
        """Everything before the queue; in a thread, because images are decoded."""
        asked = schema.read(body)
        self._check_model(asked.model)
        wanted = self._max_tokens(asked)
        prompt = self.engine.prepare(
            self._messages(asked),
            policy=asked.st3.policy if asked.st3 else None,
            max_tokens=wanted or min(self.settings.default_max_tokens, self.settings.max_tokens),
            shorten=wanted is None,
            sampling=Sampling(asked.temperature, asked.top_p, asked.seed),
            stop=asked.stop or (),
            timeout=self.settings.request_timeout,
        )
        return asked, prompt

    def _messages(self, asked: schema.ChatRequest) -> list[dict[str, Any]]:
        settings = self.settings
        if len(asked.messages) > settings.max_messages:
            raise refused(f"this server takes {settings.max_messages} messages", "messages")
        count = sum(
            isinstance(part, schema.ImagePart) for m in asked.messages for part in m.content
        )
        if count > settings.max_images:
            raise refused(f"this server takes {settings.max_images} images", "messages")
        pixels = 0
        messages = []
        for message in asked.messages:
            content: list[dict[str, Any]] = []
            for part in message.content:
                if isinstance(part, schema.TextPart):
                    content.append({"type": "text", "text": part.text})
                else:
                    image = images.load(part.image_url.url, settings, pixels)
                    pixels += image.width * image.height
                    content.append({"type": "image", "image": image})
            role = "system" if message.role == "developer" else message.role
            messages.append({"role": role, "content": content})
        return messages

    def _max_tokens(self, asked: schema.ChatRequest) -> int | None:
        both = {asked.max_tokens, asked.max_completion_tokens} - {None}
        if len(both) > 1:
            raise refused("max_tokens and max_completion_tokens differ: send one", "max_tokens")
        wanted = both.pop() if both else None
        if wanted is not None and wanted > self.settings.max_tokens:
            raise refused(
                f"max_tokens is {wanted}; this server gives {self.settings.max_tokens} at most",
                "max_tokens",
            )
        return wanted

    def _check_model(self, name: str) -> None:
        if name != self.settings.model_name:
            raise ServeError(
                404, "model_not_found",
                f"the model {name[:100]!r} is not served here; {self.settings.model_name!r} is",
                "model",
            )  # fmt: skip

    def _card(self) -> dict[str, Any]:
        return {
            "id": self.settings.model_name,
            "object": "model",
            "created": 0,
            "owned_by": "st3",
            "st3": {"policy": self.engine.policy, "kv_budget_bytes": self.engine.budget.total},
        }

    def _ended(self, event: Finished | Failed) -> None:
        if isinstance(event, Finished):
            self.metrics.finished(event)


class Guard:
    """Who may ask at all; and the count of responses."""

    def __init__(self, app: ASGIApp, server: Server) -> None:
        self.app, self.server, self.settings = app, server, server.settings

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self.app(scope, receive, send)
            return

        async def counted(message: Message) -> None:
            if message["type"] == "http.response.start" and scope["path"] == _CHAT:
                self.server.metrics.responded(message["status"])
            await send(message)

        http = Request(scope)
        try:
            self._check_host(http)
            self._check_key(http)
        except ServeError as error:
            response = await self.server.on_error(http, error)
            await response(scope, receive, counted)
            return
        await self.app(scope, receive, counted)

    def _check_host(self, http: Request) -> None:
        allowed = self.settings.allowed_hosts
        host = http.headers.get("host", "")
        name = host.partition("]")[0] + "]" if host.startswith("[") else host.partition(":")[0]
        if allowed and name.lower() not in allowed:
            raise ServeError(421, "invalid_host", "this server is not known by that name")

    def _check_key(self, http: Request) -> None:
        key = self.settings.api_key
        if key is None or http.url.path == "/health":
            return
        kind, _, given = http.headers.get("authorization", "").partition(" ")
        same = hmac.compare_digest(given.strip().encode(), key.encode())
        if kind.lower() != "bearer" or not same:
            raise ServeError(
                401, "invalid_api_key", "send the server's key as Authorization: Bearer KEY",
                headers={"WWW-Authenticate": "Bearer"},
            )  # fmt: skip
