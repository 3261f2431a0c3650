"""What trimming costs in answers, on the bundled model and its held-out scenes.

    python -m benchmarks.quality [--model FOLDER] [--scenes FOLDER | --drawn N] [--policies P ...]

For each policy: single-word accuracy; of long descriptions the objects named (all, and by third of
the description: annealing is felt at the end), those made up, and loyalty: the share of the
untrimmed description's words that stand at the same place. Greedy, fp32. ``--drawn N`` draws N
scenes that training never saw (needs the font of train/); without it the fixed set of the tests is
used. Writes Markdown to stdout and, with --out, JSON beside it.
"""

from __future__ import annotations

import argparse
import json
import platform
from pathlib import Path
from typing import Any

import torch
import transformers

import st3
from train.evaluate import DESCRIPTION_TOKENS, accuracy, answer, load, single_words
from train.tasks import DESCRIBE, mentioned_objects
from train.testset import Example, held_out, read_set

SCENES = Path("tests/data/scenes")
ANNEALING = [
    "none",
    "st3:curve=none",
    *(f"st3:tau={tau},floor={floor}" for tau in (32, 64, 128, 256) for floor in (0.05, 0.2)),
    "st3:curve=half_cosine,tau=128,floor=0.1",
    "st3:curve=linear,tau=128,floor=0.1",
    "st3:curve=exponential,tau=64,floor=0.1",
    "st3:curve=cosine,tau=64,floor=0.1,rerank_every=8",
    "random:like=(st3:curve=none)",
]


def describe_all(model: Any, processor: Any, examples: list[Example]) -> list[str]:
    prompts = [(item.image, DESCRIBE[0]) for item in examples]
    return answer(model, processor, prompts, DESCRIPTION_TOKENS)


def recall(texts: list[str], examples: list[Example]) -> dict[str, float]:
    """Objects named, of all and by third of the reading order; and the share that is made up."""
    named, true = [0, 0, 0], [0, 0, 0]
    made_up = mentions = 0
    for text, item in zip(texts, examples, strict=True):
        said = set(mentioned_objects(text))
        for place, name in enumerate(item.names):
            third = 3 * place // len(item.names)
            true[third] += 1
            named[third] += name in said
        made_up += len(said - set(item.names))
        mentions += len(said)
    thirds = [n / t for n, t in zip(named, true, strict=True)]
    return {
        "recall": sum(named) / sum(true),
        "first": thirds[0],
        "middle": thirds[1],
        "last": thirds[2],
        "made_up": made_up / max(mentions, 1),
    }


def loyalty(texts: list[str], untrimmed: list[str]) -> float:
    """Share of the untrimmed words that the trimmed answer has at the same place."""
    same = total = 0
    for text, other in zip(texts, untrimmed, strict=True):
        words, others = text.split(), other.split()
        total += len(others)
        same += sum(a == b for a, b in zip(words, others, strict=False))
    return same / max(total, 1)


def measure(
    model: Any, processor: Any, examples: list[Example], policy: str, untrimmed: list[str] | None
) -> tuple[dict[str, Any], list[str]]:
    """One row, and the descriptions."""
    with st3.trim(model, policy) as trimmer:
        words = single_words(model, processor, examples)
        texts = describe_all(model, processor, examples)
        report = trimmer.report
    row = {
        "policy": policy,
        "mean_share": report.mean_share,
        "kv_mean": report.kv_mean_ratio,
        "accuracy": accuracy(words),
        **recall(texts, examples),
        "loyalty": loyalty(texts, texts if untrimmed is None else untrimmed),
    }
    return row, texts


def table(rows: list[dict[str, Any]]) -> str:
    heads = {
        "mean_share": "mean share",
        "kv_mean": "KV mean",
        "accuracy": "single words",
        "recall": "objects named",
        "first": "first third",
        "middle": "middle",
        "last": "last third",
        "made_up": "made up",
        "loyalty": "loyalty",
    }
    lines = [
        "| policy | " + " | ".join(heads.values()) + " |",
        "|---|" + "--:|" * len(heads),
    ]
    for row in rows:
        cells = " | ".join(f"{row[key]:.1%}" for key in heads)
        lines.append(f"| `{row['policy']}` | {cells} |")
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", type=Path, default=st3.bundled_model())
    parser.add_argument("--scenes", type=Path, default=SCENES)
    parser.add_argument("--drawn", type=int, help="draw this many held-out scenes")
    parser.add_argument("--policies", nargs="+", default=ANNEALING)
    parser.add_argument("--out", type=Path)
    args = parser.parse_args()
    examples = held_out(args.drawn) if args.drawn else read_set(args.scenes)
    model, processor = load(args.model)
    rows: list[dict[str, Any]] = []
    _, untrimmed = measure(model, processor, examples, "none", None)
    for policy in args.policies:
        row, _ = measure(model, processor, examples, policy, untrimmed)
        rows.append(row)
        print(table(rows[-1:]).splitlines()[-1], flush=True)
    conditions = (
        f"{len(examples)} scenes, fp32, greedy; torch {torch.__version__}, transformers "
        f"{transformers.__version__}, Python {platform.python_version()}"
    )
    print(f"\n{table(rows)}\n\n{conditions}")
    if args.out:
        args.out.parent.mkdir(parents=True, exist_ok=True)
        args.out.write_text(json.dumps({"conditions": conditions, "rows": rows}, indent=1) + "\n")


if __name__ == "__main__":
    main()
