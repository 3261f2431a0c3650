"""Draw the scenes that `st3 eval` asks about: python -m benchmarks.scenes [--count N] [--out DIR]

Writes images, ``scenes.jsonl`` and ``objects.txt`` in the format of
:mod:`st3.tools.eval.data`: for each scene single-word questions of all tasks and a description, for
pairs of neighbours questions about two images, for every second scene a conversation. Seeds that
training never uses, nor any other set. Needs the emoji font of train/; the same command writes the
same files.
"""

from __future__ import annotations

import argparse
import json
import random
from pathlib import Path
from typing import Any

from train.scenes import HELD_OUT, Scene, draw, sample_scene
from train.tasks import (
    DESCRIBE,
    SINGLE_WORD,
    Turn,
    conversation,
    describe,
    pair_conversation,
    questions,
)
from train.world import DIGITS, EMOJI, LETTERS

START = HELD_OUT + 700_000
OUT = Path("src/st3/assets/scenes")
ROUNDS = 2  # draws of a question of each task per scene; those drawn twice are asked once
PAIR_TURNS, TURNS = 4, 4


def phrase(name: str) -> str:
    """An object as descriptions write it: "cat", "letter k", "digit 3"."""
    if name in EMOJI:
        return name
    return f"{'digit' if name in DIGITS else 'letter'} {name}"


def single_words(scene: Scene) -> list[Turn]:
    drawn = [
        turn
        for again in range(ROUNDS)
        for turn in sorted(questions(scene, random.Random(scene.seed + again)))
        if turn[0] in SINGLE_WORD
    ]
    once = {(task, answer if task in ("count", "digit", "letter") else question): turn
            for turn in drawn for task, question, answer in [turn]}  # fmt: skip
    return sorted(once.values(), key=lambda turn: SINGLE_WORD.index(turn[0]))


def rows_of(scenes: list[Scene], names: list[str]) -> list[dict[str, Any]]:
    rows: list[dict[str, Any]] = []
    for scene, name in zip(scenes, names, strict=True):
        rows += [
            {"image": name, "task": task, "question": question, "answer": answer}
            for task, question, answer in single_words(scene)
        ]
    for scene, name in zip(scenes, names, strict=True):
        objects = [phrase(thing) for thing in scene.names]
        rows.append(
            {"image": name, "task": "describe", "question": DESCRIBE[0],
             "captions": [describe(scene)], "objects": objects}
        )  # fmt: skip
    for first in range(0, len(scenes) - 1, 2):
        pair, files = scenes[first : first + 2], names[first : first + 2]
        asked = pair_conversation(pair[0], pair[1], random.Random(pair[0].seed), PAIR_TURNS)
        rows += [
            {"image": files, "task": "two images", "question": question, "answer": answer}
            for _, question, answer in asked
        ]
    for scene, name in list(zip(scenes, names, strict=True))[::2]:
        turns = [
            {"question": question, "answer": answer}
            for task, question, answer in conversation(scene, random.Random(scene.seed), 3 * TURNS)
            if task in SINGLE_WORD
        ]
        rows.append({"image": name, "task": "conversation", "turns": turns[:TURNS]})
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--count", type=int, default=64)
    parser.add_argument("--out", type=Path, default=OUT)
    args = parser.parse_args()
    args.out.mkdir(parents=True, exist_ok=True)
    scenes = [sample_scene(START + number) for number in range(args.count)]
    names = [f"{number:03d}.webp" for number in range(args.count)]
    for scene, name in zip(scenes, names, strict=True):
        draw(scene).save(args.out / name, lossless=True, quality=100, method=6)
    lines = [json.dumps(row) for row in rows_of(scenes, names)]
    (args.out / "scenes.jsonl").write_text("\n".join(lines) + "\n")
    known = [phrase(name) for name in (*EMOJI, *DIGITS, *LETTERS)]
    (args.out / "objects.txt").write_text("\n".join(known) + "\n")


if __name__ == "__main__":
    main()
