"""The lmms-eval plug-in. What needs the harness is skipped where it is not installed (the extra
``eval``: 53 packages, torchvision among them)."""

from __future__ import annotations

import json
from importlib.metadata import entry_points
from pathlib import Path
from typing import Any

import pytest
import yaml
from PIL import Image

import st3
from st3.methods import DEFAULT_POLICY
from st3.methods.policies import parse, plain
from st3.methods.policies.saved import ModelFacts, to_dict
from st3.tools.eval import Evaluation, Store, bundled_scenes, entries, label_policies
from st3.tools.eval.text import is_right
from st3.tools.lmms.settings import arguments, policy_text
from st3.tools.lmms.task import write_task

GREEDY = {"max_new_tokens": 128, "num_beams": 1, "do_sample": False}


@pytest.mark.parametrize(
    ("given", "told"),
    [
        ({}, GREEDY),
        ({"until": ["\n"], "top_p": None}, GREEDY),
        ({"max_new_tokens": 12, "num_beams": 3}, {**GREEDY, "max_new_tokens": 12, "num_beams": 3}),
        ({"temperature": 0, "top_p": 0.9, "do_sample": True}, GREEDY),
        ({"temperature": 0.7, "do_sample": False, "top_k": 5}, GREEDY),
        ({"repetition_penalty": 1.2}, {**GREEDY, "repetition_penalty": 1.2}),
        (
            {"temperature": 0.7, "top_p": 0.9, "top_k": 5},
            {**GREEDY, "do_sample": True, "temperature": 0.7, "top_p": 0.9, "top_k": 5},
        ),
        ({"do_sample": True}, {**GREEDY, "do_sample": True}),
    ],
)
def test_a_tasks_settings_reach_generate(given: dict[str, Any], told: dict[str, Any]) -> None:
    assert arguments(given) == (told, [])


def test_settings_that_generate_does_not_know_are_named() -> None:
    given = {"image_aspect_ratio": "original", "max_gen_toks": 9, "temperature": 0}
    assert arguments(given) == (GREEDY, ["image_aspect_ratio", "max_gen_toks"])


@pytest.fixture
def harness() -> Any:
    return pytest.importorskip("lmms_eval", reason="pip install 'st3[eval]'")


def test_a_task_of_a_local_set(tmp_path: Path) -> None:
    count = write_task(bundled_scenes(), tmp_path, "mine", limit=2)
    rows = [json.loads(line) for line in (tmp_path / "mine.jsonl").read_text().splitlines()]
    assert len(rows) == count == 22  # ten tasks of one image, one of two
    assert {len(row["images"]) for row in rows} == {1, 2}
    assert all(Path(image).is_file() for row in rows for image in row["images"])
    text = (tmp_path / "mine.yaml").read_text().replace("!function ", "")
    task = yaml.safe_load(text)
    assert task["task"] == "mine"
    assert Path(task["dataset_kwargs"]["data_files"]["test"]) == tmp_path / "mine.jsonl"
    functions: dict[str, Any] = {}
    exec((tmp_path / "utils.py").read_text(), functions)
    assert [image.size for image in functions["images"](rows[0])] == [(96, 96)]
    right = rows[0]["answer"].upper() + "."
    assert functions["score"](rows[0], [right]) == {"right": 1.0}
    assert functions["score"](rows[0], ["no such thing"]) == {"right": 0.0}


def test_a_set_without_questions_makes_no_task(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="no single questions"):
        write_task(bundled_scenes().only(["describe"]), tmp_path, "mine")


def test_the_harness_finds_st3(harness: Any) -> None:
    assert "st3" in {entry.name for entry in entry_points(group="lmms_eval.models")}
    from lmms_eval.models import get_model

    assert get_model("st3").__module__ == "st3.tools.lmms.model"


def test_policy_arguments_may_stand_by_themselves() -> None:
    assert policy_text("st3", {}) == "st3"
    whole = parse("fastv:layer=3,drop=0.75")
    assert parse(policy_text("fastv", {"layer": 3, "drop": 0.75})) == whole
    assert parse(policy_text("fastv:layer=3", {"drop": 0.75})) == whole
    assert parse(policy_text("grid", {"keep": 0.123456789})) == st3.UniformGrid(0.123456789)
    assert parse(policy_text("evict", {"per_head": True})) == st3.Evict(per_head=True)
    assert parse(policy_text("vtw", {"layer": None})) == st3.VTW()


@pytest.mark.parametrize("budget", [0.35, "35%", "0.35"])
@pytest.mark.parametrize("policy", ["balanced", "fastv:layer=2", "sparsevlm"])
def test_a_budget_is_the_one_of_every_command(policy: str, budget: Any) -> None:
    """As ``--budget`` and ``st3.trim(budget=)`` take it: the mean share over the layers."""
    found = parse(policy_text(policy, {"budget": budget}))
    assert found == parse(policy, budget=0.35)
    assert found.schedule(16).mean_share == pytest.approx(0.35, abs=1e-6)


@pytest.mark.parametrize("budget", ["much", 1.5, True, -0.1])
def test_a_budget_that_is_none(budget: Any) -> None:
    with pytest.raises(ValueError, match=r"is no share of the visual tokens: write 35% or 0\.35"):
        parse(policy_text("balanced", {"budget": budget}))


def test_a_budget_comes_on_top_of_a_file(tmp_path: Path) -> None:
    path = tmp_path / "policy.json"
    facts = ModelFacts("m", "llava", 16)
    path.write_text(json.dumps(to_dict(parse("fastv"), facts)))
    found = parse(policy_text(str(path), {"budget": "40%"}))
    assert plain(found) == parse("fastv", budget=0.4)


def test_the_harness_hands_the_budget_on(harness: Any) -> None:
    """From ``--model_args`` to what the model keeps."""
    from st3.tools.lmms.model import TrimmedModel

    model = TrimmedModel.create_from_arg_string(
        "policy=fastv,layer=1,budget=35%,dtype=float32", {"device": "cpu", "batch_size": 1}
    )
    assert model.policy == parse("fastv:layer=1,budget=35%")
    image = Image.new("RGB", (96, 96), "white")
    content = [{"type": "image", "image": image}, {"type": "text", "text": "what is this?"}]
    share = model._answer([[{"role": "user", "content": content}]], {"max_new_tokens": 2})[1]
    assert share == pytest.approx(0.35, abs=0.01)


def test_the_harness_measures_what_st3_eval_measures(harness: Any, tmp_path: Path) -> None:
    from lmms_eval.evaluator import simple_evaluate
    from lmms_eval.tasks import TaskManager

    policy = "fastv:drop=0.75"
    data = bundled_scenes().only(limit=2)
    write_task(data, tmp_path, "st3_test")
    found = simple_evaluate(
        model="st3",
        model_args=f"policy={policy},dtype=float32",
        tasks=["st3_test"],
        batch_size=4,
        device="cpu",
        task_manager=TaskManager(include_path=str(tmp_path), include_defaults=False),
    )
    (value,) = (v for k, v in found["results"]["st3_test"].items() if k.startswith("right,"))
    from st3.tools.lmms.model import TrimmedModel

    model = TrimmedModel(policy=policy, dtype="float32", device="cpu")
    rows, _ = entries(label_policies([policy]), None, 16)
    single = [item for item in data.items if len(item.turns) == 1 and not item.captions]
    data = type(data)(data.path, tuple(single), data.vocabulary)
    work = Evaluation(model.model, model.runner.processor, data, rows, Store(None, {}))
    records = {record.key: record for record in work.run()}
    right = [
        is_right(records[(item.task, item.number, policy)].answers[0], item.turns[0].answers)
        for item in single
    ]
    assert value == pytest.approx(sum(right) / len(right))


def test_its_help_names_the_default() -> None:
    """Read as text: the harness may not be installed."""
    text = (Path(st3.__file__).parent / "tools" / "lmms" / "model.py").read_text()
    assert f"policy                 default: {DEFAULT_POLICY};" in text
