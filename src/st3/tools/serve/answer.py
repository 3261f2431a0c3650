"""Responses: one JSON object, or server-sent events as the text comes."""

from __future__ import annotations

import asyncio
import json
import secrets
import time
from collections.abc import AsyncGenerator, Callable
from typing import Any

from st3.tools.serve.engine import Engine
from st3.tools.serve.errors import ServeError
from st3.tools.serve.ticket import Delta, Event, Failed, Finished, Kept, Request, Ticket


class Answer:
    """A submitted request, seen from the event loop.

    Args:
        on_end: told of the answer, or of the error, when it ends.

    Raises:
        ServeError: when the engine does not take the request.
    """

    def __init__(
        self,
        engine: Engine,
        request: Request,
        model_name: str,
        on_end: Callable[[Finished | Failed], None],
    ) -> None:
        self.model_name = model_name
        self.id = f"chatcmpl-{secrets.token_hex(12)}"
        self.created = int(time.time())
        self._on_end = on_end
        self._events: asyncio.Queue[Event] = asyncio.Queue()
        loop = asyncio.get_running_loop()

        def listen(event: Event) -> None:  # in the engine's thread
            loop.call_soon_threadsafe(self._events.put_nowait, event)

        self.ticket: Ticket = engine.submit(request, listen)

    async def events(self) -> AsyncGenerator[Event, None]:
        """All events, the last one included. Whoever stops listening cancels the request."""
        try:
            while True:
                event = await self._events.get()
                if isinstance(event, Finished | Failed):
                    self._on_end(event)
                    yield event
                    return
                yield event
        finally:
            self.ticket.cancel()

    async def whole(self) -> dict[str, Any]:
        """The response object. Raises ServeError if there is no answer."""
        kept: dict[str, Any] = {}
        async for event in self.events():
            if isinstance(event, Failed):
                raise event.error
            if isinstance(event, Kept):
                kept = {"kept": event.what}
            if isinstance(event, Finished):
                message = {"role": "assistant", "content": event.text, "refusal": None}
                choice = {
                    "index": 0,
                    "message": message,
                    "finish_reason": event.reason,
                    "logprobs": None,
                }
                return {
                    **self._head("chat.completion"),
                    "choices": [choice],
                    "usage": usage(event),
                    "st3": {**facts(event), **kept},
                }
        raise ServeError(500, "internal_error", "the answer ended without an end")

    async def chunks(self, include_usage: bool) -> AsyncGenerator[bytes, None]:
        """The same as server-sent events."""
        yield self._chunk({"role": "assistant", "content": ""})
        events = self.events()
        try:
            async for chunk in self._chunks(events, include_usage):
                yield chunk
        finally:
            await events.aclose()

    async def _chunks(
        self, events: AsyncGenerator[Event, None], include_usage: bool
    ) -> AsyncGenerator[bytes, None]:
        async for event in events:
            if isinstance(event, Delta):
                yield self._chunk({"content": event.text})
            elif isinstance(event, Kept):
                yield self._chunk({}, st3={"kept": event.what})
            elif isinstance(event, Failed):
                yield _sse(event.error.body())
                return
            else:
                yield self._chunk({}, event.reason, st3=facts(event))
                if include_usage:
                    head = self._head("chat.completion.chunk")
                    yield _sse({**head, "choices": [], "usage": usage(event)})
        yield b"data: [DONE]\n\n"

    def _head(self, kind: str) -> dict[str, Any]:
        return {"id": self.id, "object": kind, "created": self.created, "model": self.model_name}

    def _chunk(self, delta: dict[str, Any], reason: str | None = None, **extra: Any) -> bytes:
        choice = {"index": 0, "delta": delta, "finish_reason": reason, "logprobs": None}
        return _sse({**self._head("chat.completion.chunk"), "choices": [choice], **extra})


def usage(event: Finished) -> dict[str, int]:
    new = len(event.token_ids)
    return {
        "prompt_tokens": event.prompt_tokens,
        "completion_tokens": new,
        "total_tokens": event.prompt_tokens + new,
    }


def facts(event: Finished) -> dict[str, Any]:
    """Under ``st3`` in the response: what was trimmed, and the times in seconds."""
    return {
        "policy": event.policy,
        "visual_tokens": event.visual_tokens,
        "mean_share": event.mean_share,
        "kv_bytes": event.kv_bytes,
        "queued_s": event.queued,
        "ttft_s": event.ttft,
        "total_s": event.total,
    }


def _sse(data: dict[str, Any]) -> bytes:
    return b"data: " + json.dumps(data, ensure_ascii=False).encode() + b"\n\n"
