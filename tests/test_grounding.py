"""The pointing loss of st3-tiny's training: where tokens are told to look, and how it is paid."""

import random

import pytest
import torch

from train import tasks
from train.data import Packer
from train.grounding import (
    CELLS,
    HEADS,
    NOWHERE,
    pointing_loss,
    token_targets,
    where_answered,
    where_is,
)
from train.model import build_config, build_model, run_decoder
from train.scenes import sample_scene
from train.tokenizer import build_processor
from train.world import EMOJI, PLACES

SCENES = [sample_scene(seed) for seed in range(60)]


def cells(bits: int) -> set[int]:
    return {cell for cell in range(2 * CELLS) if bits >> cell & 1}


@pytest.mark.parametrize("task", tasks.WEIGHTS)
def test_answers_are_looked_for_where_they_are(task):
    rng = random.Random(0)
    for scene in SCENES:
        turn = next((t for t in tasks.questions(scene, rng) if t[0] == task), None)
        if turn is None:
            continue
        _, question, answer = turn
        looked = where_answered(turn, [scene])
        thing = scene.find(answer)
        if task in ("relation", "digit", "letter") or (task == "place" and thing):
            assert thing is not None
            assert cells(looked) == {thing.cell}
        elif task == "where":
            assert answer == f"at the {PLACES[min(cells(looked))]}."
        elif task in ("count", "list"):
            assert cells(looked) == {thing.cell for thing in scene.things}
        elif task == "exists":
            assert (looked == NOWHERE) == (answer == "no")
        elif task == "colour" and "background" not in question:
            (cell,) = cells(looked)
            assert scene.at(cell).colour == answer


def test_two_images_are_told_apart():
    first, second = SCENES[:2]
    for turn in tasks.pair_conversation(first, second, random.Random(1), 8):
        looked = cells(where_answered(turn, [first, second]))
        if turn[0] == "which image":
            images = {cell // CELLS for cell in looked}
            assert turn[2] == {(): "neither", (0,): "first", (1,): "second"}.get(
                tuple(sorted(images)), "both"
            )
        elif turn[0] == "place of":
            scene = second if "second" in turn[1] else first
            (cell,) = looked
            assert cell // CELLS == ("second" in turn[1])
            assert scene.at(cell % CELLS).name == turn[2]


def test_what_is_nowhere_is_looked_for_at_the_first_token():
    absent = next(name for name in EMOJI if name not in SCENES[0].names)
    assert where_is(absent, SCENES[:1]) == NOWHERE
    assert where_is(SCENES[0].names[0], SCENES[:1]) == 1 << SCENES[0].things[0].cell


def test_patches_know_their_cell():
    ids = torch.tensor([[5, *[9] * 36, 5, *[9] * 36]])
    bits = token_targets(ids, image_token=9, patches=36)[0]
    assert bits[0] == NOWHERE
    assert bits[37] == 0
    grid = bits[1:37].view(6, 6)
    assert grid[0, 0] == grid[1, 1] == 1
    assert grid[0, 5] == 1 << 2
    assert grid[5, 0] == 1 << 6
    assert bits[38:].view(6, 6)[2, 2] == 1 << (CELLS + 4)


def test_a_description_looks_at_the_cell_that_it_speaks_of():
    tokenizer = build_processor().tokenizer
    packer = Packer(tokenizer, 144)
    for scene in SCENES[:20]:
        said = packer._ids(tasks.describe(scene))
        looked = packer._described(said)
        for token, after, at in zip(said, said[1:], looked, strict=False):
            name = packer.names.get(after)
            thing = scene.find(name) if name else None
            if thing and tokenizer.decode([token]) in ("small", "large", "digit", "letter"):
                assert cells(at) == {thing.cell}
        assert {min(cells(at)) for at in looked if at} == set(range(CELLS))


def test_the_loss_is_that_of_the_models_own_attention():
    processor = build_processor()
    config = build_config(processor.tokenizer, 3, 64, 1, 64)
    model = build_model(config).eval()
    scenes = SCENES[:2]
    packer = Packer(processor.tokenizer, 144)
    chats = [[tasks.questions(scene, random.Random(2))] for scene in scenes]
    rows = [packer._row([packer.image], c, [s]) for c, s in zip(chats, scenes, strict=True)]
    length = min(map(len, rows))
    fields = [torch.tensor([[token[i] for token in row[:length]] for row in rows]) for i in (0, 5)]
    ids, named = fields
    features = torch.randn(2, 144, 64, generator=torch.manual_seed(0))
    positions = torch.arange(length).expand(2, -1)
    attend = torch.ones(2, 1, length, length, dtype=torch.bool).tril()
    bits = token_targets(ids, config.image_token_id, 144)
    with torch.inference_mode():
        last, entering, rotary = run_decoder(model, ids, features, positions, attend)
        loss, mass = pointing_loss(model, 1, entering[1], rotary, attend, named, bits)
        model.set_attn_implementation("eager")  # which alone returns its attention
        embeds = model.get_input_embeddings()(ids)
        embeds[ids == config.image_token_id] = features.flatten(0, 1)
        bare = model.model.language_model(
            inputs_embeds=embeds, position_ids=positions, output_attentions=True
        )
    torch.testing.assert_close(last, bare.last_hidden_state)
    shares = []
    for row, token in (named != 0).nonzero().tolist():
        on = (bits[row] & named[row, token]) != 0
        shares += [bare.attentions[1][row, head, token][on].sum() for head in range(HEADS)]
    shares = torch.stack(shares)
    torch.testing.assert_close(mass, shares.mean())
    torch.testing.assert_close(loss, -shares.log().mean())
