"""Two checkouts of st3 against each other in one run: is the new one as fast as the old one?

    python benchmarks/old_new.py --old ../st3-before --old-python ../env-5.23/bin/python

Two processes, one for each checkout and each with a Python of its own, make the same models of
random weights and take turns: prefill at 576 and 2,880 visual tokens, then decode steps from a
cache that stays. Printed is the old time over the new one, medians over all turns (from 0.99 on
the new one is no slower), with the quartiles of the ratios of neighbouring turns. Works with every
layout of st3 that has ``st3.trim``; only that is called. Let nothing else run.
"""

from __future__ import annotations

import argparse
import itertools
import json
import os
import statistics
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
GOAL = 0.99
# layers, hidden size, MLP width, query heads, KV heads, size of a head
SHAPES = {
    "tiny": (8, 64, 128, 4, 2, 16),
    "mha": (24, 1024, 2816, 16, 16, 64),  # cpu-308m of `st3 bench`
    "gqa-16-4": (24, 1024, 2816, 16, 4, 64),
    "gqa-32-8": (12, 1024, 2816, 32, 8, 128),
    "gqa-28-4": (12, 1792, 2816, 28, 4, 128),
}
# Written out, so that a change of defaults or presets is no change of what is compared.
POLICY = (
    "st3:first_layer=3,first_drop=0.5,final_keep=0.01,stride=4,curve=cosine,tau=128,floor=0.05,"
    "score=attention"
)
UNTRIMMED = ("untouched", "own-cache")
# what, same token on both sides, the old side's turns of seconds, the new side's
Row = tuple[str, bool, list[list[float]], list[list[float]]]


# -- in the worker -------------------------------------------------------------------------------


class Worker:
    """Answers the requests of the process that started it; nothing is imported before that asks."""

    def __init__(self) -> None:
        self.steps: Any = None

    def make(self, shape: str, dtype: str, threads: int, clock: str) -> dict[str, Any]:
        """A model of a shape; what was made before is let go."""
        import torch
        import transformers

        torch.set_num_threads(threads)
        self.clock = time.process_time if clock == "cpu" else time.perf_counter
        self.model = self.steps = None
        layers, hidden, wide, heads, kv_heads, size = SHAPES[shape]
        config = transformers.LlavaConfig(
            vision_config=transformers.CLIPVisionConfig(
                hidden_size=32, intermediate_size=64, num_hidden_layers=1, num_attention_heads=2,
                image_size=28, patch_size=14,
            ),
            text_config=transformers.LlamaConfig(
                hidden_size=hidden, intermediate_size=wide, num_hidden_layers=layers,
                num_attention_heads=heads, num_key_value_heads=kv_heads, head_dim=size,
                vocab_size=1024, max_position_embeddings=8192,
            ),
            image_token_index=1000,
        )  # fmt: skip
        torch.manual_seed(0)
        model = transformers.AutoModelForImageTextToText.from_config(
            config, dtype=getattr(torch, dtype), attn_implementation="sdpa"
        )
        self.model: Any = model.eval()
        import inspect

        known = inspect.signature(model.model.language_model.forward).parameters
        self.cache_name = "cache" if "cache" in known else "past_key_values"
        return {"torch": torch.__version__, "transformers": transformers.__version__}

    def prefill(self, method: str, visual: int, batch: int) -> dict[str, Any]:
        """Seconds of a prefill, and the token that it chooses."""
        with self._attached(method, visual, batch):
            _, out, seconds = self._prefill(visual, batch)
        return {"seconds": [seconds], "token": int(out.logits[0, -1].argmax())}

    def begin(self, method: str, visual: int, batch: int) -> dict[str, Any]:
        """A prefill whose cache stays for :meth:`step`, until :meth:`end`."""
        self.context = self._attached(method, visual, batch)
        self.context.__enter__()
        cache, _, seconds = self._prefill(visual, batch)
        self.steps = [cache, self._prompt(visual, batch).shape]
        return {"seconds": [seconds]}

    def step(self, count: int) -> dict[str, Any]:
        """Seconds of each of so many decode steps; the first is left out: it finds other things in
        the processor's caches."""
        import torch

        cache, (batch, length) = self.steps
        seconds = []
        for _ in range(count + 1):
            length += 1
            token = torch.full((batch, 1), 7)
            mask = torch.ones(batch, length, dtype=torch.long)
            seconds.append(self._timed(input_ids=token, attention_mask=mask, cache=cache)[1])
        self.steps[1] = (batch, length)
        return {"seconds": seconds[1:]}

    def end(self) -> dict[str, Any]:
        self.context.__exit__(None, None, None)
        self.steps = None
        return {}

    def _prompt(self, visual: int, batch: int) -> Any:
        import torch

        generator = torch.Generator().manual_seed(visual)
        return torch.randint(1, 900, (batch, visual + 60), generator=generator)

    def _attached(self, method: str, visual: int, batch: int) -> Any:
        import contextlib

        import torch

        if method == "untouched":
            return contextlib.nullcontext()
        import st3

        mask = torch.zeros(batch, visual + 60, dtype=torch.bool)
        mask[:, 20 : 20 + visual] = True
        if method == "own-cache":
            return st3.trim(self.model, "none", own_cache=True, visual_mask=mask)
        return st3.trim(self.model, method, visual_mask=mask)

    def _prefill(self, visual: int, batch: int) -> tuple[Any, Any, float]:
        import torch
        from transformers import DynamicCache

        ids = self._prompt(visual, batch)
        cache = DynamicCache(config=self.model.config.get_text_config(decoder=True))
        out, seconds = self._timed(input_ids=ids, attention_mask=torch.ones_like(ids), cache=cache)
        return cache, out, seconds

    def _timed(self, cache: Any, **inputs: Any) -> tuple[Any, float]:
        import torch

        with torch.no_grad():
            start = self.clock()
            out = self.model(**inputs, **{self.cache_name: cache}, use_cache=True, logits_to_keep=1)
            return out, self.clock() - start


def serve() -> None:
    """Requests and answers are lines of JSON; what libraries print goes to stderr."""
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)
    worker = Worker()
    for line in sys.stdin:
        request = json.loads(line)
        try:
            answer = getattr(worker, request.pop("do"))(**request)
        except Exception as error:  # told to the other side, which stops
            answer = {"error": f"{type(error).__name__}: {error}"}
        print(json.dumps(answer), file=answers, flush=True)


# -- in the process that asks --------------------------------------------------------------------


class Side:
    """One checkout, in a process of its own."""

    def __init__(self, name: str, checkout: Path, python: str) -> None:
        self.name = name
        self.versions: dict[str, Any] = {}
        source = checkout.resolve() / "src"
        if not (source / "st3" / "__init__.py").is_file():
            raise ValueError(f"no st3 in {str(source)!r}: give the folder of a checkout")
        told = {
            "PYTHONPATH": str(source),
            "OMP_WAIT_POLICY": "PASSIVE",  # threads of the side that waits do not spin
            # glibc keeps what is freed, see st3.tools.common.memory.keep_freed_memory.
            "MALLOC_MMAP_MAX_": "0",
            "MALLOC_TRIM_THRESHOLD_": str(2**31 - 1),
            "MALLOC_TOP_PAD_": str(1 << 28),
        }
        self.process = subprocess.Popen(
            [python, str(Path(__file__).resolve()), "--worker"],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            env={**os.environ, **told},
        )

    def ask(self, do: str, **given: Any) -> dict[str, Any]:
        if self.process.stdin is None or self.process.stdout is None:
            raise RuntimeError("the worker has no pipes")
        self.process.stdin.write(json.dumps({"do": do, **given}) + "\n")
        self.process.stdin.flush()
        line = self.process.stdout.readline()
        answer: dict[str, Any] = json.loads(line) if line else {"error": "the process ended"}
        if "error" in answer:
            raise RuntimeError(f"{self.name}: {do}: {answer['error']}")
        return answer

    def close(self) -> None:
        if self.process.stdin is not None:
            self.process.stdin.close()
        self.process.wait(timeout=60)


def turns(sides: list[Side], rounds: int, do: str, **given: Any) -> list[list[dict[str, Any]]]:
    """Answers of both sides, which take turns; who begins changes."""
    answers: list[list[dict[str, Any]]] = [[], []]
    for number in range(rounds):
        for place in (0, 1) if number % 2 == 0 else (1, 0):
            answers[place].append(sides[place].ask(do, **given))
    return answers


def compare(old: list[list[float]], new: list[list[float]]) -> dict[str, Any]:
    """Turns of seconds -> medians, their ratio, and the quartiles of the ratios of turns."""
    middle = [statistics.median(itertools.chain(*side)) for side in (old, new)]
    pairs = [statistics.median(a) / statistics.median(b) for a, b in zip(old, new, strict=True)]
    low, _, high = statistics.quantiles(pairs, n=4) if len(pairs) > 1 else (pairs * 3)
    return {
        "old_s": middle[0], "new_s": middle[1], "ratio": middle[0] / middle[1],
        "low": low, "high": high, "turns": len(pairs),
    }  # fmt: skip


def measure(sides: list[Side], given: argparse.Namespace) -> list[Row]:
    """All rows of one pair of processes; each is told on stderr when it is there."""
    rows: list[Row] = []

    def note(what: str, answers: list[list[dict[str, Any]]], same: bool = True) -> None:
        old, new = ([answer["seconds"] for answer in side] for side in answers)
        rows.append((what, same, old, new))
        told = compare(old, new)
        print(f"{what}: {told['ratio']:.3f} [{told['low']:.3f}, {told['high']:.3f}]",
              file=sys.stderr, flush=True)  # fmt: skip

    for shape in given.shapes:
        for dtype in given.dtypes:
            for side in sides:
                side.versions = side.ask(
                    "make", shape=shape, dtype=dtype, threads=given.threads, clock=given.clock
                )
            for visual in given.lengths:
                for method in [*given.untrimmed, given.policy]:
                    name = f"{shape}, {dtype}, {visual} visual, {_short(method)}"
                    asked = {"method": method, "visual": visual}
                    if "prefill" in given.sections:
                        turns(sides, 1, "prefill", **asked, batch=1)
                        found = turns(sides, given.rounds, "prefill", **asked, batch=1)
                        tokens = [{answer["token"] for answer in side} for side in found]
                        note(f"prefill: {name}", found, tokens[0] == tokens[1])
                    for batch in given.batches if "decode" in given.sections else ():
                        turns(sides, 1, "begin", **asked, batch=batch)
                        turns(sides, 1, "step", count=2)
                        found = turns(sides, given.rounds, "step", count=given.steps)
                        turns(sides, 1, "end")
                        note(f"decode step, batch {batch}: {name}", found)
    return rows


def merge(found: list[list[Row]]) -> list[dict[str, Any]]:
    """Rows of several pairs of processes -> one row each over all turns."""
    rows = []
    for same in zip(*found, strict=True):
        old, new = ([turn for row in same for turn in row[side]] for side in (2, 3))
        rows.append({"what": same[0][0], "same": all(row[1] for row in same), **compare(old, new)})
        each = [compare(row[2], row[3])["ratio"] for row in same]
        rows[-1]["processes"] = each
    return rows


def _short(method: str) -> str:
    return method if method in UNTRIMMED else "trimmed"


def page(rows: list[dict[str, Any]], sides: list[Side], given: argparse.Namespace) -> str:
    from st3.tools.common.tables import markdown

    cells = [
        [
            row["what"], f"{1e3 * row['old_s']:.1f}", f"{1e3 * row['new_s']:.1f}",
            f"{row['ratio']:.3f}", f"{row['low']:.3f} to {row['high']:.3f}",
            f"{min(row['processes']):.3f} to {max(row['processes']):.3f}", row["turns"],
            ("yes" if row["ratio"] >= GOAL else "no") + ("" if row["same"] else ", other token"),
        ]
        for row in rows
    ]  # fmt: skip
    head = (
        "",
        "old, ms",
        "new, ms",
        "old / new",
        "quartiles of turns",
        "pairs of processes",
        "turns",
        f"from {GOAL} on",
    )
    told = [
        f"{side.name}: {checkout}, torch {side.versions['torch']}, "
        f"transformers {side.versions['transformers']}"
        for side, checkout in zip(sides, (given.old, given.new), strict=True)
    ]
    clock = "time of the processor" if given.clock == "cpu" else "wall time"
    load = f"{given.threads} thread, load average {os.getloadavg()[0]:.1f}"
    around = f"{clock}, {load}, policy {given.policy}"
    return "\n\n".join([markdown(head, cells, left=(0, 7)), *told, around]) + "\n"


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--old", type=Path, required=True, help="folder of a checkout")
    parser.add_argument("--new", type=Path, default=ROOT)
    parser.add_argument("--old-python", default=sys.executable)
    parser.add_argument("--new-python", default=sys.executable)
    parser.add_argument("--sections", nargs="+", choices=("prefill", "decode"),
                        default=["prefill", "decode"])  # fmt: skip
    parser.add_argument("--shapes", nargs="+", choices=SHAPES, default=list(SHAPES)[1:])
    parser.add_argument("--dtypes", nargs="+", default=["bfloat16", "float32"])
    parser.add_argument("--lengths", nargs="+", type=int, default=[576, 2880])
    parser.add_argument("--batches", nargs="+", type=int, default=[1, 2], help="of decode steps")
    parser.add_argument("--untrimmed", nargs="*", choices=UNTRIMMED, default=list(UNTRIMMED))
    parser.add_argument("--policy", default=POLICY)
    parser.add_argument("--rounds", type=int, default=9, help="turns of each side")
    parser.add_argument(
        "--processes", type=int, default=1,
        help="times that both sides start anew: where a process's memory lies stays as it is while "
        "it lives, and makes its decode steps some percent faster or slower",
    )  # fmt: skip
    parser.add_argument("--steps", type=int, default=6, help="decode steps in a turn")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument(
        "--clock", choices=("wall", "cpu"), default="wall",
        help="cpu: time of the processor, for a machine that others use",
    )  # fmt: skip
    parser.add_argument("--out", type=Path, help="file for the rows as JSON")
    given = parser.parse_args(arguments)
    found: list[list[Row]] = []
    sides: list[Side] = []
    try:
        for _ in range(given.processes):
            sides = []
            try:
                sides.append(Side("old", given.old, given.old_python))
                sides.append(Side("new", given.new, given.new_python))
                found.append(measure(sides, given))
            finally:
                for side in sides:
                    side.close()
    except (RuntimeError, ValueError, OSError) as error:
        sys.exit(f"error: {error}")
    rows = merge(found)
    if given.out is not None:
        given.out.write_text(json.dumps(rows, indent=1) + "\n", encoding="utf-8")
    print(page(rows, sides, given))


if __name__ == "__main__":
    if sys.argv[1:] == ["--worker"]:
        serve()
    else:
        main()
