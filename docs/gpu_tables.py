"""The tables of docs/gpu.md, of the files that benchmarks/gpu.py wrote."""

from __future__ import annotations

import json
import re
from typing import Any

from measured import OWN_CACHE, RESULTS, gain, held

from st3.tools.common.tables import markdown

GPU = "gpu-llava-1.5-7b"
SEVEN = "st3:first_layer=3,final_keep=0.01,stride=4"


def named(label: str) -> str:
    """A method's name in a table."""
    if label in ("untouched", OWN_CACHE):
        return label
    return "`st3-7b`" if label == SEVEN else f"`{label}`"


def card(name: str) -> str:
    """The GPU of a result: "H100"."""
    data = json.loads((RESULTS / f"{name}.json").read_text(encoding="utf-8"))
    return str(data["conditions"]["machine"].split()[1])


def gpu_extra(kind: str) -> dict[str, list[dict[str, Any]]]:
    """The tables of a part of the GPU table, by title."""
    data = json.loads((RESULTS / f"{GPU}-{kind}.json").read_text(encoding="utf-8"))
    return {title: rows for title, rows in data.items() if isinstance(rows, list)}


def gpu_prefill() -> str:
    """Prefills on a GPU: in all, by trimming alone, and of what is possible."""
    head = (
        "card", "batch", "visual tokens", "policy", "FLOPs ratio", "untouched, ms", "trimmed, ms",
        "in all", "trimming alone", "of possible",
    )  # fmt: skip
    names = [f"{GPU}-latency-{run}" for run in ("b1", "b1-h100", "b8")]
    works = [(card(name), work) for name in names for work in held(name)]
    works = [works[0], works[2], *works[3:]]  # (576 tokens at batch 1 were measured anew)
    rows = []
    for where, work in works:
        load = work["workload"]
        for label, found in work["by"].items():
            if label in ("untouched", OWN_CACHE):
                continue
            rows.append(
                [
                    where,
                    str(load["batch"]),
                    f"{load['visual']:,}",
                    named(label),
                    f"{found['flops_ratio']:.2f}",
                    f"{1e3 * work['by']['untouched']['prefill_s']:.1f}",
                    f"{1e3 * found['prefill_s']:.1f}",
                    gain(found["speed_up"]["prefill"]),
                    gain(found["by_trimming"]["prefill"]),
                    f"{found['possible']['reached']['median']:.2f}",
                ]
            )
    return markdown(head, rows, left=(0, 3))


def gpu_lengths() -> str:
    """Prompts of lengths that no method met before, one at a time."""
    rows = []
    for title, found in gpu_extra("lengths").items():
        tokens = re.search(r"(\d+) visual", title)
        for one in found if tokens else []:
            times = [f"{one[key]:.0f}" for key in ("first token, ms", "TPOT, mean, ms")]
            method = named(one["method"])
            rows.append([f"{int(tokens[1]):,}", method, *times])  # type: ignore[index]
    head = ("visual tokens", "method", "first token, ms", "further token, mean, ms")
    return markdown(head, rows, left=(1,))


def gpu_graphs() -> str:
    """Decode steps as CUDA graphs."""
    head = ("batch", "visual tokens", "method", "step, ms", "as a graph, ms", "graph / bound")
    rows = [
        [
            str(one["batch"]),
            f"{one['visual']:,}",
            named(one["method"]),
            f"{one['TPOT usual, ms']:.1f}",
            *(
                "-" if one[key] is None else form.format(one[key])
                for key, form in (
                    ("TPOT compiled, ms", "{:.1f}"),
                    ("compiled / time to read its bytes", "{:.2f}"),
                )
            ),
        ]
        for one in gpu_extra("graphs")["decode steps in one graph"]
    ]
    return markdown(head, rows, left=(2,))
