"""The server under load, on this machine, untrimmed and trimmed in one run.

    python benchmarks/serving.py            # everything: about 30 minutes on two cores
    python benchmarks/serving.py --quick    # a few small requests, to try it out

Capacity: a random LLaVA of 32 decoder layers, the depth that the policy st3-7b is made for, answers
requests of five images (2,880 visual tokens) within a KV budget that holds --untrimmed requests
untrimmed. All requests are sent at once; what counts is how many run together and how many are
answered in a second. Untrimmed and trimmed take turns.

Overload: st3-tiny gets --requests mixed requests, streamed or not, at four times the rate that it
answers. One in ten of the clients hangs up early, one in twenty sends nonsense. Every answer is
compared with the one that generate() gives alone.

Each server listens on loopback and is asked over HTTP. The exit status says whether all bars hold.
"""

from __future__ import annotations

import argparse
import asyncio
import base64
import contextlib
import dataclasses
import gc
import json
import random
import socket
import statistics
import sys
import threading
import time
from collections import Counter
from collections.abc import Iterator, Sequence
from io import BytesIO
from pathlib import Path
from typing import Any

import httpx
import torch
import uvicorn
from PIL import Image
from rich.console import Console
from rich.progress import Progress
from transformers import (
    AutoConfig,
    AutoModelForImageTextToText,
    AutoProcessor,
    GenerationConfig,
)

import st3
from st3.tools.bench.bars import Bar, as_markdown
from st3.tools.common.chats import ask, encode
from st3.tools.common.conditions import conditions, in_words
from st3.tools.common.tables import markdown
from st3.tools.serve import Engine, Settings, create_app

RESULTS = Path(__file__).with_name("results")
CHAT = "/v1/chat/completions"
AT_ONCE, THROUGHPUT = 2.5, 2.0  # the bars: times the untrimmed server's


@dataclasses.dataclass(frozen=True)
class Size:
    """The model and the requests of the capacity part."""

    layers: int = 32
    width: int = 128
    side: int = 24  # an image has side x side visual tokens
    images: int = 5
    max_tokens: int = 64
    requests: int = 24
    repeats: int = 3
    policy: str = "st3-7b"

    @property
    def visual(self) -> int:
        return self.images * self.side**2


QUICK = Size(8, 64, 6, 5, 12, 12, 1, "balanced:first_drop=0.8,stride=2,final_keep=0")


def scaled(size: Size) -> tuple[Any, Any]:
    """A random model of st3-tiny's kind, of another depth, width and image size; and its processor.

    Its answers never end before they have the asked length.
    """
    config = AutoConfig.from_pretrained(st3.bundled_model())
    text, vision = config.text_config, config.vision_config
    text.num_hidden_layers, text.hidden_size, text.intermediate_size = (
        size.layers, size.width, 2 * size.width,
    )  # fmt: skip
    text.num_attention_heads = text.num_key_value_heads = size.width // text.head_dim
    vision.image_size = size.side * vision.patch_size
    vision.num_hidden_layers = 1  # a small share of the weights, as in LLaVA-1.5
    config.image_seq_length = size.side**2
    torch.manual_seed(0)
    model = AutoModelForImageTextToText.from_config(config, dtype=torch.float32).eval()
    model.generation_config = GenerationConfig(eos_token_id=None, pad_token_id=0)
    processor = AutoProcessor.from_pretrained(st3.bundled_model())
    processor.image_processor.size = {"height": vision.image_size, "width": vision.image_size}
    return model, processor


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


@dataclasses.dataclass
class Arm:
    """What one policy reached. Seconds are from a request's submission."""

    policy: str
    at_once: list[int] = dataclasses.field(default_factory=list)
    requests_per_s: list[float] = dataclasses.field(default_factory=list)
    tokens_per_s: list[float] = dataclasses.field(default_factory=list)
    ttft: list[float] = dataclasses.field(default_factory=list)
    kv_bytes: int = 0

    def row(self) -> list[str]:
        middle = statistics.median
        return [
            self.policy,
            f"{min(self.at_once)}",
            f"{middle(self.requests_per_s):.3f}",
            f"{middle(self.tokens_per_s):.1f}",
            f"{middle(self.ttft):.1f}",
            f"{self.kv_bytes / 2**20:.1f}",
        ]


def capacity(size: Size, untrimmed: int, progress: Progress) -> tuple[dict[str, Any], list[Bar]]:
    """How many run at once, and how many are answered, in a budget for ``untrimmed`` requests."""
    model, processor = scaled(size)
    pixels = size.side * 8
    rng = torch.Generator().manual_seed(0)
    bodies = [
        request(
            [_noise(pixels, rng) for _ in range(size.images)],
            "describe the image in detail.",
            max_tokens=size.max_tokens,
        )
        for _ in range(size.requests)
    ]
    probe = Engine(model, processor, "none", 1 << 40)
    text = bodies[0]["messages"][0]["content"][-1]["text"]
    turn = ask([_noise(pixels, rng)] * size.images, text)
    columns = probe.prepare(turn, max_tokens=size.max_tokens).columns
    budget = untrimmed * probe.budget.bytes([columns])
    probe.close()
    arms = {name: Arm(name) for name in ("none", size.policy)}
    task = progress.add_task("capacity", total=2 * size.repeats * size.requests)
    for _ in range(size.repeats):
        for arm in arms.values():
            engine = Engine(model, processor, arm.policy, budget, queue_limit=size.requests)
            with served(engine) as url:
                start = time.perf_counter()
                answers = asyncio.run(_all(url, bodies, lambda: progress.advance(task)))
                took = time.perf_counter() - start
            arm.at_once.append(engine.stats().most_running)
            arm.requests_per_s.append(len(answers) / took)
            arm.tokens_per_s.append(sum(a["usage"]["completion_tokens"] for a in answers) / took)
            arm.ttft += [a["st3"]["ttft_s"] for a in answers]
            arm.kv_bytes = answers[0]["st3"]["kv_bytes"]
    none, trimmed = arms.values()
    pairs = zip(none.requests_per_s, trimmed.requests_per_s, strict=True)
    ratios = [b / a for a, b in pairs]
    bars = [
        Bar(
            "requests at once, trimmed / untrimmed",
            min(trimmed.at_once) / max(none.at_once), AT_ONCE,
        ),
        Bar("answers a second, trimmed / untrimmed", statistics.median(ratios), THROUGHPUT),
    ]  # fmt: skip
    found = {
        "size": dataclasses.asdict(size),
        "visual": size.visual,
        "budget_bytes": budget,
        "arms": [dataclasses.asdict(arm) for arm in arms.values()],
        "ratios": ratios,
    }
    return found, bars


def _noise(pixels: int, rng: torch.Generator) -> Image.Image:
    data = torch.randint(0, 256, (pixels // 8, pixels // 8, 3), generator=rng, dtype=torch.uint8)
    return Image.fromarray(data.numpy()).resize((pixels, pixels))


async def _all(url: str, bodies: Sequence[dict[str, Any]], done: Any) -> list[dict[str, Any]]:
    async def one(http: httpx.AsyncClient, body: dict[str, Any]) -> dict[str, Any]:
        response = await http.post(CHAT, json=body)
        response.raise_for_status()
        done()
        answer: dict[str, Any] = response.json()
        return answer

    async with client(url) as http:
        return await asyncio.gather(*(one(http, body) for body in bodies))


# Overload -----------------------------------------------------------------------------------------

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
        asyncio.run(_all(url, sample, lambda: None))
        rate = len(sample) / (time.perf_counter() - start)
        before = _resident()
        took = asyncio.run(
            _flood(url, mixture, number, 4 * rate, outcomes, lambda: progress.advance(task))
        )
        while (stats := engine.stats()).running or stats.waiting:
            time.sleep(0.05)
        asyncio.run(_all(url, sample[:5], lambda: None))  # it still answers
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


# The whole ----------------------------------------------------------------------------------------


def table(found: dict[str, Any]) -> str:
    """The results in Markdown."""
    lines = []
    if "capacity" in found:
        part = found["capacity"]
        lines += [
            f"{part['visual']} visual tokens a request, {part['size']['layers']} layers, "
            f"{part['size']['max_tokens']} new tokens, {part['size']['requests']} requests sent "
            f"at once, KV budget {part['budget_bytes'] / 2**20:.0f} MiB; medians of "
            f"{part['size']['repeats']} turns.",
            "",
            markdown(
                (
                    "policy",
                    "run at once",
                    "answers/s",
                    "tokens/s",
                    "TTFT, s",
                    "KV of a request, MiB",
                ),
                [Arm(**arm).row() for arm in part["arms"]],
            ),
            "",
        ]
    if "overload" in found:
        part = found["overload"]
        counts = ", ".join(f"{count} {name}" for name, count in sorted(part["outcomes"].items()))
        lines += [
            f"{part['requests']} mixed requests at {part['rate_sent']:.1f} a second "
            f"(saturated at {part['rate_at_saturation']:.1f}): {counts}. Resident memory "
            f"{part['resident_before'] / 2**20:.0f} MiB before, "
            f"{part['resident_after'] / 2**20:.0f} MiB after.",
            "",
        ]
    return "\n".join(lines)


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--quick", action="store_true", help="small, to try it out")
    parser.add_argument("--sections", nargs="+", choices=("capacity", "overload"),
                        default=["capacity", "overload"])  # fmt: skip
    parser.add_argument("--untrimmed", type=int, default=4, help="requests the KV budget holds")
    parser.add_argument("--requests", type=int, help="of the overload part; default 2000")
    parser.add_argument("--policy", help="of the capacity part; default st3-7b")
    parser.add_argument("--model", type=Path, help="of the overload part; default st3-tiny")
    parser.add_argument("--out", type=Path, default=RESULTS, help="folder of the results")
    given = parser.parse_args(argv)
    size = QUICK if given.quick else Size()
    if given.policy:
        size = dataclasses.replace(size, policy=given.policy)
    number = given.requests or (40 if given.quick else 2000)
    console = Console(stderr=True)
    where = conditions(torch.device("cpu"), torch.float32)
    found: dict[str, Any] = {"conditions": where}
    bars: list[Bar] = []
    with Progress(console=console) as progress:
        if "capacity" in given.sections:
            found["capacity"], more = capacity(size, given.untrimmed, progress)
            bars += more
        if "overload" in given.sections:
            found["overload"], more = overload(
                number, given.model or st3.bundled_model(), progress, 12 if given.quick else 60
            )
            bars += more
    found["bars"] = [dataclasses.asdict(bar) for bar in bars]
    text = f"# The server under load\n\n{in_words(where)}.\n\n{table(found)}\n{as_markdown(bars)}"
    given.out.mkdir(parents=True, exist_ok=True)
    parts = "" if len(given.sections) == 2 else f"-{given.sections[0]}"
    name = f"serving{parts}-quick" if given.quick else f"serving{parts}"
    (given.out / f"{name}.json").write_text(json.dumps(found, indent=1) + "\n", encoding="utf-8")
    (given.out / f"{name}.md").write_text(text + "\n", encoding="utf-8")
    print(text)
    return 0 if all(bar.met for bar in bars) else 1


if __name__ == "__main__":
    sys.exit(main())
