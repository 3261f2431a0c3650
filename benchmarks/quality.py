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
PICTURES = Path("docs/img")
BUDGETS = (0.35, 0.2)
HALF = "report"
# Items of each task, in the order in which they are asked; 10 where nothing is said.
LIMITS = {"small object": 15, "small print": 15, "dense text": 15, "describe": 10,
          "two images": 8, "conversation": 4}  # fmt: skip
# Baselines stand beside anyway; two keep all in the prefill; the last two are for videos.
LEFT_OUT = ("none", "random", "dycoke", "evict", "evs", "vidcom2")
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


def rows_for(model: Any, layers: int) -> tuple[list[Entry], list[str]]:
    """The rows of the tables, and a note on what is left out."""
    names = sorted(set(available()) - set(LEFT_OUT), key=lambda name: name != DEFAULT_POLICY)
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
    parser.add_argument("--page", action="store_true", help="only write the page from the JSON")
    args = parser.parse_args()
    if not args.page:
        summary, given = run(args)
        RESULTS.write_text(json.dumps(to_dict(summary, given), indent=1) + "\n", encoding="utf-8")
        RESULTS.with_suffix(".md").write_text(as_markdown(summary, given), encoding="utf-8")
        shown = {kind: chosen_rows(rows) for kind, rows in summary.rows.items()}
        draw_all(replace(summary, rows=shown), PICTURES, "st3-tiny, the reported half")
    print(f"written: {write_page(RESULTS)}, {RESULTS}")


def run(args: argparse.Namespace) -> tuple[Summary, dict[str, Any]]:
    """Measure what is missing."""
    torch.set_num_threads(1)
    folder = st3.bundled_model()
    model = AutoModelForImageTextToText.from_pretrained(folder, dtype=torch.float32).eval()
    processor = AutoProcessor.from_pretrained(folder)
    data, kinds = scenes(args.limit), args.kinds.split(",")
    data = replace(data, items=tuple(item for item in data.items if item.kind in kinds))
    rows, notes = rows_for(model, model.config.get_text_config().num_hidden_layers)
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
    store = Store(args.items, settings)
    work = Evaluation(model, processor, data, rows, store, args.batch)
    left = [work.missing]

    def tell(count: int, what: str) -> None:
        left[0] -= count
        print(f"\r{left[0]} left, {what[:60]:60}", end="", file=sys.stderr, flush=True)

    work.on_items = tell
    return summarise(data, rows, work.run(), notes), given


if __name__ == "__main__":
    main()
