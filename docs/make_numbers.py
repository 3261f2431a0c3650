"""Write the measured tables of README.md and of pages in docs: python docs/make_numbers.py

A table stands between `<!-- table: NAME -->` and `<!-- end -->`. Each is made of files in
benchmarks/results, which hold every sample, the machine and the command; tests/test_docs_numbers.py
fails where a page and the files differ.
"""

from __future__ import annotations

import json
import re
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from statistics import median

from st3.methods import DEFAULT_POLICY
from st3.tools.common.tables import markdown

sys.path.insert(0, str(Path(__file__).resolve().parent))  # tests load this file by its path
from gpu_tables import gpu_graphs, gpu_lengths, gpu_prefill
from measured import OWN_CACHE, RESULTS, gain, held, percent, trimmed

ROOT = Path(__file__).resolve().parent.parent
PAGES = (
    ROOT / "README.md",
    *(
        ROOT / "docs" / f"{name}.md"
        for name in ("benchmarks", "gpu", "models", "serving", "scale-out")
    ),
)
SETTING = f"{DEFAULT_POLICY}:budget=35%"


def quality() -> dict[tuple[str, float | None], tuple[str, str]]:
    """(policy, budget) -> questions answered right, and the difference to untrimmed in points, with
    a 95 % interval. Of random choice, that like the default."""
    data = json.loads((RESULTS / "quality-reported.json").read_text(encoding="utf-8"))
    found = {}
    for row in data["kinds"]["questions"]["rows"]:
        name, beside = row["policy"].split(":")[0], row["random_beside"]
        if beside is None or beside.split(":")[0] == DEFAULT_POLICY:
            points = [f"{100 * one:+.1f}" for one in row["differences"]["accuracy"]]
            found[name, row["budget"]] = (
                percent(row["values"]["accuracy"][0]),
                f"{points[0]} [{points[1]}, {points[2]}]",
            )
    return found


def setting() -> str:
    """Saving, speed and answers of the same policies at the same budgets."""
    (work,) = held("front-policies")
    answers = quality()
    head = (
        "policy and budget", "FLOPs left", "KV left", "first token", "answer of 32 tokens",
        "answers right", "points to untrimmed [95 %]",
    )  # fmt: skip
    rows = [["untrimmed", "100 %", "100 %", "1", "1", answers["none", None][0], "-"]]
    policies = (
        SETTING, f"{DEFAULT_POLICY}:budget=20%", "balanced:budget=35%", "grid:budget=35%",
        "fastv:budget=35%",
    )  # fmt: skip
    for policy in policies:
        found = trimmed(work["by"], policy)
        name, budget = policy.split(":budget=")
        speed = found["by_trimming"]
        rows.append(
            [
                f"`{policy}`",
                percent(1 / found["flops_ratio"]),
                percent(found["kv_live_ratio"]),
                gain(speed["ttft"]),
                gain(speed["total"]),
                *answers[name, float(budget.strip("%")) / 100],
            ]
        )
    return markdown(head, rows)


def answers() -> str:
    """What the default and others lose at a budget of 35 %, the best first."""
    found = quality()
    names = {
        "downsample": "a smaller image, untrimmed",
        DEFAULT_POLICY: f"**`{DEFAULT_POLICY}`, the default**",
        "grid": "`grid`: an even grid, no attention",
        "random": "`random`: random choice, same counts",
    }
    others = (
        "visionzip", "vscan", "covered", "balanced", "hiprune", "scope", "sparsevlm", "fastv",
    )  # fmt: skip
    rows = [
        [names.get(name, f"`{name}`"), *found[name, 0.35]]
        for name in (*names, *others)
        if (name, 0.35) in found
    ]
    rows.sort(key=lambda row: -float(row[1].split()[0]))
    head = ("at 35 % of the visual tokens", "answers right", "points to untrimmed [95 %]")
    return markdown(head, [["untrimmed, 100 %", found["none", None][0], "-"], *rows])


def lengths() -> str:
    """The default on several prompts: what trimming gains alone, and what it gains in all."""
    head = (
        "prompt, batch", "FLOPs left", "KV left", "first token", "further token",
        "answer of 32 tokens", "cache alone", "in all",
    )  # fmt: skip
    rows = []
    for name in ("front-policies", "front-batch", "front-long"):
        (work,) = held(name)
        load = work["workload"]
        found, cache = trimmed(work["by"], SETTING), work["by"][OWN_CACHE]
        rows.append(
            [
                f"{load['visual']:,} visual tokens, batch {load['batch']}",
                percent(1 / found["flops_ratio"]),
                percent(found["kv_live_ratio"]),
                *(gain(found["by_trimming"][key]) for key in ("ttft", "tpot", "total")),
                gain(cache["speed_up"]["total"]),
                gain(found["speed_up"]["total"]),
            ]
        )
    return markdown(head, rows)


def possible() -> str:
    """Four runs of the same measurement, one after the other."""
    head = ("run", "FLOPs ratio", "possible", "of possible", "outside of the layers")
    rows = []
    for number, work in enumerate(held("front-possible"), 1):
        found = trimmed(work["by"], SETTING)
        what = found["possible"]
        rows.append(
            [
                str(number),
                f"{found['flops_ratio']:.2f}",
                *(
                    f"{one['median']:.3f} ({one['low']:.3f} to {one['high']:.3f})"
                    for one in (what["gain"], what["reached"])
                ),
                percent(what["outside"]),
            ]
        )
    return markdown(head, rows)


def layers() -> str:
    """One layer's time by its columns, of the first of those runs."""
    work = held("front-possible")[0]
    whole = work["workload"]["visual"] + work["workload"]["text"]
    found = trimmed(work["by"], SETTING)["possible"]["layers"]
    head = (
        "columns", "layers", "untouched, ms", "bare, ms", "trimmed, ms", "untouched / bare",
        "ratio of columns",
    )  # fmt: skip
    rows = [
        [
            str(one["columns"]),
            str(one["layers"]),
            *(f"{1e3 * one[key]:.1f}" for key in ("untouched_s", "bare_s", "trimmed_s")),
            f"{one['untouched_s'] / one['bare_s']:.2f}",
            f"{whole / one['columns']:.2f}",
        ]
        for one in found
    ]
    return markdown(head, rows, left=())


def prefills() -> str:
    """Prefill speed-ups over the FLOPs ratio: st3's policies and other ways."""
    head = ("method", "visual tokens", "precision", "FLOPs ratio", "prefill (spread)", "/ FLOPs")
    rows = []
    for name in ("cpu-quick", "cpu-quick-prefill-2880"):
        for work in held(name):
            load, dtype = work["workload"], work["model"].split(", ")[1]
            if load["new_tokens"] or load["repeats"] > 9:
                continue
            for label, found in work["by"].items():
                if found["flops_ratio"] > 1:
                    rows.append(
                        [
                            label,
                            f"{load['visual']:,}",
                            dtype,
                            f"{found['flops_ratio']:.2f}",
                            gain(found["speed_up"]["prefill"]),
                            f"{found['prefill_speed_up_over_flops_ratio']:.2f}",
                        ]
                    )
    return markdown(head, rows, left=(0, 2))


def steps() -> str:
    """Decode steps over the time in which memory can deliver what they read."""
    head = ("method", "batch", "visual tokens", "TPOT, ms", "step / bound")
    works = [one for one in held("cpu-quick") if one["workload"]["new_tokens"] == 32]
    works += [one for one in held("cpu-decode-2880") if one["workload"]["batch"] == 8]
    rows = []
    for work in works:
        load = work["workload"]
        for label in ("untouched", OWN_CACHE, "balanced"):
            found = work["by"][label]
            rows.append(
                [
                    label,
                    str(load["batch"]),
                    f"{load['visual']:,}",
                    f"{1e3 * found['tpot_s']:.0f}",
                    f"{found['step_over_bound']:.2f}",
                ]
            )
    return markdown(head, rows)


def vllm() -> str:
    """vLLM with st3 and without, in equal bytes of KV cache."""
    data = json.loads((RESULTS / "vllm-capacity.json").read_text(encoding="utf-8"))
    head = ("policy", "requests at once", "tokens per second", "first token")
    names = {"off": "vLLM alone", "balanced": "`balanced`", "st3-7b": "`st3-7b`"}
    rows = []
    for mode, name in {**names, "fastv": "`fastv`"}.items():
        found = data["modes"][mode]
        speed = f"{found['tokens_per_s']:.0f} ({found['throughput_ratio']:.2f} x)"
        most = str(found["most_at_once"])
        rows.append([name, most, speed, f"{found['first_token_speedup']:.2f} x"])
    return markdown(head, rows)


def serving() -> str:
    """The server in equal bytes of KV cache: medians; ratios are of the turns."""
    arms = json.loads((RESULTS / "serving.json").read_text(encoding="utf-8"))["capacity"]["arms"]
    head = ("policy", "requests at once", "answers per second", "first token, s", "KV, MiB")
    rows = []
    for arm in arms:
        cells = [f"`{arm['policy']}`"]
        for key, form in (("at_once", "{:.0f}"), ("requests_per_s", "{:.3f}")):
            ratios = [a / b for a, b in zip(arm[key], arms[0][key], strict=True)]
            cells.append(f"{form.format(median(arm[key]))} ({median(ratios):.2f} x)")
        cells += [f"{median(arm['ttft']):.1f}", f"{arm['kv_bytes'] / 2**20:.1f}"]
        rows.append(cells)
    return markdown(head, rows)


def scale_out() -> str:
    """`st3 batch` by policy and batch size."""
    data = json.loads((RESULTS / "scale-out.json").read_text(encoding="utf-8"))
    head = list(data["rows"][0])
    return markdown(head, [list(row.values()) for row in data["rows"]])


def families() -> str:
    """The models that can be trimmed, by name."""
    from st3.models import families as known
    from st3.models.hub import HUB_IDS

    rows = [
        [
            one.name,
            f"`{one.model_type}`",
            f"`{HUB_IDS[one.model_type]}`" if one.model_type in HUB_IDS else "-",
            "yes" if one.video else "no",
            "yes" if one.layout.placed else "no",
        ]
        for one in sorted(known(), key=lambda one: one.name.lower())
    ]
    head = ("family", "`model_type`", "a hub id", "video", "heat map")
    return markdown(head, rows, left=(0, 1, 2, 3, 4))


TABLES: dict[str, Callable[[], str]] = {
    f.__name__: f
    for f in (
        setting,
        answers,
        lengths,
        possible,
        layers,
        prefills,
        steps,
        vllm,
        serving,
        scale_out,
        families,
        gpu_prefill,
        gpu_lengths,
        gpu_graphs,
    )
}
BLOCK = re.compile(r"(<!-- table: (\w+) -->).*?(<!-- end -->)", re.S)


def render(page: str) -> str:
    """The page with its tables made anew."""
    return BLOCK.sub(lambda found: f"{found[1]}\n\n{TABLES[found[2]]()}\n\n{found[3]}", page)


def pages() -> Iterator[tuple[Path, str, str]]:
    """Each page: its path, its text, and its text with the tables made anew."""
    for path in PAGES:
        text = path.read_text(encoding="utf-8")
        yield path, text, render(text)


if __name__ == "__main__":
    for where, old, new in pages():
        where.write_text(new, encoding="utf-8")
        print(f"{where}: {'unchanged' if new == old else 'rewritten'}")
