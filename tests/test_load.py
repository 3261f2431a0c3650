"""The one loader of the tools: what it refuses, and in which words."""

from __future__ import annotations

import functools
import json
import shutil
import socket
import time
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import huggingface_hub
import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForImageTextToText, AutoProcessor

from st3.tools.common import load as loading
from st3.tools.common.errors import LoadError, first_line
from st3.tools.common.load import device_of, dtype_of, end_tokens, load, load_model, pad_left


def test_a_model_comes_in_eval_mode_in_the_asked_precision(tiny_model: Path) -> None:
    loaded = load(str(tiny_model), "cpu", "bf16")
    assert (loaded.model.training, loaded.model.dtype) == (False, torch.bfloat16)
    assert loaded.processor.image_processor is not None
    assert loaded.tokenizer is loaded.processor.tokenizer
    assert loaded.conditions() == "1 CPU thread, bfloat16"
    assert load(str(tiny_model), "cpu", attention="eager").model.dtype == torch.float32


def test_the_bundled_model_needs_no_name() -> None:
    assert load(device="cpu").name == load("st3-tiny", "cpu").name == "st3-tiny"


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("./nowhere", "no such model folder: './nowhere'"),
        ("a/b/c", "no such model folder"),
        (" ", "no such model folder"),
        ("someone/some-model", "neither in the local cache nor could it be had"),
    ],
)
def test_a_model_that_is_not_there(name: str, message: str) -> None:
    with pytest.raises(LoadError, match=message) as caught:
        load(name)
    assert "\n" not in str(caught.value)
    assert not caught.value.usage


@pytest.mark.parametrize("name", ["bad name!!", "a b/c", "-x/y", "x" * 99])
def test_what_cannot_be_a_hub_id_is_not_asked_for(name: str) -> None:
    with pytest.raises(LoadError, match="no folder here, and no hub id") as caught:
        load(name)
    assert "\n" not in str(caught.value)
    assert caught.value.usage


def test_a_folder_that_holds_no_model(tmp_path: Path) -> None:
    with pytest.raises(LoadError, match=r"holds no model: it has no config\.json"):
        load(str(tmp_path))


def changed(model: Path, folder: Path, layers: int) -> str:
    """A copy of a model whose config.json asks for another number of layers."""
    shutil.copytree(model, folder)
    path = folder / "config.json"
    config = json.loads(path.read_text())
    config["text_config"]["num_hidden_layers"] = layers
    config["text_config"].pop("layer_types", None)
    path.write_text(json.dumps(config))
    return str(folder)


def test_a_checkpoint_without_all_weights_is_refused(tiny_model: Path, tmp_path: Path) -> None:
    name = changed(tiny_model, tmp_path / "more", 9)
    with pytest.raises(LoadError, match=r"its checkpoint lacks \d+ of the weights .*layers\.8\."):
        load_model(name, "cpu")


def test_a_checkpoint_of_more_layers_is_refused(tiny_model: Path, tmp_path: Path) -> None:
    name = changed(tiny_model, tmp_path / "fewer", 7)
    with pytest.raises(LoadError, match=r"layers that its config.json does not name .*layers\.7\."):
        load_model(name, "cpu")


def test_weights_without_a_place_are_told(tiny_model: Path, tmp_path: Path) -> None:
    folder = Path(shutil.copytree(tiny_model, tmp_path / "more"))
    weights = load_file(folder / "model.safetensors")
    extra = {"training_head.weight": torch.zeros(1), "model.layers.0.old": torch.zeros(1)}
    save_file({**weights, **extra}, folder / "model.safetensors", {"format": "pt"})
    with pytest.warns(UserWarning, match="2 weights of the checkpoint have no place"):
        load_model(str(folder), "cpu")


def test_devices_and_dtypes_of_other_names() -> None:
    assert device_of(torch.device("cpu")) == torch.device("cpu")
    assert device_of("auto").type in ("cpu", "cuda", "mps", "xpu", "npu")
    with pytest.raises(LoadError, match="device 'toaster' cannot be used here") as caught:
        device_of("toaster")
    assert caught.value.usage
    assert dtype_of("bf16") is dtype_of("bfloat16") is torch.bfloat16
    with pytest.raises(LoadError, match="unknown dtype 'int3': use one of float32"):
        dtype_of("int3")


def test_tokens_that_end_an_answer() -> None:
    def model(ends: object) -> SimpleNamespace:
        return SimpleNamespace(generation_config=SimpleNamespace(eos_token_id=ends))

    tokenizer = SimpleNamespace(eos_token_id=7)
    assert end_tokens(model(3), tokenizer) == {3}
    assert end_tokens(model([3, 4]), tokenizer) == {3, 4}
    assert end_tokens(model(None), tokenizer) == {7}
    assert end_tokens(model(None)) == frozenset()


def test_padding_is_on_the_left_and_has_a_token() -> None:
    tokenizer = SimpleNamespace(padding_side="right", pad_token=None, eos_token="</s>")
    pad_left(tokenizer)
    assert (tokenizer.padding_side, tokenizer.pad_token) == ("left", "</s>")
    tokenizer.pad_token = "<pad>"
    pad_left(tokenizer)
    assert tokenizer.pad_token == "<pad>"


def test_reasons_are_one_line() -> None:
    assert first_line(ValueError("first\nsecond")) == "first"
    assert first_line(ValueError()) == "ValueError"
    assert first_line(OSError("of a library")) == "of a library"
    with pytest.raises(FileNotFoundError) as caught:
        Path("no/such/file").read_text()
    assert first_line(caught.value) == "No such file or directory: 'no/such/file'"


# The model hub ------------------------------------------------------------------------------------


@pytest.fixture
def hub(monkeypatch: pytest.MonkeyPatch) -> Iterator[socket.socket]:
    """A hub that takes connections and never answers."""
    silent = socket.create_server(("127.0.0.1", 0))
    address = f"http://127.0.0.1:{silent.getsockname()[1]}"
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(huggingface_hub.constants, "ENDPOINT", address)
    monkeypatch.setattr(loading, "PATIENCE", 0.5)
    yield silent
    silent.close()


@pytest.mark.parametrize("listens", [True, False])
def test_a_hub_that_is_away_is_asked_once_and_not_for_long(
    hub: socket.socket, listens: bool
) -> None:
    if not listens:
        hub.close()
    start = time.monotonic()
    with pytest.raises(LoadError, match=r"'nobody/no-such-model'.*offline"):
        load("nobody/no-such-model", "cpu")
    assert time.monotonic() - start < 5


def test_what_is_in_the_cache_is_loaded_without_the_hub(
    hub: socket.socket, tiny_model: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As transformers finds it there: told not to ask the hub for each of its files."""
    asked: list[bool] = []
    for kind in (AutoProcessor, AutoModelForImageTextToText):
        real = kind.from_pretrained
        here = functools.partial(_then, real, tiny_model, asked)
        monkeypatch.setattr(kind, "from_pretrained", here)
    monkeypatch.setattr(huggingface_hub, "try_to_load_from_cache", lambda *_, **__: "config.json")
    assert load("somebody/a-model", "cpu").name == "somebody/a-model"
    assert asked == [True, True]


def _then(real: Any, folder: Path, asked: list[bool], source: str, **options: Any) -> Any:
    asked.append(options.pop("local_files_only"))
    return real(str(folder), **options)
