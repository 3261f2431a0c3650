"""`st3 cost`: what it prints is what st3.cost computes."""

from __future__ import annotations

import dataclasses
import json
import os
import shutil
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
from transformers import AutoProcessor, LlavaConfig, LlavaNextConfig, LlavaNextProcessor
from transformers.models.llava_next.image_processing_pil_llava_next import (
    LlavaNextImageProcessorPil,
)
from typer.testing import CliRunner

import st3
from st3.cost import cost_table
from st3.cost.shapes import shape
from st3.methods.policies import presets
from st3.tools.cli import app
from tests.tiny_llava import CHAT, LAYERS


def cost(*arguments: object) -> Any:
    return CliRunner().invoke(app, ["cost", *map(str, arguments)])


def test_json_is_the_cost_table() -> None:
    done = cost(
        "--model", "llava-next-7b", "--policy", "st3-7b", "--policy", "fastv:drop=0.75",
        "--text", 50, "--new-tokens", 9, "--dtype", "float16", "--json",
    )  # fmt: skip
    assert done.exit_code == 0, done.output
    policies = {
        str(presets()["st3-7b"]): presets()["st3-7b"].schedule(32),
        "fastv:drop=0.75": st3.FastV(drop=0.75).schedule(32),
    }
    rows = cost_table(shape("llava-next-7b").config, 50, 2880, policies, 9, "float16")
    assert json.loads(done.stdout)["rows"] == [dataclasses.asdict(row) for row in rows]


def test_the_table_shows_the_default_policies() -> None:
    done = cost()
    assert done.exit_code == 0, done.output
    lines = {line.split()[0]: line for line in done.stdout.splitlines() if line.split()}
    assert {"untrimmed", "st3", "fastv:layer=2", "fastv:layer=3", "vtw"} <= set(lines)
    assert "57.5%" in lines["fastv:layer=2"]  # FastV's prefill FLOPs at K = 2, R = 50 %
    assert "not measured" in done.stdout


def test_counts_that_the_image_says_are_told_as_the_most() -> None:
    said = "pixelprune: at most; how many tokens stay is the image's own number."
    assert said in cost("--policies", "balanced,pixelprune").stdout
    assert "at most" not in cost("--policies", "balanced,pixelprune:keep=0.3").stdout


def test_presets_keep_their_names_in_the_table() -> None:
    done = cost("--policy", "st3-7b", "--policy", "st3-13b")
    assert [line.split()[0] for line in done.stdout.splitlines() if "st3-" in line] == [
        "st3-7b", "st3-13b"
    ]  # fmt: skip
    assert "first_drop" not in done.stdout


def test_a_policy_is_not_cut_where_the_terminal_is_narrow() -> None:
    done = CliRunner().invoke(
        app, ["cost", "--policies", "balanced:budget=50%"], env={"COLUMNS": "80"}
    )
    assert "…" not in done.stdout
    lines = done.stdout.splitlines()
    first = next(i for i, line in enumerate(lines) if line.startswith("balanced"))
    assert lines[first].split()[0] + lines[first + 1].split()[0] == "balanced:budget=50%"


def test_a_folder_needs_the_number_of_visual_tokens(tiny_model: Path) -> None:
    done = cost("--model", tiny_model, "--visual", 16, "--policy", "vtw", "--json")
    assert done.exit_code == 0, done.output
    (untrimmed, vtw) = json.loads(done.stdout)["rows"]
    assert untrimmed["mean_visual"] == 16
    assert vtw["mean_visual"] == 8
    assert LAYERS == 8
    without = cost("--model", tiny_model)
    assert without.exit_code == 2
    assert "--visual" in without.stderr


@pytest.mark.parametrize(
    ("arguments", "part"),
    [
        (("--model", "no-such"), "no-such"),
        (("--model", "no-such", "--visual", 9), "no-such"),
        (("--policy", "st4"), "st4"),
        (("--policy", "fastv:layer=99"), "layer=99"),
        (("--policies", " , "), "--policies names no policy"),
        (("-m", "a b/c", "--visual", 3), "no hub id"),
        (("--dtype", "int3"), "int3"),
        (("--new-tokens", 0), "--max-new-tokens"),
    ],
)
def test_wrong_usage_is_one_line(arguments: tuple[object, ...], part: str) -> None:
    done = cost(*arguments)
    assert done.exit_code == 2, done.output
    (line,) = done.stderr.strip().splitlines()
    assert line.startswith("error: ")
    assert part in line


# Images of one's own ------------------------------------------------------------------------------


def test_the_visual_tokens_of_an_image_are_the_processors(tiny_model: Path, picture: Path) -> None:
    told = json.loads(cost("-m", tiny_model, "--image", picture, "--json").stdout)
    assert told["visual"] == 16
    two = ("--image", picture, "-i", picture, "--policies", "vtw", "--json")
    assert json.loads(cost("-m", tiny_model, *two).stdout)["visual"] == 32


def save_tiled(model: Path, folder: Path) -> Path:
    """A LLaVA-NeXT as the hub has it, without weights: tiles of 16 tokens, and one of the whole."""
    config = LlavaConfig.from_pretrained(model)
    grid = [[32, 64], [64, 32], [64, 64]]
    LlavaNextConfig(
        vision_config=config.vision_config,
        text_config=config.text_config,
        image_token_index=config.image_token_id,
        image_grid_pinpoints=grid,
    ).save_pretrained(folder)
    LlavaNextProcessor(
        image_processor=LlavaNextImageProcessorPil(
            size={"shortest_edge": 32},
            crop_size={"height": 32, "width": 32},
            image_grid_pinpoints=grid,
        ),
        tokenizer=AutoProcessor.from_pretrained(model).tokenizer,
        patch_size=8,
        vision_feature_select_strategy="default",
        num_additional_image_tokens=1,
        image_token="<image>",
        chat_template=CHAT,
    ).save_pretrained(folder)
    return folder


def test_the_size_of_an_image_counts_where_tokens_follow_it(
    tiny_model: Path, tmp_path: Path
) -> None:
    folder = save_tiled(tiny_model, tmp_path / "tiled")
    words = ("-m", folder, "--policies", "vtw", "--json")
    told = [
        json.loads(cost(*words, *more).stdout)["visual"]
        for more in (
            ("--size", "64x64"),
            ("--size", "32X64"),
            ("--size", "64x64", "--size", "32x64"),
        )
    ]
    # a newline behind each row of tiles: 16 + 8 rows of 8 + 1, or 16 + 8 rows of 4 + 1
    assert told == [16 + 72, 16 + 40, 16 + 72 + 16 + 40]


@pytest.mark.parametrize(
    ("arguments", "part"),
    [
        (("--size", "12"), "--size 12: give width and height"),
        (("--size", "0x9"), "give width and height"),
        (("--size", "99999x99999"), "more than 64 megapixels"),
        (("--size", "9x9", "--visual", 3), "--size and --visual exclude each other"),
        (("--image", "no.png", "--visual", 3), "--image and --visual exclude each other"),
        (("--size", "99x99"), "the shape llava-1.5-7b does not have"),
    ],
)
def test_images_that_cannot_be_counted(arguments: tuple[object, ...], part: str) -> None:
    done = cost(*arguments)
    assert done.exit_code == 2, done.output
    (line,) = done.stderr.strip().splitlines()
    assert part in line


def test_the_bundled_model_has_a_name(picture: Path) -> None:
    words = ("-m", "st3-tiny", "--image", picture, "--policies", "vtw", "--json")
    assert json.loads(cost(*words).stdout)["visual"] == 144


def test_an_image_that_is_not_there(tiny_model: Path) -> None:
    done = cost("-m", tiny_model, "--image", "no.png")
    assert done.exit_code == 2
    assert "no.png" in done.stderr


# A hub's model in the local cache, offline --------------------------------------------------------


def cached(model: Path, home: Path, name: str, revisions: dict[str, str]) -> None:
    """A model as the hub's client lays it out: snapshots by commit, and what branches stand for."""
    folder = home / "hub" / f"models--{name.replace('/', '--')}"
    for revision, commit in revisions.items():
        (folder / "refs").mkdir(parents=True, exist_ok=True)
        (folder / "refs" / revision).write_text(commit)
        if not (folder / "snapshots" / commit).exists():
            shutil.copytree(model, folder / "snapshots" / commit)


def offline(home: Path, *arguments: object, **more: str) -> subprocess.CompletedProcess[str]:
    """`st3 cost` where nothing answers at the hub's address."""
    gone = {"HF_HOME": str(home), "HF_ENDPOINT": "http://127.0.0.1:9", **more}
    return subprocess.run(
        [sys.executable, "-m", "st3.tools.cli", "cost", *map(str, arguments)],
        env={**{k: v for k, v in os.environ.items() if not k.startswith("HF_")}, **gone},
        capture_output=True,
        text=True,
        check=False,
    )


def test_a_cached_hub_id_is_costed_offline(tiny_model: Path, tmp_path: Path) -> None:
    cached(tiny_model, tmp_path, "somebody/a-model", {"main": "a" * 40, "v2": "b" * 40})
    changed = tmp_path / "hub/models--somebody--a-model/snapshots" / ("b" * 40) / "config.json"
    config = json.loads(changed.read_text())
    config["text_config"]["num_hidden_layers"] = 4
    config["text_config"].pop("layer_types", None)
    changed.write_text(json.dumps(config))
    words = ("-m", "somebody/a-model", "--size", "60x40", "--policies", "vtw", "--json")
    start = time.monotonic()
    done = offline(tmp_path, *words)
    assert done.returncode == 0, done.stderr
    assert time.monotonic() - start < 30
    main = json.loads(done.stdout)
    assert (main["model"], main["visual"]) == ("somebody/a-model", 16)
    other = json.loads(offline(tmp_path, *words, "--revision", "v2", HF_HUB_OFFLINE="1").stdout)
    assert other["model"] == "somebody/a-model@v2"
    assert other["rows"][0]["kv_prefill_mib"] == pytest.approx(
        main["rows"][0]["kv_prefill_mib"] / 2
    )


def test_a_revision_that_is_not_in_the_cache(tiny_model: Path, tmp_path: Path) -> None:
    cached(tiny_model, tmp_path, "somebody/a-model", {"main": "a" * 40})
    done = offline(tmp_path, "-m", "somebody/a-model", "--visual", 9, "--revision", "v9")
    assert done.returncode == 1
    (line,) = done.stderr.strip().splitlines()
    assert line.startswith("error: ")
    assert "'somebody/a-model@v9'" in line
    assert "neither in the local cache" in line
