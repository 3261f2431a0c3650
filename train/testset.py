"""Sets of held-out scenes with their truth: drawn anew, or read from a folder of PNG files."""

from __future__ import annotations

import json
import random
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

from PIL import Image

from train.scenes import HELD_OUT, Scene, draw, sample_scene
from train.tasks import SINGLE_WORD, Turn, describe, questions
from train.world import PLACES

TRUTH = "scenes.jsonl"


@dataclass(frozen=True)
class Example:
    """An image with what is in it; ``questions`` are (task, question, answer)."""

    image: Image.Image
    objects: list[dict[str, str | None]]  # name, place, size, colour
    background: str
    description: str
    questions: list[Turn]
    seed: int

    @property
    def names(self) -> list[str]:
        return [str(thing["name"]) for thing in self.objects]


def example(scene: Scene) -> Example:
    """One single-word question of each task that the scene allows, and the description."""
    turns = questions(scene, random.Random(scene.seed))
    return Example(
        image=draw(scene),
        objects=[
            {
                "name": thing.name,
                "place": PLACES[thing.cell],
                "size": thing.size_word,
                "colour": thing.colour,
            }
            for thing in scene.things
        ],
        background=scene.background,
        description=describe(scene),
        questions=[turn for turn in turns if turn[0] in SINGLE_WORD],
        seed=scene.seed,
    )


def held_out(count: int, start: int = 0) -> list[Example]:
    """``count`` scenes whose seeds training never uses; needs the emoji font."""
    return [example(sample_scene(HELD_OUT + start + i)) for i in range(count)]


def write_set(folder: Path, examples: Iterable[Example]) -> None:
    """PNG files and ``scenes.jsonl``, one line per image."""
    folder.mkdir(parents=True, exist_ok=True)
    lines = []
    for number, item in enumerate(examples):
        name = f"{number:03d}.png"
        item.image.save(folder / name, optimize=True)
        lines.append(
            json.dumps(
                {
                    "image": name,
                    "seed": item.seed,
                    "background": item.background,
                    "objects": item.objects,
                    "description": item.description,
                    "questions": item.questions,
                }
            )
        )
    (folder / TRUTH).write_text("\n".join(lines) + "\n")


def read_set(folder: Path) -> list[Example]:
    """What ``write_set`` wrote; needs no font."""
    examples = []
    for line in (folder / TRUTH).read_text().splitlines():
        row = json.loads(line)
        with Image.open(folder / row.pop("image")) as image:
            pixels = image.convert("RGB")
        turns = [(task, question, answer) for task, question, answer in row.pop("questions")]
        examples.append(Example(image=pixels, questions=turns, **row))
    return examples
