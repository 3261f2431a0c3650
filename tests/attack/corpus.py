# ruff: noqa: E501
"""The requests. Each is made when it is sent: some are large."""

from __future__ import annotations

import json
import random
import zlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from io import BytesIO
from pathlib import Path
from typing import Any

from PIL import Image

from tests.serving import CHAT, data_url, picture, png

Body = Callable[[], bytes]


@dataclass(frozen=True)
class Bad:
    """A request. may_pass: whether an answer (200) is right as well, for what was changed at random
    and may have come out harmless."""

    name: str
    body: Body = bytes
    method: str = "POST"
    path: str = CHAT
    headers: dict[str, str] = field(default_factory=lambda: {"content-type": "application/json"})
    may_pass: bool = False


def corpus(folder: Path) -> Iterator[Bad]:
    """All of them. folder: the one whose files may be read; what it holds is made here."""
    yield from bodies()
    yield from fields()
    yield from messages()
    yield from pictures()
    yield from urls(folder)
    yield from policies()
    yield from wires()
    yield from large()


def plain(**changes: Any) -> dict[str, Any]:
    message = {"role": "user", "content": "describe the image"}
    return {"model": "st3", "max_tokens": 2, "messages": [message], **changes}


def shown(url: str) -> dict[str, Any]:
    parts = [{"type": "image_url", "image_url": {"url": url}}, {"type": "text", "text": "what"}]
    return plain(messages=[{"role": "user", "content": parts}])


def as_json(request: Any) -> Body:
    return lambda: json.dumps(request).encode()


def bodies() -> Iterator[Bad]:
    """Bytes that are no JSON, or the JSON of no request."""
    whole = json.dumps(shown(data_url(picture(size=(4, 4))))).encode()
    for cut in range(0, len(whole), max(1, len(whole) // 40)):
        yield Bad(f"body cut at {cut}", lambda cut=cut: whole[:cut])  # type: ignore[misc]
    chance = random.Random(1)
    for number in range(60):
        changed = bytearray(whole)
        for _ in range(1 + number % 4):
            changed[chance.randrange(len(whole))] = chance.randrange(256)
        yield Bad(f"body changed {number}", lambda data=bytes(changed): data, may_pass=True)  # type: ignore[misc]
    for encoding in ("utf-16", "utf-16-le", "utf-32", "utf-7"):
        yield Bad(f"body in {encoding}", lambda e=encoding: whole.decode().encode(e))  # type: ignore[misc]
    for text in ("", " ", "null", "true", "0", '""', "[]", "{}", "[{}]", "{'a': 1}", "NaN", "{,}",
                 '{"a":}', "// a", "\0", "\ufeff", "{}{}", "{} {}", '{"model": st3}', "1e999",
                 '{"model": "\ud800"}'):  # fmt: skip
        data = text.encode("utf-8", "surrogatepass")
        yield Bad(f"body {text!r}", lambda data=data: data)  # type: ignore[misc]
    for depth in (100, 300, 5000, 200_000):
        yield Bad(f"{depth} deep", lambda n=depth: b'{"a":' + b"[" * n + b"]" * n + b"}")  # type: ignore[misc]
        yield Bad(f"{depth} deep objects", lambda n=depth: b'{"a":' * n + b"1" + b"}" * n)  # type: ignore[misc]


WRONG: tuple[Any, ...] = (
    0, -1, 2**70, 1.5, -1e308, True, "", "x" * 300, "\0", [], [[]], {}, {"a": 1}, [None],
)  # fmt: skip
FIELDS = (
    "model", "messages", "max_tokens", "max_completion_tokens", "temperature", "top_p", "seed",
    "stop", "stream", "stream_options", "st3", "n", "logprobs", "logit_bias", "tools",
    "response_format", "user", "metadata", "anything_else",
)  # fmt: skip


def fields() -> Iterator[Bad]:
    """Every field with values of every type; some are right by chance."""
    for name in FIELDS:
        for value in WRONG:
            yield Bad(f"{name}={value!r:.40}", as_json(plain(**{name: value})), may_pass=True)
    for value in (1e-40, 5e-324, 1e-300, 1e-7):
        yield Bad(f"temperature={value}", as_json(plain(temperature=value)), may_pass=True)
        yield Bad(f"top_p={value}", as_json(plain(temperature=1, top_p=value)), may_pass=True)


def messages() -> Iterator[Bad]:
    """Conversations that are none."""
    text = {"type": "text", "text": "a"}
    image = {"type": "image_url", "image_url": {"url": "data:image/png;base64,"}}
    contents: list[Any] = [
        None, 0, {}, [], [[]], [None], ["a"], [{}], [text, None], [{"type": "text"}],
        [{"text": "a"}], [{**text, "more": 1}], [{"type": "image_url"}], [image],
        [{"type": "image_url", "image_url": "data:"}], [{"type": "image_url", "image_url": {}}],
        [{"type": "image_url", "image_url": {"url": None}}], [{"type": "video_url"}],
        [{"type": "input_audio", "input_audio": {"data": ""}}], [{"type": "file"}],
        "<image>", "a<image>b", [text, {"type": "text", "text": "<image>"}], [text] * 15_000,
    ]  # fmt: skip
    for content in contents:
        for role in ("user", "assistant"):
            said = {"role": role, "content": content}
            yield Bad(f"{role} says {content!r:.40}", as_json(plain(messages=[said])))
    turn = {"role": "user", "content": "a"}
    for role in ("tool", "function", "", "User", None, 0, [], {}):
        yield Bad(f"role {role!r}", as_json(plain(messages=[{**turn, "role": role}])))
    for number in (65, 1000, 10_000):
        yield Bad(f"{number} messages", as_json(plain(messages=[turn] * number)))
    yield Bad("17 images", as_json(plain(messages=[{**turn, "content": [image] * 17}])))
    for name in ("a b", "", "x" * 65, "<image>", "é"):
        yield Bad(f"name {name!r:.20}", as_json(plain(messages=[{**turn, "name": name}])))


def _encoded(kind: str, size: tuple[int, int] = (40, 30)) -> bytes:
    data = BytesIO()
    picture(2, size).save(data, kind)
    return data.getvalue()


def pictures() -> Iterator[Bad]:
    """Images that are broken, or claim to be other than they are."""
    chance = random.Random(2)
    for kind in ("PNG", "JPEG", "GIF", "WEBP", "BMP"):
        whole = _encoded(kind)
        for part in range(1, 10):
            cut = whole[: len(whole) * part // 10]
            yield Bad(f"{kind} cut at {part}/10", as_json(shown(data_url(cut))), may_pass=True)
        for number in range(14):
            changed = bytearray(whole)
            for _ in range(1 + number):
                changed[chance.randrange(min(len(whole), 200))] = chance.randrange(256)
            url = data_url(bytes(changed))
            yield Bad(f"{kind} changed {number}", as_json(shown(url)), may_pass=True)
    for size in ((0, 0), (0, 9), (1, 500), (500, 1), (1, 16_000_000), (65_535, 65_535),
                 (2**31 - 1, 1), (2**31 - 1, 2**31 - 1), (2**32 - 1, 2**32 - 1), (4001, 4001),
                 (300, 300)):  # fmt: skip
        yield Bad(f"PNG that claims {size}", as_json(shown(data_url(png(*size)))))
    for length in (201, 500, 1000, 4000, 60_000):
        line = Image.new("RGB", (1, length))
        yield Bad(f"a line of {length}", as_json(shown(data_url(line))))
    other = {
        "text": b"hello", "html": b"<html>" * 99, "svg": b"<svg xmlns='http://www.w3.org/2000/svg'/>",
        "ps": b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n", "pdf": b"%PDF-1.4\n",
        "tiff": _encoded("TIFF"), "ppm": _encoded("PPM"), "ico": b"\0\0\1\0\1\0", "zip": b"PK\3\4",
        "psd": b"8BPS\0\1" + bytes(40), "fits": b"SIMPLE  =" + b" " * 99, "zeros": bytes(999),
        "a bomb": zlib.compress(bytes(10_000_000)),
    }  # fmt: skip
    for name, data in other.items():
        yield Bad(f"{name} as an image", as_json(shown(data_url(data))))


def urls(folder: Path) -> Iterator[Bad]:
    """Addresses of all schemes."""
    (folder / "loop.png").symlink_to(folder / "loop.png")
    (folder / "out.png").symlink_to("/etc/passwd")
    (folder / "empty.png").write_bytes(b"")
    (folder / "text.png").write_text("no image")
    (folder / "sub").mkdir()
    inside = folder.as_posix()
    for path in ("", "/", "/etc/passwd", "/dev/zero", "/dev/random", "/proc/self/environ",
                 "/proc/self/mem", f"{inside}", f"{inside}/", f"{inside}/sub", f"{inside}/none.png",
                 f"{inside}/loop.png", f"{inside}/out.png", f"{inside}/empty.png",
                 f"{inside}/text.png", f"{inside}/../x", f"{inside}/%2e%2e/x", f"{inside}/a%00b",
                 f"{inside}/%ff", f"{inside}2/a.png", f"{inside}/" + "a" * 5000,
                 f"{inside}/" + "a/" * 3000, "[::1/x", "[x]/x", "a\u2100b/x", "evil.example/a.png",
                 "localhost:99999/x", f"{inside}/text.png?a", f"{inside}/text.png#a"):  # fmt: skip
        yield Bad(f"file://{path:.60}", as_json(shown(f"file://{path}")))
    for host in ("127.0.0.1", "127.1", "0", "2130706433", "0x7f000001", "017700000001", "[::1]",
                 "[::]", "[::ffff:127.0.0.1]", "[::127.0.0.1]", "[64:ff9b::7f00:1]",
                 "[64:ff9b:1::7f00:1]", "[2002:7f00:1::]", "[fec0::1]", "[fe80::1]", "[fc00::1]",
                 "[5f00::1]", "10.0.0.1", "172.16.0.1", "192.168.0.1", "169.254.169.254",
                 "100.64.0.1", "224.0.0.1", "255.255.255.255", "user@127.0.0.1", "a:b@127.0.0.1",
                 "", "[", "[::1", "127.0.0.1:99999", "127.0.0.1:x", "a b", "\u2460\u2461",
                 "127。0。0。1", "localhost"):  # fmt: skip
        yield Bad(f"http://{host}", as_json(shown(f"http://{host}/a.png")))
    for url in ("", "data:", "data:,", "data:;base64,", "data:image/png,abc", "data:text/html;base64,AA",
                "data:image/png;base64,****", "data:image/png;base64,A", "data:image/png\0;base64,AA",
                "data:image/png" + ";a=b" * 5000 + ";base64,AA", "ftp://a/b", "javascript:alert(1)",
                "blob:x", "//a/b", "a.png", "../../a.png", "\\\\a\\b", "gopher://a", "x" * 100_000,
                "http:", "http:/", "http://", "https://", "HTTP://127.0.0.1", "file:", "FILE:///etc/passwd",
                ):  # fmt: skip
        yield Bad(f"url {url:.40}", as_json(shown(url)))


def policies() -> Iterator[Bad]:
    """Policies that are none, or out of range."""
    for text in ("", " ", "magic", "st3:", "st3:=", "st3:a=1", "st3:tau", "st3:tau=", "st3:tau=x",
                 "st3:tau=-1", "st3:tau=nan", "st3:tau=inf", "st3:tau=1e400", "st3:tau=1,tau=2",
                 "st3:stride=0", "st3:stride=1e9", "st3:stride=0.5", "st3:first_layer=-1",
                 "st3:first_layer=999", "st3:first_drop=2", "st3:first_drop=-0.1", "st3:curve=x",
                 "st3:score=magic", "st3:score=mixed99999999999999999999", "st3:score=mixed-1",
                 "st3:score=attention-layer999", "st3:recall_every=2", "st3:rerank_every=0",
                 "fastv:layer=99", "fastv:drop=1.5", "fastv:drop=nan", "vtw:layer=-3", "vtw:layer=1e9",
                 "dycoke", "none:a=1", "random:seed=x", "random:like=", "random:like=random:like=",
                 "random:like=" + "(" * 180, "random:like=" + "random:like=" * 14 + "st3",
                 "\0", "st3\n", "st3;st3", "__import__('os')", "st3:tau=__import__('os')",
                 "st3:tau=(1).__class__", "../st3", "%s%s%s", "{}", "\U0001f600", "ST3:TAU=1",
                 "x" * 200, "x" * 300, "st3:" + "a" * 190, "st3:tau=" + "9" * 180):  # fmt: skip
        request = shown(data_url(picture(size=(8, 8))))
        yield Bad(
            f"policy {text:.40}", as_json({**request, "st3": {"policy": text}}), may_pass=True
        )


def wires() -> Iterator[Bad]:
    """Methods, pages and headers."""
    fine = as_json(plain())
    for kind in ("text/plain", "multipart/form-data", "application/x-www-form-urlencoded", "", "json",
                 "application/jsonp", "application/json2", "text/json"):  # fmt: skip
        yield Bad(f"type {kind!r}", fine, headers={"content-type": kind})
    for encoding in ("gzip", "deflate", "br", "zstd", "x"):
        headers = {"content-type": "application/json", "content-encoding": encoding}
        yield Bad(f"encoding {encoding}", fine, headers=headers)
    for host in ("evil.example", "localhost.evil.example", "127.0.0.1.evil.example", "[::1", ""):
        yield Bad(
            f"host {host!r}", fine, headers={"content-type": "application/json", "host": host}
        )
    for method in ("GET", "PUT", "DELETE", "PATCH", "OPTIONS", "TRACE", "PROPFIND", "X"):
        yield Bad(f"{method} {CHAT}", method=method)
    for path in ("/v1", "/v1/", "/v1/completions", "/v1/embeddings", "/v1/models/none", "/docs",
                 "/openapi.json", "/../etc/passwd", "/%2e%2e/%2e%2e/etc/passwd", "/v1//chat/completions",
                 "/health/x", "/metrics/x", "/" + "a" * 5000, "/%00", "/%ff"):  # fmt: skip
        yield Bad(f"page {path:.40}", method="GET", path=path)


def large() -> Iterator[Bad]:
    """Little to send, and much to do, where nobody looks first."""
    million = 1_000_000
    for name, part in (
        ("numbers", b"0,"),
        ("objects", b"{},"),
        ("lists", b"[],"),
        ("strings", b'"",'),
    ):
        for where in (b'{"messages":[', b'{"model":"st3","messages":[{"role":"user","content":['):
            yield Bad(f"a million {name}", lambda p=part, w=where: w + p * million + b"0]")  # type: ignore[misc]
    keys = lambda: b"{" + b",".join(b'"%d":0' % i for i in range(million)) + b"}"  # noqa: E731
    yield Bad("a million keys", keys)
    yield Bad("21 MiB", lambda: b" " * (21 << 20))
    for name, text in (
        ("words", "what is at the top left ? " * 600_000),
        ("one word", "a" * 10**7),
    ):
        said = [{"role": "user", "content": text}]
        yield Bad(f"MiBs of {name}", as_json(plain(messages=said)))
    zeros = lambda side: data_url(Image.new("L", (side, side)))  # noqa: E731
    yield Bad("16 million pixels", lambda: json.dumps(shown(zeros(4000))).encode(), may_pass=True)
    yield Bad("17 million pixels", lambda: json.dumps(shown(zeros(4100))).encode())

    def many() -> bytes:
        request = shown(zeros(2000))
        content = request["messages"][0]["content"]
        content[:1] = content[:1] * 16
        return json.dumps(request).encode()

    yield Bad("16 images of 4 million pixels", many, may_pass=True)
