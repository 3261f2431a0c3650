"""Draw the scenes that `st3 eval` asks about: python -m benchmarks.scenes [--count N] [--out DIR]

Writes images, ``scenes.jsonl`` and ``objects.txt`` in the format of
:mod:`st3.tools.eval.data`: for each scene single-word questions of all tasks and a description, for
pairs of neighbours questions about two images, for every second scene a conversation. Behind them
stand harder scenes than training drew: small objects, small print, dense text. The first half of
each kind is marked "choose", the other "report". Seeds that training never uses, nor any other set.
Needs the emoji font of train/; the same command writes the same files.
"""

from __future__ import annotations

import argparse
import json
import random
from dataclasses import replace
from pathlib import Path
from typing import Any

from train.scenes import CELL, HELD_OUT, Scene, Thing, draw, sample_drill, sample_scene
from train.tasks import (
    DESCRIBE,
    PLACE,
    SINGLE_WORD,
    Turn,
    conversation,
    describe,
    pair_conversation,
    questions,
)
from train.world import DIGITS, EMOJI, LETTERS, PLACES

START = HELD_OUT + 700_000
OUT = Path("src/st3/assets/scenes")
ROUNDS = 2  # draws of a question of each task per scene; those drawn twice are asked once
PAIR_TURNS, TURNS = 4, 4
HARD, ASKED = 12, 5  # scenes of each hard task, and questions about each
SMALL = (11, 14)  # pixels of the longer side; training's smallest are 16


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


def small_objects(number: int) -> tuple[Scene, list[Thing]]:
    """A scene whose objects are smaller than training's, anywhere in their cells; all are asked
    about."""
    scene = _resized(sample_scene(START + 100_000 + number), lambda thing: True)
    return scene, list(scene.things)


def small_print(number: int) -> tuple[Scene, list[Thing]]:
    """Letters and digits smaller than training's, among objects of any size; the former are asked
    about."""
    glyphs = random.Random(number).sample((*DIGITS, *LETTERS), 4)
    scene = sample_scene(START + 200_000 + number, 8, tuple(glyphs))
    scene = _resized(scene, lambda thing: thing.kind != "emoji")
    return scene, [thing for thing in scene.things if thing.kind != "emoji"]


def dense_text(number: int) -> tuple[Scene, list[Thing]]:
    """A full scene, six of whose nine objects are letters and digits; they are asked about."""
    scene = sample_drill(START + 300_000 + number)
    return scene, [thing for thing in scene.things if thing.kind != "emoji"]


HARDER = {"small object": small_objects, "small print": small_print, "dense text": dense_text}


def _resized(scene: Scene, which: Any) -> Scene:
    rng = random.Random(scene.seed)
    things = []
    for thing in scene.things:
        if which(thing):
            size = rng.randint(*SMALL)
            room = (CELL - size) // 2
            dx, dy = rng.randint(-room, room), rng.randint(-room, room)
            thing = replace(thing, size=size, dx=dx, dy=dy)
        things.append(thing)
    return replace(scene, things=tuple(things))


def harder(first: int) -> tuple[list[Scene], list[dict[str, Any]]]:
    """The scenes of the hard tasks, the first of which is image ``first``, and their rows."""
    scenes, rows = [], []
    for task, make in HARDER.items():
        for number in range(HARD):
            scene, things = make(number)
            name = f"{first + len(scenes):03d}.webp"
            rng = random.Random(scene.seed)
            for thing in sorted(rng.sample(things, min(ASKED, len(things))), key=lambda t: t.cell):
                question = rng.choice(PLACE).format(place=PLACES[thing.cell])
                rows.append(
                    {"image": name, "task": task, "question": question, "answer": thing.name,
                     "half": _half(number, HARD)}
                )  # fmt: skip
            scenes.append(scene)
    return scenes, rows


def _half(number: int, count: int) -> str:
    return "choose" if number < count // 2 else "report"


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--count", type=int, default=80)
    parser.add_argument("--out", type=Path, default=OUT)
    args = parser.parse_args()
    args.out.mkdir(parents=True, exist_ok=True)
    scenes = [sample_scene(START + number) for number in range(args.count)]
    names = [f"{number:03d}.webp" for number in range(args.count)]
    rows = rows_of(scenes, names)
    for row in rows:
        first = row["image"] if isinstance(row["image"], str) else row["image"][0]
        row["half"] = _half(names.index(first), args.count)
    hard, more = harder(args.count)
    names += [f"{args.count + number:03d}.webp" for number in range(len(hard))]
    for scene, name in zip([*scenes, *hard], names, strict=True):
        draw(scene).save(args.out / name, lossless=True, quality=100, method=6)
    lines = [json.dumps(row) for row in rows + more]
    (args.out / "scenes.jsonl").write_text("\n".join(lines) + "\n")
    known = [phrase(name) for name in (*EMOJI, *DIGITS, *LETTERS)]
    (args.out / "objects.txt").write_text("\n".join(known) + "\n")


if __name__ == "__main__":
    main()
