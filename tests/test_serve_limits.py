"""Memory, bodies and headers: what the server allows itself, before it looks at what was asked."""

from __future__ import annotations

import asyncio
import json
import logging
import resource
import shutil
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import httpx
import pytest
from PIL import Image
from starlette.requests import HTTPConnection
from starlette.testclient import TestClient

from st3.tools.common.limits import image_bytes
from st3.tools.serve import Engine, Settings, create_app, schema
from st3.tools.serve.errors import ServeError
from st3.tools.serve.memory import Memory
from tests.serving import CHAT, body, check, data_url, load, picture, turn, until


@pytest.fixture(scope="module")
def engine(tiny_model: Path) -> Iterator[Engine]:
    running = Engine(*load(tiny_model), kv_budget_bytes=64 << 20, queue_limit=4)
    yield running
    running.close()


def app(engine: Engine, **settings: Any) -> TestClient:
    """Not as a context: the engine outlives it."""
    return TestClient(create_app(engine, Settings(**settings)), raise_server_exceptions=False)


def peak() -> int:
    """Bytes resident so far at most."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


# Memory -------------------------------------------------------------------------------------------

MILLION = 1_000_000
HUGE = {
    "numbers": b'{"model":"m","messages":[' + b"0," * MILLION + b"0]}",
    "objects": b'{"model":"m","messages":[' + b"{}," * MILLION + b"0]}",
    "strings": b'{"model":"m","messages":[' + b'"",' * MILLION + b"0]}",
    "keys": b"{" + b",".join(b'"%d":0' % i for i in range(MILLION)) + b"}",
    "parts": b'{"model":"m","messages":[{"role":"user","content":[' + b"{}," * MILLION + b"0]}]}",
    "nothing in a text": b'{"a":"' + b"[,:{" * 100 + b'","b":[' + b"[]," * MILLION + b"0]}",
}


@pytest.mark.parametrize("name", HUGE)
def test_a_body_of_a_million_values_is_refused_unparsed(name: str) -> None:
    before, began = peak(), time.process_time()
    with pytest.raises(ServeError, match="more than 20000 values"):
        schema.read(HUGE[name])
    assert peak() - before < 16 << 20
    assert time.process_time() - began < 0.5


def test_values_are_counted_outside_of_strings_alone() -> None:
    text = 'a "list": [1, 2, {3}] \\ ' * 20_000
    request = {**body(), "messages": [{"role": "user", "content": text}]}
    assert schema.count_values(json.dumps(request).encode()) < 100
    assert schema.read(json.dumps(request).encode()).messages[0].content[0].text == text  # type: ignore[union-attr]


def processor(**fields: Any) -> Any:
    return SimpleNamespace(**{"do_resize": True, "crop_size": None, **fields})


CLIP = processor(
    size={"shortest_edge": 336}, do_center_crop=True, crop_size={"height": 336, "width": 336}
)
QWEN = processor(size={"shortest_edge": 3136, "longest_edge": 12_845_056})


def test_what_images_take_is_told_from_their_sizes() -> None:
    # Measured: 1 x 500 at 336 pixels on the short side took 561 MB, 4,000 x 3,000 for Qwen2-VL 753.
    assert 500e6 < image_bytes(CLIP, [(1, 500)]) < 900e6
    assert 600e6 < image_bytes(QWEN, [(4000, 3000)]) < 1000e6
    assert image_bytes(CLIP, [(1, 4000)]) > 4e9
    assert image_bytes(CLIP, [(300, 300)] * 2) == 2 * image_bytes(CLIP, [(300, 300)])
    fixed = processor(size={"height": 96, "width": 96})
    assert image_bytes(fixed, [(4000, 3000)]) < 200e6
    assert image_bytes(processor(size={"longest_edge": 1000}), [(1, 200)]) < 1e6
    assert image_bytes(processor(size={}), [(1000, 1000)]) > 1e6


@pytest.fixture(scope="module")
def thin(tiny_model: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Engine]:
    """A model whose processor scales the short side, as LLaVA-1.5's does."""
    folder = Path(shutil.copytree(tiny_model, tmp_path_factory.mktemp("thin") / "model"))
    path = folder / "processor_config.json"
    path = path if path.is_file() else folder / "preprocessor_config.json"
    config = json.loads(path.read_text())
    fields = config.get("image_processor", config)
    side = fields["size"].get("shortest_edge") or fields["size"]["height"]
    fields.update(
        image_processor_type="CLIPImageProcessor", size={"shortest_edge": side},
        do_resize=True, do_center_crop=True, crop_size={"height": side, "width": side},
    )  # fmt: skip
    path.write_text(json.dumps(config))
    running = Engine(*load(folder), kv_budget_bytes=64 << 20)
    yield running
    running.close()


def test_an_image_that_grows_is_refused_undecoded(thin: Engine) -> None:
    client = app(thin, prepare_bytes=1 << 20)
    assert client.post(CHAT, json=body("describe", picture(size=(40, 30)))).status_code == 200
    before = peak()
    line = data_url(Image.new("RGB", (8, 1600)))
    check(client, client.post(CHAT, json=body("describe", line)), 400, "MiB aside")
    many = [data_url(picture(size=(100, 100)))] * 16
    check(client, client.post(CHAT, json=body("describe", *many)), 400, "MiB aside")
    assert peak() - before < 64 << 20


def test_requests_wait_for_memory_and_give_it_back() -> None:
    memory, order = Memory(100), []

    def hold(size: int) -> None:
        with memory.hold(size, time.monotonic() + 10):
            order.append(size)

    with memory.hold(60, time.monotonic()):
        waiting = threading.Thread(target=hold, args=(50,))
        waiting.start()
        with memory.hold(40, time.monotonic()):
            order.append(40)
        assert not memory.take(41)
    waiting.join(10)
    assert order == [40, 50]
    assert memory.used == 0
    with memory.hold(60, 0), pytest.raises(TimeoutError), memory.hold(50, time.monotonic()):
        pass
    with pytest.raises(ServeError, match="less thin"), memory.hold(101, 0):
        pass
    assert memory.used == 0


def test_waiting_prompts_are_bounded_in_bytes(tiny_model: Path) -> None:
    engine = Engine(*load(tiny_model), kv_budget_bytes=64 << 20, max_rows=1)
    request = engine.prepare(turn("describe", picture()), max_tokens=500)
    engine.queue_bytes = request.nbytes + 1
    try:
        tickets = [engine.submit(request, lambda event: None)]
        until(lambda: engine.stats().running == 1)
        assert tickets[0].request.nbytes == 0  # its pixels are seen
        tickets.append(engine.submit(request, lambda event: None))
        with pytest.raises(ServeError, match="waiting already"):
            engine.submit(request, lambda event: None)
    finally:
        for ticket in tickets:
            ticket.cancel()
        engine.close()


def test_long_text_is_refused_before_it_is_tokenised(engine: Engine) -> None:
    asked: list[int] = []
    tokenizer = engine.prompts.processor.tokenizer

    class Counting:
        def __call__(self, text: str, **options: Any) -> Any:
            asked.append(len(text))
            return tokenizer(text, **options)

        def __getattr__(self, name: str) -> Any:
            return getattr(tokenizer, name)

    engine.prompts.processor.tokenizer = Counting()
    try:
        with pytest.raises(ServeError, match="positions"):
            engine.prepare(turn("describe the image " * 200_000))
        assert sum(asked) < 100_000
        del asked[:]
        engine.prepare(turn(" " * 20_000 + "describe"), max_tokens=1)  # long, and few tokens
    finally:
        engine.prompts.processor.tokenizer = tokenizer
    with pytest.raises(ServeError, match="positions"):
        engine.prepare([{"role": "user", "content": turn("a")[0]["content"] * 3000}])


# Bodies -------------------------------------------------------------------------------------------


def scope(path: str = CHAT, **headers: str) -> dict[str, Any]:
    given = {"host": "localhost", "content-type": "application/json", **headers}
    return {
        "type": "http", "asgi": {"version": "3.0"}, "http_version": "1.1", "method": "POST",
        "scheme": "http", "path": path, "raw_path": path.encode(), "query_string": b"",
        "root_path": "", "server": ("127.0.0.1", 80), "client": ("127.0.0.1", 1),
        "headers": [(k.encode(), v.encode()) for k, v in given.items()],
    }  # fmt: skip


class Wire:
    """One request on an ASGI app: the messages that come, and those that are sent."""

    def __init__(self, *coming: dict[str, Any]) -> None:
        self.coming, self.sent = list(coming), []

    async def receive(self) -> dict[str, Any]:
        if self.coming:
            return self.coming.pop(0)
        await asyncio.sleep(60)
        return {"type": "http.disconnect"}

    async def send(self, message: dict[str, Any]) -> None:
        self.sent.append(message)

    @property
    def status(self) -> int:
        return int(self.sent[0]["status"])

    @property
    def headers(self) -> dict[str, str]:
        return {k.decode(): v.decode() for k, v in self.sent[0]["headers"]}


def part(data: bytes, more: bool = False) -> dict[str, Any]:
    return {"type": "http.request", "body": data, "more_body": more}


def test_bodies_that_do_not_come_keep_nobody_out(engine: Engine) -> None:
    served = create_app(engine, Settings(body_timeout=5))

    async def go() -> int:
        announced = scope(**{"content-length": "100"})
        silent = [asyncio.ensure_future(served(announced, w.receive, w.send))
                  for w in (Wire(part(b"{", True)) for _ in range(20))]  # fmt: skip
        await asyncio.sleep(0.1)
        wire = Wire(part(json.dumps(body(max_tokens=1)).encode()))
        await served(scope(), wire.receive, wire.send)
        for task in silent:
            task.cancel()
        await asyncio.gather(*silent, return_exceptions=True)
        return wire.status

    assert asyncio.run(go()) == 200
    assert served.state.server.preparer.bodies.used == 0


def test_bodies_are_bounded_together(engine: Engine) -> None:
    served = create_app(engine, Settings(max_bodies_bytes=1000, body_timeout=5))

    async def go() -> tuple[int, int]:
        half = Wire(part(b" " * 900, True))
        task = asyncio.ensure_future(served(scope(), half.receive, half.send))
        await asyncio.sleep(0.05)
        more = Wire(part(b" " * 200, True))
        await served(scope(), more.receive, more.send)
        task.cancel()
        await asyncio.gather(task, return_exceptions=True)
        small = Wire(part(json.dumps(body(max_tokens=1)).encode()))
        await served(scope(), small.receive, small.send)
        return more.status, small.status

    assert asyncio.run(go()) == (429, 200)


@pytest.mark.parametrize("kind", ["text/plain", "application/json"])
def test_a_reply_before_the_end_of_a_body_closes(engine: Engine, kind: str) -> None:
    """What is still to come is taken in for a moment, then the connection is given up."""
    served = create_app(engine, Settings(max_body_bytes=1000))
    headers = {"content-type": kind, "content-length": "1500"}

    def ask(*coming: dict[str, Any], **more: str) -> Wire:
        wire = Wire(*coming)
        asyncio.run(served(scope(**headers, **more), wire.receive, wire.send))
        return wire

    status = 413 if "json" in kind else 415
    for wire, closes in (
        (ask(part(b" " * 500, True), part(b" " * 1000)), False),
        (ask(part(b" " * 500, True)), True),
        (ask(part(b" " * 500, True), expect="100-continue"), True),
    ):
        assert wire.status == status
        assert (wire.headers.get("connection") == "close") is closes


def test_a_client_that_goes_within_its_body_is_no_fault(
    engine: Engine, caplog: pytest.LogCaptureFixture
) -> None:
    served = create_app(engine, Settings())
    wire = Wire(part(b"{", True), {"type": "http.disconnect"})
    asyncio.run(served(scope(), wire.receive, wire.send))
    assert wire.status == 499
    assert not [record for record in caplog.records if record.exc_info]


def test_preparing_has_the_deadline_of_the_answer(
    engine: Engine, monkeypatch: pytest.MonkeyPatch
) -> None:
    free = threading.Event()
    monkeypatch.setattr(engine.prompts, "tokenise", lambda messages: free.wait(20))
    client = app(engine, request_timeout=0.3)
    began = time.monotonic()
    assert client.post(CHAT, json=body()).status_code == 504
    assert time.monotonic() - began < 5
    free.set()


# Headers ------------------------------------------------------------------------------------------


def test_the_key_is_asked_for_on_the_path_itself(
    engine: Engine, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Starlette before 1.0.1 makes a URL of the Host header, from which /health is easily made."""
    monkeypatch.setattr(HTTPConnection, "url", httpx.URL("http://localhost/health"), raising=True)
    served = create_app(engine, Settings(api_key="secret", allowed_hosts=("localhost",)))
    wire = Wire(part(json.dumps(body(max_tokens=1)).encode()))
    forged = scope(host="localhost:8000/health?")
    asyncio.run(served(forged, wire.receive, wire.send))
    assert wire.status == 401
    assert wire.headers["www-authenticate"] == "Bearer"


def test_every_response_has_a_request_id(engine: Engine) -> None:
    client = app(engine, api_key="secret")
    key = {"authorization": "Bearer secret"}
    for response in (
        client.post(CHAT, json=body(max_tokens=1), headers=key),
        client.post(CHAT, json=body(n=2), headers=key),
        client.get("/v1/models"),
        client.get("/nothing", headers=key),
    ):
        assert response.headers["x-request-id"].startswith("req-")
    given = {**key, "x-request-id": "mine-1"}
    assert client.get("/v1/models", headers=given).headers["x-request-id"] == "mine-1"
    for bad in ("a b", "x" * 101, ""):
        headers = {**key, "x-request-id": bad}
        assert client.get("/v1/models", headers=headers).headers["x-request-id"] != bad


def test_a_fault_of_the_server_is_logged_once_and_answered(
    engine: Engine, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def broken(*_: Any, **__: Any) -> None:
        raise AttributeError("a bug")

    monkeypatch.setattr(engine, "prepare", broken)
    response = app(engine).post(CHAT, json=body())
    assert response.status_code == 500
    assert response.json()["error"]["message"] == "the server failed"
    assert len([record for record in caplog.records if record.exc_info]) == 1


def test_requests_are_logged_without_what_they_say(
    engine: Engine, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.INFO, "st3.access")
    client = app(engine)
    client.post(CHAT, json=body("a secret", max_tokens=1), headers={"x-request-id": "r1"})
    client.get("/a%0Ab")
    client.get("/health")
    lines = [record.getMessage() for record in caplog.records if record.name == "st3.access"]
    assert len(lines) == 2
    assert f"POST {CHAT} 200 " in lines[0]
    assert lines[0].endswith(" r1")
    assert "GET /a%0Ab 404 " in lines[1]
    assert "secret" not in caplog.text


def test_pages_of_other_origins_ask_only_where_it_is_allowed(engine: Engine) -> None:
    page = {"origin": "https://page.example", "access-control-request-method": "POST"}
    closed, opened = app(engine), app(engine, cors_origins=("https://page.example",), api_key="k")
    assert "access-control-allow-origin" not in closed.options(CHAT, headers=page).headers
    leave = opened.options(
        CHAT, headers={**page, "access-control-request-headers": "authorization"}
    )
    assert leave.status_code == 200
    assert leave.headers["access-control-allow-origin"] == "https://page.example"
    other = opened.options(CHAT, headers={**page, "origin": "https://other.example"})
    assert "access-control-allow-origin" not in other.headers
    answer = opened.post(CHAT, json=body(), headers={"origin": "https://page.example"})
    assert answer.status_code == 401  # the key is asked for all the same
    assert answer.headers["access-control-allow-origin"] == "https://page.example"


def test_text_of_hardly_any_tokens_is_not_tokenised_either(
    engine: Engine, monkeypatch: pytest.MonkeyPatch
) -> None:
    """One long word is one token, and takes as much memory to find that out."""
    monkeypatch.setattr(engine.prompts.processor, "apply_chat_template", pytest.fail)
    with pytest.raises(ServeError, match="positions"):
        engine.prepare(turn("a" * 1_000_000))
