"""Bad requests: each gets a 4xx with a reason, and the server lives on."""

from __future__ import annotations

import base64
import http.server
import json
import os
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from PIL import Image
from starlette.testclient import TestClient

from st3.tools.serve import Engine, Settings, create_app, images
from st3.tools.serve.errors import ServeError
from st3.tools.serve.fetch import fetch
from tests.serving import body, data_url, load, picture, png

CHAT = "/v1/chat/completions"
SETTINGS = Settings(max_body_bytes=1 << 20, max_image_bytes=200_000, max_pixels=100_000)


@pytest.fixture(scope="module")
def client(tiny_model: Path) -> Iterator[TestClient]:
    engine = Engine(*load(tiny_model), kv_budget_bytes=64 << 20)
    with TestClient(create_app(engine, SETTINGS), raise_server_exceptions=False) as client:
        yield client


def check(client: TestClient, response: Any, status: int, word: str) -> None:
    """The error has OpenAI's shape, gives its reason, and the next request is answered."""
    assert response.status_code == status, response.text
    error = response.json()["error"]
    assert set(error) == {"message", "type", "param", "code"}
    assert word in error["message"], error["message"]
    assert "Traceback" not in response.text
    assert client.post(CHAT, json=body(max_tokens=1)).status_code == 200


JSON = {"content-type": "application/json"}
NESTED = b'{"model":' + b"[" * 100_000
BODIES = {
    "nothing": (b"", "JSON"),
    "cut off": (b'{"model": "st3"', "JSON"),
    "a list": (b"[]", "object"),
    "null": (b"null", "object"),
    "not UTF-8": (b'{"model": "\xff\xfe"}', "JSON"),
    "nested": (NESTED, "JSON"),
    "nested to its end": (NESTED + b"]" * 100_000 + b"}", "deep"),
    "not a number": (b'{"temperature": NaN}', "NaN"),
    "infinite": (b'{"temperature": -Infinity}', "Infinity"),
    "a number of 5,000 digits": (b'{"seed": ' + b"9" * 5000 + b"}", "JSON"),
}


@pytest.mark.parametrize("name", BODIES)
def test_bodies_that_are_no_request(client: TestClient, name: str) -> None:
    data, word = BODIES[name]
    check(client, client.post(CHAT, content=data, headers=JSON), 400, word)


def test_the_type_of_the_body_is_checked(client: TestClient) -> None:
    data = json.dumps(body())
    response = client.post(CHAT, content=data, headers={"content-type": "text/plain"})
    check(client, response, 415, "application/json")


def test_a_body_may_have_parameters_in_its_type(client: TestClient) -> None:
    headers = {"content-type": "application/json; charset=utf-8"}
    data = json.dumps(body(max_tokens=1))
    assert client.post(CHAT, content=data, headers=headers).status_code == 200


def message(**fields: Any) -> dict[str, Any]:
    return {"messages": [{"role": "user", "content": "describe", **fields}]}


def part(**fields: Any) -> dict[str, Any]:
    return message(content=[fields])


FIELDS: dict[str, tuple[dict[str, Any], str]] = {
    "no model": ({"model": None}, "model"),
    "a model of a wrong type": ({"model": 3}, "model"),
    "no messages": ({"messages": []}, "messages"),
    "messages of a wrong type": ({"messages": "describe"}, "messages"),
    "a message of a wrong type": ({"messages": ["describe"]}, "messages.0"),
    "too many messages": ({"messages": message()["messages"] * 65}, "64 messages"),
    "an unknown role": (message(role="tool"), "role"),
    "no content": (message(content=None), "content"),
    "empty content": (message(content=[]), "content"),
    "an unknown field of a message": (message(name="me"), "name"),
    "an unknown part": (part(type="input_audio", input_audio={}), "input_audio"),
    "a part without a type": (part(text="describe"), "type"),
    "a text of a wrong type": (part(type="text", text=7), "text"),
    "an image that is a string": (part(type="image_url", image_url="x"), "image_url"),
    "a detail": (
        part(type="image_url", image_url={"url": "data:", "detail": "low"}), "detail"),
    "half a character": (message(content="\ud800"), ""),
    "a placeholder": (message(content="describe <image>"), "<image>"),
    "a temperature of a wrong type": ({"temperature": "hot"}, "temperature"),
    "a temperature below zero": ({"temperature": -1}, "temperature"),
    "too high a temperature": ({"temperature": 2.1}, "temperature"),
    "no probability": ({"top_p": 0}, "top_p"),
    "too much probability": ({"top_p": 1.1}, "top_p"),
    "no tokens": ({"max_tokens": 0}, "max_tokens"),
    "negative tokens": ({"max_tokens": -5}, "max_tokens"),
    "part of a token": ({"max_tokens": 1.5}, "max_tokens"),
    "true tokens": ({"max_tokens": True}, "max_tokens"),
    "tokens as text": ({"max_tokens": "5"}, "max_tokens"),
    "absurdly many tokens": ({"max_tokens": 10**12}, "max_tokens"),
    "more tokens than positions": ({"max_tokens": 2047}, "positions"),
    "two lengths": ({"max_tokens": 3, "max_completion_tokens": 4}, "differ"),
    "too large a seed": ({"seed": 2**70}, "seed"),
    "an empty stop": ({"stop": ""}, "stop"),
    "too many stops": ({"stop": list("abcde")}, "stop"),
    "a long stop": ({"stop": "x" * 1000}, "stop"),
    "a stream of a wrong type": ({"stream": "yes"}, "stream"),
    "unknown options of a stream": ({"stream_options": {"a": 1}}, "stream_options"),
    "a long prompt": (message(content="describe " * 3000), "positions"),
    "a policy of a wrong type": ({"st3": {"policy": 3}}, "policy"),
    "an unknown policy": ({"st3": {"policy": "magic"}}, "magic"),
    "a policy that does not fit": ({"st3": {"policy": "fastv:layer=99"}}, "layer"),
    "a policy of nothing but brackets": ({"st3": {"policy": "random:like=" + "(" * 180}}, ""),
    "an endless policy": ({"st3": {"policy": "st3:" + "tau=1," * 99}}, "policy"),
    "an unknown extension": ({"st3": {"magic": 1}}, "magic"),
}  # fmt: skip


@pytest.mark.parametrize("name", FIELDS)
def test_fields_of_wrong_types_and_values(client: TestClient, name: str) -> None:
    fields, word = FIELDS[name]
    request = body(**fields)
    # Not by httpx, which cannot write half a character.
    check(client, client.post(CHAT, content=json.dumps(request), headers=JSON), 400, word)


UNSUPPORTED: dict[str, Any] = {
    "n": 2,
    "logprobs": True,
    "top_logprobs": 2,
    "logit_bias": {"5": 1},
    "presence_penalty": 0.5,
    "frequency_penalty": -0.5,
    "tools": [{"type": "function"}],
    "tool_choice": "required",
    "functions": [],
    "response_format": {"type": "json_object"},
    "user": "me",
    "metadata": {},
    "reasoning_effort": "low",
    "top_k": 5,
    "anything_else": 1,
}


@pytest.mark.parametrize("name", UNSUPPORTED)
def test_fields_that_are_not_supported_are_refused(client: TestClient, name: str) -> None:
    response = client.post(CHAT, json=body(**{name: UNSUPPORTED[name]}))
    check(client, response, 400, name)
    assert response.json()["error"]["code"] == "unsupported_field"


def test_their_neutral_values_are_taken(client: TestClient) -> None:
    neutral = {"n": 1, "logprobs": False, "presence_penalty": 0, "frequency_penalty": 0.0,
               "tools": [], "tool_choice": "none", "response_format": {"type": "text"},
               "logit_bias": None, "seed": None, "stop": None, "stream": False}  # fmt: skip
    assert client.post(CHAT, json=body(max_tokens=1, **neutral)).status_code == 200
    assert client.post(CHAT, json=body(n=True)).status_code == 400


def _jpeg() -> bytes:
    return base64.b64decode(data_url(picture(), "jpeg").partition(",")[2])


IMAGES: dict[str, tuple[str, str]] = {
    "an empty URL": ("", "data URL"),
    "an empty image": ("data:image/png;base64,", "empty"),
    "a URL without data": ("data:", "data:image/png"),
    "data that is not base64": ("data:image/png;base64,****", "base64"),
    "data without base64": ("data:image/png,abc", "data:image/png"),
    "text": ("data:text/html;base64,PGI+", "text/html"),
    "noise": (data_url(bytes(range(256)) * 4), "format"),
    "a page": (data_url(b"<html><body>" * 50), "format"),
    "vector graphics": (data_url(b"<svg xmlns='http://www.w3.org/2000/svg'/>"), "format"),
    "PostScript": (data_url(b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n"), "format"),
    "a PNG that is cut off": (data_url(png(50, 50)[:60]), "cannot be read"),
    "a PNG with too little in it": (data_url(png(300, 300)), "cannot be read"),
    "a JPEG that is cut off": (data_url(_jpeg()[:300]), "cannot be read"),
    "no pixels": (data_url(png(0, 50)), "image"),
    "a decompression bomb": (data_url(png(60_000, 60_000)), "pixels"),
    "the largest PNG there is": (data_url(png(2**31 - 1, 2**31 - 1)), "pixels"),
    "too many pixels": (data_url(png(400, 400)), "pixels"),
    "too many bytes": (data_url(b"\x89PNG" + bytes(250_000)), "bytes"),
    "a file": ("file:///etc/passwd", "files"),
    "a path": ("../../../etc/passwd", "data URL"),
    "a web address": ("http://127.0.0.1:1/a.png", "not fetched"),
    "a web address in capitals": ("HTTPS://example.org/a.png", "not fetched"),
    "another scheme": ("ftp://example.org/a.png", "data URL"),
    "a script": ("javascript:alert(1)", "data URL"),
    "no scheme": ("//example.org/a.png", "data URL"),
    "a zero byte": ("data:image/png\0;base64,AAAA", "data:image/png"),
    "many parameters": ("data:image/png" + ";a=b" * 5000 + ";base64,AAAA", "data:image/png"),
}


@pytest.mark.parametrize("name", IMAGES)
@pytest.mark.parametrize("stream", [False, True], ids=["whole", "stream"])
def test_images_that_are_none(client: TestClient, name: str, stream: bool) -> None:
    url, word = IMAGES[name]
    check(client, client.post(CHAT, json=body("describe", url, stream=stream)), 400, word)


def test_too_many_images(client: TestClient) -> None:
    small = data_url(picture(size=(4, 4)))
    check(client, client.post(CHAT, json=body("describe", *[small] * 17)), 400, "16 images")


def test_too_many_pixels_together() -> None:
    settings = Settings(max_pixels=100, max_total_pixels=150)
    url = data_url(picture(size=(10, 10)))
    images.load(url, settings, 50)
    with pytest.raises(ServeError, match="together"):
        images.load(url, settings, 51)


@pytest.mark.parametrize("mode", ["1", "L", "LA", "P", "RGBA", "CMYK", "I;16", "F"])
def test_images_of_every_mode_are_read(mode: str) -> None:
    kind = "tiff" if mode == "F" else "jpeg" if mode == "CMYK" else "png"
    image = Image.new(mode, (8, 6))
    if mode == "F":
        with pytest.raises(ServeError, match="format"):
            images.load(data_url(image, kind), SETTINGS)
        return
    found = images.load(data_url(image, kind), SETTINGS)
    assert (found.mode, found.size) == ("RGB", (8, 6))


def test_a_large_body_is_refused_while_it_comes(client: TestClient) -> None:
    sent = []

    def endless() -> Iterator[bytes]:
        for _ in range(100):
            sent.append(1)
            yield b" " * 50_000

    response = client.post(CHAT, content=endless(), headers=JSON)
    check(client, response, 413, "larger")
    response = client.post(CHAT, content=b"{}", headers={**JSON, "content-length": "9" * 15})
    check(client, response, 413, "larger")


def test_pages_that_do_not_exist(client: TestClient) -> None:
    check(client, client.get("/v1/nothing"), 404, "no such page")
    check(client, client.get(CHAT), 405, "method")
    check(client, client.get("/v1/models/other"), 404, "not served")
    check(client, client.get("/docs"), 404, "no such page")
    check(client, client.post(CHAT, json=body(model="other")), 404, "not served")


# Files and addresses, where they are allowed ------------------------------------------------------


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    inside = tmp_path / "images"
    inside.mkdir()
    picture(3).save(inside / "a b.png")
    picture(4).save(tmp_path / "outside.png")
    (inside / "link.png").symlink_to(tmp_path / "outside.png")
    (inside / "loop.png").symlink_to(inside / "loop.png")
    (inside / "sub").mkdir()
    os.mkfifo(inside / "pipe.png")
    (inside / "large.png").write_bytes(bytes(SETTINGS.max_image_bytes + 1))
    (tmp_path / "images2").mkdir()
    picture(5).save(tmp_path / "images2" / "c.png")
    return inside


def test_files_of_an_allowed_folder(folder: Path) -> None:
    settings = Settings(image_folder=folder)
    for host in ("", "localhost"):
        found = images.load(f"file://{host}{folder}/a%20b.png", settings)
        assert found.tobytes() == picture(3).tobytes()


@pytest.mark.parametrize(
    "path",
    [
        "/etc/passwd",
        "{folder}/../outside.png",
        "{folder}/%2e%2e/outside.png",
        "{folder}/sub/..%2f..%2foutside.png",
        "{folder}2/c.png",
        "{folder}/link.png",
        "{folder}/loop.png",
        "{folder}/sub",
        "{folder}/pipe.png",
        "{folder}/large.png",
        "{folder}/none.png",
        "{folder}/a%00b.png",
        "{folder}/%ff.png",
        "{folder}/a%20b.png?x",
        "evil.example{folder}/a%20b.png",
        "",
    ],
)
def test_files_that_are_not_allowed(folder: Path, path: str) -> None:
    settings = Settings(image_folder=folder, max_image_bytes=SETTINGS.max_image_bytes)
    with pytest.raises(ServeError) as caught:
        images.load(f"file://{path.format(folder=folder)}", settings)
    assert caught.value.status == 400


@pytest.mark.parametrize(
    "url",
    [
        "http://127.0.0.1:{port}/a.png",
        "http://localhost:{port}/a.png",
        "http://[::1]:{port}/a.png",
        "http://[::ffff:127.0.0.1]:{port}/a.png",
        "http://2130706433:{port}/a.png",
        "http://0.0.0.0:{port}/a.png",
        "http://10.0.0.1/a.png",
        "http://169.254.169.254/latest/meta-data",
        "http://user:word@127.0.0.1:{port}/a.png",
        "http://127.0.0.1:99999/a.png",
        "http:///a.png",
        "http://[::1/a.png",
        "http://host.invalid/a.png",
        "http://127.0.0.1:{port}/a\r\nX-Evil: 1",
    ],
)
def test_addresses_that_are_not_public_are_not_asked(web: Web, url: str) -> None:
    with pytest.raises(ServeError) as caught:
        images.load(url.format(port=web.port), Settings(http_images=True))
    assert caught.value.status == 400
    assert web.asked == []


class Web:
    """A small web server on loopback."""

    def __init__(self) -> None:
        self.asked: list[str] = []
        self.image = base64.b64decode(data_url(picture(6)).partition(",")[2])
        web = self

        class Handler(http.server.BaseHTTPRequestHandler):
            def do_GET(self) -> None:
                web.asked.append(self.path)
                if self.path == "/moved.png":
                    self.send_response(302)
                    self.send_header("Location", "/a.png")
                    self.end_headers()
                    return
                self.send_response(200)
                self.end_headers()
                self.wfile.write(web.image * (100 if self.path == "/large.png" else 1))

            def log_message(self, *args: Any) -> None:
                pass

        self.server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.port = self.server.server_address[1]
        threading.Thread(target=self.server.serve_forever, args=(0.01,), daemon=True).start()


@pytest.fixture
def web() -> Iterator[Web]:
    web = Web()
    yield web
    web.server.shutdown()
    web.server.server_close()


def test_fetching_where_it_is_allowed(web: Web) -> None:
    host = f"http://127.0.0.1:{web.port}"
    assert fetch(f"{host}/a.png?x=1", 10_000, 5, private=True) == web.image
    assert web.asked == ["/a.png?x=1"]
    with pytest.raises(ServeError, match="larger"):
        fetch(f"{host}/large.png", 10_000, 5, private=True)
    with pytest.raises(ServeError, match="302"):
        fetch(f"{host}/moved.png", 10_000, 5, private=True)
    assert web.asked == ["/a.png?x=1", "/large.png", "/moved.png"]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"model_name": " "}, "model_name"),
        ({"api_key": ""}, "api_key"),
        ({"image_folder": Path("/no/such/folder")}, "not a folder"),
        ({"max_pixels": 0}, "max_pixels"),
        ({"request_timeout": 0}, "request_timeout"),
    ],
)
def test_settings_that_make_no_sense(options: Any, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        Settings(**options)
