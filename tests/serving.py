"""What the tests of the server share: requests, answers of the bare model, a live server."""

from __future__ import annotations

import base64
import contextlib
import socket
import struct
import threading
import time
import zlib
from collections.abc import Callable, Iterator
from io import BytesIO
from pathlib import Path
from typing import Any

import torch
from PIL import Image

import st3

CHAT = "/v1/chat/completions"
JSON = {"content-type": "application/json"}
POLICIES = ("thirds", "balanced", "none", "fastv:layer=1,drop=0.6", "balanced:tau=6,floor=0")
WORDS = ("describe", "the", "image", "what", "is", "at", "top", "left", "red", "blue", "and", "a")


def picture(seed: int = 0, size: tuple[int, int] = (40, 30)) -> Image.Image:
    """Random pixels, different for each seed."""
    data = torch.randint(0, 256, (size[1], size[0], 3), generator=torch.manual_seed(seed))
    return Image.fromarray(data.to(torch.uint8).numpy())


def data_url(data: bytes | Image.Image, kind: str = "png") -> str:
    if isinstance(data, Image.Image):
        buffer = BytesIO()
        data.save(buffer, kind)
        data = buffer.getvalue()
    return f"data:image/{kind};base64,{base64.b64encode(data).decode()}"


def png(width: int, height: int) -> bytes:
    """A PNG that claims these sizes and holds next to nothing."""

    def chunk(name: bytes, data: bytes) -> bytes:
        body = name + data
        return struct.pack(">I", len(data)) + body + struct.pack(">I", zlib.crc32(body))

    head = struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
    parts = [chunk(b"IHDR", head), chunk(b"IDAT", zlib.compress(b"\0" * 1000)), chunk(b"IEND", b"")]
    return b"\x89PNG\r\n\x1a\n" + b"".join(parts)


def turn(text: str, *images: Image.Image) -> list[dict[str, Any]]:
    """A user's turn as the engine takes it."""
    shown = [{"type": "image", "image": image} for image in images]
    return [{"role": "user", "content": [*shown, {"type": "text", "text": text}]}]


def body(text: str = "describe the image", *images: Image.Image | str, **fields: Any) -> Any:
    """A chat completion request, greedy."""
    urls = [image if isinstance(image, str) else data_url(image) for image in images]
    parts: list[dict[str, Any]] = [{"type": "image_url", "image_url": {"url": u}} for u in urls]
    parts.append({"type": "text", "text": text})
    messages = [{"role": "user", "content": parts}]
    return {"model": "st3", "messages": messages, "max_tokens": 8, "temperature": 0, **fields}


def check(client: Any, response: Any, status: int, word: str) -> None:
    """The error has OpenAI's shape, gives its reason, and the next request is answered."""
    assert response.status_code == status, response.text
    error = response.json()["error"]
    assert set(error) == {"message", "type", "param", "code"}
    assert word in error["message"], error["message"]
    assert "Traceback" not in response.text
    assert client.post(CHAT, json=body(max_tokens=1)).status_code == 200


def mixed(number: int) -> list[tuple[list[dict[str, Any]], Any]]:
    """Requests of many lengths and policies: the engine's messages, and the same as a body."""
    requests = []
    for i in range(number):
        text = " ".join(WORDS[(i + k) % len(WORDS)] for k in range(2 + 5 * i % 11))
        images = [picture(7 * i + k) for k in range((1, 2, 0, 1, 1)[i % 5])]
        more = {"max_tokens": 3 + 7 * i % 23, "st3": {"policy": POLICIES[i % len(POLICIES)]}}
        requests.append((turn(text, *images), body(text, *images, **more)))
    return requests


class Alone:
    """Answers one request at a time with model.generate()."""

    def __init__(self, model: Any, processor: Any) -> None:
        self.model, self.processor = model, processor

    def tokens(self, messages: Any, policy: str, max_tokens: int) -> list[int]:
        inputs = self.processor.apply_chat_template(
            messages,
            add_generation_prompt=True,
            tokenize=True,
            return_dict=True,
            return_tensors="pt",
        ).to(self.model.device, dtype=self.model.dtype)
        with torch.no_grad(), st3.trim(self.model, policy):
            out = self.model.generate(**inputs, max_new_tokens=max_tokens, do_sample=False)
        new: list[int] = out[0, inputs["input_ids"].shape[1] :].tolist()
        return new

    def text(self, messages: Any, policy: str, max_tokens: int) -> str:
        tokens = self.tokens(messages, policy, max_tokens)
        text: str = self.processor.tokenizer.decode(tokens, skip_special_tokens=True)
        return text


def load(folder: Path) -> tuple[Any, Any]:
    """Model (fp32) and processor."""
    from transformers import AutoModelForImageTextToText, AutoProcessor

    model = AutoModelForImageTextToText.from_pretrained(folder, dtype=torch.float32)
    return model.eval(), AutoProcessor.from_pretrained(folder)


@contextlib.contextmanager
def live(app: Any) -> Iterator[str]:
    """A server on loopback; its address."""
    import uvicorn

    listener = socket.create_server(("127.0.0.1", 0))
    server = uvicorn.Server(uvicorn.Config(app, log_level="error", timeout_graceful_shutdown=5))
    thread = threading.Thread(target=server.run, kwargs={"sockets": [listener]})
    thread.start()
    until(lambda: server.started)
    try:
        yield f"http://127.0.0.1:{listener.getsockname()[1]}"
    finally:
        server.should_exit = True
        thread.join(30)
        assert not thread.is_alive()


def until(condition: Callable[[], bool], seconds: float = 30) -> None:
    """Wait for something that happens in another thread."""
    ends = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < ends, "it did not happen in time"
        time.sleep(0.005)
