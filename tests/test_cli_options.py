"""The options of all commands: one name for one thing, old names still taken."""

from __future__ import annotations

import json
import shutil
from collections import defaultdict
from pathlib import Path
from typing import Any

import pytest
import typer
from transformers import AutoProcessor

from st3.models import families
from st3.models.hub import HUB_IDS
from st3.tools.cli import _loading, _measure, app
from st3.tools.cli._options import OLD_NAMES, DType, read_dtype
from st3.tools.common import chats
from st3.tools.common import load as loading
from tests.test_cli import PROMPT, check_error, generate, st3
from tests.test_cli_common import LOADS

# What differs from command to command because the thing does, with the reason.
DIFFERS = {
    "--attention": {"bench"},  # random weights: sdpa, not a checkpoint's choice
    "--budgets": {"eval", "tune"},  # the defaults are told
    "--dtype": {"bench", "cost"},  # of random weights; of the KV cache
    "--max-new-tokens": {"bench", "cost", "eval", "tune"},  # exactly; by the kind of question
    "--model": {"bench", "cost"},  # random weights, or shapes, as well
    "--policies": {"eval", "tune"},  # `all` as well
    "--policy": {"serve"},  # of requests that name none
}


def commands() -> dict[str, Any]:
    group: Any = typer.main.get_command(app)
    found = dict(group.commands)
    found["vllm check"] = found.pop("vllm").commands["check"]
    return found


def options() -> dict[str, dict[str, Any]]:
    """Name -> command -> the option."""
    found: dict[str, dict[str, Any]] = defaultdict(dict)
    for name, command in commands().items():
        for param in command.get_params(command.context_class(command)):
            if param.param_type_name == "option":
                for spelt in param.opts:
                    found[spelt][name] = param
    return found


SHARED = [
    "--attention", "--batch", "--budget", "--device", "--device-map", "--dtype", "--json",
    "--max-new-tokens", "--model", "--policies", "--policy", "--quiet", "--revision", "--system",
    "--threads", "--trust-remote-code", "--version",
]  # fmt: skip


@pytest.mark.parametrize("name", SHARED)
def test_an_option_is_the_same_in_every_command(name: str) -> None:
    found = {k: v for k, v in options()[name].items() if k not in DIFFERS.get(name, ())}
    if name == "--batch":
        found.pop("bench")  # batch sizes, one after the other
    assert len(found) > 1 or DIFFERS.get(name)
    assert len({(tuple(p.opts), p.help, p.metavar) for p in found.values()}) == 1, found


def test_short_forms_mean_one_thing() -> None:
    short = {
        name: {p.opts[0] for p in users.values()}
        for name, users in options().items()
        if len(name) == 2
    }
    assert short == {
        "-m": {"--model"}, "-o": {"--out"}, "-p": {"--prompt"}, "-q": {"--quiet"},
        "-i": {"--image"},
    }  # fmt: skip
    assert all("-o" in param.opts for param in options()["--out"].values())


def test_what_loads_a_model_takes_the_same_options() -> None:
    for name in ("--threads", "--trust-remote-code", "--revision"):
        users = set(options()[name])
        wanted = {*LOADS, "tune"} - ({"bench"} if name != "--threads" else set())
        assert wanted <= users, (name, wanted - users)


def test_no_option_has_an_old_name() -> None:
    found = options()
    for command, names in OLD_NAMES.items():
        for old, new in names.items():
            assert command not in found[old]
            assert command in found[new]


@pytest.mark.parametrize("command", OLD_NAMES)
def test_old_names_do_what_the_new_ones_do_and_are_not_shown(command: str) -> None:
    one = commands()[command]
    params = {p.name: p for p in one.get_params(one.context_class(one))}
    for old, new in OLD_NAMES[command].items():
        param = next(p for p in params.values() if new in p.opts)
        assert f"│ {old} " not in st3(command, "--help").stdout
        values = []
        for name in (old, new):
            ctx = one.context_class(one, info_name=command)
            parsed, _, _ = one.make_parser(ctx).parse_args([name, "7"])
            values.append(parsed[param.name])
        assert values[0] == values[1]


def test_old_and_new_names_run(picture: Path, tiny_model: Path) -> None:
    for name in ("--runs", "--rounds"):
        told = json.loads(generate(picture, tiny_model, "--compare", name, 1, "--json").stdout)
        assert told["runs"] == 1
    rows = [
        json.loads(st3("cost", *words, "--json").stdout)["rows"]
        for words in (
            ("--policy", "st3-7b", "--policy", "fastv:layer=2,drop=0.75", "--new-tokens", 9),
            ("--policies", "st3-7b,fastv:layer=2,drop=0.75", "--max-new-tokens", 9),
        )
    ]
    assert rows[0] == rows[1]
    assert len(rows[0]) == 3


def test_precisions_have_short_names(picture: Path, tiny_model: Path) -> None:
    assert read_dtype("bf16") is DType.bfloat16
    assert read_dtype("auto") is DType.auto
    told = json.loads(generate(picture, tiny_model, "--dtype", "bf16", "--json").stdout)
    assert "bfloat16" in told["conditions"]
    check_error(generate(picture, tiny_model, "--dtype", "int3"), 2, "int3", "bfloat16")


# Revisions ----------------------------------------------------------------------------------------


def test_a_revision_of_what_has_none(picture: Path, tiny_model: Path) -> None:
    check_error(generate(picture, tiny_model, "--revision", "v1"), 2, "a revision is for a hub id")
    check_error(st3("cost", "--revision", "v1"), 2, "--revision is for a hub id: 'llava-1.5-7b'")
    check_error(
        st3("cost", "-m", tiny_model, "--visual", 9, "--revision", "v1"), 2, "is a folder here"
    )
    bundled = st3("generate", picture, "-p", "x", "--revision", "v1")
    check_error(bundled, 2, "a revision is for a hub id: 'st3-tiny'")


@pytest.mark.parametrize("command", ["analyze", "batch", "demo", "eval", "serve", "tune"])
def test_a_revision_gets_to_the_loader(
    command: str, picture: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen: list[Any] = []

    def load(*given: Any, **named: Any) -> Any:
        seen.append(named.get("revision"))
        raise loading.LoadError("seen")

    monkeypatch.setattr(loading, "load", load)
    for number in range(8):
        shutil.copy(picture, tmp_path / f"{number}.png")
    rows = [{"image": f"{number}.png", "question": "what?"} for number in range(8)]
    questions = tmp_path / "set.jsonl"
    questions.write_text("\n".join(map(json.dumps, rows)))
    words: dict[str, tuple[object, ...]] = {
        "analyze": ("-i", picture, "-p", "x", "-o", tmp_path / "seen"),
        "batch": (picture.parent, "-p", "x", "-o", tmp_path / "out"),
        "tune": ("--data", questions, "-o", tmp_path / "p.json"),
        "demo": ("--no-browser",),
    }
    done = st3(command, *words.get(command, ()), "-m", "some/model", "--revision", "v1.2")
    assert seen == ["v1.2"], done.output
    assert done.exit_code == 1


def test_a_batch_of_another_revision_is_another_run(
    picture: Path, tiny_model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    real = loading.load
    monkeypatch.setattr(
        loading, "load", lambda name, *a, revision=None, **k: real(str(tiny_model), *a, **k)
    )
    words = ("batch", picture.parent, "-p", "x", "-o", tmp_path / "out", "-m", "some/model")
    first = st3(*words, "--revision", "a", "--max-new-tokens", 2, "--json")
    assert first.exit_code == 0, first.output
    assert json.loads(first.stdout)["model"] == "some/model@a"
    check_error(st3(*words, "--revision", "b", "--max-new-tokens", 2), 2, "model")


# The system prompt --------------------------------------------------------------------------------


def test_a_system_prompt_comes_first() -> None:
    loaded = loading.load(device="cpu")
    ids = [
        _loading.prepare(loaded, [], "describe the image.", system)["input_ids"][0].tolist()
        for system in (None, "", "the red")
    ]
    assert ids[0] == ids[1]
    text = loaded.tokenizer.decode(ids[2])
    assert text.index("the red") < text.index("describe")


def test_the_system_prompt_reaches_the_model(
    picture: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen: list[str] = []
    real = _measure.answer

    def answer(loaded: Any, inputs: Any, *rest: Any) -> Any:
        seen.append(loaded.tokenizer.decode(inputs["input_ids"][0]))
        return real(loaded, inputs, *rest)

    monkeypatch.setattr(_measure, "answer", answer)
    words = ("generate", picture, "-p", PROMPT, "--max-new-tokens", 2)
    told = json.loads(st3(*words, "--system", "the red", "--json").stdout)
    assert told["system"] == "the red"
    assert "system" not in json.loads(st3(*words, "--json").stdout)
    assert "the red" in seen[0]
    assert "the red" not in seen[1]


def test_a_template_that_refuses_a_system_prompt_is_one_line(
    picture: Path, tiny_model: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    template = (
        "{% for m in messages %}{% if m['role'] == 'system' %}"
        "{{ raise_exception('no system role') }}{% endif %}<image> x{% endfor %}"
    )
    real = loading.load

    def load(*given: Any, **named: Any) -> Any:
        loaded = real(*given, **named)
        loaded.processor.chat_template = template
        return loaded

    monkeypatch.setattr(loading, "load", load)
    done = generate(picture, tiny_model, "--system", "be brief")
    assert done.exit_code == 1
    assert done.stderr.strip().splitlines()[-1] == (
        "error: the model's chat template refuses this: no system role"
    )


def test_a_base_model_reads_the_system_prompt_before_the_question(tiny_model: Path) -> None:
    processor = AutoProcessor.from_pretrained(tiny_model)
    processor.chat_template = None
    seen: list[str] = []

    class Watched:
        chat_template, image_token = None, "<image>"

        def __call__(self, text: list[str], **rest: Any) -> Any:
            seen.extend(text)
            return {"input_ids": [[]]}

    chats._inputs(Watched(), [chats.ask([], "what?", "be brief.")], {})
    assert seen == ["be brief.\nwhat?"]


# A model's hub ids --------------------------------------------------------------------------------


def test_hub_ids_are_of_supported_families_and_named_by_transformers() -> None:
    assert set(HUB_IDS) <= {family.model_type for family in families()}
    import transformers

    root = Path(transformers.__file__).parent / "models"
    sources = {path: path.read_text(errors="ignore") for path in root.glob("*/*.py")}
    checked = 0
    for kind, name in HUB_IDS.items():
        folders = {p.parent for p, text in sources.items() if f'model_type = "{kind}"' in text}
        texts = [text for p, text in sources.items() if p.parent in folders]
        if texts:
            assert any(name in text for text in texts), (kind, name)
            checked += 1
    assert checked > 40
    told = json.loads(st3("models", "--json").stdout)["models"]
    ids = {one["model_type"]: one["hub_id"] for one in told}
    assert {kind: name for kind, name in ids.items() if name} == HUB_IDS
    shown = st3("models").stdout
    assert all(name in shown.split() for name in HUB_IDS.values())
