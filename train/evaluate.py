"""Measure st3-tiny: ``python -m train.evaluate [--model FOLDER] [--scenes N] [--json FILE]``.

Single-word questions (one of each task per scene) with the image and with a blank one, and
the share of the objects that a description names.  Greedy, on scenes never trained on.
"""

from __future__ import annotations

import argparse
import json
from collections import defaultdict
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from PIL import Image
from tqdm import tqdm  # type: ignore[import-untyped]
from transformers import AutoModelForImageTextToText, AutoProcessor

from st3.tools.common.chats import ask, encode
from train.scenes import IMAGE_SIZE
from train.tasks import DESCRIBE, mentioned_objects
from train.testset import Example, held_out, read_set

MODEL = Path("src/st3/assets/st3-tiny")
# Longer than any description that the model was trained on.
DESCRIPTION_TOKENS = 160
ANSWER_TOKENS = 4


def load(folder: Path, dtype: torch.dtype = torch.float32) -> tuple[Any, Any]:
    """The model (in evaluation mode) and its processor, by plain ``from_pretrained``."""
    model = AutoModelForImageTextToText.from_pretrained(folder, dtype=dtype).eval()
    return model, AutoProcessor.from_pretrained(folder)


def blank() -> Image.Image:
    """The image of the baseline: plain gray, nothing to see."""
    return Image.new("RGB", (IMAGE_SIZE, IMAGE_SIZE), (128, 128, 128))


@torch.inference_mode()
def answer(
    model: Any,
    processor: Any,
    prompts: Sequence[tuple[Image.Image, str]],
    max_new_tokens: int,
    batch_size: int = 40,
) -> list[str]:
    """The greedy answers to (image, question) pairs, in left-padded batches."""
    answers: list[str] = []
    for start in tqdm(range(0, len(prompts), batch_size), leave=False):
        chats = [ask([image], text) for image, text in prompts[start : start + batch_size]]
        inputs = encode(model, processor, chats, padding=True)
        out = model.generate(**inputs, max_new_tokens=max_new_tokens, do_sample=False)
        new = out[:, inputs["input_ids"].shape[1] :]
        answers += [text.strip() for text in processor.batch_decode(new, skip_special_tokens=True)]
    return answers


def single_words(
    model: Any, processor: Any, examples: Sequence[Example], blind: bool = False
) -> dict[str, tuple[int, int]]:
    """Right answers and questions per task; ``blind`` shows a blank image instead."""
    rows = [
        (blank() if blind else item.image, *turn) for item in examples for turn in item.questions
    ]
    given = answer(model, processor, [(row[0], row[2]) for row in rows], ANSWER_TOKENS)
    right: dict[str, int] = defaultdict(int)
    asked: dict[str, int] = defaultdict(int)
    for (_, task, _, truth), text in zip(rows, given, strict=True):
        asked[task] += 1
        right[task] += text == truth
    return {task: (right[task], asked[task]) for task in sorted(asked)}


def accuracy(counts: dict[str, tuple[int, int]]) -> float:
    """The share of right answers over all tasks."""
    return sum(right for right, _ in counts.values()) / sum(asked for _, asked in counts.values())


def descriptions(model: Any, processor: Any, examples: Sequence[Example]) -> dict[str, float]:
    """Full descriptions: objects named, objects made up, tokens, and how many are exact."""
    prompts = [(item.image, DESCRIBE[0]) for item in examples]
    texts = answer(model, processor, prompts, DESCRIPTION_TOKENS)
    named = true = made_up = exact = tokens = 0
    for item, text in zip(examples, texts, strict=True):
        mentioned = mentioned_objects(text)
        true += len(item.names)
        named += len(set(mentioned) & set(item.names))
        made_up += len(set(mentioned) - set(item.names))
        exact += text == item.description
        tokens += len(processor.tokenizer(text)["input_ids"])
    return {
        "object_recall": named / true,
        "made_up_share": made_up / max(1, named + made_up),
        "exact": exact / len(examples),
        "mean_tokens": tokens / len(examples),
    }


def measure(model: Any, processor: Any, examples: Sequence[Example]) -> dict[str, Any]:
    """All of the figures, ready for JSON."""
    seen = single_words(model, processor, examples)
    blind = single_words(model, processor, examples, blind=True)
    return {
        "scenes": len(examples),
        "accuracy": accuracy(seen),
        "blank_accuracy": accuracy(blind),
        "tasks": {
            task: {
                "questions": asked,
                "accuracy": right / asked,
                "blank_accuracy": blind[task][0] / asked,
            }
            for task, (right, asked) in seen.items()
        },
        "descriptions": descriptions(model, processor, examples),
    }


def table(figures: dict[str, Any]) -> str:
    """The figures as Markdown."""
    lines = [
        "| task | questions | accuracy | with a blank image |",
        "| --- | ---: | ---: | ---: |",
    ]
    for task, row in figures["tasks"].items():
        lines.append(
            f"| {task} | {row['questions']} | {row['accuracy']:.1%} | {row['blank_accuracy']:.1%} |"
        )
    asked = sum(row["questions"] for row in figures["tasks"].values())
    lines += [
        f"| **all** | {asked} | {figures['accuracy']:.1%} | {figures['blank_accuracy']:.1%} |",
        "",
        "| descriptions | |",
        "| --- | ---: |",
        f"| objects named | {figures['descriptions']['object_recall']:.1%} |",
        f"| of these, not in the image | {figures['descriptions']['made_up_share']:.1%} |",
        f"| word for word right | {figures['descriptions']['exact']:.1%} |",
        f"| tokens, mean | {figures['descriptions']['mean_tokens']:.0f} |",
    ]
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", type=Path, default=MODEL)
    parser.add_argument("--scenes", type=int, default=200, help="held-out scenes to draw")
    parser.add_argument("--data", type=Path, help="a folder of scenes to read instead")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--json", type=Path, help="also write the figures to this file")
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    model, processor = load(args.model)
    examples = read_set(args.data) if args.data else held_out(args.scenes)
    figures = measure(model, processor, examples)
    print(table(figures))
    if args.json:
        args.json.write_text(json.dumps(figures, indent=2) + "\n")


if __name__ == "__main__":
    main()
