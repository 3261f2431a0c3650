"""A server of st3 on loopback, and how the benchmarks of the server ask it."""

from __future__ import annotations

import asyncio
import base64
import contextlib
import socket
import threading
import time
from collections.abc import Iterator, Sequence
from io import BytesIO
from typing import Any

import httpx
import uvicorn
from PIL import Image

from st3.tools.serve import Engine, Settings, create_app

CHAT = "/v1/chat/completions"


def request(images: Sequence[Image.Image], text: str, **fields: Any) -> dict[str, Any]:
    """A chat completion request, greedy."""
    parts: list[dict[str, Any]] = []
    for image in images:
        buffer = BytesIO()
        image.save(buffer, "png")
        url = "data:image/png;base64," + base64.b64encode(buffer.getvalue()).decode()
        parts.append({"type": "image_url", "image_url": {"url": url}})
    parts.append({"type": "text", "text": text})
    turn = [{"role": "user", "content": parts}]
    return {"model": "st3", "messages": turn, "temperature": 0, **fields}


@contextlib.contextmanager
def served(engine: Engine, settings: Settings | None = None) -> Iterator[str]:
    """The engine behind HTTP on loopback; closed afterwards."""
    listener = socket.create_server(("127.0.0.1", 0), backlog=2048)
    config = uvicorn.Config(create_app(engine, settings), log_level="error")
    server = uvicorn.Server(config)
    thread = threading.Thread(target=server.run, kwargs={"sockets": [listener]})
    thread.start()
    while not server.started:
        time.sleep(0.01)
    try:
        yield f"http://127.0.0.1:{listener.getsockname()[1]}"
    finally:
        server.should_exit = True
        thread.join()


def client(url: str) -> httpx.AsyncClient:
    limits = httpx.Limits(max_connections=None, max_keepalive_connections=0)
    return httpx.AsyncClient(base_url=url, timeout=3600, limits=limits)


# Capacity -----------------------------------------------------------------------------------------


async def ask_all(url: str, bodies: Sequence[dict[str, Any]], done: Any) -> list[dict[str, Any]]:
    """The answers to requests that are all sent at once."""

    async def one(http: httpx.AsyncClient, body: dict[str, Any]) -> dict[str, Any]:
        response = await http.post(CHAT, json=body)
        response.raise_for_status()
        done()
        answer: dict[str, Any] = response.json()
        return answer

    async with client(url) as http:
        return await asyncio.gather(*(one(http, body) for body in bodies))
