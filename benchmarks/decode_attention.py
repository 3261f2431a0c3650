"""Attention of one decode step on a CPU: each way to compute it, on multi-head and grouped-query
shapes, and what writing and appending cost in each layout.

    python benchmarks/decode_attention.py                       # about half an hour
    python benchmarks/decode_attention.py --dtypes bfloat16 --columns 576 --batches 1

Every call reads buffers of its own, so many that they do not fit into the processor's cache, as the
layers of a model do. The ways take turns. A time is the first decile over all calls of a way, in
microseconds, with one thread of the processor's time: what waits for others' work on the machine is
not counted. Buffers and views are made as st3's cache makes them; for transformers they are whole
tensors, as in a DynamicCache (what its `cat` costs is not counted). Results go to
benchmarks/results/decode-attention.{json,md}.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from time import perf_counter, thread_time
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import scaled_dot_product_attention as sdpa
from transformers.integrations.sdpa_attention import sdpa_attention_forward

from st3.engine import decode
from st3.engine.kv.layout import allocate, capacity_for, copy_columns
from st3.tools.common.conditions import conditions, in_words

RESULTS = Path(__file__).with_name("results")
# Query heads, KV heads, head size, and a model that has them.
SHAPES = {
    "32/32 x 128": (32, 32, 128, "LLaVA-1.5-7B"),
    "16/16 x 64": (16, 16, 64, "cpu-308m of st3 bench"),
    "32/8 x 128": (32, 8, 128, "Qwen3-VL-8B"),
    "28/4 x 128": (28, 4, 128, "Qwen2.5-VL-7B"),
    "16/2 x 128": (16, 2, 128, "Qwen2.5-VL-3B"),
    "8/4 x 256": (8, 4, 256, "Gemma-3-4B"),
    "8/1 x 256": (8, 1, 256, "PaliGemma"),
}
MASKED, PLAIN, CHOSEN = "transformers, mask", "transformers", "st3"
WAYS = {
    PLAIN: "transformers' sdpa_attention_forward without a mask",
    MASKED: "the same with a mask, which takes another kernel for grouped queries",
    "plain, sdpa": "torch's sdpa on st3's cache, the queries of a KV head as rows",
    "plain, matmul": "head size last, two matrix products",
    "plain, bags": "head size last: a matrix product for keys, bags for values",
    "size first, matmul": "keys size first: a matrix product for keys, bags for values",
    "size first, bags": "keys size first: bags for keys and values",
    CHOSEN: "`decode_attention` on the layout that `wants_size_first` asks for; each call has up to"
    " seven columns less, another number than the one before",
}
Call = Callable[[int], object]


def ways(
    heads: int, kv_heads: int, size: int, batch: int, columns: int, dtype: torch.dtype, count: int
) -> dict[str, Call]:
    """Each way as a function of the number of the buffers that it reads."""
    like = torch.empty(batch, kv_heads, 1, size, dtype=dtype)
    first = 3  # what annealing has hidden
    whole: list[tuple[Tensor, Tensor]] = []
    plain: list[tuple[Tensor, Tensor]] = []
    size_first: list[tuple[Tensor, Tensor]] = []
    states = torch.randn(batch, kv_heads, columns, size, dtype=dtype)
    for _ in range(count):
        whole.append((states.clone(), states.clone()))
        value = allocate(like, capacity_for(first + columns))[:, :, first : first + columns]
        value.copy_(states)
        for turned, pairs in ((False, plain), (True, size_first)):
            buffer = allocate(like, capacity_for(first + columns, turned), size_first=turned)
            key = buffer[:, :, first : first + columns]
            copy_columns(states, None, key)
            pairs.append((key, value))
    query = torch.randn(batch, 1, heads, size, dtype=dtype).transpose(1, 2)
    mask = torch.ones(batch, 1, 1, columns, dtype=torch.bool)
    rows = query.reshape(batch, kv_heads, -1, size)
    module = nn.Module()
    module.num_key_value_groups = heads // kv_heads

    def theirs(mask: Tensor | None, i: int) -> object:
        return sdpa_attention_forward(module, query, *whole[i], mask)

    def mixed(pairs: list[tuple[Tensor, Tensor]], logits: Callable[..., Tensor], i: int) -> object:
        key, value = pairs[i]
        return decode.bag_output(logits(query, key).softmax(-1), value)

    # As in a trimmed model, hardly a layer has as many columns as the one before.
    chosen = [
        (key[:, :, i % 8 :], value[:, :, i % 8 :])
        for i, (key, value) in enumerate(size_first if decode.wants_size_first(like) else plain)
    ]
    return {
        PLAIN: partial(theirs, None),
        MASKED: partial(theirs, mask),
        "plain, sdpa": lambda i: sdpa(rows, *plain[i]),
        "plain, matmul": lambda i: decode.matmul_decode(module, query, *plain[i], None),
        "plain, bags": partial(mixed, plain, decode.matmul_logits),
        "size first, matmul": partial(mixed, size_first, decode.matmul_logits),
        "size first, bags": partial(mixed, size_first, decode.bag_logits),
        CHOSEN: lambda i: decode.decode_attention(module, query, *chosen[i], None),
    }


def measure(calls: dict[str, Call], count: int, rounds: int) -> dict[str, float]:
    """First decile of each way's calls, in microseconds."""
    clock = thread_time if torch.get_num_threads() == 1 else perf_counter
    times: dict[str, list[float]] = {name: [] for name in calls}
    for call in calls.values():
        call(0)
    for _ in range(rounds):
        for name, call in calls.items():
            best = min((min(t) for t in times.values() if t), default=0)
            # A slow way tells nothing more when it is asked again.
            if name != CHOSEN and times[name] and min(times[name]) > 3 * best:
                continue
            for i in range(count):
                start = clock()
                call(i)
                times[name].append(clock() - start)
    return {name: 1e6 * sorted(t)[len(t) // 10] for name, t in times.items()}


def layout_costs(kv_heads: int, size: int, columns: int, dtype: torch.dtype) -> dict[str, float]:
    """Microseconds to file a prompt of ``columns`` and to append a column, batch 1, one layer."""
    order = torch.randperm(columns)[None]
    prompt = torch.randn(1, columns, kv_heads, size).to(dtype).transpose(1, 2)
    fresh = torch.randn(1, kv_heads, 1, size).to(dtype)
    calls: dict[str, Call] = {}
    count = 8
    for name, turned in (("plain", False), ("size first", True)):
        capacity = capacity_for(columns, turned)
        buffers = [allocate(prompt, capacity, size_first=turned).zero_() for _ in range(count)]

        def file(buffers: list[Tensor], i: int) -> None:
            copy_columns(prompt, order, buffers[i][:, :, :columns])

        def append(buffers: list[Tensor], i: int) -> None:
            buffers[i].narrow(2, columns, 1).copy_(fresh)

        calls[f"file, {name}"] = partial(file, buffers)
        calls[f"append, {name}"] = partial(append, buffers)
    return measure(calls | {CHOSEN: lambda i: None}, count, 5)


def run(given: argparse.Namespace) -> dict[str, Any]:
    """Everything that was asked for."""
    rows, costs = [], []
    for dtype in (getattr(torch, name) for name in given.dtypes):
        for shape in given.shapes:
            heads, kv_heads, size, _ = SHAPES[shape]
            for columns in given.columns:
                for batch in given.batches:
                    entries = 2 * batch * kv_heads * columns * size * dtype.itemsize
                    if entries > 2e6 * given.megabytes:
                        continue
                    count = max(3, min(24, round(given.megabytes * 1e6 / entries)))
                    calls = ways(heads, kv_heads, size, batch, columns, dtype, count)
                    found = measure(calls, count, given.rounds)
                    row = {
                        "shape": shape,
                        "dtype": str(dtype).removeprefix("torch."),
                        "columns": columns,
                        "batch": batch,
                        "KV bytes": entries,
                        "microseconds": found,
                    }
                    rows.append(row)
                    print(_line(row), flush=True)
            found = layout_costs(kv_heads, size, max(given.columns), dtype)
            costs.append({"shape": shape, "dtype": str(dtype), "columns": max(given.columns),
                          "microseconds": found})  # fmt: skip
    return {"attention": rows, "layouts": costs}


def _line(row: dict[str, Any]) -> str:
    found = row["microseconds"]
    times = [f"{found[name]:.0f}" for name in WAYS]
    gain = min(found[PLAIN], found[MASKED]) / found[CHOSEN]
    speed = row["KV bytes"] / found[CHOSEN] / 1e3
    fixed = [row["shape"], row["dtype"], str(row["columns"]), str(row["batch"])]
    return "| " + " | ".join([*fixed, *times, f"{gain:.1f} x", f"{speed:.1f}"]) + " |"


def as_markdown(found: dict[str, Any], given: dict[str, Any]) -> str:
    """The page of a run."""
    head = ["shape", "dtype", "columns", "batch", *WAYS, "gain", "GB/s"]
    lines = ["# Attention of one decode step on a CPU", "", in_words(given), ""]
    lines += [f"    python benchmarks/{given['command']}", ""]
    clock = "of the processor" if given["threads"] == 1 else "by the wall clock"
    lines += [f"Microseconds {clock} for one layer; first decile of the calls.", ""]
    lines += [f"- {name}: {what}" for name, what in WAYS.items()]
    lines += ["- gain: the faster of both transformers columns over st3's", ""]
    lines += [f"- {shape}: query heads / KV heads x head size of {SHAPES[shape][3]}"
              for shape in dict.fromkeys(row["shape"] for row in found["attention"])]  # fmt: skip
    lines += ["", "| " + " | ".join(head) + " |", "|---" * 3 + "|---:" * (len(head) - 3) + "|"]
    lines += [_line(row) for row in found["attention"]]
    names = ["file, plain", "file, size first", "append, plain", "append, size first"]
    lines += ["", "What keys cost on the way in, batch 1, one layer, in microseconds: writing a",
              "prompt in another order, and appending a column.", ""]  # fmt: skip
    lines += ["| shape | dtype | columns | " + " | ".join(names) + " |"]
    lines += ["|---|---|---:|" + "---:|" * len(names)]
    for row in found["layouts"]:
        times = [f"{row['microseconds'][name]:.1f}" for name in names]
        fixed = [row["shape"], row["dtype"].removeprefix("torch."), str(row["columns"])]
        lines.append("| " + " | ".join([*fixed, *times]) + " |")
    return "\n".join(lines) + "\n"


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n\n")[0])
    parser.add_argument("--dtypes", nargs="+", default=["bfloat16", "float16", "float32"])
    parser.add_argument("--shapes", nargs="+", default=list(SHAPES), choices=list(SHAPES))
    parser.add_argument("--columns", nargs="+", type=int, default=[300, 1100, 2900])
    parser.add_argument("--batches", nargs="+", type=int, default=[1, 2, 8])
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument(
        "--megabytes",
        type=float,
        default=96,
        help="of each layout's buffers; layers of over twice as much are left out",
    )
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--name", default="decode-attention")
    given = parser.parse_args(arguments)
    torch.set_num_threads(given.threads)
    around = conditions(torch.device("cpu"), torch.bfloat16)
    around["dtype"] = ", ".join(given.dtypes)
    with torch.inference_mode():
        found = run(given)
    RESULTS.mkdir(exist_ok=True)
    data = json.dumps({"conditions": around} | found, indent=1)
    RESULTS.joinpath(f"{given.name}.json").write_text(data + "\n", encoding="utf-8")
    RESULTS.joinpath(f"{given.name}.md").write_text(as_markdown(found, around), encoding="utf-8")


if __name__ == "__main__":
    main()
