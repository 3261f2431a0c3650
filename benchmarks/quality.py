"""The page of docs/quality.md: python -m benchmarks.quality [--page]

Runs what ``st3 eval`` runs, with every method for images, on the half of the bundled scenes that no
setting was chosen on, at 35 % and at 20 % of the visual tokens, in float32. Writes
benchmarks/results/quality-reported.json and .md, docs/quality.md and its pictures. A killed run
goes on where it was; ``--page`` only writes the page anew. Results of a tree with changes or of
another version of the core are refused.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from transformers import AutoModelForImageTextToText, AutoProcessor

import st3
from benchmarks.quality_page import chosen_rows, write_page
from st3.methods import DEFAULT_POLICY
from st3.methods.policies import available, parse
from st3.tools.common.conditions import conditions, versions
from st3.tools.eval import (
    SEEDS,
    Dataset,
    Entry,
    Evaluation,
    Item,
    Store,
    Summary,
    as_markdown,
    bundled_scenes,
    entries,
    fingerprint,
    summarise,
    to_dict,
    usable,
)
from st3.tools.eval.data import KINDS
from st3.tools.eval.plot import draw_all

ITEMS = Path("runs/quality")  # finished items, not committed
RESULTS = Path("benchmarks/results/quality-reported.json")
WHOLE_RESULTS = Path("benchmarks/results/quality-whole.json")
PICTURES = Path("docs/img")
BUDGETS = (0.35, 0.2)
HALF = "report"
# Items of each task, in the order in which they are asked; 10 where nothing is said.
LIMITS = {"small object": 15, "small print": 15, "dense text": 15, "describe": 10,
          "two images": 8, "conversation": 4}  # fmt: skip
# Baselines stand beside anyway; two keep all in the prefill; the last two are for videos.
LEFT_OUT = ("none", "random", "dycoke", "evict", "evs", "vidcom2")
# Of all questions and descriptions of the half: narrower intervals, of fewer rows.
WHOLE = (DEFAULT_POLICY, "balanced", "covered", "visionzip", "vscan", "cdpruner")
WHOLE_TASKS = ("place", "count", "exists", "relation", "digit", "letter", "colour",
               "small object", "small print", "dense text", "describe")  # fmt: skip
# Random choice stands beside the default alone: others have other counts, at the same mean share.
RANDOM_BESIDE = (DEFAULT_POLICY,)


def scenes(limit: int | None = None) -> Dataset:
    """The items that are asked, of as many images as can be; ``limit`` of each task, if it is
    less."""
    half = bundled_scenes().half(HALF)
    tasks = [task for task in half.tasks if task not in LIMITS] + list(LIMITS)
    items: list[Item] = []
    for task in tasks:
        every = half.only([task]).items
        count = min(LIMITS.get(task, 10), limit or 20, len(every))
        items += [every[number * len(every) // count] for number in range(count)]
    return replace(half, items=tuple(items))


def rows_for(
    model: Any, layers: int, names: Sequence[str] | None = None
) -> tuple[list[Entry], list[str]]:
    """The rows of the tables, of all policies or of those that are named, and a note on what is
    left out."""
    every = sorted(set(available()) - set(LEFT_OUT), key=lambda name: name != DEFAULT_POLICY)
    names = every if names is None else names
    able, refused = usable(model, [parse(name) for name in names])
    rows, notes = entries(able, BUDGETS, layers)
    kept = [row for row in rows if row.beside is None or _name(row.beside) in RANDOM_BESIDE]
    return kept, refused + notes


def _name(label: str) -> str:
    return label.partition(":")[0]


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--limit", type=int, help="at most N items of each task")
    parser.add_argument("--kinds", default=",".join(KINDS), help=f"of {', '.join(KINDS)}")
    parser.add_argument("--batch", type=int, default=16)
    parser.add_argument("--items", type=Path, default=ITEMS, help="folder of finished items")
    parser.add_argument(
        "--whole", action="store_true", help="all items of the half, for the best policies alone"
    )
    parser.add_argument("--page", action="store_true", help="only write the page from the JSON")
    args = parser.parse_args()
    if args.whole:
        summary, given = run(args)
        WHOLE_RESULTS.write_text(
            json.dumps(to_dict(summary, given), indent=1) + "\n", encoding="utf-8"
        )
    elif not args.page:
        summary, given = run(args)
        RESULTS.write_text(json.dumps(to_dict(summary, given), indent=1) + "\n", encoding="utf-8")
        RESULTS.with_suffix(".md").write_text(as_markdown(summary, given), encoding="utf-8")
        shown = {kind: chosen_rows(rows) for kind, rows in summary.rows.items()}
        draw_all(replace(summary, rows=shown), PICTURES, "st3-tiny, the reported half")
    print(f"written: {write_page(RESULTS, WHOLE_RESULTS)}")


def run(args: argparse.Namespace) -> tuple[Summary, dict[str, Any]]:
    """Measure what is missing."""
    torch.set_num_threads(1)
    folder = st3.bundled_model()
    model = AutoModelForImageTextToText.from_pretrained(folder, dtype=torch.float32).eval()
    processor = AutoProcessor.from_pretrained(folder)
    data, kinds = scenes(args.limit), args.kinds.split(",")
    if args.whole:
        data = bundled_scenes().half(HALF).only(WHOLE_TASKS, args.limit)
    data = replace(data, items=tuple(item for item in data.items if item.kind in kinds))
    layers = model.config.get_text_config().num_hidden_layers
    rows, notes = rows_for(model, layers, WHOLE if args.whole else None)
    given = conditions(model.device, model.dtype) | {
        "model": "st3-tiny",
        "data": "the bundled scenes",
        "half": HALF,
        "items": len(data.items),
        "batch": args.batch,
        "seeds": SEEDS,
    }
    settings = {"model": fingerprint(model), "data": data.fingerprint(), **versions()}
    settings |= {"engine": given["engine"], "batch": args.batch}
    store = Store(args.items / "whole" if args.whole else args.items, settings)
    work = Evaluation(model, processor, data, rows, store, args.batch)
    left = [work.missing]

    def tell(count: int, what: str) -> None:
        left[0] -= count
        print(f"\r{left[0]} left, {what[:60]:60}", end="", file=sys.stderr, flush=True)

    work.on_items = tell
    return summarise(data, rows, work.run(), notes), given


if __name__ == "__main__":
    main()
