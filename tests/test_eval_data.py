"""Sets: the bundled scenes, and folders of one's own."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

from benchmarks.scenes import START, harder
from st3.tools.eval import bundled_scenes, load_folder
from st3.tools.eval.data import CAPTION, IMAGES, KINDS, QUESTION, TURNS
from st3.tools.eval.text import mentioned
from train.scenes import HELD_OUT, SIZE_RANGES
from train.world import PLACES


def write(folder: Path, *rows: Any, name: str = "set.jsonl") -> Path:
    for image in ("a.png", "b.png"):
        Image.new("RGB", (8, 8)).save(folder / image)
    lines = [row if isinstance(row, str) else json.dumps(row) for row in rows]
    (folder / name).write_text("\n".join(lines) + "\n")
    return folder


def test_the_bundled_scenes() -> None:
    data = bundled_scenes()
    assert {item.kind for item in data.items} == set(KINDS)
    single = {item.task for item in data.items if item.kind == QUESTION}
    hard = {"small object", "small print", "dense text"}
    assert single == {"place", "count", "exists", "relation", "digit", "letter", "colour", *hard}
    size = sum(file.stat().st_size for file in data.path.parent.iterdir())
    assert size < 1.5e6
    for item in data.items:
        if item.kind == CAPTION:
            assert item.objects
            assert mentioned(item.captions[0], data.vocabulary) == list(item.objects)
        if item.kind == TURNS:
            assert len(item.turns) >= 3


def test_no_scene_of_training_or_of_another_set() -> None:
    """The images are those of the command, drawn from seeds of their own."""
    from train.scenes import FONT_FILE, draw, sample_scene

    assert START > HELD_OUT
    if not FONT_FILE.exists():
        pytest.skip("drawing needs the emoji font")
    image = Image.open(bundled_scenes().items[0].images[0]).convert("RGB")
    assert image.tobytes() == draw(sample_scene(START)).tobytes()
    scenes, rows = harder(80)
    last = Image.open(bundled_scenes().path.parent / rows[-1]["image"]).convert("RGB")
    assert last.tobytes() == draw(scenes[-1]).tobytes()


def test_harder_scenes_than_training_drew() -> None:
    """Smaller objects and print, and more text; what is asked for is there."""
    scenes, rows = harder(80)
    by_name = {f"{80 + number:03d}.webp": scene for number, scene in enumerate(scenes)}
    assert len({scene.seed for scene in scenes}) == len(scenes)
    for row in rows:
        scene = by_name[row["image"]]
        assert scene.seed > HELD_OUT
        thing = scene.find(row["answer"])
        assert thing is not None
        assert PLACES[thing.cell] in row["question"]
        if row["task"] == "dense text":
            assert sum(thing.kind != "emoji" for thing in scene.things) == 6
        else:
            assert thing.size < SIZE_RANGES["small"][0]
    asked = [row for row in bundled_scenes().items if row.task in {r["task"] for r in rows}]
    assert len(asked) == len(rows)
    assert {item.half for item in asked} == {"choose", "report"}


def test_a_line_may_say_its_half(tmp_path: Path) -> None:
    rows = [{"image": "a.png", "question": "what?", "answer": "x", "half": "report"},
            {"image": "b.png", "question": "what?", "answer": "x", "half": "choose"}]  # fmt: skip
    data = load_folder(write(tmp_path, *rows))
    assert [item.images[0].name for item in data.half("report").items] == ["a.png"]
    with pytest.raises(ValueError, match="must be choose or report"):
        load_folder(write(tmp_path, {**rows[0], "half": "both"}))


def test_lines_of_each_kind(tmp_path: Path) -> None:
    write(
        tmp_path,
        {"image": "a.png", "question": "what?", "answer": ["red", "crimson"], "task": "colour"},
        {"image": ["a.png", "b.png"], "question": "which?", "answer": 2},
        "",
        {"image": "a.png", "turns": [{"question": "x?", "answer": "y"}] * 2},
        {"image": "b.png", "captions": ["a cat."], "objects": ["cat"]},
        {"image": "b.png", "captions": "a dog."},
    )
    (tmp_path / "objects.txt").write_text("cat, kitten\ndog\n")
    data = load_folder(tmp_path)
    assert [item.kind for item in data.items] == [QUESTION, IMAGES, TURNS, CAPTION, CAPTION]
    assert data.items[0].turns[0].answers == ("red", "crimson")
    assert data.items[1].turns[0].answers == ("2",)
    assert data.items[3].objects == ("cat",)
    assert data.items[4].objects is None
    assert data.vocabulary == {"cat": "cat", "kitten": "cat", "dog": "dog"}
    assert data.tasks == ["colour", "several images", "conversation", "describe"]
    assert load_folder(tmp_path / "set.jsonl").items == data.items
    assert [item.number for item in data.only(["describe"], 1).items] == [4]


@pytest.mark.parametrize(
    ("row", "message"),
    [
        ("{", "line 1"),
        ([1], "line 1: each line must be a JSON object"),
        ({"question": "q", "answer": "a"}, '"image" is missing'),
        ({"image": "c.png", "question": "q", "answer": "a"}, "no such image: .*c.png"),
        ({"image": "a.png", "answer": "a"}, 'needs "question"'),
        ({"image": "a.png", "question": "q", "answer": []}, '"answer" must be a string'),
        ({"image": "a.png", "question": "q", "answer": {}}, '"answer" must be a string'),
        ({"image": "a.png", "turns": []}, "at least one turn"),
    ],
)
def test_lines_that_cannot_be_used(tmp_path: Path, row: Any, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        load_folder(write(tmp_path, row))


def test_folders_that_cannot_be_used(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="no such folder"):
        load_folder(tmp_path / "none")
    with pytest.raises(ValueError, match=r"holds no \.jsonl"):
        load_folder(tmp_path)
    write(tmp_path, "")
    with pytest.raises(ValueError, match="is empty"):
        load_folder(tmp_path)
    write(tmp_path, "", name="other.jsonl")
    with pytest.raises(ValueError, match="give the path"):
        load_folder(tmp_path)
    row = {"image": "a.png", "question": "q", "answer": "a", "task": "one"}
    data = load_folder(write(tmp_path, row, name="other.jsonl") / "other.jsonl")
    with pytest.raises(ValueError, match=r"no task 'two' .*: one"):
        data.only(["two"])
