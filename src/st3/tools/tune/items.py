"""On what a policy is chosen: items in two halves, and how much of an answer counts as kept."""

from __future__ import annotations

import math
import random
import re
from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path

import torch

from st3.tools.eval import text
from st3.tools.eval.data import (
    CAPTION,
    QUESTION,
    Dataset,
    Item,
    bundled_scenes,
    load_folder,
)
from st3.tools.eval.stats import LEVEL, Metric, metric
from st3.tools.eval.store import Record

LEAST = 8  # items: four in each half
DESCRIPTIONS = 3  # of the bundled scenes, for one question of each kind


@dataclass(frozen=True)
class Questions:
    """A set, cut in two.

    Attributes:
        data: all items that are used; an item's task is its kind, so that kinds run in batches.
        search, confirm: the halves; no image is in both.
        labelled: whether answers are held against labels; else against the untrimmed answers.
    """

    data: Dataset
    search: tuple[Item, ...]
    confirm: tuple[Item, ...]
    labelled: bool
    notes: list[str] = field(default_factory=list)

    @property
    def unit(self) -> str:
        """What is counted."""
        return "right answers" if self.labelled else "next tokens"


def read_goal(given: str) -> float:
    """The share of a goal such as "98% of answers", "98%" or "0.98".

    Raises:
        ValueError: anything else, or a share outside of (0, 1].
    """
    found = re.fullmatch(r"\s*(\d+(?:\.\d+)?)\s*(%?)(?:\s+of\s+(?:the\s+)?answers)?\s*", given)
    share = float(found[1]) / (100 if found[2] else 1) if found else 0.0
    if not 0 < share <= 1:
        raise ValueError(f"goal {given!r} is no share: write 98% or '98% of answers'")
    return share


def questions(path: Path | None, limit: int | None = None, seed: int = 0) -> Questions:
    """Items of a JSONL file, or of the bundled scenes, in two halves of about the same kinds.

    Args:
        limit: use so many items at most, spread over the file; None: all, of the scenes 40.
        seed: of the order in which images are dealt to the halves.

    Raises:
        ValueError: a file that cannot be used, or too few items.
    """
    data = load_folder(path) if path is not None else _scenes()
    items = [replace(item, task=item.kind) for item in data.items]
    if limit is None and path is None:
        limit = 40
    if limit is not None and limit < len(items):
        items = [items[i * len(items) // limit] for i in range(limit)]
    if len(items) < LEAST:
        raise ValueError(
            f"{data.path} has {len(items)} items: give at least {LEAST}, better 40 or more, as one "
            "half chooses and the other confirms"
        )
    search, confirm = _halves(items, seed)
    if min(len(search), len(confirm)) < LEAST // 2:
        raise ValueError(
            f"the items of {data.path} are about too few images to be cut in two: use more images"
        )
    labels = [_labelled(item) for item in items]
    notes = []
    if any(labels) and not all(labels):
        notes.append(
            f"{labels.count(False)} of {len(items)} items have no answer: all are held against the "
            "untrimmed answers"
        )
    used = Dataset(data.path, tuple(items), data.vocabulary)
    return Questions(used, search, confirm, all(labels), notes)


def _scenes() -> Dataset:
    """Of each bundled scene one item, its tasks in turn: short questions and descriptions."""
    data = bundled_scenes()
    by_image: dict[Path, dict[str, Item]] = defaultdict(dict)
    for item in data.items:
        if item.kind in (QUESTION, CAPTION):
            by_image[item.images[0]].setdefault(item.task, item)
    chosen: list[Item] = []
    used: dict[str, float] = defaultdict(float)
    for tasks in by_image.values():
        task = min(tasks, key=lambda name: used[name])
        used[task] += 1 if tasks[task].kind == QUESTION else 1 / DESCRIPTIONS
        chosen.append(tasks[task])
    return Dataset(data.path, tuple(chosen), data.vocabulary)


def _labelled(item: Item) -> bool:
    if item.kind == CAPTION:
        return item.objects is not None and len(item.objects) > 0
    return all(turn.answers for turn in item.turns)


def _halves(items: Sequence[Item], seed: int) -> tuple[tuple[Item, ...], tuple[Item, ...]]:
    """Images dealt to two halves, each kind of items evenly; items that share an image stay
    together."""
    group: dict[Path, Path] = {}

    def root(image: Path) -> Path:
        while group.setdefault(image, image) != image:
            image = group[image]
        return image

    for item in items:
        for image in item.images[1:]:
            group[root(image)] = root(item.images[0])
    groups: dict[Path, list[Item]] = defaultdict(list)
    for item in items:
        groups[root(item.images[0])].append(item)
    order = sorted(groups.values(), key=lambda own: own[0].number)
    random.Random(seed).shuffle(order)
    order.sort(key=lambda own: (own[0].kind, -len(own)))  # stable: the shuffle decides within
    halves: tuple[list[Item], list[Item]] = ([], [])
    for own in order:
        halves[len(halves[0]) > len(halves[1])].extend(own)
    rng = random.Random(seed + 1)
    return _mixed(halves[0], rng), _mixed(halves[1], rng)


def _mixed(items: list[Item], rng: random.Random) -> tuple[Item, ...]:
    """In an order of which every beginning has the kinds in about their shares."""
    kinds: dict[str, list[Item]] = defaultdict(list)
    for item in items:
        kinds[item.kind].append(item)
    placed = []
    for own in kinds.values():
        rng.shuffle(own)
        placed += [((number + 0.5) / len(own), item) for number, item in enumerate(own)]
    return tuple(item for _, item in sorted(placed, key=lambda pair: pair[0]))


# What is kept -----------------------------------------------------------------------------------


@dataclass(frozen=True)
class Part:
    """Of one item: what the untrimmed model has (``whole``), how much of it is kept, and what one
    more fault would cost, as a share of the whole."""

    kept: float
    whole: float
    fault: float
    image: str


@dataclass(frozen=True)
class Quality:
    """Of a policy on some items.

    Attributes:
        kept: share of the untrimmed model's right answers (objects, tokens) that it has.
        kl: nats a token, along the untrimmed answers; 0 where there are none.
        parts: the items'.
    """

    kept: float
    kl: float
    parts: tuple[Part, ...]

    @property
    def items(self) -> int:
        return len(self.parts)

    @property
    def key(self) -> tuple[float, float]:
        """The higher the better; where as much is kept, the divergence decides."""
        return self.kept, -self.kl

    @property
    def error(self) -> float:
        """About the standard error of ``kept``, not less than one fault would change."""
        whole = sum(part.whole for part in self.parts)
        off = sum((part.kept - self.kept * part.whole) ** 2 for part in self.parts)
        fault = sum(part.fault for part in self.parts) / self.items
        return math.sqrt(off) / whole + fault / self.items

    def lower(self, level: float = LEVEL) -> float:
        """What ``kept`` is not below, with this certainty: a one-sided bootstrap bound over images.

        As though one more item had been seen that loses one fault more than the worst one did:
        where nothing was lost, a plain bootstrap would be sure that nothing ever is.
        """
        there = [part for part in self.parts if part.whole > 0]
        worst = max(1 - part.kept / part.whole for part in there)
        whole = sum(part.whole for part in there) / len(there)
        left = min(1.0, max(0.0, 1 - worst - max(part.fault for part in there)))
        rows = [(part.kept, part.whole) for part in self.parts] + [(left * whole, whole)]
        images = [part.image for part in self.parts] + ["one more"]
        found: Metric = metric([torch.tensor(row) for row in rows], images)
        return found.lower(level)


def quality(
    given: Questions, items: Sequence[Item], own: Sequence[Record], untrimmed: Sequence[Record]
) -> Quality:
    """How much of the untrimmed answers, or of what is right in them, a policy keeps.

    Raises:
        ValueError: the untrimmed model has nothing right.
    """
    parts = tuple(
        _part(given, item, record, base)
        for item, record, base in zip(items, own, untrimmed, strict=True)
    )
    whole = sum(part.whole for part in parts)
    if not whole:
        raise ValueError(
            f"the untrimmed model answers none of {len(items)} questions as the labels have it: "
            "check that the answers are single words, or leave them out"
        )
    led = [record for record in own if record.kl is not None]
    tokens = sum(record.tokens for record in led)
    kl = sum(record.kl or 0.0 for record in led) / tokens if tokens else 0.0
    return Quality(sum(part.kept for part in parts) / whole, kl, parts)


def _part(given: Questions, item: Item, own: Record, base: Record) -> Part:
    image = str(item.images[0])
    if given.labelled:
        count = len(item.objects or ()) if item.kind == CAPTION else len(item.turns)
        scores = [_score(item, record, given.data.vocabulary) for record in (own, base)]
        return Part(scores[0], scores[1], 1 / count, image)
    kept = own.same_place if own.agree is None else own.agree  # conversations have no agreement
    return Part(kept, own.tokens, 1 / max(own.tokens, 1), image)


def _score(item: Item, record: Record, vocabulary: dict[str, str]) -> float:
    """The share of an item that is right: its answers, or the objects that it should name."""
    if item.kind == CAPTION:
        there = [vocabulary.get(name, name) for name in item.objects or ()]
        said = text.mentioned(record.answers[0], vocabulary)
        return sum(name in said for name in there) / len(there)
    pairs = zip(item.turns, record.answers, strict=True)
    return sum(text.is_right(own, turn.answers) for turn, own in pairs) / len(item.turns)
