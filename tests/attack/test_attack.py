"""The corpus against `st3 serve`: no 5xx, no more than 300 MB, no late reply."""

from __future__ import annotations

import re
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import httpx
import pytest

from tests.attack.corpus import Bad, corpus
from tests.serving import CHAT, body, picture, until

TIMEOUT = 60
MOST_BYTES = 300 << 20


class Served:
    """The server's process: a process of its own, so that what clients hold is not counted."""

    def __init__(self, model: Path, folder: Path, log: Path) -> None:
        self.log = log
        command = [
            sys.executable, "-m", "st3.tools.cli", "serve", "-m", str(model), "--name", "st3",
            "--port", "0", "--kv-budget", "64M", "--dtype", "float32", "--timeout", str(TIMEOUT),
            "--image-folder", str(folder), "--allow-http-images", "--no-access-log",
        ]  # fmt: skip
        with log.open("w") as file:
            self.process = subprocess.Popen(command, stderr=file)
        ends = time.monotonic() + 120
        while not (found := re.search(r"(http://127\.0\.0\.1:\d+)/v1", log.read_text())):
            assert self.process.poll() is None, log.read_text()
            assert time.monotonic() < ends
            time.sleep(0.1)
        self.url = found[1]
        self.most = 0
        threading.Thread(target=self._watch, daemon=True).start()

    def resident(self) -> int:
        statm = Path(f"/proc/{self.process.pid}/statm")
        return int(statm.read_text().split()[1]) * 4096

    def _watch(self) -> None:
        while self.process.poll() is None:
            try:
                self.most = max(self.most, self.resident())
            except (OSError, IndexError):
                return
            time.sleep(0.002)


@pytest.fixture
def served(tiny_model: Path, tmp_path: Path) -> Iterator[Served]:
    (tmp_path / "images").mkdir()
    server = Served(tiny_model, tmp_path / "images", tmp_path / "log")
    yield server
    server.process.terminate()
    server.process.wait(60)


@pytest.mark.slow
@pytest.mark.skipif(not Path("/proc/self/statm").exists(), reason="memory is read from /proc")
def test_six_hundred_bad_requests(served: Served, tmp_path: Path) -> None:
    requests = list(corpus(tmp_path / "images"))
    assert len(requests) >= 600
    wrong: list[str] = []
    slowest = (0.0, "")
    with httpx.Client(base_url=served.url, timeout=2 * TIMEOUT) as client:
        good = body("describe", picture())
        before = client.post(CHAT, json=good).json()["choices"]
        idle = served.most = served.resident()

        def ask(bad: Bad) -> None:
            nonlocal slowest
            data, began = bad.body(), time.monotonic()
            reply = client.request(bad.method, bad.path, content=data, headers=bad.headers)
            slowest = max(slowest, (time.monotonic() - began, bad.name))
            right = 400 <= reply.status_code < 500 or (bad.may_pass and reply.status_code == 200)
            if not right or "Traceback" in reply.text:
                wrong.append(f"{bad.name}: {reply.status_code} {reply.text[:200]}")

        with ThreadPoolExecutor(4) as crowd:
            list(crowd.map(ask, requests))
        grown = served.most - idle
        print(f"{len(requests)} requests, +{grown >> 20} MiB, slowest {slowest}")
        assert wrong == []
        assert slowest[0] < TIMEOUT
        assert grown < MOST_BYTES
        # What was asked before is answered as before, and nothing is held any more.
        assert client.post(CHAT, json=good).json()["choices"] == before
        for gauge in ("running", "waiting", "kv_reserved_bytes"):
            # A reply is sent a moment before its request is counted as ended.
            until(lambda line=f"st3_{gauge} 0.0": line in client.get("/metrics").text)
    assert "Traceback" not in served.log.read_text()
