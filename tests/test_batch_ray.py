"""Batch runs and the server on Ray: an actor that is killed loses nothing."""

from __future__ import annotations

import functools
import json
import os
import signal
import socket
import sys
import urllib.request
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from st3.tools.batch import BatchError, Done, run
from st3.tools.batch.ray import _shares, on_ray
from st3.tools.cli import _loading
from tests.test_batch import answers, data_url, errors, many, options, pictures, write_rows

__all__ = ["pictures"]  # the fixture


@pytest.fixture(scope="module")
def cluster() -> Iterator[Any]:
    ray = pytest.importorskip("ray", reason="needs the extra st3[ray]")
    pytest.importorskip("ray.data", reason="needs the extra st3[ray]")
    if sys.platform != "linux":
        pytest.skip("finds the actors' processes in /proc")
    # Two CPUs whatever the machine has: two actors, of a thread each.
    ray.init(address="local", num_cpus=2, include_dashboard=False, log_to_driver=False)
    yield ray
    ray.shutdown()


def actor_processes() -> list[int]:
    """The processes of this test's own actors: children of the raylet that it started."""
    found = []
    for folder in Path("/proc").iterdir():
        try:
            name = (folder / "cmdline").read_bytes()
            if name.startswith(b"ray::") and b"MapWorker" in name:
                parent = int((folder / "stat").read_text().rpartition(")")[2].split()[1])
                of = int((Path("/proc") / str(parent) / "stat").read_text()
                         .rpartition(")")[2].split()[1])  # fmt: skip
                if of == os.getpid():
                    found.append(int(folder.name))
        except (OSError, ValueError):
            continue  # it has ended, or is no process
    return found


@pytest.mark.slow
@pytest.mark.ray
def test_killed_actor_loses_nothing(
    cluster: Any, pictures: Path, tmp_path: Path, tiny_model: Path
) -> None:
    rows = many(pictures, 30)
    rows[7]["image"] = "pictures/none.png"
    source = write_rows(tmp_path / "rows.jsonl", rows)
    load = functools.partial(_loading.load, str(tiny_model), "cpu", "float32", False)
    asked = options(source, tokens=40, batch_size=2, window=4)
    killed: list[int] = []

    def kill_one(done: Done) -> None:
        if not killed:
            processes = actor_processes()
            assert processes
            os.kill(processes[0], signal.SIGKILL)
            killed.append(processes[0])

    on_two = on_ray("local", actors=2)
    summary = run(asked, load, tmp_path / "out", on_two, on_done=kill_one)
    assert killed
    assert killed[0] not in actor_processes()
    found = {a["id"]: a["answer"] for a in answers(tmp_path / "out")}
    assert len(answers(tmp_path / "out")) == len(found) == 29
    assert list(errors(tmp_path / "out")) == ["r7"]
    assert summary["answered"] == 29

    run(asked, load, tmp_path / "here")
    assert found == {a["id"]: a["answer"] for a in answers(tmp_path / "here")}


@pytest.mark.ray
def test_failing_actor_is_one_line(cluster: Any, pictures: Path, tmp_path: Path) -> None:
    source = write_rows(tmp_path / "rows.jsonl", many(pictures, 2))
    load = functools.partial(_loading.load, str(tmp_path), "cpu", "float32", False)
    with pytest.raises(RuntimeError, match=r"Ray gave up: .*holds no model"):
        run(options(source), load, tmp_path / "out", on_ray("local"))


@pytest.mark.slow
@pytest.mark.ray
def test_server_on_ray_answers(cluster: Any, pictures: Path) -> None:
    pytest.importorskip("fastapi", reason="needs the extra st3[server]")
    serve = pytest.importorskip("ray.serve", reason="needs the extra st3[ray]")
    from st3.tools.serve import Settings
    from st3.tools.serve.ray import application, start

    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    load = functools.partial(_loading.load, None, "cpu", "float32", False)
    app = application(load, Settings(), {"kv_budget_bytes": 32 << 20}, max_replicas=2)
    start(app, "local", "127.0.0.1", port)
    try:
        picture = {"type": "image_url", "image_url": {"url": data_url(pictures / "0.png")}}
        text = {"type": "text", "text": "describe the image in detail."}
        body = {
            "model": "st3",
            "messages": [{"role": "user", "content": [picture, text]}],
            "max_tokens": 4,
        }
        request = urllib.request.Request(
            f"http://127.0.0.1:{port}/v1/chat/completions",
            json.dumps(body).encode(),
            {"Content-Type": "application/json"},
        )
        with urllib.request.urlopen(request, timeout=60) as response:
            answer = json.load(response)
        assert answer["usage"]["completion_tokens"] == 4
        assert answer["choices"][0]["message"]["content"]
    finally:
        serve.shutdown()


def test_without_ray_says_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "ray", None)
    with pytest.raises(BatchError, match=r"pip install 'st3\[ray\]'"):
        on_ray("local")


@pytest.mark.parametrize(
    ("cluster_has", "actors", "gpus", "expected"),
    [
        ({"CPU": 8}, None, None, (1, 0, 8.0)),
        ({"CPU": 8}, 3, None, (3, 0, 2.0)),
        ({"CPU": 64, "GPU": 8}, None, None, (8, 1, 1.0)),
        ({"CPU": 64, "GPU": 8}, None, 2, (4, 2, 1.0)),
        ({"CPU": 64, "GPU": 8}, 2, 0, (2, 0, 32.0)),
    ],
)
def test_shares(
    cluster_has: dict[str, float],
    actors: int | None,
    gpus: int | None,
    expected: tuple[int, int, float],
) -> None:
    assert _shares(cluster_has, actors, gpus) == expected


@pytest.mark.parametrize(
    ("cluster_has", "actors", "gpus", "message"),
    [
        ({"CPU": 2}, 3, None, "3 actors need a CPU each; the cluster has 2"),
        ({"CPU": 8}, None, 1, "shall have 1 GPUs; the cluster has 0"),
        ({"CPU": 8, "GPU": 2}, 3, None, "3 actors with 1 GPUs each need 3"),
    ],
)
def test_too_small_a_cluster(
    cluster_has: dict[str, float], actors: int | None, gpus: int | None, message: str
) -> None:
    with pytest.raises(BatchError, match=message):
        _shares(cluster_has, actors, gpus)
