"""`st3 batch` and rows that are odd, bad, or not the same as before: each costs a line in the
errors file at most, never the run or its continuation."""

from __future__ import annotations

import errno
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image

from st3.tools.batch import BatchError, Store, open_source, run
from st3.tools.cli import _loading
from tests.test_batch import POLICY, answers, errors, invoke, options, write_rows

PROMPT = "what is at the top left ?"


@pytest.fixture(scope="module")
def loaded(tiny_model: Path) -> _loading.Loaded:
    return _loading.load(str(tiny_model), "cpu", "float32", False)


@pytest.fixture
def pictures(tmp_path: Path) -> Path:
    folder = tmp_path / "pictures"
    folder.mkdir()
    for i, colour in enumerate(("red", "blue", "green", "white", "black")):
        Image.new("RGB", (40 + 10 * i, 50), colour).save(folder / f"{i}.png")
    return folder


def row(**fields: Any) -> dict[str, Any]:
    return {"image": "pictures/1.png", "prompt": PROMPT, **fields}


def test_ids_of_any_characters_are_answered_and_known_again(
    pictures: Path, tmp_path: Path, loaded: _loading.Loaded
) -> None:
    """Some of them end lines for Python, others are no characters at all."""
    ids = ["a\u2028b", "a\u0085b", "a\rb", "a\nb", "\ud800", "\udcff", "\0", "", "\U0001f600"]
    source = write_rows(tmp_path / "rows.jsonl", [row(id=one) for one in ids])
    for before in (0, len(ids)):
        summary = run(options(source, tokens=2), lambda: loaded, tmp_path / "out")
        assert summary["this_run"]["answered_before"] == before
        assert summary["answered"] == len(ids)
    found = (tmp_path / "out").glob("answers-*.jsonl")
    lines = [line for file in found for line in file.read_text("ascii").split("\n") if line]
    assert sorted(json.loads(line)["id"] for line in lines) == sorted(ids)


def test_bad_rows_of_all_kinds_are_one_line_each(
    pictures: Path, tmp_path: Path, loaded: _loading.Loaded
) -> None:
    Image.new("RGB", (1, 500)).save(pictures / "line.png")
    (pictures / "empty.png").write_bytes(b"")
    bad = {
        "a half character": json.dumps(row(prompt="\ud83d")),
        "a placeholder": json.dumps(row(prompt="what is <image> ?")),
        "long": json.dumps(row(prompt="what " * 3000)),
        "nearly too long": json.dumps(row(prompt="what " * 2030)),
        "thin": json.dumps(row(image="pictures/line.png")),
        "empty": json.dumps(row(image="pictures/empty.png")),
        "a NUL": json.dumps(row(image="a\0b.png")),
        "half a name": json.dumps(row(image="\ud83d.png")),
        "nobody's home": json.dumps(row(image="~nobody/a.png")),
        "a long name": json.dumps(row(image="a" * 5000)),
        "deep": "[" * 100_000,
        "deep and whole": "[" * 100_000 + "]" * 100_000,
        "digits": '{"id": ' + "9" * 5000 + "}",
        "text": "\u2028",
    }
    lines = [*bad.values(), json.dumps(row()), json.dumps(row(id="good"))]
    source = write_rows(tmp_path / "rows.jsonl", lines)
    summary = run(options(source, tokens=4), lambda: loaded, tmp_path / "out")
    assert {answer["id"] for answer in answers(tmp_path / "out")} == {"15", "good"}
    found = errors(tmp_path / "out")
    assert set(found) == {str(number) for number in range(1, 15)}
    assert summary["errors"] == 14
    assert all(found.values())
    assert "positions" in found["3"] and "positions" in found["4"]  # noqa: PT018
    assert "thinner" in found["5"]


def test_a_folder_has_files_of_any_name_and_none_that_hide(
    pictures: Path, tmp_path: Path, loaded: _loading.Loaded
) -> None:
    one = (pictures / "0.png").read_bytes()
    odd = [b"\xff\xfe.png", "a\u2028b.png".encode(), b"~a.png", b"a b.PNG"]
    for name in odd:
        (pictures / os.fsdecode(name)).write_bytes(one)
    for name in ("._0.png", ".DS_Store", "notes.pdf", "clip.mpg", "page.eps", "data.h5"):
        (pictures / name).write_bytes(b"\x00\x05\x16\x07")
    (pictures / ".thumbnails").mkdir()
    (pictures / ".thumbnails" / "0.png").write_bytes(one)
    for before in (0, 9):
        summary = run(options(pictures, 2, prompt=PROMPT), lambda: loaded, tmp_path / "out")
        assert summary["this_run"]["answered_before"] == before
    ids = {answer["id"] for answer in answers(tmp_path / "out")}
    assert ids == {f"{i}.png" for i in range(5)} | {os.fsdecode(name) for name in odd}
    assert errors(tmp_path / "out") == {}


def test_a_changed_input_is_noticed_by_what_its_rows_say(
    pictures: Path, tmp_path: Path, loaded: _loading.Loaded
) -> None:
    out, source = tmp_path / "out", tmp_path / "rows.jsonl"
    rows = [row(image=f"pictures/{i}.png") for i in range(5)]

    def answered() -> dict[str, str]:
        return {answer["id"]: answer["answer"] for answer in answers(out)}

    def again(given: list[Any]) -> dict[str, Any]:
        write_rows(source, given)
        return run(options(source), lambda: loaded, out)

    again(rows)
    whole = answered()
    # The first row is taken out: the rest, known by number, stand under other numbers now.
    summary = again(rows[1:])
    assert summary["this_run"]["stale"] == 5
    assert (summary["answered"], summary["rows"]) == (4, 4)
    assert answered() == {str(i): whole[str(i + 1)] for i in range(1, 5)}
    stale = [json.loads(line) for line in (out / "stale.jsonl").read_text().splitlines()]
    assert {answer["id"]: answer["answer"] for answer in stale} == whole
    # One question is another, one image is another; one image is gone, and its answer stays.
    changed = [rows[1], {**rows[2], "prompt": "red"}, rows[3], rows[4]]
    Image.new("RGB", (70, 70), "red").save(pictures / "3.png")
    (pictures / "4.png").unlink()
    summary = again(changed)
    assert (summary["this_run"]["stale"], summary["this_run"]["answered"]) == (2, 2)
    assert summary["answered"] == 4
    # Rows that are added are answered; nothing else is done again.
    summary = again([*changed, rows[0]])
    assert (summary["this_run"]["stale"], summary["this_run"]["answered"]) == (0, 1)


def test_what_answered_is_recorded_and_not_mixed(
    pictures: Path, tmp_path: Path, loaded: _loading.Loaded, monkeypatch: pytest.MonkeyPatch
) -> None:
    import transformers

    out, source = tmp_path / "out", write_rows(tmp_path / "rows.jsonl", [row()])
    run(options(source), lambda: loaded, out)
    told = json.loads((out / "run.json").read_text())
    assert told["transformers"] == told["ran"]["transformers"] == transformers.__version__
    assert told["torch"] == torch.__version__
    assert (told["ran"]["dtype"], told["ran"]["device"]) == ("float32", "cpu")
    assert "final_keep=0.1" in told["policy_in_full"]
    before = answers(out)

    write_rows(source, [row(), row(prompt="red")])
    other = _loading.Loaded("tiny", loaded.model, loaded.processor)
    with monkeypatch.context() as patch:
        patch.setattr("st3.tools.batch.worker.str", lambda value: "torch.bfloat16", raising=False)
        with pytest.raises(BatchError, match="dtype was 'float32', now 'bfloat16'"):
            run(options(source), lambda: other, out)
    with monkeypatch.context() as patch:
        patch.setattr(transformers, "__version__", "99.0")
        with pytest.raises(BatchError, match=r"transformers was '.*', now '99\.0'"):
            run(options(source), lambda: pytest.fail("not reached"), out)
    assert answers(out) == before
    assert run(options(source), lambda: loaded, out)["answered"] == 2


def test_a_policy_that_does_not_fit_is_refused_at_the_start(pictures: Path, tmp_path: Path) -> None:
    refused = "pyramiddrop:own_layer=true"
    result = invoke(pictures, "-o", tmp_path / "out", "-p", PROMPT, "--policy", refused)
    assert result.exit_code == 2
    assert "ranks in the layer that drops" in result.output
    assert "again" not in result.output
    assert (tmp_path / "out" / "errors.jsonl").read_text() == ""


def test_a_full_disk_is_one_line_and_the_run_goes_on_with_room(
    pictures: Path, tmp_path: Path, tiny_model: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    source = write_rows(tmp_path / "rows.jsonl", [row(), row(image="none.png")])
    command = (source, "-o", tmp_path / "out", "-m", tiny_model, "--max-new-tokens", 2)
    sync = os.fsync

    def full(file: int) -> None:
        if any((tmp_path / "out").glob("answers-*.part")):
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        sync(file)

    with monkeypatch.context() as patch:
        patch.setattr(os, "fsync", full)
        result = invoke(*command)
    assert result.exit_code == 1
    assert result.output.strip().splitlines()[-1].startswith("error: cannot write to")
    assert "No space left" in result.output
    assert result.exception is None or isinstance(result.exception, SystemExit)
    assert not list((tmp_path / "out").glob("*.part"))
    assert invoke(*command).exit_code == 0
    assert len(answers(tmp_path / "out")) == 1


def test_a_damaged_folder_is_named(pictures: Path, tmp_path: Path, loaded: Any) -> None:
    out, source = tmp_path / "out", write_rows(tmp_path / "rows.jsonl", [row()])
    run(options(source), lambda: loaded, out)
    whole = (out / "answers-00000.jsonl").read_text()
    for damaged in (whole[:-20], '{"id": "a"}\n', "7\n"):
        (out / "answers-00000.jsonl").write_text(damaged)
        with pytest.raises(BatchError, match=r"answers-00000\.jsonl', line 1"):
            run(options(source), lambda: loaded, out)
    (out / "answers-00000.jsonl").write_text(whole)
    (out / "run.json").write_text("{")
    with pytest.raises(BatchError, match=r"run\.json' is damaged"):
        run(options(source), lambda: loaded, out)


def test_a_folder_is_free_again_when_its_run_could_not_start(tmp_path: Path) -> None:
    with Store(tmp_path, {"policy": "st3"}) as store:
        store.add([{"id": "1", "kv_share": 1.0, "new_tokens": 1, "row": "a"}], [])
    with pytest.raises(ValueError, match="another run"):
        Store(tmp_path, {"policy": "fastv"})
    Store(tmp_path, {"policy": "st3"}).__exit__(None, None, None)


@pytest.mark.parametrize("every", [True, False])
def test_a_model_that_fails_ends_the_run_and_a_row_that_fails_does_not(
    pictures: Path, tmp_path: Path, loaded: _loading.Loaded, every: bool,
    monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    generate = loaded.model.generate

    def failing(*args: Any, **inputs: Any) -> Any:
        if every or (inputs["attention_mask"].sum(dim=1) > 30).any():
            raise RuntimeError("The size of tensor a (7) must match the size of tensor b")
        return generate(*args, **inputs)

    monkeypatch.setattr(loaded.model, "generate", failing)
    rows = [row(), row(prompt=PROMPT * 6), *[row()] * 10]
    source = write_rows(tmp_path / "rows.jsonl", rows)
    if every:
        with pytest.raises(RuntimeError, match="tensor b"):
            run(options(source), lambda: loaded, tmp_path / "out")
        return
    run(options(source), lambda: loaded, tmp_path / "out")
    assert list(errors(tmp_path / "out")) == ["2"]
    assert len(answers(tmp_path / "out")) == 11


@pytest.mark.slow
def test_sigterm_keeps_what_is_answered(pictures: Path, tmp_path: Path, tiny_model: Path) -> None:
    rows = [row(image=f"pictures/{i % 5}.png") for i in range(400)]
    source, out = write_rows(tmp_path / "rows.jsonl", rows), tmp_path / "out"
    command = [sys.executable, "-m", "st3.tools.cli", "batch", str(source), "-o", str(out), "-m",
               str(tiny_model), "--policy", POLICY, "--batch", "1"]  # fmt: skip
    process = subprocess.Popen(command, stderr=subprocess.PIPE, text=True)
    until = time.monotonic() + 120
    while '"ran"' not in ((out / "run.json").read_text() if (out / "run.json").exists() else ""):
        assert process.poll() is None
        assert time.monotonic() < until
        time.sleep(0.05)
    time.sleep(0.5)
    process.send_signal(signal.SIGTERM)
    _, said = process.communicate(timeout=60)
    assert process.returncode == 128 + signal.SIGTERM
    assert "Traceback" not in said
    assert 0 < len(answers(out)) < 400


def test_rows_of_parquet_are_marked_by_their_bytes(tmp_path: Path) -> None:
    pyarrow = pytest.importorskip("pyarrow", reason="Parquet needs pyarrow (extra st3[ray])")
    parquet = pytest.importorskip("pyarrow.parquet")

    marks = []
    for image in (b"one", b"two", b"one"):
        table = pyarrow.table({"image": [{"bytes": image, "path": None}], "prompt": [PROMPT]})
        parquet.write_table(table, tmp_path / "rows.parquet")
        source = open_source(tmp_path / "rows.parquet")
        (found,) = source.read(list(source.scan()))
        marks.append(found.mark(source.base))  # type: ignore[union-attr]
    assert marks[0] == marks[2] != marks[1]
