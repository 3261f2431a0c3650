"""Scenes, tasks and the training loop of st3-tiny, without the shipped weights."""

import random
from dataclasses import replace

import numpy as np
import pytest
import torch
from transformers import LlavaForConditionalGeneration

from train import data, run, tasks
from train.data import IGNORE, Packer
from train.run import Recipe, Trainer, cell_labels
from train.scenes import CELL, FONT_FILE, HELD_OUT, draw, sample_scene
from train.testset import held_out, read_set, write_set
from train.tokenizer import build_processor
from train.world import BACKGROUNDS, INKS, NAMES, NUMBERS, PLACES

SCENES = [sample_scene(seed) for seed in range(200)]
needs_font = pytest.mark.skipif(not FONT_FILE.exists(), reason=f"{FONT_FILE} is not installed")


@pytest.mark.parametrize("count", range(1, 10))
def test_scene_holds_the_asked_count_of_different_objects(count):
    scene = sample_scene(5, count)
    assert len(set(scene.names)) == len(scene.things) == count
    cells = [thing.cell for thing in scene.things]
    assert cells == sorted(set(cells))


def test_scene_depends_on_the_seed_alone():
    assert sample_scene(3) == sample_scene(3)
    assert sample_scene(3) != sample_scene(4)


@pytest.mark.parametrize("count", [0, 10, -1])
def test_impossible_count_is_refused(count):
    with pytest.raises(ValueError, match="1 to 9"):
        sample_scene(0, count)


def test_included_objects_appear():
    for seed in range(30):
        assert {"cat", "crown"} <= set(sample_scene(seed, include=("cat", "crown")).names)


def test_glyphs_contrast_with_the_background_and_come_at_most_once():
    for scene in SCENES:
        kinds = [thing.kind for thing in scene.things if thing.colour]
        assert len(kinds) == len(set(kinds))
        assert all(thing.colour != scene.background for thing in scene.things)
        assert all((thing.colour is None) == (thing.kind == "emoji") for thing in scene.things)


def test_description_names_every_object_in_reading_order():
    for scene in SCENES:
        assert tasks.mentioned_objects(tasks.describe(scene)) == scene.names
        assert tasks.mentioned_objects(tasks.list_objects(scene)) == scene.names


def test_mentioned_objects_counts_no_bare_letter_and_no_name_twice():
    text = "A Cat, a cat; the letter k, k and x, 7, the digit 7 and something else."
    assert tasks.mentioned_objects(text) == ["cat", "k", "7"]
    assert tasks.mentioned_objects("") == []


def solve(scene, task, question):
    """An independent answer, from the question's words and the scene."""
    words = question.rstrip("?.").split()
    if task == "place":
        place = max((p for p in PLACES if question.rstrip("?").endswith(p)), key=len)
        thing = scene.at(PLACES.index(place))
        return thing.name if thing else "nothing"
    if task == "count":
        return NUMBERS[len(scene.things)]
    if task == "exists":
        return "yes" if any(name in words for name in scene.names) else "no"
    if task in ("digit", "letter"):
        (thing,) = [thing for thing in scene.things if thing.kind == task]
        return thing.name
    if task == "colour":
        if words[-1] == "background":
            return scene.background
        (thing,) = [thing for thing in scene.things if thing.kind == words[-1]]
        return thing.colour
    if task == "where":
        return f"at the {PLACES[scene.find(words[-1]).cell]}."
    if task == "list":
        return tasks.list_objects(scene)
    thing = scene.find(words[-1])
    step = {"left": -1, "right": 1, "above": -3, "below": 3}
    (side,) = [side for side in step if side in words]
    return scene.at(thing.cell + step[side]).name


def test_every_answer_is_true():
    asked = set()
    for scene in SCENES:
        for task, question, answer in tasks.questions(scene, random.Random(scene.seed)):
            asked.add(task)
            # "is there a letter e": the word "a" is never an object's name.
            assert solve(scene, task, question) == answer, (scene.seed, question)
    assert asked == set(tasks.WEIGHTS)


def test_yes_and_no_are_balanced():
    rng = random.Random(0)
    answers = [a for s in SCENES for t, _, a in tasks.questions(s, rng) if t == "exists"]
    assert 0.4 < answers.count("yes") / len(answers) < 0.6


def test_pair_answers_are_true():
    rng = random.Random(0)
    seen = set()
    for seed in range(100):
        first = sample_scene(seed)
        second = sample_scene(seed + 1000, include=tuple(first.names[:2]))
        for task, question, answer in tasks.pair_conversation(first, second, rng, 5):
            words = question.rstrip("?").split()
            has = [any(name in words for name in scene.names) for scene in (first, second)]
            seen.add((task, answer))
            if task == "which image":
                table = {(1, 1): "both", (1, 0): "first", (0, 1): "second", (0, 0): "neither"}
                assert answer == table[has[0], has[1]]
            elif task == "both images":
                assert answer == ("yes" if all(has) else "no")
            elif task == "more":
                counts = len(first.things), len(second.things)
                assert answer == ("first" if counts[0] > counts[1] else "second")
            else:
                scene = first if "first" in words else second
                short = question.split(" of the ")[0] if task == "place of" else "count"
                kind = "place" if task == "place of" else "count"
                assert answer == solve(scene, kind, short)
    assert {("which image", a) for a in ("both", "first", "second", "neither")} <= seen


def test_the_tokenizer_knows_every_word():
    tokenizer = build_processor().tokenizer
    rng = random.Random(0)
    for scene in SCENES:
        turns = tasks.questions(scene, rng) + tasks.pair_conversation(scene, SCENES[0], rng, 4)
        for text in [tasks.describe(scene), *(text for turn in turns for text in turn[1:])]:
            ids = tokenizer(text)["input_ids"]
            assert tokenizer.unk_token_id not in ids, text
            assert tokenizer.decode(ids) == text


def test_a_description_fits_the_bounds():
    tokenizer = build_processor().tokenizer
    for scene in SCENES:
        length = len(tokenizer(tasks.describe(scene))["input_ids"]) + 1  # <eos>
        assert 60 <= length <= 150
        assert length > 100 or len(scene.things) < 8


def test_cell_labels_follow_the_scene():
    names, sizes, inks, backgrounds = cell_labels(SCENES[:20])
    for row, scene in enumerate(SCENES[:20]):
        assert (names[row] < len(NAMES)).sum() == len(scene.things)
        assert list(BACKGROUNDS)[backgrounds[row, 4]] == scene.background
        for thing in scene.things:
            assert NAMES[names[row, thing.cell]] == thing.name
            assert sizes[row, thing.cell] == 1 + (thing.size_word == "large")
            if thing.colour:
                assert list(INKS)[inks[row, thing.cell] - 1] == thing.colour


@needs_font
def test_drawing_is_repeatable_and_puts_objects_into_their_cells():
    scene = replace(sample_scene(11, 1), noise=0, gradient=(0, 0, 0))
    pixels = np.asarray(draw(scene)).astype(int)
    assert pixels.shape == (96, 96, 3)
    assert (pixels == np.asarray(draw(scene))).all()
    changed = np.argwhere((pixels != scene.shade).any(-1)).mean(0) // CELL
    assert tuple(changed.astype(int)) == (scene.things[0].row, scene.things[0].column)


@needs_font
def test_every_object_has_its_own_picture():
    base = replace(sample_scene(11, 1), noise=0, gradient=(0, 0, 0))
    thing = replace(base.things[0], size=28, angle=0.0, dx=0, dy=0)
    pictures = set()
    for name in NAMES:
        colour = None if name.isalpha() and len(name) > 1 else "red"
        pictures.add(
            draw(replace(base, things=(replace(thing, name=name, colour=colour),))).tobytes()
        )
    assert len(pictures) == len(NAMES)


@needs_font
def test_a_set_is_read_as_it_was_written(tmp_path):
    examples = held_out(3)
    write_set(tmp_path, examples)
    for old, new in zip(examples, read_set(tmp_path), strict=True):
        assert old.image.tobytes() == new.image.tobytes()
        assert (old.objects, old.questions, old.seed) == (new.objects, new.questions, new.seed)
        assert old.seed >= HELD_OUT


@pytest.fixture
def drawn(monkeypatch):
    """Plain noise instead of drawings: the loop's tests need no font."""

    def to_pixels(scenes):
        noise = [torch.manual_seed(scene.seed) and torch.randn(3, 96, 96) for scene in scenes]
        return torch.stack(noise)

    monkeypatch.setattr(data, "to_pixels", to_pixels)
    monkeypatch.setattr(run, "to_pixels", to_pixels)


RECIPE = Recipe(tower_steps=2, tower_batch=2, steps=4, batch=2, warmup=2, pairs_from=0.5, pairs=1.0)
SIZES = {"layers": 2, "hidden": 64, "vision_layers": 1, "vision_hidden": 64}


def test_a_resumed_run_equals_an_uninterrupted_one(drawn, tmp_path):
    whole, first, second = (Trainer(RECIPE, **SIZES) for _ in range(3))
    losses = [whole.advance()["loss"] for _ in range(whole.last)]
    for part in (1, 2, 1):  # stops in phase 1, in phase 2 and among the pairs
        again = [first.advance()["loss"] for _ in range(part)]
        assert again == losses[first.step - part : first.step]
        first.save(tmp_path)
        first = Trainer(RECIPE, **SIZES)
        first.load(tmp_path)
    second.load(tmp_path)
    for _ in range(whole.last - second.step):
        second.advance()
    for name, value in whole.model.state_dict().items():
        assert torch.equal(value, second.model.state_dict()[name]), name


def test_resuming_from_nothing_says_so(tmp_path):
    with pytest.raises(FileNotFoundError, match="without --resume"):
        Trainer(RECIPE, **SIZES).load(tmp_path)


@pytest.mark.slow
def test_the_loss_falls(drawn):
    recipe = Recipe(tower_steps=0, steps=40, batch=2, warmup=1, lr=3e-3, pairs=0.0)
    trainer = Trainer(recipe, **SIZES)
    losses = [trainer.advance()["told"] for _ in range(30)]
    assert losses[-1] < 0.7 * losses[0]


def test_an_export_loads_plainly(drawn, tmp_path):
    trainer = Trainer(RECIPE, **SIZES)
    trainer.export(tmp_path / "model")
    trainer.export(tmp_path / "model")  # over the old one
    model = LlavaForConditionalGeneration.from_pretrained(tmp_path / "model")
    assert model.dtype == torch.bfloat16
    for name, value in trainer.model.state_dict().items():
        assert torch.equal(value.bfloat16(), model.state_dict()[name]), name


def test_chats_behind_one_image_do_not_see_each_other(drawn):
    """The packed rows give the logits of each chat alone."""
    trainer = Trainer(RECIPE, **SIZES)
    tokenizer = trainer.processor.tokenizer
    packer = Packer(tokenizer, trainer.model.config.image_seq_length, turns=2)
    batch = packer.single(range(1))
    model = trainer.model.eval()
    with torch.inference_mode():
        packed = model(
            input_ids=batch.input_ids,
            pixel_values=batch.pixel_values,
            attention_mask=batch.attend,
            position_ids=batch.position_ids,
        ).logits[0]
        ids = batch.input_ids[0]
        prefix = 2 + model.config.image_seq_length
        start = prefix + int((batch.position_ids[0, prefix:] == prefix).nonzero()[1])
        alone = torch.cat([ids[:prefix], ids[start:]])
        logits = model(input_ids=alone[None], pixel_values=batch.pixel_values).logits[0]
    torch.testing.assert_close(packed[start:], logits[prefix:], atol=1e-5, rtol=1e-4)
    learnt = batch.labels[0] != IGNORE
    assert (batch.labels[0][learnt] == ids[learnt]).all()
    assert not learnt[:prefix].any()


def test_training_and_the_processor_agree_on_a_prompt(drawn):
    """The ids that training builds are those of the chat template."""
    processor = build_processor()
    packer = Packer(processor.tokenizer, 144)
    row = packer._row([packer.image], [[("count", "count the objects.", "four")]], SCENES[:1])
    chat = [
        {
            "role": "user",
            "content": [{"type": "image"}, {"type": "text", "text": "Count the objects."}],
        },
        {"role": "assistant", "content": [{"type": "text", "text": "four"}]},
    ]
    text = processor.apply_chat_template(chat).replace("<image>", "<image>" * 144)
    assert processor.tokenizer(text)["input_ids"] == [token for token, *_ in row]
