"""Told to stop: once, twice, three times; and `st3 demo`."""

from __future__ import annotations

import json
import os
import re
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import httpx
import pytest

from tests.serving import CHAT, body, picture

pytestmark = pytest.mark.slow
LONG = 1500


class Process:
    """A command that serves. Attributes: url; lines: what it said on stderr so far."""

    def __init__(self, *words: str, **environment: str) -> None:
        self.process = subprocess.Popen(
            [sys.executable, "-m", "st3.tools.cli", *words],
            stderr=subprocess.PIPE, text=True, env={**os.environ, **environment},
        )  # fmt: skip
        self.lines: list[str] = []
        self._reader = threading.Thread(target=self._read, daemon=True)
        self._reader.start()
        self.url = self._wait(r"(http://127.0.0.1:\d+)/")
        for _ in range(200):  # the socket listens a moment before the app is ready
            try:
                httpx.get(f"{self.url}/health", timeout=30)
                return
            except httpx.TransportError:
                time.sleep(0.1)
        raise AssertionError("the server did not start")

    def _read(self) -> None:
        assert self.process.stderr is not None
        self.lines.extend(self.process.stderr)

    def _wait(self, pattern: str, seconds: float = 120) -> str:
        ends = time.monotonic() + seconds
        while not (found := re.search(pattern, "".join(self.lines))):
            assert self.process.poll() is None, self.lines
            assert time.monotonic() < ends, self.lines
            time.sleep(0.05)
        return found[1]

    def running(self) -> int:
        return int(httpx.get(f"{self.url}/health", timeout=30).json()["running"])

    def signal(self, number: int) -> None:
        self.process.send_signal(number)

    def end(self, seconds: float = 30) -> tuple[int, str]:
        """The exit status, and all that was said."""
        code = self.process.wait(seconds)
        self._reader.join(10)
        return code, "".join(self.lines)


@pytest.fixture
def server(tiny_model: Path) -> Iterator[Process]:
    process = Process(
        "serve", "-m", str(tiny_model), "--name", "st3", "--port", "0", "--kv-budget", "256M",
        "--dtype", "float32", OMP_NUM_THREADS="1",
    )  # fmt: skip
    try:
        yield process
    finally:
        process.process.kill()
        process.process.wait()


def asked(url: str, stream: bool) -> Any:
    """A long answer: (status, body)."""
    request = body("describe", picture(), max_tokens=LONG, stream=stream)
    response = httpx.post(f"{url}{CHAT}", json=request, timeout=120)
    return response.status_code, response.text


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_twice_gives_up_the_answers_and_tells_their_clients(
    server: Process, number: signal.Signals
) -> None:
    with ThreadPoolExecutor(8) as pool:
        whole = [pool.submit(asked, server.url, False) for _ in range(4)]
        streams = [pool.submit(asked, server.url, True) for _ in range(4)]
        while server.running() < 8:
            time.sleep(0.05)
        server.signal(number)
        server._wait("(finishing) the answers under way")
        server.signal(number)
        for future in whole:
            status, text = future.result()
            assert status == 503
            assert json.loads(text)["error"]["code"] == "shutting_down"
        for future in streams:
            status, text = future.result()
            assert status == 200
            last = [line for line in text.splitlines() if line][-1]
            assert json.loads(last.removeprefix("data: "))["error"]["code"] == "shutting_down"
    code, said = server.end()
    assert code == 0
    assert "Traceback" not in said
    assert " 500 " not in said


def test_three_times_it_is_gone_at_once(server: Process) -> None:
    with ThreadPoolExecutor(1) as pool:
        future = pool.submit(asked, server.url, False)
        while not server.running():
            time.sleep(0.05)
        for _ in range(3):
            server.signal(signal.SIGINT)
            time.sleep(0.02)
        code, said = server.end(10)
        try:
            status, _ = future.result()
            assert status == 503
        except httpx.TransportError:  # it was not there to say so any more
            pass
    assert code in (0, 130)
    assert "Traceback" not in said


def test_idle_it_ends_at_once(server: Process) -> None:
    start = time.monotonic()
    server.signal(signal.SIGINT)
    code, said = server.end(10)
    assert code == 0
    assert time.monotonic() - start < 5
    assert "finishing" not in said
    assert "Traceback" not in said


def test_demo_opens_the_page_and_ends_with_ctrl_c(tmp_path: Path) -> None:
    """The browser is a program that notes what it was asked to open."""
    note = tmp_path / "opened"
    browser = tmp_path / "browser"
    browser.write_text(f'#!/bin/sh\necho "$1" > {note}\n')
    browser.chmod(0o755)
    for words, opened in ((["demo"], True), (["demo", "--no-browser"], False)):
        process = Process(*words, BROWSER=f"{browser} %s", OMP_NUM_THREADS="1")
        try:
            page = httpx.get(f"{process.url}/", timeout=30)
            assert page.status_code == 200
            assert "<h1>" in page.text
            assert len(httpx.get(f"{process.url}/page/about", timeout=30).json()["samples"]) == 6
            if opened:
                while not note.exists():
                    time.sleep(0.05)
                assert note.read_text().strip() == f"{process.url}/"
                note.unlink()
            process.signal(signal.SIGINT)
            code, said = process.end()
            assert code == 0
            assert ("opened in the browser" in said) == opened
            assert "Traceback" not in said
        finally:
            process.process.kill()
            process.process.wait()
    assert not note.exists()
