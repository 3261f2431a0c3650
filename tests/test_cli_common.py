"""What all commands have, and what is refused before anything is answered."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image

from st3.tools.cli import _loading, _measure, app
from tests.test_cli import check_error, generate, st3
from tests.test_pages import sample_run

COMMANDS = (
    "analyze", "batch", "bench", "cost", "demo", "eval", "generate", "models", "policies",
    "report", "serve", "vllm check",
)  # fmt: skip
JSON = (
    "analyze", "batch", "bench", "cost", "eval", "generate", "models", "policies", "report",
    "vllm check",
)  # fmt: skip
LOADS = ("analyze", "batch", "bench", "demo", "eval", "generate", "serve")


@pytest.mark.parametrize("command", COMMANDS)
def test_every_command_has_help_version_and_quiet(command: str) -> None:
    told = st3(*command.split(), "--help")
    assert told.exit_code == 0
    assert "<bool>" not in told.stdout
    assert "BOOLEAN" not in told.stdout
    for option in ("--quiet", "--version", "--help"):
        assert option in told.stdout
    assert ("--json" in told.stdout) >= (command in JSON)
    version = st3(*command.split(), "--version")
    assert (version.exit_code, version.stdout[:5]) == (0, "st3 0")


@pytest.mark.parametrize("command", LOADS)
def test_the_attention_kernel_can_be_chosen_where_a_model_is_loaded(command: str) -> None:
    assert "--attention" in st3(command, "--help").stdout


def test_threads_are_those_of_the_process(tiny_model: Path) -> None:
    before = torch.get_num_threads()
    try:
        _loading.load(str(tiny_model), "cpu", "auto", False, threads=2)
        assert torch.get_num_threads() == 2
        _loading.load(str(tiny_model), "cpu", "auto", False)
        assert torch.get_num_threads() == 2
    finally:
        torch.set_num_threads(before)


def test_the_attention_kernel_gets_to_the_model(
    picture: Path, tiny_model: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen = []
    real = _measure.answer

    def answer(loaded: Any, *rest: Any) -> Any:
        seen.append(loaded.model.config.get_text_config()._attn_implementation)
        return real(loaded, *rest)

    monkeypatch.setattr(_measure, "answer", answer)
    assert generate(picture, tiny_model, "--attention", "eager").exit_code == 0
    assert seen == ["eager"]
    check_error(generate(picture, tiny_model, "--attention", "magic"), 1, "magic")


def test_shells_complete_commands_and_options() -> None:
    for words, wanted in (("st3 gen", "generate"), ("st3 generate --comp", "--compare")):
        run = subprocess.run(
            [sys.executable, "-m", "st3.tools.cli"],
            env={
                **os.environ,
                "_ST3_COMPLETE": "complete_bash",
                "COMP_WORDS": words,
                "COMP_CWORD": str(len(words.split()) - 1),
            },
            capture_output=True,
            text=True,
            check=False,
        )
        assert wanted in run.stdout.split()


def test_quiet_leaves_the_answer_alone(picture: Path, tiny_model: Path) -> None:
    loud, quiet = generate(picture, tiny_model), generate(picture, tiny_model, "--quiet")
    assert quiet.stdout == loud.stdout
    assert loud.stderr
    assert quiet.stderr == ""
    again = generate(picture, tiny_model)  # it was for that command alone
    assert again.stderr
    check_error(st3("generate", "no.png", "-p", "x", "-q"), 2, "no.png")


# Before the answer, not after it ------------------------------------------------------------------


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--heatmap", "kept.png", "--layers", "99"], "no layer 99, the model has 0 to 7"),
        (["--save", "run", "--policy", "dycoke"], "--save: a run of dycoke cannot be recorded"),
        (["--save", "run", "--policy", "st3:rerank_every=4"], "cannot be recorded"),
        (["--save", "/proc/no/run"], "--save /proc/no/run: No such file or directory"),
        (["--rounds", "2"], "--rounds is for --compare"),
        (["--device", "foo"], "no such device; use auto, cpu"),
    ],
)
def test_it_is_refused_before_anything_is_answered(
    picture: Path, tiny_model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch,
    options: list[str], message: str,
) -> None:  # fmt: skip
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(_measure, "answer", None)
    check_error(generate(picture, tiny_model, *options), 2, message)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--picture", "7"], "--picture 7: the prompt had 2 image(s), from 1 on"),
        (["--out", "page.txt"], "--out page.txt: the name must end in .html"),
        (["--gif", "film.png"], "--gif film.png: the name must end in .gif"),
    ],
)
def test_a_report_is_refused_before_anything_is_written(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, options: list[str], message: str
) -> None:
    monkeypatch.chdir(tmp_path)
    sample_run(pictures=2).save(tmp_path / "run")
    before = sorted(tmp_path.rglob("*"))
    check_error(st3("report", "run", *options), 2, message)
    assert sorted(tmp_path.rglob("*")) == before


def test_a_group_without_a_command_shows_its_help() -> None:
    told = st3("vllm")
    assert told.exit_code == 0
    assert "check" in told.stdout
    assert told.stderr == ""


def test_a_folder_of_results_is_no_file(tmp_path: Path) -> None:
    (tmp_path / "out").write_text("x")
    check_error(st3("eval", "-o", tmp_path / "out"), 2, "that is a file, name a folder")


def test_a_report_as_json(tmp_path: Path) -> None:
    sample_run().save(tmp_path / "run")
    told = json.loads(st3("report", tmp_path / "run", "--json").stdout)
    assert told["page"] == str(tmp_path / "run" / "report.html")
    assert Path(told["animation"]).is_file()


def test_prompts_in_a_file_that_is_not_there(picture: Path, tmp_path: Path) -> None:
    words = ("analyze", "-i", picture, "-o", tmp_path / "seen", "-p")
    check_error(st3(*words, "nosuch.txt"), 2, "--prompt nosuch.txt: no such file")
    there = tmp_path / "seen"
    there.write_text("x")
    check_error(st3(*words, "what?"), 2, "that is a file, name a folder")


def test_a_folder_of_images_without_a_prompt(picture: Path, tmp_path: Path) -> None:
    done = st3("batch", picture.parent, "-o", tmp_path / "out")
    check_error(done, 2, "say what to ask of each with -p")


# Images and their names ---------------------------------------------------------------------------


def test_an_image_on_stdin(picture: Path, tiny_model: Path) -> None:
    from typer.testing import CliRunner

    words = ["generate", "-", "-p", "describe", "-m", str(tiny_model), "--max-new-tokens", "3"]
    done = CliRunner().invoke(app, words, input=picture.read_bytes())
    assert done.exit_code == 0, done.output
    empty = CliRunner().invoke(app, words, input=b"")
    check_error(empty, 2, "stdin")


def test_several_images_are_one_prompt_and_it_says_so(picture: Path, tiny_model: Path) -> None:
    done = st3("generate", picture, picture, "-p", "describe", "-m", tiny_model)
    assert "2 images in one prompt" in done.stderr


def test_names_that_are_not_utf8(tiny_model: Path, tmp_path: Path) -> None:
    name = os.path.join(os.fsencode(tmp_path), b"caf\xe9.png")
    Image.new("RGB", (40, 30)).save(tmp_path / "a.png")
    os.rename(tmp_path / "a.png", name)
    out = os.path.join(os.fsencode(tmp_path), b"k\xe9pt.png")
    command = [
        sys.executable, "-m", "st3.tools.cli", "generate", name, "-p", "describe", "-m",
        str(tiny_model), "--max-new-tokens", "2", "--heatmap", out,
    ]  # fmt: skip
    loud = subprocess.run(command, capture_output=True, check=False)
    assert loud.returncode == 0, loud.stderr
    assert b"pt.png" in loud.stderr.replace(b"\n", b"")
    run = subprocess.run([*command, "--json"], capture_output=True, check=False)
    assert run.returncode == 0, run.stderr
    told = json.loads(run.stdout.decode("utf-8"))
    assert os.fsencode(told["images"][0]) == name
    gone = subprocess.run([*command[:4], name + b"x", "-p", "x"], capture_output=True, check=False)
    assert gone.returncode == 2
    assert gone.stderr.startswith(b"error: ")
    assert gone.stderr.count(b"\n") == 1


# Evaluation without labels ------------------------------------------------------------------------


@pytest.mark.slow
def test_eval_needs_no_labels(tiny_model: Path, tmp_path: Path) -> None:
    for name in ("a.png", "b.png"):
        Image.new("RGB", (30, 30), "red").save(tmp_path / name)
    rows = [{"image": name, "question": "what is it?"} for name in ("a.png", "b.png")]
    (tmp_path / "set.jsonl").write_text("\n".join(map(json.dumps, rows)))
    words = ("eval", "-m", tiny_model, "--data", tmp_path, "--policies", "fastv")
    told = json.loads(st3(*words, "--json", "--out", tmp_path / "out").stdout)
    first, *others = told["kinds"]["questions"]["rows"]
    assert "accuracy" not in first["values"]
    assert first["values"]["loyal_answers"][0] == 1
    assert all("kl" in row["values"] for row in others)
    shown = st3(*words)
    assert shown.exit_code == 0, shown.output
    assert "right" not in shown.stdout.splitlines()[2]
    assert "loyal" in shown.stdout
