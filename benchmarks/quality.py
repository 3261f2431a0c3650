"""The page of docs/quality.md: python -m benchmarks.quality [--limit N] [--page]

Runs ``st3 eval`` on the bundled model and its scenes with every method at the paper's budget and at
half of the visual tokens, in float32, and writes docs/quality.md with its pictures and
benchmarks/results/quality-st3-tiny.json. A killed run goes on where it was; ``--page`` only writes
the page anew.
"""

from __future__ import annotations

import argparse
import json
import shutil
from pathlib import Path
from typing import Any

import torch

from st3.methods import DEFAULT_POLICY
from st3.tools.cli._options import DType
from st3.tools.cli.eval import evaluate
from st3.tools.common.tables import markdown

ITEMS = Path("runs/quality")  # finished items, not committed
RESULTS = Path("benchmarks/results/quality-st3-tiny.json")
PAGE, PICTURES = Path("docs/quality.md"), Path("docs/img")
BUDGETS = (0.35, 0.5)
KEPT = 0.98  # of the untrimmed figure: the bar

INTRO = """# What it costs in answers

Every method of st3 on the bundled model, st3-tiny, and its bundled scenes, at equal mean visual
share: {budgets} of the visual tokens over the decoder layers. It is a small model (16 layers, 144
visual tokens), and its descriptions name up to nine objects in about 100 tokens: hard ground for
any method that drops visual tokens. [How it is measured](eval.md), also on your own model and
images. [What each choice of the default does](ablations.md).

"""
REPRODUCE = """
## Reproduce

<!-- no-test: takes hours on one core -->
```bash
python -m benchmarks.quality --limit 40   # without: all scenes
```
"""


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--limit", type=int, help="the first N items of each task")
    parser.add_argument("--policies", default="all")
    parser.add_argument("--batch", type=int, default=16)
    parser.add_argument("--items", type=Path, default=ITEMS, help="folder of finished items")
    parser.add_argument("--page", action="store_true", help="only write the page from --items")
    args = parser.parse_args()
    if not args.page:
        torch.set_num_threads(1)
        evaluate(
            model=None,
            data=None,
            tasks=None,
            policies=args.policies,
            budgets=",".join(map(str, BUDGETS)),
            limit=args.limit,
            batch=args.batch,
            max_new_tokens=None,
            out=args.items,
            device="cpu",
            dtype=DType.float32,
            trust_remote_code=False,
        )
    shutil.copy(args.items / "quality.json", RESULTS)
    body = (args.items / "quality.md").read_text(encoding="utf-8").partition("\n")[2].lstrip()
    for picture in sorted(args.items.glob("quality-*.png")):
        shutil.copy(picture, PICTURES / picture.name)
        body = body.replace(f"]({picture.name})", f"](img/{picture.name})")
    results = json.loads(RESULTS.read_text(encoding="utf-8"))
    budgets = " and ".join(f"{share:.0%}" for share in BUDGETS)
    page = INTRO.format(budgets=budgets) + bars(results) + "\n" + body + REPRODUCE
    PAGE.write_text(page, encoding="utf-8")
    print(f"written: {PAGE}, {RESULTS}")


def bars(results: dict[str, Any]) -> str:
    """What the default policy keeps of the untrimmed figures, and who is above it."""
    head = ("untrimmed", DEFAULT_POLICY, "kept", "bar", "above it at this share or less")
    lines = []
    for kind, name, title in (
        ("questions", "accuracy", "single words right"),
        ("descriptions", "recall", "objects named"),
    ):
        rows = results["kinds"].get(kind, {}).get("rows", [])
        ours = [r for r in rows if r["budget"] == BUDGETS[0] and _name(r) == DEFAULT_POLICY]
        if not ours:
            continue
        whole, own = rows[0]["values"][name][0], ours[0]["values"][name][0]
        above = [
            f"`{_name(row)}` {row['values'][name][0]:.1%}"
            for row in rows[1:]
            if row["mean_share"] <= ours[0]["mean_share"] + 0.005 and row["values"][name][0] > own
        ]
        kept = own / whole if whole else 1.0
        met = "met" if kept >= KEPT else "missed"
        lines.append(
            [title, f"{whole:.1%}", f"{own:.1%}", f"{kept:.1%}", f"{KEPT:.0%}: {met}",
             ", ".join(above) or "none"]
        )  # fmt: skip
    return markdown((f"at {BUDGETS[0]:.0%}", *head), lines, left=(0, 5)) + "\n"


def _name(row: dict[str, Any]) -> str:
    if row["random_beside"]:
        return f"random like {row['random_beside'].partition(':')[0]}"
    return str(row["policy"].partition(":")[0])


if __name__ == "__main__":
    main()
