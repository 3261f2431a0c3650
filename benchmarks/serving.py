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
import dataclasses
import json
import statistics
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from PIL import Image
from rich.console import Console
from rich.progress import Progress
from serving_client import ask_all, request, served
from serving_load import overload
from transformers import (
    AutoConfig,
    AutoModelForImageTextToText,
    AutoProcessor,
    GenerationConfig,
)

import st3
from st3.tools.bench.bars import Bar, as_markdown
from st3.tools.common.chats import ask
from st3.tools.common.conditions import conditions, in_words
from st3.tools.common.tables import markdown
from st3.tools.serve import Engine

RESULTS = Path(__file__).with_name("results")
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
                answers = asyncio.run(ask_all(url, bodies, lambda: progress.advance(task)))
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
