"""Settings of `thirds`, and others, on the half to choose on: python -m benchmarks.choose

Prints a line for each candidate and budget; finished items are kept, so that a killed run goes on.
"""

from __future__ import annotations

import sys
from dataclasses import replace
from pathlib import Path

import torch
from transformers import AutoModelForImageTextToText, AutoProcessor

import st3
from st3.methods.policies import parse
from st3.tools.common.conditions import engine
from st3.tools.eval import Entry, Evaluation, Item, Store, bundled_scenes, summarise

BUDGETS = (0.35, 0.2)
CANDIDATES = (
    "thirds",
    "balanced",
    "covered",
    "visionzip",
    "vscan",
    "cdpruner",
    "thirds:later=1",
    "thirds:salient=0.5",
    "thirds:salient=0.8",
    "thirds:window=6",
    "thirds:every=2",
    "thirds:every=3",
)
LIMITS = {"small object": 15, "small print": 15, "dense text": 15, "describe": 10}


def main() -> None:
    torch.set_num_threads(1)
    folder = st3.bundled_model()
    model = AutoModelForImageTextToText.from_pretrained(folder, dtype=torch.float32).eval()
    layers = model.config.get_text_config().num_hidden_layers
    half = bundled_scenes().half("choose")
    items: list[Item] = []
    for task in half.tasks:
        if task in ("two images", "conversation"):
            continue
        every = half.only([task]).items
        count = (
            0 if task in ("two images", "conversation") else min(LIMITS.get(task, 10), len(every))
        )
        items += [every[number * len(every) // count] for number in range(count)]
    data = replace(half, items=tuple(items))
    rows = [Entry(parse("none"), source="none")]
    for text in CANDIDATES:
        rows += [Entry(parse(text).at_budget(layers, b), b, source=text) for b in BUDGETS]
    rows += [Entry(parse("none"), b, source="downsample", shrink=b) for b in BUDGETS]
    store = Store(Path("runs/choose"), {"engine": engine(), "data": data.fingerprint()})
    work = Evaluation(model, AutoProcessor.from_pretrained(folder), data, rows, store)
    work.on_items = lambda count, what: print(f"\r{what[:70]:70}", end="", file=sys.stderr)
    made = summarise(data, rows, work.run()).rows
    for asked, said in zip(made["questions"], made["descriptions"], strict=True):
        figures = [asked.values["accuracy"].value, asked.values["kl"].value]
        figures += [asked.values["hard"].value if "hard" in asked.values else 0.0, asked.hard]
        figures += [said.values["recall"].value, said.values["kl"].value, asked.time]
        shown = " ".join(f"{value:8.3f}" for value in figures)
        print(f"{asked.entry.title:45} {shown}")


if __name__ == "__main__":
    main()
