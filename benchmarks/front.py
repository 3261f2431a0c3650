"""The speeds of README.md: one setting, what trimming gains alone and what it gains in all.

    python benchmarks/front.py                 # all parts; ten minutes
    python benchmarks/front.py --part policies

Random weights (shape cpu-308m: 24 layers, d 1024), bf16, one thread, 64 text tokens. Each part is
written to benchmarks/results as JSON and Markdown. Let nothing else run.

    policies    batch 1, 576 visual tokens, 32 new: several policies and budgets
    batch       batch 4, 576 visual tokens, 32 new
    long        batch 1, 2,880 visual tokens, 32 new
    possible    the prefill beside bare layers, in rounds of its own, four times over
"""

from __future__ import annotations

import argparse
import dataclasses
from pathlib import Path

import torch
from rich.console import Console

from st3.methods import DEFAULT_POLICY
from st3.tools.bench import Subject, Workload, compare, from_shape, run
from st3.tools.bench.files import save
from st3.tools.common.conditions import conditions
from st3.tools.common.memory import keep_freed_memory

RESULTS = Path(__file__).with_name("results")
CPU = torch.device("cpu")
SETTING = f"{DEFAULT_POLICY}:budget=35%"
OTHERS = (
    f"{DEFAULT_POLICY}:budget=20%", "balanced:budget=35%", "grid:budget=35%", "fastv:budget=35%",
)  # fmt: skip
SHORT = Workload(visual=576, text=64, new_tokens=32)
PREFILL = dataclasses.replace(SHORT, new_tokens=0, repeats=1)
PARTS: dict[str, tuple[tuple[str, ...], list[Workload]]] = {
    "policies": ((SETTING, *OTHERS), [dataclasses.replace(SHORT, repeats=3)]),
    "batch": ((SETTING,), [dataclasses.replace(SHORT, batch=4, repeats=3)]),
    "long": ((SETTING,), [dataclasses.replace(SHORT, visual=2880, images=5, repeats=3)]),
    "possible": ((SETTING,), [dataclasses.replace(PREFILL, layer_rounds=6)] * 4),
}


def measure(part: str, subject: Subject, out: Path, console: Console) -> None:
    """Measure one part and write its files."""
    policies, workloads = PARTS[part]
    where = conditions(CPU, torch.bfloat16)
    where["freed_memory"] = "kept by the process"
    results = []
    for work in workloads:
        prefills = not work.new_tokens
        results.append(run(subject, work, compare(policies, peers=False), prefills=prefills))
        console.print(f"done: {part}: {work.title}")
    save(results, where, out, f"front-{part}", plots=False)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--part", nargs="+", choices=PARTS, default=list(PARTS))
    parser.add_argument("--shape", default="cpu-308m", help="tiny: to try the script out")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--out", type=Path, default=RESULTS)
    given = parser.parse_args()
    torch.set_num_threads(given.threads)
    keep_freed_memory()
    subject = from_shape(given.shape, CPU, torch.bfloat16)
    for part in given.part:
        measure(part, subject, given.out, Console(stderr=True))


if __name__ == "__main__":
    main()
