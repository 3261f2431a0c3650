"""`st3 eval`: what it measures, that it goes on where it was, what it writes, what it refuses."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image
from typer.testing import CliRunner, Result

import st3
from st3.hf.call import CACHE
from st3.tools.cli import app
from st3.tools.eval import (
    Evaluation,
    Store,
    entries,
    label_policies,
    load_folder,
    summarise,
    usable,
)
from st3.tools.eval.data import Dataset
from st3.tools.eval.runs import Runner, _chat
from tests.tiny_llava import LAYERS, save_picture

ALL_KEPT = "st3:first_drop=0,final_keep=1,curve=none"
POLICY = "fastv:layer=1,drop=0.75"


@pytest.fixture(scope="module")
def loaded(tiny_model: Path) -> tuple[Any, Any]:
    from transformers import AutoModelForImageTextToText, AutoProcessor

    model = AutoModelForImageTextToText.from_pretrained(tiny_model).eval()
    return model, AutoProcessor.from_pretrained(tiny_model)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("set")
    save_picture(path / "a.png")
    save_picture(path / "b.png")
    rows = [
        {"image": "a.png", "question": "what is the red ?", "answer": "left"},
        {"image": "b.png", "question": "what is at the top left of the image ?", "answer": "top"},
        {"image": ["a.png", "b.png"], "question": "what is blue ?", "answer": "image"},
        {"image": "a.png", "captions": ["the red left"], "objects": ["red"]},
        {"image": "b.png", "captions": ["a blue top of the image"], "objects": ["blue", "image"]},
    ]
    (path / "set.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def evaluation(
    loaded: tuple[Any, Any], data: Dataset, policies: list[str], store: Store | None = None
) -> Evaluation:
    rows, _ = entries(label_policies(policies), None, LAYERS)
    return Evaluation(*loaded, data, rows, store or Store(None, {}), batch=2, max_new_tokens=6)


def st3_eval(folder: Path, model: Path, *more: object) -> Result:
    words = ["eval", "--data", folder, "--model", model, "--max-new-tokens", 5, *more]
    return CliRunner().invoke(app, [str(word) for word in words])


def test_what_keeps_everything_is_loyal(loaded: tuple[Any, Any], folder: Path) -> None:
    data = load_folder(folder)
    work = evaluation(loaded, data, [ALL_KEPT])
    work.entries = [entry for entry in work.entries if entry.beside is None]
    for rows in summarise(data, work.entries, work.run()).rows.values():
        untrimmed, kept = rows
        for name in ("loyal_answers", "loyal_tokens", "agreement"):
            assert kept.values[name].value == 1
        assert kept.values["kl"].value < 1e-9
        assert untrimmed.share == kept.share == 1
        assert kept.flops == pytest.approx(1)


def test_kl_and_agreement_are_those_of_a_plain_forward_pass(
    loaded: tuple[Any, Any], folder: Path
) -> None:
    """Without annealing and batch mates, the trimmed model's logits along the untrimmed answer."""
    model, _ = loaded
    item = load_folder(folder).items[0]
    runner = Runner(*loaded)
    reference = runner.reference([item], 6)
    led = runner.follow([item], st3.methods.policies.parse(POLICY), reference)
    chat = _chat(item)
    inputs = runner.encode([chat])
    prompt, length = inputs["input_ids"].shape[1], reference.tokens.shape[1]
    ids = torch.cat([inputs["input_ids"], reference.tokens], 1)
    whole = {"input_ids": ids, "attention_mask": torch.ones_like(ids)}
    whole["pixel_values"] = inputs["pixel_values"]
    with torch.no_grad():
        plain = model(**whole).logits[0, prompt - 1 : -1].log_softmax(-1)
        cache_free = []
        for end in range(length):
            part = {**whole, "input_ids": ids[:, : prompt + end]}
            part["attention_mask"] = torch.ones_like(part["input_ids"])
            cache_free.append(_trimmed_last(model, inputs, part, end))
    own = torch.stack(cache_free).log_softmax(-1)
    wanted = (plain.exp() * (plain - own)).sum()
    assert led.kl[0] == pytest.approx(float(wanted), rel=1e-3, abs=1e-6)
    assert led.kl[0] > 1e-3
    assert led.agree[0] == int((own.argmax(-1) == reference.tokens[0]).sum())


def _trimmed_last(model: Any, inputs: Any, part: Any, end: int) -> torch.Tensor:
    """Logits behind ``end`` answer tokens, fed one by one behind a trimmed prompt."""
    from transformers import DynamicCache

    cache = DynamicCache(config=model.config)
    prompt = inputs["input_ids"].shape[1]
    with st3.trim(model, POLICY):
        output = model(**inputs, **{CACHE: cache}, use_cache=True)
        for place in range(prompt, prompt + end):
            output = model(
                input_ids=part["input_ids"][:, place : place + 1],
                attention_mask=part["attention_mask"][:, : place + 1],
                **{CACHE: cache},
                use_cache=True,
            )
    return output.logits[0, -1]


def test_answers_are_those_of_generate(loaded: tuple[Any, Any], folder: Path) -> None:
    """Also of rows that were not generated, because every token was the untrimmed one."""
    data = load_folder(folder)
    work = evaluation(loaded, data, [POLICY, "vtw:layer=7"])
    records = {record.key: record for record in work.run()}
    runner = Runner(*loaded)
    for item in data.items:
        for entry in work.entries:
            (text,), (tokens,) = runner.answers([item], entry.policy, 6, entry.shrink)
            record = records[(item.task, item.number, entry.label)]
            assert record.answers == [text]
            first = records[(item.task, item.number, "none")]
            assert record.loyal == [record.same_place == first.tokens == len(tokens)]


def test_a_killed_run_goes_on(loaded: tuple[Any, Any], folder: Path, tmp_path: Path) -> None:
    data = load_folder(folder)
    whole = evaluation(loaded, data, [POLICY]).run()

    class Killed(Exception):
        pass

    def kill(count: int, what: str) -> None:
        raise Killed

    for _ in range(3):  # each time a batch further
        work = evaluation(loaded, data, [POLICY], Store(tmp_path, {"a": 1}))
        work.on_items = kill
        with pytest.raises(Killed):
            work.run()
    lines = (tmp_path / "items.jsonl").read_text()
    (tmp_path / "items.jsonl").write_text(lines[:-20])  # killed while writing
    store = Store(tmp_path, {"a": 1})
    done = dict(store.records)
    assert 0 < len(done) < len(whole)
    work = evaluation(loaded, data, [POLICY], store)
    counted: list[int] = []
    missing = work.missing
    work.on_items = lambda count, what: counted.append(count)
    resumed = work.run()
    assert sum(counted) == missing == len(whole) - len(done)
    assert work.missing == 0
    for record, other in zip(resumed, whole, strict=True):
        assert record.key == other.key
        assert record.answers == other.answers
        assert record.kl == pytest.approx(other.kl, abs=1e-5)
        assert done.get(record.key, record) is record
    with pytest.raises(ValueError, match="another a"):
        Store(tmp_path, {"a": 2})
    path = tmp_path / "policies.json"
    told = json.loads(path.read_text())
    assert "drop=0.75" in told[POLICY]
    path.write_text(json.dumps({**told, POLICY: told[POLICY] + " of that day"}))
    with pytest.raises(ValueError, match=r"results of another fastv.* its defaults changed"):
        evaluation(loaded, data, [POLICY], Store(tmp_path, {"a": 1})).run()


def test_random_stands_beside_every_policy_at_its_counts() -> None:
    rows, notes = entries(
        label_policies(["thirds", "vtw", "random", "none", "fastv"]), None, LAYERS, False
    )
    assert [row.label for row in rows] == ["none", "thirds", "random", "vtw", "fastv",
                                           "random:like=(fastv)"]  # fmt: skip
    assert not notes
    assert rows[-1].policy.schedule(LAYERS) == rows[-2].policy.schedule(LAYERS)
    assert rows[2].beside == "thirds"  # VTW chooses nothing, and random has its own counts


def test_budgets_are_reached() -> None:
    chosen = label_policies(["st3", "fastv", "pyramiddrop"])
    rows, notes = entries(chosen, [0.45, 0.6], 32, baselines=False)
    shares = [row.policy.schedule(32).mean_share for row in rows[1:]]
    assert shares == pytest.approx([0.45, 0.45, 0.6, 0.6] * 3, abs=1e-6)
    assert not notes
    rows, notes = entries(label_policies(["st3-7b", "fastv"]), [0.08], 32)
    names = ["none", "fastv", "random like fastv", "grid", "downsample"]
    assert [row.source for row in rows] == names
    assert "at 8% is left out: a mean share of 8.0% cannot be had" in notes[0]
    with pytest.raises(ValueError, match="cannot be had"):
        entries(label_policies(["st3-7b"]), [0.05], 32)


def test_policies_that_a_model_cannot_have_are_left_out() -> None:
    from tests.zoo import build

    model = build("mistral3", 0)[1]
    able, notes = usable(model, label_policies(["visionzip", "fastv"]))
    assert [str(policy) for policy in able] == ["fastv"]
    assert "visionzip is left out" in notes[0]
    assert "cannot be followed" in notes[0]
    with pytest.raises(ValueError, match="cannot be followed"):
        usable(model, label_policies(["visionzip"]))


def test_conversations_go_on_from_the_cache(monkeypatch: pytest.MonkeyPatch) -> None:
    """The second question is answered from what the first one left, and untrimmed as ever."""
    from transformers import AutoModelForImageTextToText, AutoProcessor

    folder = st3.bundled_model()
    model = AutoModelForImageTextToText.from_pretrained(folder, dtype=torch.float32).eval()
    runner = Runner(model, AutoProcessor.from_pretrained(folder))
    item = st3.tools.eval.bundled_scenes().only(["conversation"], 1).items[0]
    untrimmed = runner.converse(item, st3.methods.policies.parse("none"), 8)
    chat = _chat(item)
    for turn, answer in zip(item.turns[1:], untrimmed.answers, strict=False):
        for role, text in (("assistant", answer), ("user", turn.question)):
            chat.append({"role": role, "content": [{"type": "text", "text": text}]})
        with torch.no_grad():
            inputs = runner.encode([chat])
            out = model.generate(**inputs, max_new_tokens=8, do_sample=False)
        (again,) = runner.texts(out[:, inputs["input_ids"].shape[1] :])
        assert again == untrimmed.answers[len(chat) // 2]
    prompts: list[int] = []
    forward = model.model.language_model.forward

    def watched(**kwargs: Any) -> Any:
        prompts.append(kwargs["inputs_embeds"].shape[1])
        return forward(**kwargs)

    monkeypatch.setattr(model.model.language_model, "forward", watched)
    talk = runner.converse(item, st3.methods.policies.parse("st3"), 8)
    assert prompts[0] > 144
    assert max(prompts[1:]) < 144  # the image is never fed again
    assert talk.kept.share < 0.5
    assert len(talk.answers) == len(item.turns)


@pytest.mark.slow
def test_command_prints_and_writes(folder: Path, tiny_model: Path, tmp_path: Path) -> None:
    result = st3_eval(folder, tiny_model, "--policies", POLICY, "--out", tmp_path, "--batch", 2)
    assert result.exit_code == 0, result.output
    assert "Questions (2)" in result.stdout
    assert "- random" in result.stdout
    data = json.loads((tmp_path / "quality.json").read_text())
    assert data["kinds"].keys() == {"questions", "several images", "descriptions"}
    rows = data["kinds"]["descriptions"]["rows"]
    assert [row["policy"] for row in rows] == [
        "none", POLICY, f"random:like=({POLICY})", "grid:keep=0.34", "downsample:keep=0.34",
    ]  # fmt: skip
    given = data["conditions"]
    assert given["st3"] == st3.__version__
    assert {"commit", "engine", "seeds"} <= given.keys()
    assert rows[1]["mean_share"] == pytest.approx((1 + 7 * 0.25) / 8)
    assert rows[1]["time"] > 0
    assert {"recall", "made_up", "cider", "bleu4", "rouge_l", "kl"} <= rows[1]["values"].keys()
    page = (tmp_path / "quality.md").read_text()
    assert f"| `{POLICY}` |" in page
    for picture in ("quality-budget.png", "quality-time.png", "quality-bubbles.png"):
        assert (tmp_path / picture).stat().st_size > 5000
        assert f"({picture})" in page
    before = (tmp_path / "items.jsonl").read_text()
    again = st3_eval(folder, tiny_model, "--policies", POLICY, "--out", tmp_path)
    assert again.exit_code == 0
    assert (tmp_path / "items.jsonl").read_text() == before  # nothing was left to do


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--policies", "nonsense"], "unknown policy 'nonsense'"),
        (["--budgets", "half"], "budget half is no share"),
        (["--budgets", "1.5"], "1.5 is no share"),
        (["--budget", "35%,0%"], "0 is no share"),
        (["--tasks", "nonsense"], "no task 'nonsense'"),
        (["--data", "/nowhere"], "no such folder or file"),
        (["--policies", "st3:first_layer=20"], "first_layer"),
        (["--budgets", "0.1", "--policies", "st3"], "cannot be had"),
    ],
)
def test_wrong_use_is_one_line(
    folder: Path, tiny_model: Path, options: list[str], message: str
) -> None:
    result = st3_eval(folder, tiny_model, *options)
    assert result.exit_code != 0
    lines = result.stderr.strip().splitlines()
    assert lines[-1].startswith("error: ")
    assert message in lines[-1]
    assert not any("Traceback" in line for line in lines)


def test_photographs_are_asked_about_upright(tmp_path: Path) -> None:
    exif = Image.Exif()
    exif[0x0112] = 6
    Image.new("RGB", (30, 20)).save(tmp_path / "photo.jpg", exif=exif)
    row = {"image": "photo.jpg", "question": "what is this?", "answer": "nothing"}
    (tmp_path / "questions.jsonl").write_text(json.dumps(row) + "\n")
    item = load_folder(tmp_path).items[0]
    assert _chat(item)[0]["content"][0]["image"].size == (20, 30)


def test_results_of_other_settings_are_kept_apart(
    folder: Path, tiny_model: Path, tmp_path: Path
) -> None:
    (tmp_path / "settings.json").write_text('{"model": "another"}')
    result = st3_eval(folder, tiny_model, "--out", tmp_path)
    assert result.exit_code == 1
    assert "holds results with another model" in result.stderr


def test_the_system_prompt_is_asked_with_and_kept_apart(
    folder: Path, tiny_model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen: list[str] = []
    real = Runner.encode

    def encode(self: Runner, chats: Any) -> Any:
        inputs = real(self, chats)
        seen.extend(self.processor.batch_decode(inputs["input_ids"]))
        return inputs

    monkeypatch.setattr(Runner, "encode", encode)
    words = ("--policies", "vtw", "--limit", 1, "--out", tmp_path / "out", "--json")
    done = st3_eval(folder, tiny_model, *words, "--system", "green and red")
    assert done.exit_code == 0, done.output
    assert json.loads(done.stdout)["conditions"]["system"] == "green and red"
    asked = [text for text in seen if "what" in text or "describe" in text]
    assert asked
    assert all("green and red" in text for text in asked)
    for other in ((), ("--system", "blue")):
        again = st3_eval(folder, tiny_model, *words, *other)
        assert again.exit_code == 1
        assert "holds results with another system" in again.stderr


@pytest.mark.parametrize("name", ["st3", "torch", "transformers", "dtype", "device"])
def test_results_of_other_versions_are_not_mixed(
    folder: Path, tiny_model: Path, tmp_path: Path, name: str
) -> None:
    (tmp_path / "settings.json").write_text(json.dumps({name: "0.0"}))
    result = st3_eval(folder, tiny_model, "--out", tmp_path)
    assert result.exit_code == 1
    assert "holds results with another " in result.stderr
    assert name in result.stderr
    (tmp_path / "settings.json").unlink()
    assert st3_eval(folder, tiny_model, "--out", tmp_path).exit_code == 0
    assert json.loads((tmp_path / "settings.json").read_text())[name] != "0.0"
