"""`st3 batch`: answers, bad rows, resuming. The same on Ray is in test_batch_ray.py."""

from __future__ import annotations

import base64
import io
import json
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
from PIL import Image
from typer.testing import CliRunner, Result

from st3.tools.batch import BadRow, BatchError, Done, Options, Ref, Row, Store, open_source, run
from st3.tools.batch.run import Load
from st3.tools.cli import _loading, app

PROMPTS = [
    "describe the image in detail .",
    "what is at the top left ?",
    "red",
    "what is at the right of the red and the blue and the green ?",
]
POLICY = "st3:final_keep=0.1,stride=2"


def invoke(*args: object) -> Result:
    return CliRunner().invoke(app, ["batch", *map(str, args)])


@pytest.fixture(scope="module")
def loaded(tiny_model: Path) -> _loading.Loaded:
    return _loading.load(str(tiny_model), "cpu", "float32", False)


@pytest.fixture
def pictures(tmp_path: Path) -> Path:
    """A folder of images of one colour each; their answers differ with the prompt."""
    folder = tmp_path / "pictures"
    folder.mkdir()
    for i, colour in enumerate(("red", "blue", "green", "white", "black")):
        Image.new("RGB", (40 + 10 * i, 50), colour).save(folder / f"{i}.png")
    return folder


def write_rows(path: Path, rows: list[Any]) -> Path:
    lines = [row if isinstance(row, str) else json.dumps(row) for row in rows]
    path.write_text("".join(line + "\n" for line in lines), "utf-8")
    return path


def many(pictures: Path, count: int) -> list[dict[str, Any]]:
    return [
        {"id": f"r{i}", "image": f"pictures/{i % 5}.png", "prompt": PROMPTS[i % len(PROMPTS)]}
        for i in range(count)
    ]


def answers(out: Path) -> list[dict[str, Any]]:
    files = sorted(out.glob("answers-*.jsonl"))
    return [json.loads(line) for file in files for line in file.read_text("utf-8").splitlines()]


def errors(out: Path) -> dict[str, str]:
    lines = (out / "errors.jsonl").read_text("utf-8").splitlines()
    found = [json.loads(line) for line in lines]
    assert len({e["id"] for e in found}) == len(found)
    return {e["id"]: e["error"] for e in found}


def data_url(path: Path) -> str:
    return "data:image/png;base64," + base64.b64encode(path.read_bytes()).decode()


def options(source: Path, tokens: int = 12, **changes: Any) -> Options:
    given: dict[str, Any] = dict(
        input=source, prompt=None, model="tiny", policy=POLICY, max_new_tokens=tokens, batch_size=4,
        window=8,
    )  # fmt: skip
    return Options(**given | changes)


def test_answers_are_those_of_generate(
    pictures: Path, tmp_path: Path, loaded: _loading.Loaded
) -> None:
    import st3

    rows = many(pictures, 11)
    rows[3]["image"] = data_url(pictures / "3.png")
    source = write_rows(tmp_path / "rows.jsonl", rows)
    summary = run(options(source), lambda: loaded, tmp_path / "out")

    shares = []
    found = {answer["id"]: answer for answer in answers(tmp_path / "out")}
    assert len(found) == len(rows)
    for row in rows:
        path = pictures / f"{int(row['id'][1:]) % 5}.png"
        inputs = _loading.prepare(loaded, [Image.open(path)], row["prompt"])
        with st3.trim(loaded.model, POLICY) as trimmer:
            output = loaded.model.generate(**inputs, max_new_tokens=12, do_sample=False)
        width = inputs["input_ids"].shape[1]
        alone = loaded.tokenizer.decode(output[0, width:], skip_special_tokens=True).strip()
        answer = found[row["id"]]
        assert answer["answer"] == alone
        assert answer["prompt_tokens"] == width
        assert answer["visual_tokens"] == trimmer.report.n_visual[0]
        assert answer["new_tokens"] == output.shape[1] - width
        shares.append(answer["kv_share"])
    assert len({answer["answer"] for answer in found.values()}) > 3
    assert summary["answered"] == summary["this_run"]["answered"] == len(rows)
    assert summary["mean_kv_saved"] == pytest.approx(1 - sum(shares) / len(shares))
    assert 0.05 < summary["mean_kv_saved"] < 0.95
    assert summary["this_run"]["images_per_s"] > 0
    assert json.loads((tmp_path / "out/summary.json").read_text()) == summary


def test_batches_hold_rows_of_like_length(
    pictures: Path, tmp_path: Path, loaded: _loading.Loaded
) -> None:
    source = write_rows(tmp_path / "rows.jsonl", many(pictures, 16))
    batches: list[Done] = []
    run(options(source, window=16), lambda: loaded, tmp_path / "out", on_done=batches.append)
    lengths = [[answer["prompt_tokens"] for answer in done.answers] for done in batches]
    assert [len(set(row)) for row in lengths] == [1, 1, 1, 1]


def test_bad_rows_go_to_the_error_file(pictures: Path, tmp_path: Path, tiny_model: Path) -> None:
    torn = (pictures / "0.png").read_bytes()[:-40]
    (pictures / "torn.png").write_bytes(torn)
    (pictures / "text.png").write_text("no image")
    good = {"image": "pictures/1.png", "prompt": PROMPTS[0]}
    rows = [
        {**good, "id": "good"},
        {"id": "gone", "image": "pictures/none.png", "prompt": PROMPTS[0]},
        {"id": "torn", "image": "pictures/torn.png", "prompt": PROMPTS[0]},
        {"id": "text", "image": "pictures/text.png", "prompt": PROMPTS[0]},
        {"id": "folder", "image": "pictures", "prompt": PROMPTS[0]},
        {"id": "silent", "image": "pictures/1.png"},
        {"id": "blind", "prompt": PROMPTS[0]},
        {"id": "address", "image": "https://example.com/a.png", "prompt": PROMPTS[0]},
        {"id": "base64", "image": "data:image/png;base64,%%%", "prompt": PROMPTS[0]},
        {"id": "data", "image": "data:nonsense", "prompt": PROMPTS[0]},
        # Its text holds a second placeholder, for which there is no image.
        {"id": "placeholder", "image": "pictures/1.png", "prompt": "what is <image> ?"},
        {**good, "id": ["list"]},
        "{not json",
        "[1, 2]",
        {**good, "id": 99},
        good,
    ]  # fmt: skip
    source = write_rows(tmp_path / "rows.jsonl", rows)
    out = tmp_path / "out"
    result = invoke(source, "-o", out, "-m", tiny_model, "--max-new-tokens", 4)
    assert result.exit_code == 0, result.output
    assert {answer["id"] for answer in answers(out)} == {"good", "99", "16"}
    reasons = errors(out)
    assert {name: text.split(":")[0] for name, text in reasons.items()} == {
        "gone": "no such image",
        "torn": "image 'pictures/torn.png' cannot be read",
        "text": "image 'pictures/text.png' is not an image that Pillow can read",
        "folder": "image 'pictures' is a folder, not an image",
        "silent": "it has no prompt, and none was given for all rows",
        "blind": "it has no image",
        "address": reasons["address"].split(":")[0],
        "base64": "the image is not valid base64",
        "data": reasons["data"].split(":")[0],
        "placeholder": reasons["placeholder"].split(":")[0],
        "12": "its id is neither a string nor a whole number",
        "13": "this line is not JSON",
        "14": "this line is not a JSON object",
    }
    assert "3 of 16 rows answered, 13 errors" in result.output

    # What has been mended is answered when the same command runs again, and only that.
    Image.new("RGB", (30, 30), "red").save(pictures / "none.png")
    again = invoke(source, "-o", out, "-m", tiny_model, "--max-new-tokens", 4)
    assert "4 of 16 rows answered (3 before), 12 errors" in again.output
    assert sorted(answer["id"] for answer in answers(out)) == ["16", "99", "gone", "good"]
    assert "gone" not in errors(out)


def test_folder_and_parquet(pictures: Path, tmp_path: Path) -> None:
    (pictures / "notes.txt").write_text("not an image")
    (pictures / "deep").mkdir()
    Image.new("RGB", (30, 30)).save(pictures / "deep" / "a.jpg")
    folder = open_source(pictures, "red")
    refs = list(folder.scan())
    assert [ref.id for ref in refs] == ["0.png", "1.png", "2.png", "3.png", "4.png", "deep/a.jpg"]
    assert list(folder.read(refs[-1:])) == [Row("deep/a.jpg", "deep/a.jpg", "red")]

    pyarrow = pytest.importorskip("pyarrow", reason="Parquet needs pyarrow (extra st3[ray])")
    parquet = pytest.importorskip("pyarrow.parquet")

    encoded = (pictures / "0.png").read_bytes()
    table = pyarrow.table(
        {
            "id": [f"p{i}" for i in range(5)],
            "image": [{"bytes": encoded, "path": None}] * 4 + [{"bytes": None, "path": "0.png"}],
            "prompt": ["red", None, "", "blue", "green"],
        }
    )
    path = tmp_path / "rows.parquet"
    parquet.write_table(table, path, row_group_size=2)
    source = open_source(path, "given")
    refs = list(source.scan())
    assert refs == [Ref(f"p{i}", i) for i in range(5)]
    assert list(source.read([refs[4], refs[0], refs[1], refs[2]])) == [
        Row("p4", "0.png", "green"),
        Row("p0", encoded, "red"),
        Row("p1", encoded, "given"),
        BadRow("p2", "it has no prompt, and none was given for all rows"),
    ]


@pytest.mark.slow
def test_killed_process_goes_on_without_loss_or_repeats(
    pictures: Path, tmp_path: Path, tiny_model: Path
) -> None:
    rows = many(pictures, 24)
    source = write_rows(tmp_path / "rows.jsonl", rows)
    out = tmp_path / "out"
    script = tmp_path / "slow.py"
    script.write_text(
        "import sys, time\n"
        "from pathlib import Path\n"
        "from st3.tools.batch import Options, run\n"
        "from st3.tools.cli import _loading\n"
        "source, out, model, policy = sys.argv[1:]\n"
        "run(Options(Path(source), None, 'tiny', policy, 12, 4, 8),\n"
        "    lambda: _loading.load(model, 'cpu', 'float32', False), Path(out),\n"
        "    on_done=lambda done: time.sleep(0.5), flush_seconds=0)\n"
    )
    args = [sys.executable, str(script), str(source), str(out), str(tiny_model), POLICY]
    process = subprocess.Popen(args, stderr=subprocess.DEVNULL)
    until = time.monotonic() + 120
    while len(list(out.glob("answers-*.jsonl"))) < 2:
        assert process.poll() is None
        assert time.monotonic() < until
        time.sleep(0.02)
    process.send_signal(signal.SIGKILL)
    process.wait()
    before = answers(out)
    assert 0 < len(before) < len(rows)
    (out / "answers-00099.jsonl.part").write_text('{"id": "r0", "answ')  # killed while writing

    loaded = _loading.load(str(tiny_model), "cpu", "float32", False)
    summary = run(options(source), lambda: loaded, out)
    assert summary["this_run"]["answered_before"] == len(before)
    assert summary["this_run"]["answered"] == len(rows) - len(before)
    everything = answers(out)
    assert sorted(a["id"] for a in everything) == sorted(row["id"] for row in rows)
    assert everything[: len(before)] == before
    whole = run(options(source), lambda: loaded, tmp_path / "whole")
    texts = {a["id"]: a["answer"] for a in answers(tmp_path / "whole")}
    assert {a["id"]: a["answer"] for a in everything} == texts
    assert summary["new_tokens"] == whole["new_tokens"]
    assert not list(out.glob("*.part"))


def test_done_run_has_nothing_left_to_do(
    pictures: Path, tmp_path: Path, loaded: _loading.Loaded
) -> None:
    source = write_rows(tmp_path / "rows.jsonl", many(pictures, 3))
    run(options(source), lambda: loaded, tmp_path / "out")

    def load() -> _loading.Loaded:
        raise AssertionError("nothing is left to answer")

    summary = run(options(source), load, tmp_path / "out")
    assert summary["answered"] == 3
    assert summary["this_run"] == {
        "answered_before": 3, "answered": 0, "new_tokens": 0, "seconds": 0.0, "images_per_s": None,
        "tokens_per_s": None, "stale": 0,
    }  # fmt: skip


def test_failure_of_the_model_keeps_what_is_answered(
    pictures: Path, tmp_path: Path, loaded: _loading.Loaded
) -> None:
    source = write_rows(tmp_path / "rows.jsonl", many(pictures, 12))

    def breaking(options: Options, load: Load, windows: list[list[Ref]]) -> Any:
        from st3.tools.batch.run import here

        yield next(iter(here(options, load, windows)))
        raise RuntimeError("CUDA error: an illegal memory access")

    with pytest.raises(RuntimeError, match="illegal"):
        run(options(source), lambda: loaded, tmp_path / "out", breaking)
    assert len(answers(tmp_path / "out")) == 4
    assert not (tmp_path / "out/summary.json").exists()


def test_wrong_use_is_one_line(pictures: Path, tmp_path: Path, tiny_model: Path) -> None:
    row = {"id": 1, "image": "pictures/0.png", "prompt": "red"}
    twice = write_rows(tmp_path / "twice.jsonl", [row, {**row, "id": "1"}])
    empty = write_rows(tmp_path / "empty.jsonl", [])
    fine = write_rows(tmp_path / "fine.jsonl", [row])
    (tmp_path / "table.parquet").write_text("no parquet")
    (tmp_path / "file").write_text("")
    model = ("-m", tiny_model, "--max-new-tokens", 2)
    out = ("-o", tmp_path / "out")
    wrong: list[tuple[tuple[object, ...], str]] = [
        ((twice, *out), "the id '1' comes twice"),
        ((empty, *out), "has no rows"),
        ((pictures, *out), "say what to ask"),
        ((pictures, *out, "-p", " "), "the prompt is empty"),
        ((tmp_path / "none.jsonl", *out), "no such file or folder"),
        ((tmp_path / "file", *out), "nor a .jsonl or .parquet file"),
        ((fine, *out, "--policy", "nonsense"), "--policy nonsense"),
        ((fine, *out, "--replicas", 2), "need --ray"),
        ((fine, *out, "--device-map", "here"), "--device-map here: choose auto"),
        ((fine, *out, "--device-map", "auto", "--device", "cpu"), "exclude each other"),
        ((fine, "-o", tmp_path / "file"), "cannot write"),
    ]
    for args, message in wrong:
        result = invoke(*args)
        assert result.exit_code == 2, (args, result.output)
        assert message in result.output
        assert result.output.count("error:") == 1
        assert "Traceback" not in result.output

    assert invoke(fine, *out, *model).exit_code == 0
    other = invoke(fine, *out, *model, "--policy", "fastv")
    assert other.exit_code == 2
    assert "holds answers of another run (policy was 'thirds', now 'fastv')" in other.output
    only_bad = write_rows(tmp_path / "bad.jsonl", [{"image": "none.png", "prompt": "red"}])
    failed = invoke(only_bad, "-o", tmp_path / "bad", *model)
    assert failed.exit_code == 1
    assert "no row could be answered" in failed.output


def test_two_runs_do_not_share_a_folder(tmp_path: Path) -> None:
    with (
        Store(tmp_path / "out", {"policy": "st3"}),
        pytest.raises(ValueError, match="another run writes"),
    ):
        Store(tmp_path / "out", {"policy": "st3"})
    Store(tmp_path / "out", {"policy": "st3"}).__exit__(None, None, None)


def test_answers_without_their_run_are_refused(pictures: Path, tmp_path: Path) -> None:
    source = write_rows(tmp_path / "rows.jsonl", many(pictures, 1))
    (tmp_path / "out").mkdir()
    write_rows(tmp_path / "out" / "answers-00000.jsonl", [{"id": "r0"}])
    with pytest.raises(BatchError, match=r"no run\.json"):
        run(options(source), lambda: pytest.fail("not reached"), tmp_path / "out")


def test_images_are_turned_and_made_rgb(tmp_path: Path) -> None:
    from st3.tools.batch.images import load

    exif = Image.Exif()
    exif[0x0112] = 6  # taken with the camera on its side
    buffer = io.BytesIO()
    Image.new("L", (30, 20)).save(buffer, "jpeg", exif=exif)
    opened = load(buffer.getvalue(), tmp_path)
    assert (opened.size, opened.mode) == ((20, 30), "RGB")


def test_the_system_prompt_is_every_rows(
    pictures: Path, tiny_model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from st3.tools.batch import worker

    seen: list[Any] = []
    real = worker.encode

    def encode(model: Any, processor: Any, chats: Any, **padding: Any) -> Any:
        seen.extend(chat[0] for chat in chats)
        return real(model, processor, chats, **padding)

    monkeypatch.setattr(worker, "encode", encode)
    words = (pictures, "-o", tmp_path / "out", "-p", "red", "-m", tiny_model, "--max-new-tokens", 2)
    first = invoke(*words, "--system", "be brief")
    assert first.exit_code == 0, first.output
    assert seen == 5 * [{"role": "system", "content": [{"type": "text", "text": "be brief"}]}]
    for other in ((), ("--system", "be long")):
        again = invoke(*words, *other)
        assert again.exit_code == 2
        assert "system" in again.stderr
