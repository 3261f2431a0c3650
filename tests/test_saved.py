"""A policy in a file: what it is, which model it was found for, and that every command takes it."""

from __future__ import annotations

import json
import warnings
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from typer.testing import CliRunner, Result

import st3
from st3.errors import OtherModelWarning
from st3.methods.policies import parse, parse_text, plain, with_budget
from st3.methods.policies.saved import ModelFacts, Saved, to_dict
from st3.models import model_facts
from st3.tools.cli import app
from st3.tools.serve import Engine
from tests.helpers import Case
from tests.serving import load
from tests.tiny_llava import LAYERS

TINY = ModelFacts("tiny-llava", "llava", LAYERS)
POLICY = "fastv:layer=1,drop=0.75"


def write(path: Path, model: ModelFacts = TINY, policy: str = POLICY, **more: Any) -> Path:
    path.write_text(json.dumps({**to_dict(parse(policy), model), **more}))
    return path


@pytest.fixture
def file(tmp_path: Path) -> Path:
    return write(tmp_path / "policy.json")


def run(*words: object) -> Result:
    return CliRunner().invoke(app, [str(word) for word in words])


# Reading ----------------------------------------------------------------------------------------


def test_a_file_is_the_policy_in_it(file: Path) -> None:
    policy = parse(str(file))
    assert str(policy) == POLICY
    assert plain(policy) == with_budget(policy, LAYERS) == parse(POLICY)
    assert policy.schedule(LAYERS) == parse(POLICY).schedule(LAYERS)
    assert policy.scorer() == parse(POLICY).scorer()
    assert policy.at_budget(LAYERS, 0.5) == parse(POLICY).at_budget(LAYERS, 0.5)
    assert plain(parse("fastv")) == parse("fastv")


def test_a_path_is_a_file(file: Path, tmp_path: Path) -> None:
    assert parse(file) == parse(str(file))
    assert plain(parse(file, budget="50%")) == parse(POLICY, budget=0.5)
    odd = write(tmp_path / "tuned.policy")  # whatever its name
    assert plain(parse(odd)) == parse(POLICY)
    with pytest.raises(ValueError, match="cannot read the policy"):
        parse(tmp_path / "none.json")


def test_a_long_name_is_not_read_back_in_full() -> None:
    with pytest.raises(ValueError, match=r"^unknown policy 'x{60}\.\.\.': use one of") as error:
        parse("x" * 100_000)
    assert len(str(error.value)) < 500


def test_arguments_beside_a_file(file: Path) -> None:
    policy = parse(f"{file}:layer=3", budget="50%")
    assert str(policy) == "fastv:layer=3,drop=0.75,budget=0.5"
    assert isinstance(policy, Saved)
    assert with_budget(policy, 8) == parse("fastv:layer=3").at_budget(8, 0.5)
    assert str(parse(policy, layer=4)) == "fastv:layer=4,drop=0.75,budget=0.5"


def test_texts_from_elsewhere_read_no_files(file: Path) -> None:
    for text in (str(file), f"random:like=({file})"):
        with pytest.raises(ValueError, match="unknown policy"):
            parse_text(text)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (None, "cannot read the policy .*: No such file"),
        ("policy", "is not JSON"),
        ("[1]", "is no policy that st3 tune wrote: it holds no object"),
        ("null", "it holds no object"),
        ("[" * 100_000, "is not JSON"),
        ("{}", "'policy' is missing"),
        ('{"policy": "st3"}', "'model' is missing"),
        ('{"policy": "st3", "model": []}', r"its model is \[\]"),
        ('{"policy": "st3", "model": {"name": "a", "type": "b"}}', "'layers' is missing"),
        (json.dumps(to_dict(parse("st3"), replace(TINY, layers=True))), "its layers is True"),
        (json.dumps(to_dict(parse("st3"), TINY) | {"policy_in_full": 3}), "its policy_in_full is"),
        (json.dumps(to_dict(parse("st3"), TINY) | {"policy": 3}), "its policy is 3"),
        (json.dumps(to_dict(parse("st3"), TINY) | {"policy": "a.json"}), "its policy is 'a.json'"),
        (json.dumps(to_dict(parse("st3"), TINY) | {"policy": "magic"}), "unknown policy 'magic'"),
    ],
)
def test_files_that_are_none(tmp_path: Path, content: str | None, message: str) -> None:
    path = tmp_path / "bad.json"
    if content is not None:
        path.write_text(content)
    with pytest.raises(ValueError, match=message):
        parse(str(path))


def test_other_defaults_are_told(tmp_path: Path) -> None:
    path = write(tmp_path / "policy.json", policy="balanced", policy_in_full="Balanced(old=1)")
    with pytest.warns(OtherModelWarning, match="other defaults: run st3 tune again"):
        parse(str(path))


# Which model ------------------------------------------------------------------------------------


def test_a_model_by_its_config() -> None:
    case = Case.of("llava")
    assert model_facts(case.model.config) == ModelFacts("", "llava", case.layers)


def test_the_model_it_was_found_for(file: Path, tiny_model: Path) -> None:
    model, _ = load(tiny_model)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        trimmer = st3.trim(model, str(file))
    assert trimmer.policy == parse(POLICY)


def test_another_name_is_a_warning_that_names_both(tmp_path: Path, tiny_model: Path) -> None:
    path = write(tmp_path / "policy.json", replace(TINY, name="llava-1.5-7b"))
    model, _ = load(tiny_model)
    with pytest.warns(OtherModelWarning, match=r"llava-1\.5-7b .*this model is tiny-llava"):
        st3.trim(model, str(path))


@pytest.mark.parametrize("other", [{"layers": 32}, {"type": "qwen2_vl"}])
def test_another_kind_is_an_error_that_names_both(
    tmp_path: Path, tiny_model: Path, picture: Path, other: dict[str, Any]
) -> None:
    path = write(tmp_path / "policy.json", replace(TINY, name="theirs", **other))
    model, processor = load(tiny_model)
    with pytest.raises(ValueError, match=r"found for theirs .* this model is tiny-llava") as error:
        st3.trim(model, str(path))
    with pytest.raises(ValueError, match="found for theirs"):
        Engine(model, processor, policy=str(path), kv_budget_bytes=1 << 20)
    result = run("generate", picture, "-p", "what", "-m", tiny_model, "--policy", path)
    assert result.exit_code == 2
    (line,) = result.stderr.strip().splitlines()
    assert line.startswith("error: ")
    assert str(error.value) in line


# Commands ---------------------------------------------------------------------------------------


def test_generate(file: Path, picture: Path, tiny_model: Path) -> None:
    words = ("generate", picture, "-p", "what is red ?", "-m", tiny_model, "--max-new-tokens", 4)
    data = json.loads(run(*words, "--json", "--policy", file).stdout)
    assert data["policy"] == data["report"]["policy"] == POLICY
    data = json.loads(run(*words, "--json", "--policy", "fastv", "--budget", "50%").stdout)
    assert data["policy"] == "fastv:budget=0.5"
    assert data["report"]["mean_share"] == pytest.approx(0.5, abs=0.02)


def test_generate_warns_in_one_line(tmp_path: Path, picture: Path, tiny_model: Path) -> None:
    path = write(tmp_path / "policy.json", replace(TINY, name="theirs"))
    result = run("generate", picture, "-p", "what", "-m", tiny_model, "--policy", path, "--json")
    assert result.exit_code == 0
    (line,) = result.stderr.strip().splitlines()
    assert line.startswith("warning: ")
    assert "theirs" in line
    assert "tiny-llava" in line


def test_batch(file: Path, picture: Path, tiny_model: Path, tmp_path: Path) -> None:
    words = ("batch", picture.parent, "-p", "what", "-m", tiny_model, "--max-new-tokens", 2)
    for name, options, policy in (
        ("a", ("--policy", file), POLICY),
        ("b", ("--budget", "0.5"), "thirds:budget=0.5"),
    ):
        result = run(*words, "-o", tmp_path / name, *options)
        assert result.exit_code == 0, result.output
        assert json.loads((tmp_path / name / "summary.json").read_text())["policy"] == policy


def test_cost(file: Path, tmp_path: Path) -> None:
    path = write(tmp_path / "vicuna.json", ModelFacts("llava-1.5-7b-hf", "llava", 32))
    words = ("cost", "--model", "llava-1.5-7b", "--json", "--policy")
    rows = json.loads(run(*words, path).stdout)["rows"]
    assert [row["policy"] for row in rows][-1] == POLICY
    assert "found for tiny-llava" in run(*words, file).stderr
    rows = json.loads(run(*words, "fastv", "--budget", "20%").stdout)["rows"]
    assert rows[-1]["policy"] == "fastv:budget=0.2"
    assert rows[-1]["mean_share"] == pytest.approx(0.2, abs=2e-3)


def test_serve(file: Path, tiny_model: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from st3.tools import serve

    asked: list[Any] = []

    class Refusing:
        def __init__(self, model: Any, processor: Any, policy: Any, **limits: Any) -> None:
            asked.append(policy)
            raise ValueError("enough")

    monkeypatch.setattr(serve, "Engine", Refusing)
    words = ("serve", "-m", tiny_model, "--port", 0)
    for options in (("--policy", file), ("--policy", "fastv", "--budget", "35%")):
        assert "enough" in run(*words, *options).stderr
    assert list(map(str, asked)) == [POLICY, "fastv:budget=0.35"]
    assert isinstance(asked[0], Saved)  # so that the engine can tell whose it is


def test_eval(file: Path, picture: Path, tiny_model: Path, tmp_path: Path) -> None:
    row = {"image": str(picture), "question": "what is red ?", "answer": "left"}
    (tmp_path / "set.jsonl").write_text(json.dumps(row) + "\n")
    out = tmp_path / "out"
    result = run(
        "eval", "-m", tiny_model, "--data", tmp_path / "set.jsonl", "--policies", file, "--out", out
    )
    assert result.exit_code == 0, result.output
    data = json.loads((out / "quality.json").read_text())
    assert data["kinds"]["questions"]["rows"][1]["policy"] == POLICY


@pytest.mark.parametrize(
    "command",
    [
        ("generate", "x.png", "-p", "what"),
        ("batch", "x.jsonl", "-o", "x"),
        ("cost",),
        ("serve",),
        ("demo",),
        ("bench",),
        ("vllm", "check", "model"),
    ],
)
def test_wrong_budgets_and_files_are_one_line(command: tuple[str, ...]) -> None:
    option = "--policies" if command in (("bench",), ("cost",)) else "--policy"
    for options, message in (
        (("--budget", "35"), "error: --budget 35 is no share of the visual tokens"),
        ((option, "none.json"), f"error: {option} none.json: cannot read the policy none.json"),
    ):
        result = run(*command, *options)
        assert result.exit_code == 2, result.output
        (line,) = result.stderr.strip().splitlines()
        assert line.startswith(message)


# vLLM -------------------------------------------------------------------------------------------


def vllm_model(name: str, layers: int) -> Any:
    text = SimpleNamespace(num_hidden_layers=layers)
    config = SimpleNamespace(
        name_or_path=name, model_type="llava", get_text_config=lambda decoder: text
    )
    return SimpleNamespace(hf_config=config, hf_text_config=text)


def test_vllm(file: Path) -> None:
    from st3.vllm import settings

    def plan(**asked: Any) -> Any:
        found = settings.read({"st3": asked})
        assert found is not None
        return found.plan_for(vllm_model("/models/tiny-llava", LAYERS))

    assert plan(policy=str(file)).policy == POLICY
    at_budget = str(parse("fastv").at_budget(LAYERS, 0.5))
    assert plan(policy="fastv", budget="50%").policy == at_budget
    assert plan(policy="divprune", budget=0.5).policy == "divprune:keep=0.5"
    own = plan(budget=0.5)
    assert own.schedule.mean_share == pytest.approx(0.5, abs=1e-4)
    assert own.policy.startswith("balanced:")
    with pytest.raises(ValueError, match="budget 50 is no share"):
        plan(budget=50)
    with pytest.raises(ValueError, match="cannot run inside of vLLM"):
        plan(policy="dart", budget=0.5)
    assert plan(policy="none") is None
    found = settings.read({"st3": {"policy": str(file)}})
    assert found is not None
    with pytest.raises(ValueError, match=r"found for tiny-llava .* this model is other"):
        found.plan_for(vllm_model("other", 32))
