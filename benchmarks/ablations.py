"""The choices of `thirds`, of annealing and of scores: python -m benchmarks.ablations [--limit N]

Runs what ``st3 eval`` runs (answers, objects named, KL divergence along the untrimmed answers) on
the bundled scenes, for each ablation of :data:`ABLATIONS`; keeps finished items, so that a killed
run goes on; writes ``ablations.json``, a picture for each ablation and docs/ablations.md.
``--page`` only writes the page and the pictures anew from the finished JSON.
"""

from __future__ import annotations

import argparse
import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from rich.progress import Progress
from transformers import AutoModelForImageTextToText, AutoProcessor

import st3
from benchmarks.ablation_page import write_page
from st3.methods.policies import Policy, Random, parse
from st3.tools.common.conditions import conditions
from st3.tools.eval import (
    SEEDS,
    Entry,
    Evaluation,
    Store,
    bundled_scenes,
    fingerprint,
    summarise,
    to_dict,
)

RESULTS = Path("benchmarks/results/ablations.json")
ITEMS = Path("runs/ablations")  # finished items, not committed
KINDS = ("questions", "descriptions")
BUDGET, SMALLER = 0.35, 0.2


@dataclass(frozen=True)
class Ablation:
    """Variants that differ in one thing. The first is what the others are compared with.

    Attributes:
        budget: every variant is set to this mean visual share; None: as it is written.
        random: random choice at the first variant's counts stands below.
    """

    name: str
    question: str
    variants: dict[str, str]
    budget: float | None = None
    random: bool = False


def _scores(*names: str) -> dict[str, str]:
    return {name: f"balanced:curve=none,score={name}" for name in names}


def _thirds(name: str, *values: float) -> dict[str, str]:
    return {f"{name} = {value}": f"thirds:{name}={value}" for value in values}


_PARTS = {
    "thirds": "thirds",
    "without the grid": "thirds:salient=1",
    "without the tower: grid and attention": "thirds:salient=0",
    "without windows": "thirds:window=1000",
    "without attention": "thirds:every=1000",
    "without drops in the decoder": "thirds:later=1",
    "the embeddings in place of the tower": "thirds:tower=false",
}
_ONLY_VTA = "balanced:first_drop=0,final_keep=1"

ABLATIONS = (
    Ablation(
        "parts",
        "What each part of `thirds` earns: one left out at a time",
        _PARTS,
        budget=SMALLER,
        random=True,
    ),
    Ablation(
        "parts-35",
        "The same",
        _PARTS,
        budget=BUDGET,
        random=True,
    ),
    Ablation(
        "salient",
        "How much stands out: share of the tokens before the decoder, the others by the grid",
        _thirds("salient", 0.667, 0.333, 0.5, 0.8),
        budget=SMALLER,
    ),
    Ablation(
        "window",
        "The side of a window, in tokens; an image has 12",
        _thirds("window", 4, 2, 3, 6),
        budget=SMALLER,
    ),
    Ablation(
        "every",
        "How much attention chooses within the decoder: one place in so many",
        _thirds("every", 4, 2, 3, 6),
        budget=SMALLER,
    ),
    Ablation(
        "later",
        "How steep: what each of the two drops within the decoder leaves",
        _thirds("later", 0.667, 0.5, 0.8, 0.9),
        budget=SMALLER,
    ),
    Ablation(
        "tau",
        "How fast to anneal: period tau of the quarter cosine, floor 5 %, nothing dropped by depth",
        {
            "tau = 128": f"{_ONLY_VTA},tau=128",
            **{f"tau = {t}": f"{_ONLY_VTA},tau={t}" for t in (32, 64, 256, 512)},
            "no annealing": f"{_ONLY_VTA},curve=none",
        },
    ),
    Ablation(
        "curve",
        "Along which curve: tau = 128, floor 5 %, nothing dropped by depth",
        {
            "cosine": f"{_ONLY_VTA},tau=128",
            **{
                c.replace("_", " "): f"{_ONLY_VTA},curve={c},tau=128"
                for c in ("half_cosine", "linear", "exponential")
            },
        },
    ),
    Ablation(
        "floor",
        "How far to anneal: floor at tau = 64, nothing dropped by depth",
        {
            f"floor = {int(100 * f)} %": f"{_ONLY_VTA},tau=64,floor={f}"
            for f in (0.05, 0.0, 0.1, 0.2, 0.4)
        },
    ),
    Ablation(
        "rerank",
        "Ranking frozen at the prefill, made anew among what is visible, or among all that is "
        "stored; tau = 64, floor 20 %, nothing dropped by depth",
        {
            "frozen": f"{_ONLY_VTA},tau=64,floor=0.2",
            **{
                f"{what} every {n}": f"{_ONLY_VTA},tau=64,floor=0.2,{what}_every={n}"
                for what in ("rerank", "recall")
                for n in (1, 8)
            },
        },
        random=True,
    ),
    Ablation(
        "heredity",
        "QK heredity: blocks of lazy layers share the score of their first layer; S = 1",
        {
            "each layer": "balanced:stride=1,curve=none,score=attention",
            **{
                f"blocks of {n}": f"balanced:stride=1,curve=none,score=attention-lazy{n}"
                for n in (2, 4, 8)
            },
        },
        budget=BUDGET,
    ),
    Ablation(
        "rows",
        "Which row scores: the prompt's last token, all of its text, or the raters among it",
        _scores("attention", "text-rows", "text-raters"),
        budget=BUDGET,
    ),
    Ablation(
        "heads",
        "How heads are joined: mean, max, or the mean of the visual heads",
        _scores("attention", "attention-max", "attention-visual-heads"),
        budget=BUDGET,
    ),
    Ablation(
        "bias",
        "De-biased scores: by the trend over places, or without RoPE",
        _scores("attention", "attention-debiased", "attention-detrended", "attention-no-rope"),
        budget=BUDGET,
    ),
    Ablation(
        "score",
        "Scores that are no attention, in ST3's schedule",
        _scores("attention", "key_norm", "hidden-change", "dart", "feather", "uniform", "grid"),
        budget=BUDGET,
        random=True,
    ),
)


def entries_of(ablation: Ablation, num_layers: int) -> list[Entry]:
    """Its rows, the one that the others are compared with first; ``source`` is the label."""
    rows = []
    for label, text in ablation.variants.items():
        policy: Policy = parse(text)
        if ablation.budget is not None:
            policy = policy.at_budget(num_layers, ablation.budget)
        rows.append(Entry(policy, ablation.budget, source=label))
    if ablation.random:
        rows.append(Entry(Random(like=rows[0].policy), source="random choice"))
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--model", type=Path, default=st3.bundled_model())
    parser.add_argument("--limit", type=int, help="the first N items of each task")
    parser.add_argument("--only", nargs="+", choices=[a.name for a in ABLATIONS], metavar="NAME")
    parser.add_argument("--batch", type=int, default=16)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--out", type=Path, default=RESULTS)
    parser.add_argument("--items", type=Path, default=ITEMS, help="folder of finished items")
    parser.add_argument("--page", action="store_true", help="only write the page from --out")
    args = parser.parse_args()
    if not args.page:
        results = run(args)
        args.out.parent.mkdir(parents=True, exist_ok=True)
        args.out.write_text(json.dumps(results, indent=1) + "\n", encoding="utf-8")
    for path in write_page(json.loads(args.out.read_text(encoding="utf-8"))):
        print(f"written: {path}")


def run(args: argparse.Namespace) -> dict[str, Any]:
    """All ablations that are asked for, ready for JSON."""
    torch.set_num_threads(1)
    model = AutoModelForImageTextToText.from_pretrained(args.model, dtype=torch.float32).eval()
    model.to(args.device)
    processor = AutoProcessor.from_pretrained(args.model)
    layers = model.config.get_text_config().num_hidden_layers
    data = bundled_scenes().half("choose").only(limit=args.limit)
    data = type(data)(
        data.path, tuple(item for item in data.items if item.kind in KINDS), data.vocabulary
    )
    given = conditions(model.device, model.dtype) | {
        "items": len(data.items), "batch": args.batch, "half": "choose", "seeds": SEEDS,
    }  # fmt: skip
    settings = {"model": fingerprint(model), "data": data.fingerprint(), "engine": given["engine"]}
    store = Store(args.items, settings)
    chosen = [a for a in ABLATIONS if args.only is None or a.name in args.only]
    rows = {ablation.name: entries_of(ablation, layers) for ablation in chosen}
    everything = {e.label: e for group in rows.values() for e in group}
    untrimmed = Entry(parse("none"), source="untrimmed")
    work = Evaluation(model, processor, data, [untrimmed, *everything.values()], store, args.batch)
    with Progress() as progress:
        task = progress.add_task("ablations", total=work.missing)
        work.on_items = lambda count, what: progress.update(
            task, advance=count, description=what[:48]
        )
        records = work.run()
    base = to_dict(summarise(data, [untrimmed], records), given)
    return {
        "conditions": given,
        "untrimmed": base["kinds"],
        "ablations": [
            {
                "name": ablation.name,
                "question": ablation.question,
                "budget": ablation.budget,
                "labels": [entry.source for entry in rows[ablation.name]],
                # The first row stands where the untrimmed model stands elsewhere: differences and
                # times are to it.
                "kinds": to_dict(summarise(data, rows[ablation.name], records), given)["kinds"],
            }
            for ablation in chosen
        ],
    }


if __name__ == "__main__":
    main()
