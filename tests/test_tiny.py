"""The bundled model: it loads plainly, it is small, and it sees (issue bars on a fixed set)."""

from pathlib import Path

import pytest
import torch
from PIL import Image
from transformers import AutoModelForImageTextToText, AutoProcessor

from train.evaluate import accuracy, answer, descriptions, load, single_words
from train.scenes import HELD_OUT
from train.tasks import SINGLE_WORD
from train.testset import read_set

ASSETS = Path(__file__).parents[1] / "src/st3/assets"
MODEL = ASSETS / "st3-tiny"
EXAMPLES = read_set(Path(__file__).parent / "data/scenes")


@pytest.fixture(scope="module")
def tiny():
    return load(MODEL)


def chat(text: str, *images: Image.Image) -> list[dict]:
    content = [{"type": "image", "image": image} for image in images]
    return [{"role": "user", "content": [*content, {"type": "text", "text": text}]}]


def encode(processor, chats):
    return processor.apply_chat_template(
        chats,
        add_generation_prompt=True,
        tokenize=True,
        return_dict=True,
        return_tensors="pt",
        processor_kwargs={"padding": True},
    )


def test_loads_plainly_in_bf16():
    model = AutoModelForImageTextToText.from_pretrained(MODEL)
    assert model.dtype == torch.bfloat16
    assert model.config.model_type == "llava"
    assert model.config.text_config.num_hidden_layers >= 12
    assert AutoProcessor.from_pretrained(MODEL).__class__.__name__ == "LlavaProcessor"


def test_weights_are_under_30_megabytes():
    assert sum(file.stat().st_size for file in MODEL.iterdir()) < 30e6


def test_an_image_is_144_visual_tokens(tiny):
    model, processor = tiny
    inputs = encode(processor, chat("count the objects.", EXAMPLES[0].image))
    assert (inputs["input_ids"] == model.config.image_token_id).sum() == 144
    two = encode(processor, chat("count.", EXAMPLES[0].image, EXAMPLES[1].image))
    assert (two["input_ids"] == model.config.image_token_id).sum() == 288


def test_text_survives_the_tokenizer(tiny):
    _, processor = tiny
    for item in EXAMPLES:
        ids = processor.tokenizer(item.description)["input_ids"]
        assert processor.tokenizer.unk_token_id not in ids
        assert processor.decode(ids) == item.description


def test_the_set_is_held_out_and_descriptions_are_long(tiny):
    _, processor = tiny
    assert all(item.seed >= HELD_OUT for item in EXAMPLES)
    for item in EXAMPLES:
        length = len(processor.tokenizer(item.description)["input_ids"]) + 1  # <eos>
        assert 60 <= length <= 150
        assert length > 100 or len(item.names) < 8


@pytest.fixture(scope="module")
def words(tiny):
    return single_words(*tiny, EXAMPLES)


@pytest.mark.slow
def test_answers_single_words_from_the_image(words):
    assert accuracy(words) >= 0.85


@pytest.mark.slow
@pytest.mark.parametrize("task", SINGLE_WORD)
def test_answers_every_task(words, task):
    assert accuracy({task: words[task]}) >= 0.85


@pytest.mark.slow
def test_cannot_guess_them_without_the_image(tiny):
    assert accuracy(single_words(*tiny, EXAMPLES, blind=True)) < 0.45


@pytest.mark.slow
def test_descriptions_name_the_objects(tiny):
    figures = descriptions(*tiny, EXAMPLES)
    assert figures["object_recall"] >= 0.85
    assert figures["made_up_share"] <= 0.15


def test_a_padded_row_answers_as_it_does_alone(tiny):
    item = EXAMPLES[0]
    prompts = [(item.image, "count the objects."), (item.image, item.questions[0][1] + " " * 3)]
    prompts.append((item.image, "what is at the bottom right of the image, on the right?"))
    assert answer(*tiny, prompts, 4) == [answer(*tiny, [pair], 4)[0] for pair in prompts]


def test_a_chat_goes_on(tiny):
    model, processor = tiny
    right = 0
    for item in EXAMPLES[:10]:
        turns = item.questions[:2]
        messages = chat(turns[0][1], item.image)
        messages += [{"role": "assistant", "content": [{"type": "text", "text": turns[0][2]}]}]
        messages += [{"role": "user", "content": [{"type": "text", "text": turns[1][1]}]}]
        inputs = encode(processor, messages)
        out = model.generate(**inputs, max_new_tokens=4, do_sample=False)
        text = processor.decode(out[0, inputs["input_ids"].shape[1] :], skip_special_tokens=True)
        right += text.strip() == turns[1][2]
    assert right >= 7


def test_samples_come_with_their_truth():
    samples = read_set(ASSETS / "samples")
    assert sorted({len(item.names) for item in samples}) == [4, 6, 9]
    for item in samples:
        assert item.image.size == (96, 96)
        assert item.seed >= HELD_OUT
        assert item.seed not in {example.seed for example in EXAMPLES}
