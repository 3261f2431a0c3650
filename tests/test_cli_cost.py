"""`st3 cost`: what it prints is what st3.cost computes."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner

import st3
from st3.cost import cost_table
from st3.cost.shapes import shape
from st3.methods.policies import presets
from st3.tools.cli import app
from tests.tiny_llava import LAYERS


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


def test_presets_keep_their_names_in_the_table() -> None:
    done = cost("--policy", "st3-7b", "--policy", "st3-13b")
    assert [line.split()[0] for line in done.stdout.splitlines() if "st3-" in line] == [
        "st3-7b", "st3-13b"
    ]  # fmt: skip
    assert "first_drop" not in done.stdout


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
        (("--dtype", "int3"), "int3"),
        (("--new-tokens", 0), "--new-tokens"),
    ],
)
def test_wrong_usage_is_one_line(arguments: tuple[object, ...], part: str) -> None:
    done = cost(*arguments)
    assert done.exit_code == 2, done.output
    (line,) = done.stderr.strip().splitlines()
    assert line.startswith("error: ")
    assert part in line
