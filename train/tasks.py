"""What is asked about a scene, and the true answers.

Prompts that st3-tiny was trained on (it knows no other words)::

    describe the image in detail.          list the objects.
    what is at the top left?               what is in the centre?
    how many objects are there?            is there a cat in the image?
    what is to the left of the cat?        what is below the cat?
    which digit is in the image?           which letter is in the image?
    what colour is the letter?             what colour is the background?
    where is the cat?

and with two images::

    which image has a cat?                 which image has more objects?
    do both images have a cat?             what is at the top left of the second image?

Places are {top, middle, bottom} x {left, centre, right}; the middle one is "centre".
"""

from __future__ import annotations

import random
import re

from train.scenes import Scene, Thing
from train.world import BACKGROUNDS, DIGITS, EMOJI, INKS, LETTERS, NAMES, NUMBERS, PLACES, SIZES

Turn = tuple[str, str, str]  # task, question, answer

DESCRIBE = (
    "describe the image in detail.",
    "describe this image.",
    "what do you see in the image?",
    "please describe the picture in detail.",
    "what is shown in the image?",
)
LIST = ("list the objects.", "name the objects in the image.", "which objects do you see?")
PLACE = ("what is at the {place}?", "what is in the {place}?", "which object is at the {place}?")
COUNT = (
    "how many objects are there?",
    "how many objects are in the image?",
    "count the objects.",
    "how many objects do you see?",
)
EXISTS = ("is there {a} in the image?", "is there {a}?", "do you see {a}?")
RELATION = {
    "left": ("what is to the left of {the}?", "what is left of {the}?"),
    "right": ("what is to the right of {the}?", "what is right of {the}?"),
    "above": ("what is above {the}?", "which object is above {the}?"),
    "below": ("what is below {the}?", "which object is below {the}?"),
}
STEP = {"left": (0, -1), "right": (0, 1), "above": (-1, 0), "below": (1, 0)}
GLYPH = ("which {kind} is in the image?", "which {kind} do you see?", "what {kind} is shown?")
COLOUR = ("what colour is the {what}?", "what color is the {what}?", "which colour has the {what}?")
WHERE = ("where is {the}?", "where do you see {the}?")

WHICH_IMAGE = ("which image has {a}?", "which image shows {a}?")
BOTH_IMAGES = ("do both images have {a}?",)
MORE = ("which image has more objects?",)
PLACE_OF = ("what is at the {place} of the {nth} image?",)
COUNT_OF = ("how many objects are in the {nth} image?",)

SINGLE_WORD = ("place", "count", "exists", "relation", "digit", "letter", "colour")
# How often a task is asked; place comes first because it teaches the others.
WEIGHTS = {
    "place": 5, "relation": 6, "count": 3, "exists": 4, "digit": 2, "letter": 2, "colour": 2,
    "where": 2, "list": 0.5,
}  # fmt: skip


def article(name: str) -> str:
    """The object with its indefinite article: "an apple", "a letter k"."""
    if name in EMOJI:
        word = "an" if name[0] in "aeiou" and name != "unicorn" else "a"
        return f"{word} {name}"
    return f"a {_kind(name)} {name}"


def definite(name: str) -> str:
    """The object with its definite article: "the apple", "the letter k"."""
    return f"the {name}" if name in EMOJI else f"the {_kind(name)} {name}"


def _kind(name: str) -> str:
    return "digit" if name.isdigit() else "letter"


def _place(cell: int) -> str:
    return f"at the {PLACES[cell]}"


def describe(scene: Scene) -> str:
    """Every cell in reading order, a sentence per row: about 90 to 115 words and marks."""
    rows = []
    for row in range(3):
        parts = [_clause(scene, cell) for cell in range(3 * row, 3 * row + 3)]
        rows.append(f"{parts[0]}, {parts[1]}, and {parts[2]}.")
    count = NUMBERS[len(scene.things)]
    head = f"the image shows {count} objects on a {scene.background} background."
    return " ".join([head, *rows])


def _clause(scene: Scene, cell: int) -> str:
    thing = scene.at(cell)
    if thing is None:
        return f"{_place(cell)} there is nothing"
    colour = f"{thing.colour} {thing.kind} " if thing.colour else ""
    return f"{_place(cell)} there is a {thing.size_word} {colour}{thing.name}"


def list_objects(scene: Scene) -> str:
    """The names in reading order: "cat, letter k, apple."."""
    return (
        ", ".join(t.name if t.kind == "emoji" else f"{t.kind} {t.name}" for t in scene.things) + "."
    )


def mentioned_objects(text: str) -> list[str]:
    """Names of objects in a text, in order of first mention, each once.

    A digit or a letter counts only after the word "digit" or "letter", as the model writes it.
    """
    found: list[str] = []
    words = re.findall(r"\w+", text.lower())
    for before, word in zip(["", *words], words, strict=False):
        if word in NAMES and (word in EMOJI or before == _kind(word)) and word not in found:
            found.append(word)
    return found


def questions(scene: Scene, rng: random.Random) -> list[Turn]:
    """One question of each task that the scene allows, in random order."""
    turns = [_ask(task, scene, rng) for task in WEIGHTS]
    found = [turn for turn in turns if turn is not None]
    rng.shuffle(found)
    return found


def conversation(scene: Scene, rng: random.Random, turns: int) -> list[Turn]:
    """``turns`` questions drawn by the tasks' weights, none twice."""
    asked: list[Turn] = []
    while len(asked) < turns:
        task = rng.choices(list(WEIGHTS), list(WEIGHTS.values()))[0]
        turn = _ask(task, scene, rng)
        if turn is not None and turn not in asked:
            asked.append(turn)
    return asked


def _ask(task: str, scene: Scene, rng: random.Random) -> Turn | None:
    if task == "place":
        # An empty cell now and then: enough to learn "nothing", too few to gain by guessing it.
        empty = [cell for cell in range(9) if scene.at(cell) is None]
        if empty and rng.random() < 0.12:
            cell, answer = rng.choice(empty), "nothing"
        else:
            thing = rng.choice(scene.things)
            cell, answer = thing.cell, thing.name
        return task, rng.choice(PLACE).format(place=PLACES[cell]), answer
    if task == "count":
        return task, rng.choice(COUNT), NUMBERS[len(scene.things)]
    if task == "exists":
        name, answer = _present_or_not([scene], rng)
        return task, rng.choice(EXISTS).format(a=article(name)), answer
    if task == "relation":
        return _relation(scene, rng)
    if task in ("digit", "letter"):
        names = [thing.name for thing in scene.things if thing.kind == task]
        return (task, rng.choice(GLYPH).format(kind=task), names[0]) if names else None
    if task == "colour":
        colours = {thing.kind: thing.colour for thing in scene.things if thing.colour}
        colours["background"] = scene.background
        what = rng.choice(list(colours))
        return task, rng.choice(COLOUR).format(what=what), str(colours[what])
    if task == "where":
        thing = rng.choice(scene.things)
        return task, rng.choice(WHERE).format(the=definite(thing.name)), _place(thing.cell) + "."
    if task == "list":
        return task, rng.choice(LIST), list_objects(scene)
    raise ValueError(f"unknown task {task!r}; known: {', '.join(WEIGHTS)}")


def _relation(scene: Scene, rng: random.Random) -> Turn | None:
    pairs: list[tuple[str, Thing, Thing]] = []
    for thing in scene.things:
        for side, (down, right) in STEP.items():
            row, column = thing.row + down, thing.column + right
            if 0 <= row < 3 and 0 <= column < 3:
                neighbour = scene.at(3 * row + column)
                if neighbour is not None:
                    pairs.append((side, thing, neighbour))
    if not pairs:
        return None
    side, thing, neighbour = rng.choice(pairs)
    question = rng.choice(RELATION[side]).format(the=definite(thing.name))
    return "relation", question, neighbour.name


def _present_or_not(scenes: list[Scene], rng: random.Random) -> tuple[str, str]:
    names = [name for scene in scenes for name in scene.names]
    name = rng.choice(names)
    if rng.random() < 0.5:
        return name, "yes"
    # An absent object is of a present one's kind, or the kind alone gives the answer away.
    kind = next(group for group in (tuple(EMOJI), DIGITS, LETTERS) if name in group)
    return rng.choice([other for other in kind if other not in names]), "no"


def pair_conversation(first: Scene, second: Scene, rng: random.Random, turns: int) -> list[Turn]:
    """``turns`` questions about two images; the answer words are balanced where possible."""
    both = [name for name in first.names if name in second.names]
    only = [[n for n in s.names if n not in both] for s in (first, second)]
    none = [name for name in EMOJI if name not in first.names + second.names]
    pools = {"both": both, "first": only[0], "second": only[1], "neither": none}
    pools = {answer: names for answer, names in pools.items() if names}
    asked: list[Turn] = []
    while len(asked) < turns:
        task = rng.choice(("which", "which", "do both", "more", "place", "count"))
        turn: Turn | None = None
        if task == "which":
            answer = rng.choice(list(pools))
            name = rng.choice(pools[answer])
            turn = "which image", rng.choice(WHICH_IMAGE).format(a=article(name)), answer
        elif task == "do both":
            yes = bool(both) and rng.random() < 0.5
            name = rng.choice(both if yes else only[0] + only[1] or none)
            turn = "both images", BOTH_IMAGES[0].format(a=article(name)), "yes" if yes else "no"
        elif task == "more" and len(first.things) != len(second.things):
            more = "first" if len(first.things) > len(second.things) else "second"
            turn = "more", MORE[0], more
        elif task in ("place", "count"):
            nth, scene = rng.choice((("first", first), ("second", second)))
            thing = rng.choice(scene.things)
            if task == "place":
                question = PLACE_OF[0].format(place=PLACES[thing.cell], nth=nth)
                turn = "place of", question, thing.name
            else:
                turn = "count of", COUNT_OF[0].format(nth=nth), NUMBERS[len(scene.things)]
        if turn is not None and turn not in asked:
            asked.append(turn)
    return asked


def vocabulary() -> list[str]:
    """Every word and mark that questions and answers use, sorted."""
    texts = [*DESCRIBE, *LIST, *PLACE, *COUNT, *EXISTS, *GLYPH, *COLOUR, *WHERE]
    texts += [*WHICH_IMAGE, *BOTH_IMAGES, *MORE, *PLACE_OF, *COUNT_OF]
    texts += [text for group in RELATION.values() for text in group]
    texts = [re.sub(r"\{\w+\}", " ", text) for text in texts]
    texts += [*NAMES, *PLACES, *NUMBERS, *SIZES, *BACKGROUNDS, *INKS]
    texts += ["a an the letter digit background there is nothing and at on shows objects"]
    texts += ["first second both neither yes no , . ? ! : '"]
    return sorted({word for text in texts for word in re.findall(r"\w+|[^\w\s]", text)})
