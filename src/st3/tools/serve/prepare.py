"""From the body of a request to a prompt for the engine, within bounds of memory and time."""

from __future__ import annotations

import asyncio
import contextlib
import functools
import math
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Any, TypeVar

from st3.tools.common.limits import image_bytes
from st3.tools.serve import images, schema
from st3.tools.serve.engine import Engine
from st3.tools.serve.errors import ServeError, overloaded, refused
from st3.tools.serve.fetch import fetch_async
from st3.tools.serve.kept import MEMORY
from st3.tools.serve.memory import Memory
from st3.tools.serve.sampling import Sampling
from st3.tools.serve.settings import Settings
from st3.tools.serve.ticket import Request as Prompt

T = TypeVar("T")
WORKERS = 2  # threads; tokenising takes turns anyway


class Preparer:
    """Makes prompts of bodies. Used from one event loop; its work is done in threads.

    Attributes:
        bodies: bytes of bodies that have come and are no prompts yet.
    """

    def __init__(self, engine: Engine, settings: Settings) -> None:
        self.engine, self.settings = engine, settings
        self.bodies = Memory(settings.max_bodies_bytes)
        self._workers = ThreadPoolExecutor(WORKERS, thread_name_prefix="st3-prepare")
        self._slots = asyncio.Semaphore(WORKERS)
        self._waiting = self._fetching = 0

    @functools.cached_property
    def memory(self) -> Memory:
        """Bytes in which images are decoded and processed."""
        if self.settings.prepare_bytes is not None:
            return Memory(self.settings.prepare_bytes)
        side = math.isqrt(self.settings.max_pixels)
        return Memory(max(256 << 20, image_bytes(self._image_processor, [(side, side)])))

    @property
    def _image_processor(self) -> Any:
        return self.engine.processor.image_processor

    @property
    def full(self) -> bool:
        """Whether as many requests are being prepared as may wait in the queue."""
        return self._waiting >= self.engine.queue_limit

    async def prompt(self, body: bytearray) -> tuple[schema.ChatRequest, Prompt]:
        """The request in a body, and its prompt.

        Raises:
            ServeError: for what is wrong with it, or 504 when there was no time for it.
        """
        if self.full:
            raise overloaded("the queue is full: try again later", 1)
        timeout = self.settings.request_timeout
        ends = time.monotonic() + timeout
        self._waiting += 1
        try:
            async with asyncio.timeout(timeout):
                asked = await self._in_thread(self._read, body)
                fetched = await self._fetch(asked.image_urls)
                return asked, await self._in_thread(
                    self._prepare, asked, fetched, self.memory, ends
                )
        except TimeoutError as error:
            raise ServeError(504, "timeout", f"not answered within {timeout:g} seconds") from error
        finally:
            self._waiting -= 1

    def close(self) -> None:
        self._workers.shutdown(wait=False)

    async def _in_thread(self, work: Callable[..., T], *args: Any) -> T:
        """The result of ``work`` in a free thread. Given up, it keeps its slot until it has ended,
        so that no work piles up in front of busy threads."""
        await self._slots.acquire()
        loop = asyncio.get_running_loop()

        def release(_: Any) -> None:
            with contextlib.suppress(RuntimeError):  # the loop is closed
                loop.call_soon_threadsafe(self._slots.release)

        future = self._workers.submit(work, *args)
        future.add_done_callback(release)
        return await asyncio.wrap_future(future)

    async def _fetch(self, urls: list[str]) -> dict[str, bytes]:
        """The images of the web addresses among ``urls``. Meanwhile the request does not count as
        waiting: hosts that are slow fill no queue."""
        web = [url for url in urls if images.is_web(url)]
        if not web or not self.settings.http_images:
            return {}
        if self._fetching >= self.settings.max_fetching:
            raise overloaded("the images of many requests are being fetched: try again later", 5)
        self._waiting, self._fetching = self._waiting - 1, self._fetching + 1
        ends = time.monotonic() + self.settings.body_timeout
        left = self.settings.max_body_bytes
        found: dict[str, bytes] = {}
        try:
            for url in dict.fromkeys(web):
                limit = min(left, self.settings.max_image_bytes)
                found[url] = await fetch_async(url, limit, ends - time.monotonic())
                left -= len(found[url])
        finally:
            self._waiting, self._fetching = self._waiting + 1, self._fetching - 1
        return found

    # In a thread --------------------------------------------------------------------------------

    def _read(self, body: bytearray) -> schema.ChatRequest:
        """The parsed request, as far as it can be judged without its images."""
        asked = schema.read(body)
        settings = self.settings
        check_model(asked.model, settings)
        self._max_tokens(asked)
        if len(asked.messages) > settings.max_messages:
            raise refused(f"this server takes {settings.max_messages} messages", "messages")
        if len(asked.image_urls) > settings.max_images:
            raise refused(f"this server takes {settings.max_images} images", "messages")
        return asked

    def _prepare(
        self,
        asked: schema.ChatRequest,
        fetched: dict[str, bytes],
        memory: Memory,
        ends: float,
    ) -> Prompt:
        """Everything else before the queue."""
        settings = self.settings
        encoded: list[bytes] = []
        sizes: list[tuple[int, int]] = []
        left = settings.max_body_bytes
        for url in asked.image_urls:
            data = fetched.get(url) or images.read(url, settings)
            left -= len(data)
            if left < 0:
                raise refused(
                    f"the request's images have more than {settings.max_body_bytes} bytes together",
                    images.PARAM,
                    "image_too_large",
                )
            pixels = sum(width * height for width, height in sizes)
            sizes.append(images.size(data, settings, pixels))
            encoded.append(data)
        wanted = self._max_tokens(asked)
        kept = asked.st3 is not None and bool(asked.st3.kept)
        needed = image_bytes(self._image_processor, sizes) * (MEMORY if kept else 1)
        with memory.hold(needed, ends):
            return self.engine.prepare(
                self._messages(asked, encoded),
                policy=asked.st3.policy if asked.st3 else None,
                budget=asked.st3.budget if asked.st3 else None,
                max_tokens=wanted or min(settings.default_max_tokens, settings.max_tokens),
                shorten=wanted is None,
                sampling=Sampling(asked.temperature, asked.top_p, asked.seed),
                stop=asked.stop or (),
                timeout=max(0.001, ends - time.monotonic()),
                kept=kept,
            )

    def _messages(self, asked: schema.ChatRequest, encoded: list[bytes]) -> list[dict[str, Any]]:
        """As the engine takes them, with the images decoded."""
        messages = []
        left = iter(encoded)
        for message in asked.messages:
            content: list[dict[str, Any]] = []
            for part in message.content:
                if isinstance(part, schema.TextPart):
                    content.append({"type": "text", "text": part.text})
                else:
                    image = images.decode(next(left), self.settings)
                    content.append({"type": "image", "image": image})
            role = "system" if message.role == "developer" else message.role
            named = {} if message.name is None else {"name": message.name}
            messages.append({"role": role, **named, "content": content})
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


def check_model(name: str, settings: Settings) -> None:
    """Raises ServeError, 404, for a model that is not served."""
    if name != settings.model_name:
        raise ServeError(
            404, "model_not_found",
            f"the model {name[:100]!r} is not served here; {settings.model_name!r} is",
            "model",
        )  # fmt: skip
