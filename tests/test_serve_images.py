"""Images that strangers send: each bad one gets a 4xx with a reason; files and addresses are read
only where they are allowed."""

from __future__ import annotations

import base64
import http.server
import os
import socket
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from PIL import Image
from starlette.testclient import TestClient

from st3.tools.serve import Engine, Settings, create_app, images
from st3.tools.serve.errors import ServeError
from st3.tools.serve.fetch import _public, fetch
from tests.serving import CHAT, body, check, data_url, load, picture, png

SETTINGS = Settings(max_body_bytes=1 << 20, max_image_bytes=200_000, max_pixels=100_000)


@pytest.fixture(scope="module")
def client(tiny_model: Path) -> Iterator[TestClient]:
    engine = Engine(*load(tiny_model), kv_budget_bytes=64 << 20)
    with TestClient(create_app(engine, SETTINGS), raise_server_exceptions=False) as client:
        yield client


def decoded(url: str, settings: Settings, pixels: int = 0) -> Image.Image:
    return images.decode(images.read(url, settings), settings, pixels)


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
    "a line": (data_url(Image.new("RGB", (1, 500))), "thinner"),
    "a lying line": (data_url(png(90_000, 1)), "thinner"),
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
    decoded(url, settings, 50)
    with pytest.raises(ServeError, match="together"):
        decoded(url, settings, 51)


@pytest.mark.parametrize("mode", ["1", "L", "LA", "P", "RGBA", "CMYK", "I;16", "F"])
def test_images_of_every_mode_are_read(mode: str) -> None:
    kind = "tiff" if mode == "F" else "jpeg" if mode == "CMYK" else "png"
    image = Image.new(mode, (8, 6))
    if mode == "F":
        with pytest.raises(ServeError, match="format"):
            decoded(data_url(image, kind), SETTINGS)
        return
    found = decoded(data_url(image, kind), SETTINGS)
    assert (found.mode, found.size) == ("RGB", (8, 6))


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
        found = decoded(f"file://{host}{folder}/a%20b.png", settings)
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
        "[::1{folder}/a%20b.png",
        "[x]{folder}/a%20b.png",
        "a\u2100b{folder}/a%20b.png",
    ],
)
def test_files_that_are_not_allowed(folder: Path, path: str) -> None:
    settings = Settings(image_folder=folder, max_image_bytes=SETTINGS.max_image_bytes)
    with pytest.raises(ServeError) as caught:
        decoded(f"file://{path.format(folder=folder)}", settings)
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
        fetch(url.format(port=web.port), 10_000, 5)
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


PRIVATE = (
    "127.0.0.1", "10.1.2.3", "169.254.169.254", "100.64.0.1", "0.0.0.0", "224.0.0.1", "240.0.0.1",
    "192.88.99.1", "::", "::1", "::ffff:127.0.0.1", "::127.0.0.1", "::ffff:0:127.0.0.1",
    "64:ff9b::127.0.0.1", "64:ff9b::169.254.169.254", "64:ff9b::8.8.8.8", "64:ff9b:1::127.0.0.1",
    "2002:7f00:1::", "2001:0:7f00:1::", "fc00::1", "fe80::1%eth0", "fec0::1", "ff0e::1", "5f00::1",
    "100::1", "2001:db8::1",
)  # fmt: skip


@pytest.mark.parametrize("address", PRIVATE)
def test_addresses_that_do_not_count_as_public(address: str) -> None:
    assert not _public(address)


def test_addresses_that_count_as_public() -> None:
    for address in ("8.8.8.8", "::ffff:8.8.8.8", "2606:4700:4700::1111", "2a00:1450::1"):
        assert _public(address)


@pytest.mark.parametrize(
    "head",
    [
        b"HTTP/1.1 200 OK\r\nContent-Length: 100000\r\n\r\n",  # then the body drips
        b"HTTP/1.1 200 OK\r\n",  # the headers
        b"HTT",  # the status line
        None,  # nothing ever comes
    ],
    ids=["body", "headers", "status", "nothing"],
)
def test_fetching_has_one_deadline_for_all_phases(head: bytes | None) -> None:
    server = socket.create_server(("127.0.0.1", 0))

    def drip() -> None:
        try:
            peer, _ = server.accept()
            peer.sendall(head or b"")
            for _ in range(100):
                time.sleep(0.1)
                peer.sendall(b"x" if head else b"")
        except OSError:
            pass

    threading.Thread(target=drip, daemon=True).start()
    began = time.monotonic()
    with pytest.raises(ServeError, match="too long"):
        fetch(f"http://127.0.0.1:{server.getsockname()[1]}/a.png", 10_000, 0.5, private=True)
    assert time.monotonic() - began < 3
    server.close()


def test_a_name_that_hangs_has_the_same_deadline(monkeypatch: pytest.MonkeyPatch) -> None:
    free = threading.Event()
    monkeypatch.setattr(socket, "getaddrinfo", lambda *_, **__: free.wait(20))
    began = time.monotonic()
    try:
        with pytest.raises(ServeError, match="too long"):
            fetch("http://slow.example/a.png", 10_000, 0.3)
        assert time.monotonic() - began < 3
    finally:
        free.set()


def test_images_are_fetched_for_a_request(
    tiny_model: Path, web: Web, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Where it is allowed, once for each address; the answer is that of the image itself."""
    monkeypatch.setattr("st3.tools.serve.fetch._public", lambda address: True)
    settings = Settings(http_images=True, max_body_bytes=100_000)
    url = f"http://127.0.0.1:{web.port}/a.png"
    with TestClient(create_app(Engine(*load(tiny_model)), settings)) as client:
        answers = [
            client.post(CHAT, json=body("describe", image, image)).json()
            for image in (url, data_url(web.image))
        ]
        assert answers[0]["choices"] == answers[1]["choices"]
        assert web.asked == ["/a.png"]
        large = client.post(CHAT, json=body("describe", url, f"{url[:-5]}large.png"))
        check(client, large, 400, "larger")


ENCODINGS = {
    "capitals": lambda url: "DATA:IMAGE/PNG;BASE64," + url.partition(",")[2],
    "line breaks": lambda url: "\r\n".join(url[i : i + 76] for i in range(0, len(url), 76)),
    "no padding": lambda url: url.rstrip("="),
    "for URLs": lambda url: url[:22] + url[22:].replace("+", "-").replace("/", "_"),
    "octets": lambda url: url.replace("image/png", "application/octet-stream"),
}


@pytest.mark.parametrize("name", ENCODINGS)
def test_base64_of_all_kinds_is_read(name: str) -> None:
    url = data_url(picture(8))
    assert decoded(ENCODINGS[name](url), Settings()).tobytes() == picture(8).tobytes()
