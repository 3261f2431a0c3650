"""The command line: what it prints, and one test for each kind of wrong input."""

from __future__ import annotations

import json
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import pytest
from PIL import Image
from typer.testing import CliRunner, Result

from st3.tools.cli import app
from st3.tools.cli._measure import Answer
from st3.tools.cli._show import why_no_faster
from tests.tiny_llava import LAYERS, SIDE

PROMPT = "describe the image in detail."


def st3(*arguments: object) -> Result:
    return CliRunner().invoke(app, [str(a) for a in arguments])


def generate(picture: Path, model: Path, *more: object, prompt: str = PROMPT) -> Result:
    return st3("generate", picture, "-p", prompt, "--model", model, "--max-new-tokens", 8, *more)


def check_error(result: Result, code: int, *parts: str) -> None:
    """One `error:` line on stderr with these parts in it, nothing on stdout, no traceback."""
    assert result.exit_code == code, result.output
    assert result.stdout == ""
    lines = result.stderr.strip().splitlines()
    assert len(lines) == 1, result.stderr
    assert lines[0].startswith("error: ")
    for part in parts:
        assert part in lines[0]


# What it does


def test_answer_goes_to_stdout_and_the_summary_to_stderr(picture: Path, tiny_model: Path) -> None:
    whole = json.loads(generate(picture, tiny_model, "--json").stdout)
    result = generate(picture, tiny_model)
    assert result.exit_code == 0, result.output
    assert result.stdout.strip() == whole["answer"]
    assert "TTFT" in result.stderr
    assert "16 visual tokens" in result.stderr


def test_policy_none_answers_like_the_bare_model(picture: Path, tiny_model: Path) -> None:
    from transformers import AutoModelForImageTextToText, AutoProcessor

    model = AutoModelForImageTextToText.from_pretrained(tiny_model)
    processor = AutoProcessor.from_pretrained(tiny_model)
    inputs = processor(
        images=Image.open(picture), text=f"<s> <image> {PROMPT}", return_tensors="pt"
    )
    bare = model.generate(**inputs, max_new_tokens=8, do_sample=False)
    expected = processor.decode(bare[0, inputs["input_ids"].shape[1] :], skip_special_tokens=True)
    result = generate(picture, tiny_model, "--policy", "none")
    assert result.stdout.strip() == expected.strip()
    assert expected.strip()


def test_json_is_one_object_and_nothing_else(picture: Path, tiny_model: Path) -> None:
    result = generate(picture, tiny_model, "--json")
    assert result.exit_code == 0, result.output
    data = json.loads(result.stdout)
    assert data["new_tokens"] == 8
    assert data["policy"] == "thirds"
    assert data["ttft_ms"] > 0
    assert data["total_ms"] >= data["ttft_ms"]
    assert data["report"]["mean_share"] < 1
    assert "untrimmed" not in data


def test_compare_as_json_has_both_answers(picture: Path, tiny_model: Path) -> None:
    result = generate(picture, tiny_model, "--compare", "--runs", 1, "--json", "--policy", "none")
    data = json.loads(result.stdout)
    assert data["answer"] == data["untrimmed"]["answer"]
    assert data["untrimmed"]["new_tokens"] == 8
    assert data["runs"] == 1
    assert "1 CPU thread, float32" in data["conditions"]


@pytest.mark.parametrize(("seconds", "said"), [(2.0, False), (1.0, True), (0.9, True)])
def test_who_sees_no_gain_is_told_what_a_step_reads(seconds: float, said: bool) -> None:
    untrimmed = Answer("a", 9, ttft=0.1, tpot=0.1, total=seconds)
    report = SimpleNamespace(kv_untrimmed_bytes=3 << 20)
    hint = why_no_faster(untrimmed, replace(untrimmed, total=1.0), report, 24 << 20)
    assert (hint is not None) is said
    assert not said or ("24 MiB of weights" in hint and "3 MiB of KV" in hint)


def test_compare_prints_both_sides_and_how_it_was_measured(picture: Path, tiny_model: Path) -> None:
    result = generate(picture, tiny_model, "--compare", "--runs", 1, "--policy", "fastv:drop=0.75")
    assert result.exit_code == 0, result.output
    for part in (
        "untrimmed",
        "fastv:drop=0.75",
        "TTFT",
        "TPOT",
        "FLOPs",
        "KV in use",
        "medians of 1",
    ):
        assert part in result.stdout
    visual = next(line for line in result.stdout.splitlines() if "visual tokens" in line)
    # layers 0 and 1 of 8 see 16 tokens, the others 4: 7 on average
    assert [cell.strip() for cell in visual.strip("│┃ ").split("│")][1:] == ["16", "7", "44%"]


def test_heatmap_is_drawn_with_a_row_for_each_image(
    picture: Path, tiny_model: Path, tmp_path: Path
) -> None:
    one, two = tmp_path / "one.png", tmp_path / "two.png"
    assert generate(picture, tiny_model, "--heatmap", one).exit_code == 0
    result = st3(
        *("generate", picture, picture, "-p", PROMPT, "--model", tiny_model, "--heatmap", two)
    )
    assert result.exit_code == 0, result.output
    assert str(two) in result.stderr.replace("\n", "")
    with Image.open(one) as a, Image.open(two) as b:
        assert a.width == b.width
        assert b.height > 1.6 * a.height


def test_heatmap_of_chosen_layers(picture: Path, tiny_model: Path, tmp_path: Path) -> None:
    sizes = []
    for layers in ("3", "0,3,5"):
        target = tmp_path / "map.png"
        result = generate(picture, tiny_model, "--heatmap", target, "--layers", layers)
        assert result.exit_code == 0, result.output
        with Image.open(target) as drawn:
            sizes.append(drawn.width)
    assert sizes[1] > sizes[0]


def test_models_lists_every_family() -> None:
    from st3.models import families

    result = st3("models")
    assert result.exit_code == 0
    for family in families():
        assert family.model_type in result.stdout
    told = json.loads(st3("models", "--json").stdout)["models"]
    assert {one["model_type"]: one["heatmap"] for one in told} == {
        family.model_type: family.layout.placed for family in families()
    }


def test_policies_are_listed_the_default_first() -> None:
    import st3 as package

    result = st3("policies")
    assert result.exit_code == 0
    names = [line.split()[0] for line in result.stdout.splitlines() if line[:1].strip()]
    assert names[:3] == ["policy", "thirds", "st3"]
    assert set(package.available()) | set(package.presets()) <= set(names)
    told = json.loads(st3("policies", "--json").stdout)
    assert {one["name"]: one["paper"] for one in told["policies"]} == {
        name: policy.paper for name, policy in package.available().items()
    }
    assert told["presets"] == {name: str(value) for name, value in package.presets().items()}


def test_a_policy_is_told_with_its_arguments_and_defaults() -> None:
    import st3 as package

    defaults = package.ST3()
    result = st3("policies", "st3")
    assert f"st3: {defaults.paper}" in result.stdout
    for name in ("first_drop", "final_keep", "first_layer", "stride"):
        value = getattr(defaults, name)
        assert f" {name}={'none' if value is None else value}\n" in result.stdout
    assert f" tau={defaults.anneal.tau}\n" in result.stdout
    assert "st3-7b  is  st3:" in st3("policies", "st3-7b").stdout
    assert ":class:" not in st3("policies", "thirds").stdout
    check_error(st3("policies", "FastV1"), 2, "did you mean 'fastv'")


@pytest.mark.parametrize("command", [[], ["generate"], ["models"], ["policies"]])
def test_help_everywhere(command: list[str]) -> None:
    result = st3(*command, "--help")
    assert result.exit_code == 0
    assert "Usage: st3" in result.stdout
    assert "Example" in result.stdout
    assert "Traceback" not in result.output


def test_no_command_prints_the_help() -> None:
    result = st3()
    assert result.exit_code == 0
    assert "generate" in result.stdout


def test_version() -> None:
    result = st3("--version")
    assert result.exit_code == 0
    assert result.stdout.startswith("st3 0.")


def test_python_m_is_the_same_command() -> None:
    run = subprocess.run(
        [sys.executable, "-m", "st3.tools.cli", "generate"],
        capture_output=True,
        text=True,
        check=False,
    )
    assert run.returncode == 2
    assert run.stderr == "error: Missing argument 'IMAGE'.\n"


# Wrong input, one test each


def test_missing_image(tiny_model: Path) -> None:
    check_error(generate(Path("nowhere.png"), tiny_model), 2, "nowhere.png", "no such image")


def test_image_that_is_a_folder(tiny_model: Path, tmp_path: Path) -> None:
    check_error(generate(tmp_path, tiny_model), 2, "folder")


def test_image_that_is_none(tiny_model: Path, tmp_path: Path) -> None:
    text = tmp_path / "notes.png"
    text.write_text("not an image")
    check_error(generate(text, tiny_model), 2, "notes.png", "not an image")


def test_broken_image(picture: Path, tiny_model: Path, tmp_path: Path) -> None:
    broken = tmp_path / "broken.png"
    broken.write_bytes(picture.read_bytes()[:120])
    check_error(generate(broken, tiny_model), 2, "broken.png", "cannot be read")


def test_image_address(tiny_model: Path) -> None:
    result = st3("generate", "https://example.org/a.png", "-p", PROMPT, "--model", tiny_model)
    check_error(result, 2, "download")


def test_no_prompt(picture: Path) -> None:
    check_error(st3("generate", picture), 2, "--prompt")


def test_empty_prompt(picture: Path, tiny_model: Path) -> None:
    check_error(generate(picture, tiny_model, prompt="  "), 2, "prompt is empty")


def test_unknown_policy(picture: Path, tiny_model: Path) -> None:
    check_error(generate(picture, tiny_model, "--policy", "st4"), 2, "st4", "fastv")


def test_unknown_policy_argument(picture: Path, tiny_model: Path) -> None:
    check_error(
        generate(picture, tiny_model, "--policy", "fastv:depth=2"), 2, "depth", "layer, drop"
    )


def test_policy_argument_out_of_range(picture: Path, tiny_model: Path) -> None:
    check_error(generate(picture, tiny_model, "--policy", "fastv:drop=1.5"), 2, "drop", "1.5")


def test_policy_that_does_not_fit_the_model(picture: Path, tiny_model: Path) -> None:
    result = generate(picture, tiny_model, "--policy", f"fastv:layer={LAYERS}")
    check_error(result, 2, f"--policy fastv:layer={LAYERS}", "use at most")


def test_unknown_hub_id_offline(picture: Path) -> None:
    result = generate(picture, Path("nobody/no-such-model"))
    check_error(result, 1, "nobody/no-such-model", "offline", "local folder")


def test_model_folder_that_is_not_there(picture: Path) -> None:
    check_error(generate(picture, Path("./no/such/folder/here")), 1, "no such model folder")


def test_folder_without_a_model(picture: Path, tmp_path: Path) -> None:
    check_error(generate(picture, tmp_path), 1, "config.json")


def test_model_without_a_processor(picture: Path, tiny_model: Path, tmp_path: Path) -> None:
    (tmp_path / "config.json").write_bytes((tiny_model / "config.json").read_bytes())
    check_error(generate(picture, tmp_path), 1, "cannot load model")


def test_model_with_broken_weights(picture: Path, tiny_model: Path, tmp_path: Path) -> None:
    for file in tiny_model.iterdir():
        (tmp_path / file.name).write_bytes(file.read_bytes())
    (tmp_path / "model.safetensors").write_bytes(b"broken")
    check_error(generate(picture, tmp_path), 1, "cannot load model")


def test_text_only_model(picture: Path, tmp_path: Path) -> None:
    from transformers import LlamaConfig

    LlamaConfig(hidden_size=32, num_hidden_layers=1).save_pretrained(tmp_path)
    check_error(generate(picture, tmp_path), 1, "model")


def test_unknown_option(picture: Path, tiny_model: Path) -> None:
    check_error(generate(picture, tiny_model, "--fast"), 2, "--fast")


@pytest.mark.parametrize("value", ["0", "-3", "many"])
def test_bad_number_of_tokens(picture: Path, value: str) -> None:
    result = st3("generate", picture, "-p", PROMPT, "--max-new-tokens", value)
    check_error(result, 2, "--max-new-tokens")


def test_bad_device(picture: Path, tiny_model: Path) -> None:
    check_error(generate(picture, tiny_model, "--device", "toaster"), 2, "toaster")


def test_bad_dtype(picture: Path, tiny_model: Path) -> None:
    check_error(generate(picture, tiny_model, "--dtype", "int3"), 2, "--dtype")


def test_heatmap_of_an_unknown_kind(picture: Path, tiny_model: Path) -> None:
    check_error(generate(picture, tiny_model, "--heatmap", "kept.docx"), 2, ".png")


def test_heatmap_in_a_folder_that_is_not_there(picture: Path, tiny_model: Path) -> None:
    check_error(generate(picture, tiny_model, "--heatmap", "no/kept.png"), 2, "no folder")


def test_layers_without_a_heatmap(picture: Path, tiny_model: Path) -> None:
    check_error(generate(picture, tiny_model, "--layers", "3"), 2, "--heatmap")


def test_layers_that_are_no_numbers(picture: Path, tiny_model: Path) -> None:
    result = generate(picture, tiny_model, "--heatmap", "kept.png", "--layers", "first")
    check_error(result, 2, "--layers first")


def test_layer_that_the_model_has_not(picture: Path, tiny_model: Path, tmp_path: Path) -> None:
    target = tmp_path / "kept.png"
    result = generate(picture, tiny_model, "--heatmap", target, "--layers", LAYERS, "--json")
    check_error(result, 2, "no layer", f"0 to {LAYERS - 1}")
    assert not target.exists()


def test_unknown_command() -> None:
    check_error(st3("generat"), 2, "generat", "generate")


def test_the_tiny_model_is_as_the_tests_expect(tiny_model: Path) -> None:
    config = json.loads((tiny_model / "config.json").read_text())
    assert config["text_config"]["num_hidden_layers"] == LAYERS
    assert (config["vision_config"]["image_size"] // config["vision_config"]["patch_size"]) == SIDE


@pytest.mark.slow
@pytest.mark.parametrize("command", ["policies", "models"])
def test_lists_in_a_fresh_process(command: str) -> None:
    """Where no earlier command has imported what this one needs."""
    done = subprocess.run(
        [sys.executable, "-m", "st3.tools.cli", command], capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    assert len(done.stdout.splitlines()) > 10
