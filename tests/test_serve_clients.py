"""A live server on loopback, asked by the clients that people use; and by rude ones."""

from __future__ import annotations

import asyncio
import json
import os
import re
import shutil
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import AsyncGenerator, Iterator
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import pytest

from st3.tools.serve import Engine, Settings, create_app
from st3.tools.serve.stream import EventStream
from tests.serving import Alone, body, live, load, mixed, picture, until

openai = pytest.importorskip("openai", reason="the openai package is not installed")
KEY = "a-key-of-our-own"


class Served:
    """A running server, and the model that it serves."""

    def __init__(self, url: str, engine: Engine, alone: Alone) -> None:
        self.url, self.engine, self.alone = url, engine, alone
        parts = urlsplit(url)
        self.address = (parts.hostname or "", parts.port or 0)

    def idle(self) -> bool:
        stats = self.engine.stats()
        return stats.running == stats.waiting == 0

    def raw(self, data: bytes) -> socket.socket:
        connection = socket.create_connection(self.address, timeout=30)
        connection.sendall(data)
        return connection


@pytest.fixture(scope="module")
def served(tiny_model: Path) -> Iterator[Served]:
    model, processor = load(tiny_model)
    alone = Alone(*load(tiny_model))  # a model of its own: the engine's thread uses the first
    engine = Engine(model, processor, kv_budget_bytes=64 << 20, queue_limit=64)
    settings = Settings(
        api_key=KEY, allowed_hosts=("127.0.0.1", "localhost"), body_timeout=1.0, send_timeout=1.0
    )
    with live(create_app(engine, settings)) as url:
        yield Served(url, engine, alone)


@pytest.fixture(scope="module")
def client(served: Served) -> Any:
    return openai.OpenAI(base_url=f"{served.url}/v1", api_key=KEY, max_retries=0)


def as_openai(request: dict[str, Any]) -> dict[str, Any]:
    """The body in the form that the client takes: extensions go into extra_body."""
    return {
        **{k: v for k, v in request.items() if k != "st3"},
        "extra_body": {"st3": request["st3"]},
    }


def test_openai(served: Served, client: Any) -> None:
    messages, request = mixed(1)[0]
    answer = client.chat.completions.create(**as_openai(request))
    wanted = served.alone.tokens(messages, request["st3"]["policy"], request["max_tokens"])
    assert answer.choices[0].message.content == served.alone.text(
        messages, request["st3"]["policy"], request["max_tokens"]
    )
    assert answer.choices[0].finish_reason in ("stop", "length")
    assert answer.usage.completion_tokens == len(wanted)
    assert answer.usage.total_tokens == answer.usage.prompt_tokens + len(wanted)
    assert answer.model_extra["st3"]["policy"] == "thirds"
    assert answer.model_extra["st3"]["visual_tokens"] == 16
    assert [model.id for model in client.models.list()] == ["st3"]
    assert client.models.retrieve("st3").id == "st3"


def test_openai_streaming(client: Any) -> None:
    request = as_openai(mixed(2)[1][1])
    whole = client.chat.completions.create(**request)
    stream = client.chat.completions.create(
        **request, stream=True, stream_options={"include_usage": True}
    )
    chunks = list(stream)
    assert chunks[0].choices[0].delta.role == "assistant"
    pieces = [c.choices[0].delta.content or "" for c in chunks if c.choices]
    assert "".join(pieces) == whole.choices[0].message.content
    assert len([piece for piece in pieces if piece]) > 1
    assert [c.choices[0].finish_reason for c in chunks if c.choices][-1] == (
        whole.choices[0].finish_reason
    )
    assert chunks[-1].usage == whole.usage
    assert len({c.id for c in chunks}) == 1


def test_openai_async_many_at_once(served: Served) -> None:
    requests = mixed(16)
    wanted = [
        served.alone.text(messages, request["st3"]["policy"], request["max_tokens"])
        for messages, request in requests
    ]

    async def one(client: Any, number: int, request: Any) -> str:
        await asyncio.sleep(0.02 * number)
        if number % 2:
            answer = await client.chat.completions.create(**as_openai(request))
            return str(answer.choices[0].message.content)
        stream = await client.chat.completions.create(**as_openai(request), stream=True)
        return "".join([chunk.choices[0].delta.content or "" async for chunk in stream])

    async def all_of_them() -> list[str]:
        async with openai.AsyncOpenAI(base_url=f"{served.url}/v1", api_key=KEY) as client:
            return await asyncio.gather(
                *(one(client, i, request) for i, (_, request) in enumerate(requests))
            )

    assert asyncio.run(all_of_them()) == wanted


def test_openai_errors(served: Served, client: Any) -> None:
    request = as_openai(mixed(1)[0][1])
    with pytest.raises(openai.BadRequestError, match="n is not supported"):
        client.chat.completions.create(**request, n=2)
    with pytest.raises(openai.NotFoundError, match="not served"):
        client.chat.completions.create(**{**request, "model": "gpt-4o"})
    stranger = client.with_options(api_key="a-wrong-key")
    with pytest.raises(openai.AuthenticationError):
        stranger.chat.completions.create(**request)
    with pytest.raises(openai.AuthenticationError):
        stranger.models.list()


def test_langchain(served: Served) -> None:
    package = pytest.importorskip("langchain_openai", reason="langchain-openai is not installed")
    messages, request = mixed(1)[0]
    model = package.ChatOpenAI(
        base_url=f"{served.url}/v1", api_key=KEY, model="st3", temperature=0, max_tokens=12,
        extra_body={"st3": {"policy": "none"}},
    )  # fmt: skip
    wanted = served.alone.text(messages, "none", 12)
    assert model.invoke(request["messages"]).content == wanted
    assert "".join(str(chunk.content) for chunk in model.stream(request["messages"])) == wanted


@pytest.mark.skipif(shutil.which("curl") is None, reason="curl is not installed")
def test_curl(served: Served, tmp_path: Path) -> None:
    messages, request = mixed(1)[0]
    (tmp_path / "body.json").write_text(json.dumps(request))
    command = [
        "curl", "-sN", f"{served.url}/v1/chat/completions", "-H", f"Authorization: Bearer {KEY}",
        "-H", "Content-Type: application/json", "-d", f"@{tmp_path / 'body.json'}",
    ]  # fmt: skip
    wanted = served.alone.text(messages, "thirds", request["max_tokens"])
    answer = json.loads(subprocess.run(command, capture_output=True, check=True).stdout)
    assert answer["choices"][0]["message"]["content"] == wanted
    (tmp_path / "body.json").write_text(json.dumps({**request, "stream": True}))
    lines = subprocess.run(command, capture_output=True, check=True, text=True).stdout.split("\n\n")
    assert lines[-2:] == ["data: [DONE]", ""]
    deltas = [json.loads(line.removeprefix("data: "))["choices"][0] for line in lines[:-2]]
    assert "".join(d["delta"].get("content", "") for d in deltas) == wanted


def test_health_and_metrics(served: Served, client: Any) -> None:
    import httpx

    assert httpx.get(f"{served.url}/health").json()["status"] == "ok"
    assert httpx.get(f"{served.url}/metrics").status_code == 401
    headers = {"Authorization": f"Bearer {KEY}"}

    def metrics() -> dict[str, float]:
        page = httpx.get(f"{served.url}/metrics", headers=headers)
        assert page.headers["content-type"].startswith("text/plain; version=0.0.4")
        lines = [line for line in page.text.splitlines() if not line.startswith("#")]
        return {name: float(value) for name, _, value in (s.rpartition(" ") for s in lines)}

    before = metrics()
    answer = client.chat.completions.create(**as_openai(mixed(1)[0][1]))
    after = metrics()
    gained = after["st3_generated_tokens_total"] - before["st3_generated_tokens_total"]
    assert gained == answer.usage.completion_tokens
    assert after["st3_visual_tokens_total"] - before["st3_visual_tokens_total"] == 16
    assert after['st3_requests_total{status="200"}'] > before['st3_requests_total{status="200"}']
    assert after["st3_ttft_seconds_count"] == before["st3_ttft_seconds_count"] + 1
    assert after["st3_kv_budget_bytes"] == 64 << 20


def test_other_host_names_are_refused(served: Served) -> None:
    import httpx

    for host, status in (("evil.example", 421), ("localhost:80", 200), ("127.0.0.1", 200)):
        assert httpx.get(f"{served.url}/health", headers={"host": host}).status_code == status


def head(length: int, path: str = "/v1/chat/completions") -> bytes:
    return (
        f"POST {path} HTTP/1.1\r\nHost: localhost\r\nAuthorization: Bearer {KEY}\r\n"
        f"Content-Type: application/json\r\nContent-Length: {length}\r\n\r\n"
    ).encode()


def request_bytes(**fields: Any) -> bytes:
    data = json.dumps(body("describe", picture(), **fields)).encode()
    return head(len(data)) + data


def test_a_slow_body_is_given_up(served: Served) -> None:
    connection = served.raw(head(1000) + b'{"model"')
    answer = connection.recv(1 << 16)
    assert answer.startswith(b"HTTP/1.1 408"), answer
    connection.close()


def test_a_client_that_vanishes_within_its_body(served: Served, client: Any) -> None:
    served.raw(head(1000) + b'{"model"').close()
    client.chat.completions.create(**as_openai(mixed(1)[0][1]))


@pytest.mark.parametrize("stream", [True, False], ids=["stream", "whole"])
def test_a_client_that_vanishes_frees_its_row(served: Served, stream: bool) -> None:
    connection = served.raw(request_bytes(max_tokens=1900, stream=stream))
    until(lambda: served.engine.stats().running == 1)
    if stream:
        assert connection.recv(1 << 12).startswith(b"HTTP/1.1 200")
    tokens = served.engine.stats().tokens
    connection.close()
    until(served.idle)
    assert served.engine.stats().tokens < tokens + 1000  # it did not go on to the end


def test_a_client_that_does_not_read_holds_nobody_up(served: Served, client: Any) -> None:
    connection = served.raw(request_bytes(max_tokens=300, stream=True))
    until(lambda: served.engine.stats().running == 1)
    client.chat.completions.create(**as_openai(mixed(1)[0][1]))
    until(served.idle)
    connection.close()


@pytest.mark.parametrize("taken", [0, 3])
def test_a_client_that_takes_no_more_is_given_up(taken: int) -> None:
    told: list[str] = []
    sent: list[Any] = []

    async def events() -> AsyncGenerator[bytes, None]:
        while True:
            yield b"data: x\n\n"

    async def receive() -> Any:
        await asyncio.sleep(60)

    async def send(message: Any) -> None:
        if len(sent) >= taken:
            await asyncio.sleep(60)
        sent.append(message)

    stream = EventStream(events(), 0.05, lambda: told.append("closed"))
    asyncio.run(asyncio.wait_for(stream({}, receive, send), 10))
    assert told == ["closed"]
    assert len(sent) == taken


def test_nonsense_on_the_wire(served: Served, client: Any) -> None:
    for data in (b"\0" * 100, b"GET / HTTP/9.9\r\n\r\n", b"POST " + b"x" * 100_000):
        with served.raw(data) as connection:
            connection.shutdown(socket.SHUT_WR)
            answer = connection.recv(1 << 12)
            assert answer == b"" or answer.startswith(b"HTTP/1.1 4")
    client.chat.completions.create(**as_openai(mixed(1)[0][1]))


@pytest.mark.slow
def test_the_command_serves_and_stops_gracefully(tiny_model: Path, tmp_path: Path) -> None:
    """Told to stop, it finishes the answer under way, refuses new connections, and ends."""
    (tmp_path / "key").write_text(KEY + "\n")
    command = [
        sys.executable, "-m", "st3.tools.cli", "serve", "-m", str(tiny_model), "--name", "tiny",
        "--port", "0", "--kv-budget", "64M", "--dtype", "float32",
        "--api-key-file", str(tmp_path / "key"),
    ]  # fmt: skip
    process = subprocess.Popen(command, stderr=subprocess.PIPE, text=True, env={**os.environ})
    timer = threading.Timer(120, process.kill)
    timer.start()
    try:
        assert process.stderr is not None
        lines = []
        while not (found := re.search(r"(http://127.0.0.1:\d+)/v1", "".join(lines))):
            lines.append(process.stderr.readline())
            assert lines[-1], lines
        client = openai.OpenAI(base_url=found[0], api_key=KEY, max_retries=0)
        for attempt in range(100):  # the socket listens a moment before the app is ready
            try:
                client.models.list()
                break
            except openai.APIConnectionError:
                assert attempt < 99
                time.sleep(0.1)
        request = body("describe", picture(), max_tokens=300, model="tiny")
        stream = client.chat.completions.create(**request, stream=True)
        chunks = [next(stream)]
        process.send_signal(signal.SIGTERM)
        chunks += list(stream)
        assert chunks[-1].choices[0].finish_reason in ("length", "stop")
        assert process.wait(30) in (0, -signal.SIGTERM)
        with pytest.raises(openai.APIConnectionError):
            client.models.list()
        assert "Traceback" not in process.stderr.read()
    finally:
        timer.cancel()
        process.kill()
        process.wait()


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--kv-budget", "much"], "--kv-budget much"),
        (["--kv-budget", "10"], "does not hold one token"),
        (["--policy", "magic"], "unknown policy"),
        (["--host", "no.such.host.invalid"], "cannot listen"),
        (["--api-key-file", "/no/such/file"], "--api-key-file"),
        (["--image-folder", "/no/such/folder"], "not a folder"),
    ],
)
def test_wrong_usage_is_one_line(tiny_model: Path, options: list[str], message: str,
                                 capsys: pytest.CaptureFixture[str]) -> None:  # fmt: skip
    from st3.tools.cli import app

    code = app(["serve", "-m", str(tiny_model), *options], standalone_mode=False)
    error = capsys.readouterr().err
    assert code in (1, 2)
    assert message in error
    assert "Traceback" not in error


def test_a_policy_that_cannot_be_attached_is_refused_at_the_start() -> None:
    refused = "pyramiddrop:own_layer=true"
    command = [sys.executable, "-m", "st3.tools.cli", "serve", "--policy", refused]
    done = subprocess.run([*command, "--port", "0"], capture_output=True, text=True, timeout=120)
    assert done.returncode == 2
    assert "ranks in the layer that drops" in done.stderr
    assert "Traceback" not in done.stderr


def test_clients_that_vanish_leave_no_tracebacks(
    served: Served, client: Any, caplog: pytest.LogCaptureFixture, capfd: pytest.CaptureFixture[str]
) -> None:
    """Within the headers, within the body, behind it, and in mid-stream, politely and not."""
    whole = request_bytes(max_tokens=50, stream=True)
    for sent in (whole[:60], whole[:400], whole[:-3], whole):
        for linger in (b"\0" * 8, b"\1\0\0\0\0\0\0\0"):  # the second: a reset in place of an end
            connection = served.raw(sent)
            connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, linger)
            time.sleep(0.05)
            connection.close()
    client.chat.completions.create(**as_openai(mixed(1)[0][1]))
    until(served.idle)
    assert "Traceback" not in caplog.text + capfd.readouterr().err
    assert not [record for record in caplog.records if record.exc_info]
