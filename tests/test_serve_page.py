"""What the page of `st3 serve` asks the API for, and what it is sent."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from starlette.testclient import TestClient

import st3
from st3.tools.serve import Engine, Settings, create_app, kept, page
from tests.serving import CHAT, body, check, load, picture

KEY = "a-key-of-our-own"
LAYERS = 8


def events(text: str) -> list[Any]:
    lines = [line.removeprefix("data: ") for line in text.splitlines() if line]
    return [json.loads(line) for line in lines if line != "[DONE]"]


@pytest.fixture(scope="module")
def engine(tiny_model: Path) -> Iterator[Engine]:
    engine = Engine(*load(tiny_model), kv_budget_bytes=64 << 20)
    yield engine
    engine.close()


@pytest.fixture(scope="module")
def client(engine: Engine) -> TestClient:  # not entered: the engine is other fixtures' as well
    return TestClient(create_app(engine, Settings()), raise_server_exceptions=False)


# What the response says of each layer -------------------------------------------------------------


def test_the_response_says_what_each_layer_saw_if_it_is_asked(
    client: TestClient, engine: Engine
) -> None:
    asked = body("describe", picture(1, (40, 30)), st3={"policy": "fastv:layer=2,drop=0.75"})
    assert "kept" not in client.post(CHAT, json=asked).json()["st3"]
    asked["st3"]["kept"] = True
    found = client.post(CHAT, json=asked).json()["st3"]
    what = found["kept"]
    assert what["layers"] == LAYERS
    assert len(what["seen_by"]) == len(what["places"]) == found["visual_tokens"] == 16
    assert sorted(set(what["seen_by"])) == [2, LAYERS]  # layers 0 and 1 saw what 2 does not
    assert what["seen_by"].count(LAYERS) == 4
    mean = sum(what["seen_by"]) / (LAYERS * 16)
    assert mean == pytest.approx(found["mean_share"])
    for place in what["places"]:
        number, left, top, right, bottom = place
        assert number == 0
        assert 0 <= left < right <= 1
        assert 0 <= top < bottom <= 1


def test_it_says_the_tokens_that_generate_keeps(client: TestClient, tiny_model: Path) -> None:
    model, processor = load(tiny_model)
    shown = picture(3, (40, 40))
    asked = body("what is at the top left", shown, st3={"policy": "st3", "kept": True})
    what = client.post(CHAT, json=asked).json()["st3"]["kept"]
    parts = [{"type": "image", "image": shown}, {"type": "text", "text": "what is at the top left"}]
    inputs = processor.apply_chat_template(
        [{"role": "user", "content": parts}],
        add_generation_prompt=True, tokenize=True, return_dict=True, return_tensors="pt",
    )  # fmt: skip
    with st3.trim(model, "st3") as trimmer:
        model.generate(**inputs, max_new_tokens=1, do_sample=False)
    for layer in range(LAYERS):
        saw = [token for token, reach in enumerate(what["seen_by"]) if reach > layer]
        assert saw == trimmer.report.kept_positions(layer).tolist()


def test_a_stream_says_it_before_the_first_word(client: TestClient) -> None:
    asked = body("describe", picture(1), stream=True, st3={"kept": True, "policy": "none"})
    said = events(client.post(CHAT, json=asked).text)
    place = next(i for i, event in enumerate(said) if "kept" in event.get("st3", {}))
    words = [i for i, event in enumerate(said) if event["choices"][0]["delta"].get("content")]
    assert place < min(i for i in words if i > 0)
    assert said[place]["st3"]["kept"]["seen_by"] == [LAYERS] * 16
    assert "kept" not in said[-1]["st3"]


def test_without_an_image_nothing_was_seen(client: TestClient) -> None:
    what = client.post(CHAT, json=body("describe", st3={"kept": True})).json()["st3"]["kept"]
    assert what == {
        "layers": LAYERS, "seen_by": [], "places": None, "unplaced": "the prompt has no image"
    }  # fmt: skip


def test_it_is_bounded(client: TestClient, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(kept, "MAX_TOKENS", 31)
    asked = body("describe", picture(1), picture(2), st3={"kept": True})
    check(client, client.post(CHAT, json=asked), 400, "up to 31 visual tokens")
    asked["st3"] = {}
    assert client.post(CHAT, json=asked).status_code == 200
    check(client, client.post(CHAT, json=body(st3={"kept": 1})), 400, "st3.kept")


def test_places_that_are_not_known_are_told(
    client: TestClient, monkeypatch: pytest.MonkeyPatch
) -> None:
    def unknown(*_: Any) -> Any:
        raise kept.UnknownPlaces("nobody knows")

    monkeypatch.setattr(kept, "places", unknown)
    asked = body("describe", picture(1), st3={"kept": True})
    what = client.post(CHAT, json=asked).json()["st3"]["kept"]
    assert (what["places"], what["unplaced"], len(what["seen_by"])) == (None, "nobody knows", 16)


# The files ----------------------------------------------------------------------------------------


def test_the_page_forbids_scripts_and_addresses_of_others(client: TestClient) -> None:
    for path in ("/", "/page/page.js", "/page/api.js", "/page/picture.js", "/page/page.css"):
        response = client.get(path)
        assert response.status_code == 200
        rules = dict(
            rule.split(" ", 1) for rule in response.headers["content-security-policy"].split("; ")
        )
        assert rules["default-src"] == rules["frame-ancestors"] == "'none'"
        assert rules["script-src"] == rules["style-src"] == rules["connect-src"] == "'self'"
        assert response.headers["x-content-type-options"] == "nosniff"
        assert "://" not in response.text.replace("http://www.w3.org/2000/svg", "")
    page = client.get("/").text
    assert "<style" not in page
    assert "onclick" not in page
    assert "style=" not in page


def test_the_page_can_be_left_out(engine: Engine) -> None:
    client = TestClient(create_app(engine, Settings(page=False)))
    assert client.get("/").status_code == 404
    assert client.get("/page/about").status_code == 404


def test_with_a_key_the_files_are_open_and_nothing_else(engine: Engine) -> None:
    client = TestClient(create_app(engine, Settings(api_key=KEY)))
    assert client.get("/").status_code == 200
    for path in ("/page/about", "/page/../v1/models", "/page/samples", "/v1/models", "/metrics"):
        assert client.get(path).status_code == 401, path
    about = client.get("/page/about", headers={"Authorization": f"Bearer {KEY}"}).json()
    assert about["policies"][0] == about["policy"] == "thirds"
    assert about["layers"] == LAYERS
    assert about["samples"] == []


@pytest.mark.slow
def test_the_bundled_model_comes_with_its_pictures() -> None:
    engine = Engine(*load(st3.bundled_model()), kv_budget_bytes=64 << 20)
    try:
        client = TestClient(create_app(engine, Settings()))
        about = client.get("/page/about").json()
        assert about["samples"] == [path.name for path in st3.sample_images()]
        first = client.get(f"/page/samples/{about['samples'][0]}")
        assert first.content == st3.sample_images()[0].read_bytes()
        assert client.get("/page/samples/..%2Fscenes.jsonl").status_code == 404
        assert client.get("/page/samples/scenes.jsonl").status_code == 404
    finally:
        engine.close()


def test_without_the_bundled_models_package_there_are_no_pictures(
    engine: Engine, monkeypatch: pytest.MonkeyPatch
) -> None:
    def none() -> Path:
        raise FileNotFoundError("not installed")

    monkeypatch.setattr(page, "bundled_model", none)
    client = TestClient(create_app(engine, Settings()))
    assert client.get("/page/about").json()["samples"] == []
