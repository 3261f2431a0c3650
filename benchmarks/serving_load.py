"""Mixed requests at four times the rate that the server answers; part of benchmarks/serving.py."""

from __future__ import annotations

import asyncio
import contextlib
import dataclasses
import gc
import json
import random
import sys
import time
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import httpx
import torch
from PIL import Image
from rich.progress import Progress
from serving_client import CHAT, ask_all, client, request, served
from transformers import AutoModelForImageTextToText, AutoProcessor

import st3
from st3.tools.bench.bars import Bar
from st3.tools.common.chats import ask, encode
from st3.tools.serve import Engine, Settings

POLICIES = ("balanced", "none", "balanced:tau=40,floor=0", "fastv", "vtw")
NONSENSE: tuple[Any, ...] = (
    {"model": "st3"}, {"model": "st3", "messages": [], "n": 3}, [], "st3",
    {"model": "st3", "messages": [{"role": "user", "content": [
        {"type": "image_url", "image_url": {"url": "data:image/png;base64,AAAA"}}]}]},
)  # fmt: skip


@dataclasses.dataclass(frozen=True)
class Kind:
    """A request of the mixture and its only right answer."""

    body: dict[str, Any]
    answer: str


def kinds(model: Any, processor: Any, number: int, longest: int) -> list[Kind]:
    """Requests of many lengths and policies, answered alone by generate()."""
    images = [Image.open(path).convert("RGB") for path in st3.sample_images()]
    texts = ("describe the image in detail.", "what is at the top left?", "what is in the center?")
    found = []
    for i in range(number):
        policy, text = POLICIES[i % len(POLICIES)], texts[i % len(texts)]
        image, tokens = images[i % len(images)], 4 + 11 * i % longest
        inputs = encode(model, processor, [ask([image], text)])
        with torch.no_grad(), st3.trim(model, policy):
            out = model.generate(**inputs, max_new_tokens=tokens, do_sample=False)
        new = out[0, inputs["input_ids"].shape[1] :]
        answer = processor.tokenizer.decode(new, skip_special_tokens=True)
        body = request([image], text, max_tokens=tokens, st3={"policy": policy})
        found.append(Kind(body, answer))
    return found


def overload(
    number: int, folder: Path, progress: Progress, longest: int = 60
) -> tuple[dict[str, Any], list[Bar]]:
    """``number`` mixed requests at four times the rate of saturation."""
    model = AutoModelForImageTextToText.from_pretrained(folder, dtype=torch.float32).eval()
    processor = AutoProcessor.from_pretrained(folder)
    mixture = kinds(model, processor, min(30, max(5, number // 10)), longest)
    engine = Engine(model, processor, kv_budget_bytes=128 << 20)
    task = progress.add_task("overload", total=number)
    outcomes: Counter[str] = Counter()
    with served(engine, Settings(send_timeout=10)) as url:
        sample = [mixture[i % len(mixture)].body for i in range(min(48, max(10, number // 10)))]
        start = time.perf_counter()
        asyncio.run(ask_all(url, sample, lambda: None))
        rate = len(sample) / (time.perf_counter() - start)
        before = _resident()
        took = asyncio.run(
            _flood(url, mixture, number, 4 * rate, outcomes, lambda: progress.advance(task))
        )
        while (stats := engine.stats()).running or stats.waiting:
            time.sleep(0.05)
        asyncio.run(ask_all(url, sample[:5], lambda: None))  # it still answers
        while engine.stats().lanes:
            time.sleep(0.05)
        after, stats = _resident(), engine.stats()
    answered = outcomes["right"] + outcomes["wrong"]
    bars = [
        Bar("requests that crashed or got no response", outcomes["lost"], 0, at_most=True),
        Bar("wrong answers", outcomes["wrong"], 0, at_most=True),
        Bar("KV bytes still held", stats.reserved + stats.allocated, 0, at_most=True),
        Bar("growth of resident memory, MiB", (after - before) / 2**20, 64, at_most=True),
    ]
    found = {
        "requests": number, "rate_at_saturation": rate, "rate_sent": number / took,
        "answered": answered, "outcomes": dict(outcomes), "resident_before": before,
        "resident_after": after, "most_running": stats.most_running,
    }  # fmt: skip
    return found, bars


async def _flood(
    url: str,
    mixture: Sequence[Kind],
    number: int,
    rate: float,
    outcomes: Counter[str],
    done: Any,
) -> float:
    """Send the requests at this rate; the seconds in which they were sent."""
    rng = random.Random(0)

    async def one(http: httpx.AsyncClient, index: int) -> None:
        draw = rng.random()
        try:
            if draw < 0.05:
                outcomes[await _nonsense(http, rng.choice(NONSENSE))] += 1
            else:
                outcomes[await _ask(http, rng.choice(mixture), draw < 0.15, draw < 0.55)] += 1
        except httpx.HTTPError as error:
            outcomes["lost"] += 1
            print(f"lost: {error!r}", file=sys.stderr)
        done()

    async with client(url) as http, asyncio.TaskGroup() as tasks:
        start = time.perf_counter()
        for index in range(number):
            await asyncio.sleep(max(0.0, start + index / rate - time.perf_counter()))
            tasks.create_task(one(http, index))
        took = time.perf_counter() - start
    return took


async def _nonsense(http: httpx.AsyncClient, body: Any) -> str:
    response = await http.post(CHAT, json=body)
    return "refused, bad" if response.status_code in (400, 429) else "wrong"


async def _ask(http: httpx.AsyncClient, kind: Kind, hangs_up: bool, stream: bool) -> str:
    """One client: it reads the answer whole or as a stream, or goes away."""
    if not stream and not hangs_up:
        response = await http.post(CHAT, json=kind.body)
        if response.status_code == 429 and "retry-after" in response.headers:
            return "refused, queue"
        if response.status_code != 200:
            return "wrong"
        said = response.json()["choices"][0]["message"]["content"]
        return "right" if said == kind.answer else "wrong"
    text = ""
    async with http.stream("POST", CHAT, json={**kind.body, "stream": True}) as response:
        if response.status_code == 429:
            return "refused, queue"
        async for line in response.aiter_lines():
            if line == "data: [DONE]":
                return "right" if text == kind.answer else "wrong"
            if not line:
                continue
            chunk = json.loads(line.removeprefix("data: "))
            if "choices" not in chunk:
                return "wrong"
            text += chunk["choices"][0]["delta"].get("content", "")
            if hangs_up and text:
                return "hung up"
    return "wrong"


def _resident() -> int:
    gc.collect()
    with contextlib.suppress(OSError, AttributeError):
        import ctypes

        ctypes.CDLL("libc.so.6").malloc_trim(0)
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith("VmRSS"):
            return int(line.split()[1]) << 10
    return 0
