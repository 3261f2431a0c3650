"""One request to the server's engine, on an idle machine and beside a process that never sleeps.

    python benchmarks/serving_busy.py            # about five minutes on two cores
    python benchmarks/serving_busy.py --quick    # a small model, to try it out

A random LLaVA of 24 layers (bf16) answers a request of 576 visual and --tokens new tokens. Each
arm is a process of its own with other threads (torch's), and another wait policy of the OpenMP
runtime: what a thread does that waits for the others, spin or sleep. The arms take turns --repeats
times; beside every second turn run --busy processes: loops, or with --rival torch matrix products
on all cores, whose threads spin as well. The files are named after both, serving-busy-torch-3.
"""

from __future__ import annotations

import argparse
import contextlib
import dataclasses
import json
import os
import statistics
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

RESULTS = Path(__file__).with_name("results")
CORES = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
ARMS: dict[str, tuple[int, dict[str, str]]] = {
    f"{CORES} threads, as OpenMP waits by default": (CORES, {}),
    f"{CORES} threads, OMP_WAIT_POLICY=passive": (CORES, {"OMP_WAIT_POLICY": "passive"}),
    f"{max(1, CORES - 1)} thread(s)": (max(1, CORES - 1), {}),
}


RIVALS = {
    "loop": "while True: pass",
    "torch": f"""import torch
torch.set_num_threads({CORES})
a = torch.randn(64, 64)
while True: a = torch.tanh(a @ a)
""",
}


def answer(threads: int, tokens: int, quick: bool) -> None:
    """One arm: for each line on stdin one request, its TTFT and TPOT on stdout."""
    import serving
    import torch

    from st3.tools.serve import Engine

    torch.set_num_threads(threads)
    size = serving.Size(8, 64, 6, 1) if quick else serving.Size(24, 1024, 24, 1)
    model, processor = serving.scaled(size)
    engine = Engine(model.to(torch.bfloat16), processor, "none", 1 << 30)
    image = serving._noise(size.side * 8, torch.Generator().manual_seed(0))
    turn = serving.ask([image], "describe the image in detail.")
    engine.complete(engine.prepare(turn, max_tokens=4))
    print("ready", flush=True)
    for _ in sys.stdin:
        done = engine.complete(engine.prepare(turn, max_tokens=tokens))
        step = (done.total - done.ttft) / max(1, tokens - 1)
        print(json.dumps({"ttft": done.ttft, "tpot": step, "total": done.total}), flush=True)
    engine.close()


@contextlib.contextmanager
def busy(count: int, code: str) -> Iterator[None]:
    """Processes that never sleep."""
    loops = [subprocess.Popen([sys.executable, "-c", code]) for _ in range(count)]
    try:
        yield
    finally:
        for loop in loops:
            loop.kill()
            loop.wait()


def start(threads: int, environment: dict[str, str], given: argparse.Namespace) -> Any:
    clean = {k: v for k, v in os.environ.items() if not k.startswith(("OMP_", "GOMP_", "KMP_"))}
    command = [sys.executable, __file__, "--arm", str(threads), "--tokens", str(given.tokens)]
    process = subprocess.Popen(
        command + ["--quick"] * given.quick,
        env={**clean, **environment},
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    )
    assert process.stdout is not None
    if process.stdout.readline().strip() != "ready":
        raise RuntimeError("an arm did not start")
    return process


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--quick", action="store_true", help="small, to try it out")
    parser.add_argument("--tokens", type=int, default=64)
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--busy", type=int, default=1, help="processes beside every second turn")
    parser.add_argument("--rival", choices=RIVALS, default="loop")
    parser.add_argument("--arm", type=int, help=argparse.SUPPRESS)
    parser.add_argument("--out", type=Path, default=RESULTS, help="folder of the results")
    given = parser.parse_args(argv)
    if given.arm:
        answer(given.arm, given.tokens, given.quick)
        return 0
    arms = {name: start(*how, given) for name, how in ARMS.items()}
    found: dict[str, dict[str, list[dict[str, float]]]] = {
        name: {"idle": [], "busy": []} for name in arms
    }
    for _ in range(given.repeats):
        for state, count in (("idle", 0), ("busy", given.busy)):
            for name, arm in arms.items():
                with busy(count, RIVALS[given.rival]):
                    time.sleep(0.5 if given.rival == "loop" or not count else 4)
                    arm.stdin.write("go\n")
                    arm.stdin.flush()
                    found[name][state].append(json.loads(arm.stdout.readline()))
    for arm in arms.values():
        arm.stdin.close()
        arm.wait(60)
    import torch
    from serving import Size

    from st3.tools.common.conditions import conditions, in_words
    from st3.tools.common.tables import markdown

    torch.set_num_threads(CORES)  # not those of this process, which measures nothing
    where = conditions(torch.device("cpu"), torch.bfloat16)
    rows = []
    for name, states in found.items():
        row = [name]
        for state in ("idle", "busy"):
            totals = [one["total"] for one in states[state]]
            tpot = statistics.median(one["tpot"] for one in states[state])
            row += [f"{statistics.median(totals):.1f}", f"{max(totals):.1f}", f"{1e3 * tpot:.0f}"]
        rows.append(row)
    head = ("", "alone, s", "worst", "ms a token",
            f"beside {given.busy} busy ({given.rival}), s", "worst", "ms a token")  # fmt: skip
    size = dataclasses.asdict(Size(24, 1024, 24, 1))
    text = (
        f"# One request beside a busy process\n\n{in_words(where)}; {CORES} cores, "
        f"{given.tokens} new tokens, {given.repeats} turns.\n\n{markdown(head, rows)}\n\n"
        "Seconds of the whole answer: the median of the turns, and the slowest. A rival of torch "
        f"computes on {CORES} threads.\n"
    )
    given.out.mkdir(parents=True, exist_ok=True)
    name = "serving-busy" + "-quick" * given.quick
    name += f"-{given.rival}" * (given.rival != "loop") + f"-{given.busy}" * (given.busy > 1)
    whole = {
        "conditions": where, "cores": CORES, "busy": given.busy, "rival": given.rival,
        "tokens": given.tokens, "size": size, "arms": found,
    }  # fmt: skip
    (given.out / f"{name}.json").write_text(json.dumps(whole, indent=1) + "\n", encoding="utf-8")
    (given.out / f"{name}.md").write_text(text, encoding="utf-8")
    print(text)
    return 0


if __name__ == "__main__":
    sys.exit(main())
