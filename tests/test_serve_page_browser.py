"""The page of `st3 serve`, in a real headless browser."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

from st3.tools.serve import Engine, Settings, create_app
from tests.browser import PROGRAM, Browser
from tests.serving import live, load, until

KEY = "a-key-of-our-own"
LAYERS = 8
no_browser = pytest.mark.skipif(
    PROGRAM is None, reason="no browser: apt-get install --no-install-recommends chromium"
)


@pytest.fixture(scope="module")
def engine(tiny_model: Path) -> Iterator[Engine]:
    engine = Engine(*load(tiny_model), kv_budget_bytes=64 << 20)
    yield engine
    engine.close()


@pytest.fixture(scope="module")
def browser(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Browser]:
    with Browser(tmp_path_factory.mktemp("profile")) as opened:
        yield opened


class Shared:
    """An engine that outlives the app."""

    def __init__(self, engine: Engine) -> None:
        self.engine = engine

    def __getattr__(self, name: str) -> Any:
        return getattr(self.engine, name)

    def close(self, timeout: float | None = None) -> bool:
        return True


def page_of(engine: Engine, **settings: Any) -> Any:
    shared: Any = Shared(engine)
    return live(create_app(shared, Settings(**settings)))


@pytest.fixture(scope="module")
def url(engine: Engine) -> Iterator[str]:
    with page_of(engine) as url:
        yield url


DONE = "!document.getElementById('ask').disabled"
ANSWERED = "document.getElementById('status').textContent === 'Done.'"


def text(browser: Browser, selector: str) -> str:
    return str(browser.run(f"document.querySelector({selector!r}).textContent"))


def give(browser: Browser, file: Path) -> None:
    browser.choose("#file", file)
    browser.wait("!document.getElementById('preview').hidden")


def ask(browser: Browser, question: str = "describe the image", policy: str = "") -> None:
    browser.run(f"document.getElementById('question').value = {question!r}")
    browser.run("document.getElementById('longest').value = '12'")
    if policy:
        browser.run(f"document.getElementById('policy').value = {policy!r}")
    browser.run("document.getElementById('ask').focus()")
    browser.press("Enter")


@pytest.mark.browser
@no_browser
def test_both_answers_stand_side_by_side(browser: Browser, url: str, picture: Path) -> None:
    browser.open(url)
    give(browser, picture)
    ask(browser, policy="fastv:layer=2,drop=0.75")
    browser.wait(ANSWERED)
    for card, seen in (("untrimmed", "16"), ("trimmed", "7 (44 %)")):
        assert text(browser, f"#{card} .answer").strip()
        facts = browser.run(
            f"Object.fromEntries([...document.querySelectorAll('#{card} dt')]"
            ".map((t) => [t.textContent, t.nextElementSibling.textContent]))"
        )
        assert facts["visual tokens a layer sees, mean"] == seen
        assert facts["tokens of the answer"] == "12"
        assert facts["first token"].split(" ")[1] in ("ms", "s")
        assert float(facts["tokens per second"].split(" ")[0]) > 0
        assert "iB" in facts["KV cache, at most"]
    assert "44 % of the visual tokens" in text(browser, "#verdict")
    assert browser.run("document.querySelector('#trimmed h2').textContent").endswith("drop=0.75")
    assert browser.complaints == []
    assert {address.split("/")[2] for address in browser.requests if "://" in address} == {
        url.split("/")[2]
    }


@pytest.mark.browser
@no_browser
def test_the_slider_shows_what_a_layer_sees(browser: Browser, url: str, tmp_path: Path) -> None:
    shown = tmp_path / "white.png"
    Image.new("RGB", (64, 64), "white").save(shown)
    browser.open(url)
    give(browser, shown)
    ask(browser, policy="fastv:layer=2,drop=0.75")
    browser.wait(ANSWERED)
    # The middle of each of the 16 patches.
    bright = """(() => { const c = document.getElementById('canvas'); const p = c.getContext('2d');
    const [w, h] = [c.width / 4, c.height / 4]; let n = 0; for (let i = 0; i < 16; i += 1) {
    const d = p.getImageData((i % 4 + .5) * w, (Math.floor(i / 4) + .5) * h, 1, 1).data;
    n += d[0] > 250 ? 1 : 0; } return n; })()"""
    assert browser.run(bright) == 4
    browser.run("document.getElementById('layer').focus()")
    for layer in range(LAYERS - 2, -1, -1):
        browser.press("ArrowLeft")
        said = browser.run("document.getElementById('layer').getAttribute('aria-valuetext')")
        count = 16 if layer < 2 else 4
        assert said == f"layer {layer}: {count} of 16 visual tokens"
        assert browser.run(bright) == count
        assert browser.run("document.querySelectorAll('#chart rect.now').length") == 1
    assert browser.complaints == []


@pytest.mark.browser
@no_browser
def test_what_goes_wrong_is_said_in_words(
    browser: Browser, url: str, picture: Path, tmp_path: Path
) -> None:
    browser.open(url)
    ask(browser)
    assert text(browser, "#error") == "Choose a picture first."
    nothing = tmp_path / "no.png"
    nothing.write_text("this is no picture")
    browser.choose("#file", nothing)
    browser.wait("document.getElementById('error').textContent.includes('no picture')")
    give(browser, picture)
    assert browser.run("document.getElementById('error').hidden")
    ask(browser, "  ")
    assert text(browser, "#error") == "Write a question first."
    ask(browser, policy="nosuch")
    browser.wait("!document.getElementById('error').hidden && " + DONE)
    assert "nosuch" in text(browser, "#error")
    ask(browser, policy="none")  # and on it goes
    browser.wait(ANSWERED)
    assert text(browser, "#verdict").startswith("Same answer")


@pytest.mark.browser
@no_browser
def test_a_server_that_has_gone_and_one_that_is_busy(
    browser: Browser, engine: Engine, picture: Path
) -> None:
    with page_of(engine) as url:
        browser.open(url)
        give(browser, picture)
        engine.queue_limit = 0
        ask(browser)
        browser.wait("!document.getElementById('error').hidden && " + DONE)
        assert "busy" in text(browser, "#error")
        engine.queue_limit = 64
    ask(browser)
    browser.wait("document.getElementById('error').textContent.includes('cannot be reached')")


@pytest.mark.browser
@no_browser
def test_it_asks_for_the_key(browser: Browser, engine: Engine, picture: Path) -> None:
    with page_of(engine, api_key=KEY) as url:
        browser.open(url)
        browser.wait("document.getElementById('key-dialog').open")
        assert "asks for a key" in text(browser, "#key-title")
        for given in ("wrong", KEY):
            browser.run("document.getElementById('key').value = ''")
            browser.run("document.getElementById('key').focus()")
            browser.type(given)
            browser.press("Enter")
            if given == "wrong":
                browser.wait("document.getElementById('key-text').textContent.includes('again')")
                browser.wait("document.getElementById('key-dialog').open")
        browser.wait("document.getElementById('model').textContent === 'st3'")
        assert not browser.run("document.getElementById('key-dialog').open")
        give(browser, picture)
        ask(browser)
        browser.wait(ANSWERED)


@pytest.mark.browser
@no_browser
def test_large_pictures_are_made_smaller_and_drops_are_taken(
    browser: Browser, url: str, tmp_path: Path
) -> None:
    large = tmp_path / "large.png"
    Image.new("RGB", (3000, 1500), "green").save(large)
    browser.open(url)
    give(browser, large)
    assert "3000 x 1500 pixels, sent as 2048 x 1024" in text(browser, "#drop-text")
    browser.run(
        "(async () => { const canvas = new OffscreenCanvas(50, 40); canvas.getContext('2d');"
        "const blob = await canvas.convertToBlob(); const data = new DataTransfer();"
        "data.items.add(new File([blob], 'drop.png', { type: 'image/png' }));"
        "document.getElementById('drop').dispatchEvent("
        "new DragEvent('drop', { bubbles: true, dataTransfer: data })); })()"
    )
    browser.wait("document.getElementById('drop-text').textContent.startsWith('50 x 40')")
    ask(browser)
    browser.wait(ANSWERED)


@pytest.mark.browser
@no_browser
@pytest.mark.parametrize("dark", [False, True])
@pytest.mark.parametrize("wide", [390, 1280])
def test_it_fits_phones_and_the_readers_colours(
    browser: Browser, url: str, picture: Path, wide: int, dark: bool
) -> None:
    browser.open(url, dark=dark, wide=wide)
    give(browser, picture)
    ask(browser)
    browser.wait(ANSWERED)
    assert browser.run("document.documentElement.scrollWidth") <= wide
    cards = browser.run(
        "[...document.querySelectorAll('article')].map((a) => a.getBoundingClientRect().top)"
    )
    assert (cards[0] == cards[1]) == (wide > 700)  # beside each other, or one below the other
    ground = browser.run("getComputedStyle(document.body).backgroundColor")
    brightness = sum(int(part) for part in ground[4:-1].split(",")[:3])
    assert brightness < 150 if dark else brightness > 600
    low = browser.run(
        "[...document.querySelectorAll('button, select, input:not([type=file])')]"
        ".filter((e) => e.offsetParent).map((e) => e.getBoundingClientRect().height)"
    )
    assert min(low) >= 30  # a finger finds it
    assert browser.complaints == []


@pytest.mark.browser
@no_browser
def test_an_answer_can_be_stopped(
    browser: Browser, url: str, engine: Engine, picture: Path
) -> None:
    browser.open(url)
    give(browser, picture)
    browser.run("document.getElementById('question').value = 'describe'")
    browser.run("document.getElementById('longest').value = '1500'")
    browser.click("#ask")
    browser.wait("document.querySelector('#untrimmed .answer').textContent.length > 20")
    browser.click("#stop")
    browser.wait("document.getElementById('status').textContent === 'Stopped.'")
    until(lambda: engine.stats().running == 0)
    assert browser.run("document.getElementById('stop').hidden")
