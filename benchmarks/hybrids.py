"""Decoders whose layers are not all alike: does a prefill gain what token counts say?

    OMP_NUM_THREADS=1 python -m benchmarks.hybrids [--repeats 7] [--small] [--out FOLDER]

Random weights, one thread, time of the processor, variants in turns in one process, medians. Bars:
of a Qwen3.5 of 125 M parameters (16 layers, 12 of them linear attention) with 1,152 visual tokens
the speed-up of each policy is at least 0.95 of what token counts say; a Gemma 4 whose last layers
share KV entries is faster if no visual token enters those than with the same policy there, too.
"""

from __future__ import annotations

import argparse
import json
import statistics
import time
from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from transformers import AutoModelForImageTextToText

import st3
from st3.cost import TextDims, prefill_flops
from st3.hf.call import CACHE, cache_of
from st3.methods.laid import Laid
from st3.tools.bench.hybrids import gemma4, qwen3_5
from st3.tools.common.conditions import conditions, in_words
from st3.tools.common.tables import markdown

RESULTS = Path(__file__).with_name("results")
VISUAL, TEXT = 1152, 62
STEPS = 12
BAR = 0.95
HEAD = ["", "seconds", "speed-up", "by tokens", "by FLOPs", "of tokens"]
Samples = dict[str, list[float]]


@dataclass
class Part:
    """One table of the page, the samples behind it, and whether its bar is met."""

    name: str
    table: str
    samples: Samples
    good: bool = True
    says: str = ""


def qwen(small: bool) -> Any:
    return built(qwen3_5(144, 128) if small else qwen3_5(768))


def gemma(small: bool) -> Any:
    return built(gemma4(64, 128) if small else gemma4(512))


def built(config: Any) -> Any:
    torch.manual_seed(0)
    return AutoModelForImageTextToText.from_config(config, dtype=torch.float32).eval()


def prompt() -> tuple[dict[str, Any], torch.Tensor]:
    """A prompt without pixels, and which of its tokens count as visual."""
    tokens = VISUAL + TEXT
    ids = torch.randint(30, 120, (1, tokens), generator=torch.manual_seed(1))
    visual = torch.zeros(1, tokens, dtype=torch.bool)
    visual[:, TEXT // 2 : TEXT // 2 + VISUAL] = True
    return {"input_ids": ids, "use_cache": True}, visual


def prefill(model: Any, given: dict[str, Any], trimmer: st3.Trimmer | None) -> float:
    """Seconds of a forward pass of the prompt."""
    with trimmer or nullcontext(), torch.no_grad():
        start = time.process_time()
        model(**given)
        return time.process_time() - start


def step(model: Any, given: dict[str, Any], trimmer: st3.Trimmer | None) -> float:
    """Seconds of a decode step behind the prompt, median of a few."""
    with trimmer or nullcontext(), torch.no_grad():
        cache, taken = cache_of(model(**given)), []
        for _ in range(STEPS):
            token = torch.full((1, 1), 40)
            start = time.process_time()
            model(input_ids=token, use_cache=True, **{CACHE: cache})
            taken.append(time.process_time() - start)
    return statistics.median(taken[2:])


def in_turns(calls: dict[str, Callable[[], float]], repeats: int) -> Samples:
    """Seconds of each variant; the first round warms up."""
    times: Samples = {name: [] for name in calls}
    for turn in range(repeats + 1):
        for name, call in calls.items():
            took = call()
            if turn:
                times[name].append(took)
    return times


def by_tokens(schedule: Any) -> float:
    """The speed-up that token counts say."""
    layers = schedule.num_layers
    left = sum(schedule.kept(layer, VISUAL) + TEXT for layer in range(layers))
    return layers * (VISUAL + TEXT) / left


def rows_of(times: Samples, trimmers: dict[str, Any], dims: TextDims) -> tuple[list[Any], bool]:
    base, rows, good = statistics.median(times["untrimmed"]), [], True
    full = prefill_flops(dims, TEXT, VISUAL).total
    for name, taken in times.items():
        took, trimmer = statistics.median(taken), trimmers[name]
        row: list[Any] = [name, f"{took:.2f}", f"{base / took:.2f}"]
        if trimmer is not None:
            said = by_tokens(trimmer.schedule)
            flops = full / prefill_flops(dims, TEXT, VISUAL, trimmer.schedule).total
            row += [f"{said:.2f}", f"{flops:.2f}", f"{base / took / said:.3f}"]
            good &= base / took >= BAR * said
        rows.append(row + [""] * (len(HEAD) - len(row)))
    return rows, good


def states(repeats: int, small: bool) -> list[Part]:
    model = qwen(small)
    given, visual = prompt()
    given["logits_to_keep"] = 1
    policies = {
        "ST3": st3.ST3(score="attention"),
        "FastV, layer 4": st3.FastV(layer=4, drop=0.5),
        "PyramidDrop": st3.PyramidDrop(),
    }
    trimmers: dict[str, Any] = {"untrimmed": None}
    trimmers |= {n: st3.trim(model, p, visual_mask=visual) for n, p in policies.items()}
    calls = {name: lambda t=t: prefill(model, given, t) for name, t in trimmers.items()}
    times = in_turns(calls, repeats)
    rows, good = rows_of(times, trimmers, TextDims.from_config(model.config))
    count = sum(p.numel() for p in model.model.language_model.parameters())
    name = f"Qwen3.5, {count / 1e6:.0f} M parameters: prefill of {VISUAL} + {TEXT} tokens"
    says = f"Bar: each at least {BAR} of what token counts say."
    first = Part(name, markdown(HEAD, rows), times, good, says)
    steps: dict[str, Any] = {"untrimmed": None, "ST3": trimmers["ST3"]}
    steps["st3's cache, nothing dropped"] = st3.trim(
        model, "none", own_cache=True, visual_mask=visual
    )
    calls = {name: lambda t=t: step(model, given, t) for name, t in steps.items()}
    found = in_turns(calls, max(1, repeats // 2))
    table = [[n, f"{1e3 * statistics.median(taken):.1f}"] for n, taken in found.items()]
    return [first, Part("The same: a decode step", markdown(["", "ms"], table), found)]


def shared(repeats: int, small: bool) -> Part:
    model = gemma(small)
    # All logits: with one alone, transformers itself goes on with the last token in those layers.
    given, visual = prompt()
    free = st3.trim(model, st3.FastV(layer=2, drop=0.5), visual_mask=visual)
    kept = st3.trim(model, st3.FastV(layer=2, drop=0.5), visual_mask=visual)
    laid = kept.schedule
    if not isinstance(laid, Laid):
        raise TypeError("this model's layers share no KV entries")
    last = laid.shares[laid.shared - 1]
    same = (*laid.shares[: laid.shared], *[last] * (laid.num_layers - laid.shared))
    kept.schedule = replace(laid, shares=same)
    given_one = {**given, "logits_to_keep": 1}
    calls = {
        "untrimmed": lambda: prefill(model, given, None),
        "FastV in all layers": lambda: prefill(model, given, kept),
        "FastV, no visual token where KV is shared": lambda: prefill(model, given, free),
        "untrimmed, last logits only": lambda: prefill(model, given_one, None),
        "FastV, last logits only": lambda: prefill(model, given_one, free),
    }
    times = in_turns(calls, repeats)
    middle = {name: statistics.median(taken) for name, taken in times.items()}
    rows = []
    for label, took in middle.items():
        base = middle["untrimmed, last logits only" if "logits" in label else "untrimmed"]
        rows.append([label, f"{took:.2f}", f"{base / took:.2f}"])
    good = middle["FastV, no visual token where KV is shared"] < middle["FastV in all layers"]
    name = f"Gemma 4, 8 of 16 layers share KV entries: prefill of {VISUAL} + {TEXT} tokens"
    says = "Bar: faster without visual tokens in the layers that share."
    return Part(name, markdown(HEAD[:3], rows), times, good, says)


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--repeats", type=int, default=7)
    parser.add_argument("--small", action="store_true", help="tiny models: only whether it runs")
    parser.add_argument("--out", type=Path, default=RESULTS)
    given = parser.parse_args(arguments)
    torch.set_num_threads(1)
    told = conditions(torch.device("cpu"), torch.float32)
    parts = [*states(given.repeats, given.small), shared(given.repeats, given.small)]
    page = f"# Decoders whose layers are not all alike\n\n{in_words(told)}\n\n"
    page += (
        "`OMP_NUM_THREADS=1 python -m benchmarks.hybrids`: random weights, time of the processor, "
    )
    page += f"variants in turns, medians of {given.repeats} rounds; torch's own kernels.\n"
    for part in parts:
        met = f"\n\n{part.says} {'Met.' if part.good else 'Missed.'}" if part.says else ""
        page += f"\n## {part.name}\n\n{part.table}{met}\n"
    given.out.mkdir(parents=True, exist_ok=True)
    (given.out / "hybrids.md").write_text(page, encoding="utf-8")
    samples = {part.name: part.samples for part in parts}
    text = json.dumps({"conditions": told, "samples": samples})
    (given.out / "hybrids.json").write_text(text, encoding="utf-8")
    print(page)
    if not all(part.good for part in parts):
        raise SystemExit("a bar was missed")


if __name__ == "__main__":
    main()
