"""The pages, in a real headless browser, and the files behind them."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from PIL import Image
from typer.testing import CliRunner

from st3.models.places import Place
from st3.tools.cli import app
from st3.tools.see.record import Run
from tests.browser import PROGRAM, Browser

no_browser = pytest.mark.skipif(
    PROGRAM is None, reason="no browser: apt-get install --no-install-recommends chromium"
)
WORDS = [" a", " red", " do", "t", ".", " done"]


def sample_run(pictures: int = 1, placed: bool = True) -> Run:
    """4 visual tokens a picture, 2 by 2, and a newline token without a place; 3 layers; layer 1
    keeps half, layer 2 one token, and each step sees one fewer of layer 0's."""
    each = 5
    count = each * pictures
    places = []
    for number in range(pictures):
        places += [
            Place(number, (x / 2, y / 2, x / 2 + 0.5, y / 2 + 0.5)) for y in (0, 1) for x in (0, 1)
        ]
        places.append(Place(number, None))
    order = [list(range(count)), list(range(count // 2)), [0]]
    visible = [[max(1, count - step), count // 2, 1] for step in range(len(WORDS))]
    attention = [bytes((step * 40 + 17 * i) % 256 for i in range(count)) for step in range(6)]
    return Run(
        about={"model": "tiny", "policy": "st3", "prompt": "what is <b>it</b>?", "answer": "x"},
        tokens=WORDS,
        n_visual=count,
        places=places if placed else None,
        unplaced="" if placed else "where the visual tokens lie is not known",
        order=order,
        visible=visible,
        attention=attention,
        shares=[0.5, 0.4, 0.3, 0.2, 0.1, 0.05],
        kv=[
            {"step": s, "live": 900 - 50 * s, "allocated": 1000, "untrimmed": 2000 + 10 * s}
            for s in range(6)
        ],
        costs=[{"name": "KV", "unit": "B", "untrimmed": 2050, "trimmed": 650}],
        pictures=[Image.new("RGB", (120, 80), "white") for _ in range(pictures)],
    )


def cli(*arguments: object) -> Any:
    return CliRunner().invoke(app, [str(a) for a in arguments])


def page_of(run: Run, folder: Path) -> Path:
    run.save(folder)
    result = cli("report", folder)
    assert result.exit_code == 0, result.output
    return folder / "report.html"


@pytest.fixture(scope="module")
def browser(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Browser]:
    with Browser(tmp_path_factory.mktemp("profile")) as opened:
        yield opened


# Of a canvas, the mean brightness of each quarter: top left, top right, bottom left, bottom right.
QUARTERS = """(() => { const c = document.querySelectorAll('canvas')[%d];
const p = c.getContext('2d'); const w = c.width / 2, h = c.height / 2;
return [[0, 0], [w, 0], [0, h], [w, h]].map(([x, y]) => {
  const d = p.getImageData(x + w / 2, y + h / 2, 1, 1).data;
  return [d[0], d[1], d[2]]; }); })()"""
BRIGHT = [255, 255, 255]


def bright(browser: Browser, canvas: int = 0) -> list[bool]:
    return [pixel == BRIGHT for pixel in browser.run(QUARTERS % canvas)]


def slide(browser: Browser, to: int) -> None:
    """With the keyboard, from wherever it is."""
    browser.run("document.getElementById('layer').focus()")
    now = int(browser.run("document.getElementById('layer').value"))
    for _ in range(abs(to - now)):
        browser.press("ArrowRight" if to > now else "ArrowLeft")
    assert int(browser.run("document.getElementById('layer').value")) == to


@pytest.mark.browser
@no_browser
def test_the_slider_shows_what_each_layer_kept(browser: Browser, tmp_path: Path) -> None:
    page = page_of(sample_run(), tmp_path / "run")
    browser.open(page)
    browser.wait("document.querySelector('canvas').width > 300")
    slide(browser, 1)
    browser.wait("document.getElementById('layer-name').textContent.startsWith('0')")
    assert bright(browser) == [True] * 4
    slide(browser, 2)
    assert bright(browser) == [True, True, False, False]
    slide(browser, 3)
    assert bright(browser) == [True, False, False, False]
    text = browser.run("document.querySelector('figcaption').textContent")
    assert text == (
        "image: 1 of 4 visual tokens visible; 1 tokens for line ends or padding have no place"
    )
    assert browser.run("document.getElementById('state').textContent").startswith(
        "Prefill, layer 2: 1 of 5"
    )
    assert (
        browser.run("document.getElementById('layer').getAttribute('aria-valuetext')") == "layer 2"
    )
    assert browser.complaints == []
    assert [url for url in browser.requests if not url.startswith(("file:", "data:"))] == []


@pytest.mark.browser
@no_browser
def test_words_tell_what_they_saw_by_mouse_and_by_keyboard(
    browser: Browser, tmp_path: Path
) -> None:
    browser.open(page_of(sample_run(), tmp_path / "run"))
    browser.wait("document.querySelector('canvas').width > 300")
    words = browser.run("[...document.querySelectorAll('.word')].map((w) => w.textContent)")
    assert words == ["a", "red", "dot.", "done"]  # pieces of a word are one word
    state = "document.getElementById('state').textContent"
    slide(browser, 1)
    browser.point(".word:nth-of-type(4)")
    assert "“done” (token 6 of 6)" in browser.run(state)
    assert "5.0 % of its attention" in browser.run(state)
    assert (
        browser.run("document.querySelectorAll('.word')[3].getAttribute('aria-pressed')") == "true"
    )
    assert bright(browser)[1:] == [False] * 3  # 5 steps on, one token is left in layer 0
    assert browser.run(QUARTERS % 0)[0] != BRIGHT  # and it is coloured by attention
    browser.point("h1")
    assert browser.run(state).startswith("Prefill")
    browser.click(".word:nth-of-type(2)")
    browser.point("h1")
    assert "“red”" in browser.run(state)  # a click stays
    browser.press("ArrowRight")
    assert "“dot.”" in browser.run(state)
    assert browser.run("document.activeElement.textContent") == "dot."
    assert browser.run("document.querySelectorAll('#kv .mark').length") == 1
    browser.click("#release")
    assert browser.run(state).startswith("Prefill")
    assert browser.complaints == []


@pytest.mark.browser
@no_browser
def test_several_pictures_and_unknown_places(browser: Browser, tmp_path: Path) -> None:
    browser.open(page_of(sample_run(pictures=3), tmp_path / "three"))
    browser.wait("[...document.querySelectorAll('canvas')].every((c) => c.width > 100)")
    assert browser.run("document.querySelectorAll('canvas').length") == 3
    slide(browser, 2)  # layer 1 keeps 7 of 15: all of the first picture, two of the second's
    browser.wait("document.getElementById('layer-name').textContent.startsWith('1')")
    assert [bright(browser, i) for i in range(3)] == [
        [True] * 4, [True, True, False, False], [False] * 4
    ]  # fmt: skip
    browser.open(page_of(sample_run(placed=False), tmp_path / "strip"))
    assert browser.run("document.querySelectorAll('canvas').length") == 1
    caption = browser.run("document.querySelector('figcaption').textContent")
    assert caption.startswith("visual tokens in their order")
    assert "is not known" in browser.run("document.getElementById('about').textContent")
    assert not (tmp_path / "strip" / "annealing.gif").exists()
    assert browser.complaints == []


@pytest.mark.browser
@no_browser
def test_pages_are_dark_where_the_reader_is(browser: Browser, tmp_path: Path) -> None:
    page = page_of(sample_run(), tmp_path / "run")
    ground = "getComputedStyle(document.body).backgroundColor"
    browser.open(page)
    light = browser.run(ground)
    browser.open(page, dark=True)
    dark = browser.run(ground)
    assert (
        sum(map(int, re.findall(r"\d+", light)))
        > 600
        > 150
        > sum(map(int, re.findall(r"\d+", dark)))
    )


@pytest.mark.browser
@no_browser
@pytest.mark.parametrize("dark", [False, True])
def test_a_report_can_be_read_on_a_phone(browser: Browser, tmp_path: Path, dark: bool) -> None:
    browser.open(page_of(sample_run(), tmp_path / "run"), dark=dark, wide=390)
    browser.wait("document.querySelector('canvas').width > 100")
    assert browser.run("document.documentElement.scrollWidth") <= 390
    heights = browser.run(
        "[...document.querySelectorAll('svg text')].map((t) => t.getBoundingClientRect().height)"
    )
    assert min(heights) > 10
    room = "(() => { const t = document.querySelector('.scroll');"
    assert browser.run(room + "return t.scrollWidth - t.clientWidth; })()") <= 0
    assert browser.complaints == []
    browser.open(tmp_path / "run" / "report.html")  # the window as it was


@pytest.mark.browser
@no_browser
def test_all_layers_are_a_mean_and_attention_can_be_left_out(
    browser: Browser, tmp_path: Path
) -> None:
    run = sample_run()
    run.about["untrimmed"] = "a <red> dot."
    browser.open(page_of(run, tmp_path / "run"))
    browser.wait("document.querySelector('canvas').width > 300")
    caption = browser.run("document.querySelector('figcaption').textContent")
    # Of the 4 placed tokens layer 0 sees 4, layer 1 sees 2 and layer 2 one.
    assert caption.startswith("image: 2.3 of 4 visual tokens visible, mean over the layers")
    assert browser.run("document.getElementById('untrimmed-answer').textContent") == "a <red> dot."
    slide(browser, 1)
    browser.click(".word:nth-of-type(1)")
    coloured = browser.run(QUARTERS % 0)
    assert coloured != [BRIGHT] * 4
    browser.click("#glow")
    assert browser.run(QUARTERS % 0) == [BRIGHT] * 4
    assert browser.complaints == []


@pytest.mark.browser
@no_browser
def test_the_axes_have_round_numbers(browser: Browser, tmp_path: Path) -> None:
    run = sample_run()
    browser.open(page_of(run, tmp_path / "run"))
    numbers = browser.run(
        "[[144, 10], [1, 10], [5, 10], [16, 10], [4015, 2], [1.2e9, 2]].map((a) => ticks(...a))"
    )
    assert numbers[0] == [0, 50, 100]
    assert numbers[1] == [0, 1]
    assert numbers[2] == [0, 1, 2, 3, 4, 5]
    assert numbers[3] == [0, 5, 10, 15]
    assert numbers[4] == [0, 1024, 2048, 3072]
    assert all(value % 2**20 == 0 for value in numbers[5])


# The analysis, from the command line --------------------------------------------------------------


@pytest.fixture(scope="module")
def analysed(tiny_model: Path, picture: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    pytest.importorskip("matplotlib")
    out = tmp_path_factory.mktemp("seen")
    prompts = out / "prompts.txt"
    prompts.write_text("describe the image in detail.\n\nwhat is at the top left?\n")
    result = cli(
        "analyze", "-i", picture, "-i", picture, "-p", prompts, "-o", out, "-m", tiny_model,
        "--max-new-tokens", 6,
    )  # fmt: skip
    assert result.exit_code == 0, result.output
    assert "st3 tune" in result.stdout
    return out


def test_analyze_writes_page_data_and_figures(analysed: Path) -> None:
    page = (analysed / "analysis.html").read_text()
    assert len(page) < 3_000_000
    assert "http://" not in page.replace("http://www.w3.org/2000/svg", "")
    assert "https://" not in page
    data = json.loads((analysed / "analysis.json").read_text())
    assert len(data["prefill"]["cosine"]) == 8
    assert data["placed"]
    figures = {p.stem for p in analysed.glob("*.png")}
    assert len(figures) == 16
    for name in figures:
        with Image.open(analysed / f"{name}.png") as figure:
            assert figure.width > 700
            corner = figure.convert("L").getpixel((3, 3))
        assert (corner > 128) == (not name.endswith("-dark"))  # type: ignore[operator]


@pytest.mark.browser
@no_browser
def test_the_analysis_page_shows_its_figures(browser: Browser, analysed: Path) -> None:
    for dark in (False, True):
        browser.open(analysed / "analysis.html", dark)
        browser.wait(
            "[...document.images].length === 8 &&"
            "[...document.images].every((i) => i.complete && i.naturalWidth > 800)"
        )
    browser.click("summary")
    assert browser.run("document.querySelector('details').open")
    assert browser.run("document.querySelectorAll('details')[0].querySelectorAll('tr').length") == 9
    assert browser.run(
        "document.documentElement.scrollWidth <= document.documentElement.clientWidth"
    )
    assert browser.complaints == []


def test_a_saved_run_of_two_images_has_what_the_answer_saw(
    tiny_model: Path, picture: Path, tmp_path: Path
) -> None:
    folder = tmp_path / "run"
    result = cli(
        "generate", picture, picture, "-p", "describe the image in detail.", "-m", tiny_model,
        "--max-new-tokens", 8, "--save", folder, "--json",
    )  # fmt: skip
    assert result.exit_code == 0, result.output
    answer = json.loads(result.stdout)
    run = Run.load(folder)
    assert run.about["answer"] == answer["answer"]
    assert (run.n_visual, run.layers, len(run.pictures)) == (32, 8, 2)
    assert [len(order) for order in run.order] == answer["report"]["kept"][0]
    assert len(run.visible) == len(run.tokens) == len(run.kv) == 8
    assert run.visible[0] == answer["report"]["kept"][0]
    assert run.places is not None
    assert [place.picture for place in run.places] == [0] * 16 + [1] * 16
    assert run.places[21].box == run.places[5].box
    assert run.places[5] == Place(0, pytest.approx((0.25, 0.25, 0.5, 0.5), abs=5e-3))  # type: ignore[arg-type]
    assert cli("report", folder).exit_code == 0
    assert (folder / "report.html").stat().st_size < 3_000_000
    with Image.open(folder / "annealing.gif") as film:
        assert film.n_frames > 1  # type: ignore[attr-defined]


# Wrong input --------------------------------------------------------------------------------------


def refused(*arguments: object) -> str:
    result = cli(*arguments)
    assert result.exit_code == 2, result.output
    assert result.stderr.startswith("error: ")
    assert len(result.stderr.strip().splitlines()) == 1
    return str(result.stderr)


def test_wrong_input_is_one_clear_line(tmp_path: Path, picture: Path) -> None:
    empty = tmp_path / "empty"
    empty.mkdir()
    blank = tmp_path / "blank.txt"
    blank.write_text("\n\n")
    broken = tmp_path / "broken"
    broken.mkdir()
    (broken / "run.json").write_text("{}")
    assert "st3 generate" in refused("report", empty)
    assert "cannot be read" in refused("report", broken)
    some = ("-o", tmp_path / "out")
    assert "no such file" in refused("analyze", "-i", tmp_path / "x", "-p", "hi", *some)
    assert "no images" in refused("analyze", "-i", empty, "-p", "hi", *some)
    assert "no prompt" in refused("analyze", "-i", picture, "-p", blank, *some)
    assert "--keep" in refused("analyze", "-i", picture, "-p", "hi", "--keep", 2, *some)
    assert "name a folder" in refused("generate", picture, "-p", "hi", "--save", picture)
