"""The benchmark of the server, small: more requests at once when trimmed; overload without harm."""

from __future__ import annotations

import dataclasses
import importlib.util
import json
import sys
from pathlib import Path
from types import ModuleType

import pytest

SCRIPT = Path(__file__).resolve().parent.parent / "benchmarks" / "serving.py"


@pytest.fixture(scope="module")
def serving() -> ModuleType:
    sys.path.insert(0, str(SCRIPT.parent))  # as a script's own folder is
    spec = importlib.util.spec_from_file_location("serving_benchmark", SCRIPT)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module
    spec.loader.exec_module(module)
    sys.path.remove(str(SCRIPT.parent))
    return module


@pytest.mark.slow
def test_a_small_run(serving: ModuleType, tiny_model: Path, tmp_path: Path,
                     capsys: pytest.CaptureFixture[str]) -> None:  # fmt: skip
    serving.main(["--quick", "--model", str(tiny_model), "--out", str(tmp_path)])
    found = json.loads((tmp_path / "serving-quick.json").read_text())
    met = {bar["name"]: bar["measured"] for bar in found["bars"]}
    assert met["requests at once, trimmed / untrimmed"] >= 2.5
    assert "answers a second, trimmed / untrimmed" in met  # too small to say how many
    overload = found["overload"]
    outcomes = overload["outcomes"]
    assert sum(outcomes.values()) == overload["requests"] == 40
    assert not {"wrong", "lost"} & set(outcomes)
    assert outcomes["right"] >= 5
    assert met["KV bytes still held"] == 0
    text = (tmp_path / "serving-quick.md").read_text()
    assert text.strip() == capsys.readouterr().out.strip()
    assert "| none | 4 |" in text


def test_the_models_of_the_capacity_part_are_as_large_as_they_say(serving: ModuleType) -> None:
    assert serving.Size().visual == 2880
    model, processor = serving.scaled(dataclasses.replace(serving.QUICK, layers=4))
    picture = serving._noise(48, serving.torch.Generator())
    inputs = processor(images=picture, text="<image>", return_tensors="pt")
    assert int((inputs["input_ids"] == model.config.image_token_index).sum()) == 36
    assert model.config.text_config.num_hidden_layers == 4
