"""What is asked: the bundled scenes, or any folder of images with a JSONL file of questions.

One JSON object a line, one of three kinds (``image`` is a file name beside the JSONL file, or a
list of them; ``task`` is optional and names the row of the tables, ``half`` is optional, too, and
is the half of the set that the line belongs to, "choose" or "report")::

    {"image": "a.jpg", "question": "what colour is the car?", "answer": "red", "task": "colour"}
    {"image": "a.jpg", "captions": ["a red car on a road."], "objects": ["car"]}
    {"image": "a.jpg", "turns": [{"question": "...", "answer": "..."}, ...]}

``answer`` may be a list of accepted answers, or be left out: then the answers are held against the
untrimmed model's alone. ``objects`` are those that a description should name,
in the order of the reference. A file ``objects.txt`` beside the JSONL file lists all objects that
count as made up where they are not there, one a line, with synonyms behind commas.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from st3.tools.common.bundled import ASSETS

OBJECTS = "objects.txt"
CAPTION_PROMPT = "Describe the image in detail."

# Kinds of items, in the order of the tables: one question, one about several images, a
# conversation on one cache, a description.
QUESTION, IMAGES, TURNS, CAPTION = "questions", "several images", "conversations", "descriptions"
KINDS = (QUESTION, IMAGES, TURNS, CAPTION)

HALVES = ("choose", "report")


@dataclass(frozen=True)
class Turn:
    """A question, and the answers that count as right (none: they are not known, or it is a
    description)."""

    question: str
    answers: tuple[str, ...] = ()


@dataclass(frozen=True)
class Item:
    """One line of a set: images, and what is asked about them.

    Attributes:
        number: its place in the set, from 0; with ``task`` it names the item.
        captions: references of a description.
        objects: what a description should name, in the references' order; None: not known.
        half: the half of the set that it belongs to, if the set says so.
    """

    number: int
    task: str
    images: tuple[Path, ...]
    turns: tuple[Turn, ...]
    captions: tuple[str, ...] = ()
    objects: tuple[str, ...] | None = None
    half: str | None = None

    @property
    def kind(self) -> str:
        if self.captions or self.objects is not None:
            return CAPTION
        if len(self.turns) > 1:
            return TURNS
        return IMAGES if len(self.images) > 1 else QUESTION


@dataclass(frozen=True)
class Dataset:
    """Items, and the objects that may be named: synonym -> the name in ``Item.objects``."""

    path: Path
    items: tuple[Item, ...]
    vocabulary: dict[str, str]

    @property
    def tasks(self) -> list[str]:
        """The items' tasks, in order of the file."""
        return list(dict.fromkeys(item.task for item in self.items))

    def fingerprint(self) -> str:
        """Tells sets apart: a hash of the whole file of questions."""
        return hashlib.sha256(self.path.read_bytes()).hexdigest()[:16]

    def only(self, tasks: Sequence[str] | None = None, limit: int | None = None) -> Dataset:
        """The first ``limit`` items of each of these tasks (None: of all).

        Raises:
            ValueError: a task that the set does not have.
        """
        wanted = self.tasks if tasks is None else list(tasks)
        if unknown := [task for task in wanted if task not in self.tasks]:
            raise ValueError(f"no task {unknown[0]!r} in {self.path}: {', '.join(self.tasks)}")
        items: list[Item] = []
        for task in wanted:
            items += [item for item in self.items if item.task == task][:limit]
        return Dataset(self.path, tuple(items), self.vocabulary)

    def half(self, name: str) -> Dataset:
        """One half of the images with all that is asked about them, in order of the file: "choose"
        is the first one, to choose settings on, "report" the other, for the figures that are
        printed. Images that a question shows together are in one half. Where each line of the set
        has a "half", that is the one.

        Raises:
            ValueError: another name, or a set that cannot be cut.
        """
        if name not in HALVES:
            raise ValueError(f"no half {name!r} of a set: use {' or '.join(HALVES)}")
        if all(item.half for item in self.items):
            own = tuple(item for item in self.items if item.half == name)
            return Dataset(self.path, own, self.vocabulary)
        scenes = _shown_together(self.items)
        sizes = dict.fromkeys(scenes.values(), 0)
        for root in scenes.values():
            sizes[root] += 1
        first, seen = set(), 0
        for root, size in sizes.items():
            if seen < len(scenes) / 2:
                first.add(root)
            seen += size
        if len(first) == len(sizes):
            raise ValueError(f"{self.path} cannot be cut in two: its images are shown together")
        items = tuple(
            item for item in self.items if (scenes[item.images[0]] in first) == (name == HALVES[0])
        )
        return Dataset(self.path, items, self.vocabulary)


def _shown_together(items: Sequence[Item]) -> dict[Path, Path]:
    """For each image, in order, the first one of those that it is tied to by questions."""
    tied: dict[Path, Path] = {}

    def root(image: Path) -> Path:
        while tied[image] != image:
            image = tied[image]
        return image

    for item in items:
        for image in item.images:
            tied.setdefault(image, image)
            ends = root(item.images[0]), root(image)
            tied[max(ends)] = min(ends)
    return {image: root(image) for image in tied}


def bundled_scenes() -> Dataset:
    """Drawn scenes that st3-tiny was not trained on, with their questions and descriptions."""
    return load_folder(ASSETS / "scenes")


def load_folder(path: Path) -> Dataset:
    """A set from a JSONL file, or from a folder that holds one.

    Raises:
        ValueError: no such file, several of them, or a line that cannot be used; names the line.
    """
    source = _jsonl_of(path)
    items = []
    for number, line in enumerate(source.read_text(encoding="utf-8").splitlines()):
        if line.strip():
            try:
                items.append(_item(json.loads(line), number, source.parent))
            except (ValueError, TypeError, KeyError) as error:
                raise ValueError(f"{source}, line {number + 1}: {error}") from error
    if not items:
        raise ValueError(f"{source} is empty")
    return Dataset(source, tuple(items), _vocabulary(source.parent / OBJECTS, items))


def _jsonl_of(path: Path) -> Path:
    if path.is_file():
        return path
    if not path.is_dir():
        raise ValueError(f"no such folder or file: {str(path)!r}")
    found = sorted(path.glob("*.jsonl"))
    if len(found) != 1:
        raise ValueError(
            f"{path} holds {len(found)} .jsonl files: give the path of the one to use"
            if found
            else f"{path} holds no .jsonl file with the questions"
        )
    return found[0]


def _item(row: Any, number: int, folder: Path) -> Item:
    if not isinstance(row, dict):
        raise ValueError("each line must be a JSON object")
    names = _strings(row, "image")
    images = tuple(folder / name for name in names)
    if missing := [image for image in images if not image.is_file()]:
        raise ValueError(f"no such image: {str(missing[0])!r}")
    captions = _strings(row, "captions") if "captions" in row else ()
    objects = _strings(row, "objects", empty=True) if "objects" in row else None
    if "turns" in row:
        turns = tuple(_turn(turn) for turn in row["turns"])
        default = "conversation"
    elif captions or objects is not None:
        turns, default = (Turn(str(row.get("question", CAPTION_PROMPT))),), "describe"
    else:
        turns = (_turn(row),)
        default = "question" if len(images) == 1 else "several images"
    if not turns:
        raise ValueError("a conversation needs at least one turn")
    half = row.get("half")
    if half not in (None, *HALVES):
        raise ValueError(f'"half" must be {" or ".join(HALVES)}, got {half!r}')
    return Item(number, str(row.get("task", default)), images, turns, captions, objects, half)


def _turn(row: Any) -> Turn:
    if not isinstance(row, dict) or "question" not in row:
        raise ValueError('a line needs "question" (and "answer"), or "captions", or "turns"')
    return Turn(str(row["question"]), _strings(row, "answer") if "answer" in row else ())


def _strings(row: dict[str, Any], key: str, empty: bool = False) -> tuple[str, ...]:
    if key not in row:
        raise ValueError(f'"{key}" is missing')
    value = row[key]
    values = value if isinstance(value, list) else [value]
    if (not values and not empty) or not all(isinstance(v, str | int | float) for v in values):
        raise ValueError(f'"{key}" must be a string or a list of strings')
    return tuple(str(v) for v in values)


def _vocabulary(path: Path, items: Sequence[Item]) -> dict[str, str]:
    known = {name: name for item in items for name in item.objects or ()}
    if path.is_file():
        for line in path.read_text(encoding="utf-8").splitlines():
            words = [word.strip() for word in line.split(",") if word.strip()]
            known |= dict.fromkeys(words, words[0])
    return known
