"""The one image opener: every kind of file becomes what a viewer shows, or one clear line."""

from __future__ import annotations

import base64
import io
import struct
import warnings
import zlib
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image, ImageDraw

from st3.tools.common.errors import ImageError
from st3.tools.common.images import data_url_bytes, image_size, open_image, to_rgb

WHITE, BLACK = (255, 255, 255), (0, 0, 0)


def encoded(image: Image.Image, kind: str = "PNG", **more: Any) -> bytes:
    file = io.BytesIO()
    image.save(file, kind, **more)
    return file.getvalue()


def png(width: int, height: int, depth: int, colour: int, rows: bytes, *chunks: bytes) -> bytes:
    """A PNG written by hand: some kinds Pillow reads but does not write."""

    def chunk(name: bytes, data: bytes) -> bytes:
        return (
            struct.pack(">I", len(data)) + name + data + struct.pack(">I", zlib.crc32(name + data))
        )

    head = struct.pack(">IIBBBBB", width, height, depth, colour, 0, 0, 0)
    rest = b"".join(chunk(part[:4], part[4:]) for part in chunks)
    body = chunk(b"IDAT", zlib.compress(rows)) + chunk(b"IEND", b"")
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", head) + rest + body


# Grey of 16 bits ----------------------------------------------------------------------------------

RAMP = np.tile(np.arange(256, dtype=np.uint16), (4, 1))  # the 8-bit picture


@pytest.mark.parametrize("kind", ["PNG", "TIFF", "JPEG2000"])
def test_sixteen_bit_grey_looks_like_its_eight_bit_version(kind: str) -> None:
    more = {"irreversible": False} if kind == "JPEG2000" else {}
    shown = open_image(encoded(Image.fromarray(RAMP * 257), kind, **more))
    assert shown.mode == "RGB"
    for channel in np.moveaxis(np.asarray(shown), -1, 0):
        assert np.array_equal(channel, RAMP)


def test_sixteen_bits_are_rounded_to_the_nearest_of_eight() -> None:
    every = np.arange(65536, dtype=np.uint16).reshape(256, 256)
    shown = np.asarray(open_image(encoded(Image.fromarray(every))))[..., 0].astype(int)
    assert np.array_equal(shown, np.round(every / 257).astype(int))


def test_sixteen_bit_grey_of_a_pgm_file() -> None:
    data = b"P5 256 4 65535\n" + (RAMP * 257).astype(">u2").tobytes()
    assert np.array_equal(np.asarray(open_image(data))[..., 0], RAMP)


@pytest.mark.parametrize("mode", ["I;16", "I;16B"])
def test_both_byte_orders(mode: str) -> None:
    order = "<u2" if mode == "I;16" else ">u2"
    image = Image.frombytes(mode, (256, 4), (RAMP * 257).astype(order).tobytes())
    assert np.array_equal(np.asarray(to_rgb(image))[..., 0], RAMP)


def test_sixteen_bit_grey_with_a_transparent_value() -> None:
    rows = b"".join(b"\0" + struct.pack(">HH", 0, 1000) for _ in range(2))
    data = png(2, 2, 16, 0, rows, b"tRNS" + struct.pack(">H", 0))
    shown = open_image(data)
    assert shown.getpixel((0, 0)) == WHITE  # black is the transparent one
    assert shown.getpixel((1, 0)) == (4, 4, 4)


def test_sixteen_bit_colour_with_a_transparent_value() -> None:
    red, black = struct.pack(">HHH", 65535, 0, 0), bytes(6)
    data = png(2, 1, 16, 2, b"\0" + red + black, b"tRNS" + red)
    shown = open_image(data)
    assert (shown.getpixel((0, 0)), shown.getpixel((1, 0))) == (WHITE, BLACK)


def test_sixteen_bit_grey_with_alpha() -> None:
    data = png(2, 1, 16, 4, b"\0" + struct.pack(">HHHH", 0, 0, 257 * 40, 65535))
    shown = open_image(data)
    assert (shown.getpixel((0, 0)), shown.getpixel((1, 0))) == (WHITE, (40, 40, 40))


@pytest.mark.parametrize("values", [np.float32([[0.0, 0.5, 1.0]]), np.int32([[0, 70000, 1 << 30]])])
def test_values_without_a_known_range_are_refused(values: np.ndarray) -> None:
    with pytest.raises(ImageError, match="save it as 8-bit"):
        open_image(encoded(Image.fromarray(values), "TIFF"))


# Transparency -------------------------------------------------------------------------------------


def drawing() -> Image.Image:
    """Black on transparent, whose hidden colour is black too."""
    picture = Image.new("RGBA", (96, 96), (0, 0, 0, 0))
    ImageDraw.Draw(picture).ellipse((20, 20, 70, 70), fill=(0, 0, 0, 255))
    return picture


def palette() -> Image.Image:
    picture = Image.new("P", (96, 96), 0)
    picture.putpalette([0, 0, 0, 0, 0, 0])
    ImageDraw.Draw(picture).ellipse((20, 20, 70, 70), fill=1)
    return picture


@pytest.mark.parametrize(
    "data",
    [
        encoded(drawing()),
        encoded(drawing().convert("LA")),
        encoded(drawing(), "WEBP", lossless=True),
        encoded(drawing(), "TIFF"),
        encoded(palette(), transparency=0),
        encoded(palette(), "GIF", transparency=0),
    ],
    ids=["RGBA", "grey with alpha", "WebP", "TIFF", "palette", "GIF"],
)
def test_what_is_transparent_is_white(data: bytes) -> None:
    shown = open_image(data)
    assert shown.getpixel((45, 45)) == BLACK
    assert shown.getpixel((2, 2)) == WHITE


def test_half_transparent_is_half_white() -> None:
    picture = Image.new("RGBA", (4, 4), (200, 0, 0, 128))
    assert open_image(encoded(picture)).getpixel((0, 0)) == (227, 127, 127)


def test_one_transparent_colour() -> None:
    picture = Image.new("RGB", (4, 4), (10, 20, 30))
    picture.putpixel((0, 0), (1, 2, 3))
    shown = open_image(encoded(picture, transparency=(10, 20, 30)))
    assert (shown.getpixel((1, 1)), shown.getpixel((0, 0))) == (WHITE, (1, 2, 3))


# Colours and orientation --------------------------------------------------------------------------


def test_palettes_black_and_white_and_printers_colours() -> None:
    green = Image.new("P", (4, 4), 1)
    green.putpalette([0, 0, 0, 0, 255, 0])
    assert open_image(encoded(green)).getpixel((0, 0)) == (0, 255, 0)
    assert open_image(encoded(Image.new("1", (4, 4), 1))).getpixel((0, 0)) == WHITE
    paper = Image.new("CMYK", (16, 16), (0, 0, 0, 0))
    assert open_image(encoded(paper, "JPEG")).getpixel((8, 8)) == WHITE
    cyan = Image.new("CMYK", (16, 16), (255, 0, 0, 0))
    red, green_, blue = open_image(encoded(cyan, "TIFF")).getpixel((8, 8))
    assert red == 0
    assert min(green_, blue) > 200


def two_coloured() -> Image.Image:
    picture = Image.new("RGB", (64, 32), WHITE)
    picture.paste(BLACK, (0, 0, 32, 32))
    return picture


@pytest.mark.parametrize("kind", ["JPEG", "PNG", "WEBP"])
def test_photographs_are_turned_as_they_say(kind: str) -> None:
    exif = Image.Exif()
    exif[0x0112] = 6  # shown turned by 90 degrees clockwise
    shown = open_image(encoded(two_coloured(), kind, exif=exif.tobytes()))
    assert shown.size == (32, 64)
    assert sum(shown.getpixel((16, 8))) < 60
    assert sum(shown.getpixel((16, 56))) > 700


def test_sixteen_bits_are_turned_as_well() -> None:
    exif = Image.Exif()
    exif[0x0112] = 8
    data = encoded(Image.fromarray(RAMP * 257), exif=exif.tobytes())
    assert open_image(data).size == (4, 256)


def test_an_unreadable_orientation_leaves_the_picture_as_it_is() -> None:
    data = encoded(two_coloured(), "JPEG", exif=b"Exif\0\0" + b"\xff" * 40)
    assert open_image(data).size == (64, 32)


def test_an_animation_shows_its_first_frame() -> None:
    frames = [Image.new("RGB", (8, 8), colour) for colour in (WHITE, BLACK)]
    data = encoded(frames[0], "GIF", save_all=True, append_images=frames[1:])
    assert open_image(data).getpixel((0, 0)) == WHITE


# What cannot be shown -----------------------------------------------------------------------------


def test_broken_files_say_so_in_one_line(tmp_path: Path) -> None:
    whole = encoded(Image.effect_noise((64, 64), 50))
    cut = tmp_path / "cut.png"
    cut.write_bytes(whole[: len(whole) // 2])
    text = tmp_path / "text.png"
    text.write_text("no image")
    for path, message in (
        (cut, "image '.*cut.png' cannot be read: "),
        (text, "image '.*text.png' is not an image that Pillow can read"),
        (tmp_path / "gone.png", "no such image: '.*gone.png'"),
        (tmp_path, "image '.*' is a folder, not an image"),
        ("https://example.org/a.png", "is an address: download the image and give the file"),
        ("nul\0.png", "cannot be read"),
        (b"", "the image is not an image that Pillow can read"),
        (whole[:60], "the image cannot be read"),
    ):
        with pytest.raises(ImageError, match=message) as caught:
            open_image(path)
        assert "\n" not in str(caught.value)


@pytest.mark.parametrize("kind", ["PNG", "JPEG", "GIF", "WEBP", "BMP", "TIFF"])
def test_a_file_cut_off_anywhere_is_shown_or_refused(kind: str) -> None:
    whole = encoded(Image.effect_noise((24, 24), 50).convert("RGB"), kind)
    for end in range(0, len(whole), max(1, len(whole) // 60)):
        try:
            open_image(whole[:end])
        except ImageError:
            continue


def test_a_decompression_bomb_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    data = encoded(Image.new("L", (100, 100)))
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 4_000)
    with pytest.raises(ImageError, match="the image has more than 8000 pixels"):
        open_image(data)


def test_half_of_that_is_no_matter_for_a_warning(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 6_000)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert open_image(encoded(Image.new("L", (100, 100)))).size == (100, 100)


def test_a_thin_line_is_refused_before_a_processor_scales_its_short_side() -> None:
    assert open_image(encoded(Image.new("L", (2, 400)))).size == (2, 400)
    for size in ((1, 201), (1000, 2)):
        with pytest.raises(ImageError, match=f"is {size[0]} x {size[1]} pixels, thinner"):
            open_image(encoded(Image.new("L", size)))


def test_a_tools_own_limits_come_before_the_decoding() -> None:
    class TooLarge(Exception):
        pass

    def check(size: tuple[int, int]) -> None:
        raise TooLarge(size)

    cut = encoded(Image.new("RGB", (30, 20)))[:45]  # nothing but the header
    with pytest.raises(TooLarge, match=r"\(30, 20\)"):
        open_image(cut, check=check)


def test_formats_can_be_limited() -> None:
    data = encoded(Image.new("L", (8, 8)), "TIFF")
    assert open_image(data).size == (8, 8)
    with pytest.raises(ImageError, match="not an image"):
        open_image(data, formats=("PNG", "JPEG"))


def test_the_size_is_read_off_the_header() -> None:
    data = encoded(Image.new("RGB", (30, 20)))
    assert image_size(data[:45]) == (30, 20)
    with pytest.raises(ImageError, match="the picture of row 3 is not an image"):
        image_size(b"text", name="the picture of row 3")


# Data URLs ----------------------------------------------------------------------------------------


def test_data_urls_of_the_forms_that_browsers_take() -> None:
    data = bytes(range(256)) * 3 + b"x"
    text = base64.b64encode(data).decode()
    broken = "\n".join(text[i : i + 76] for i in range(0, len(text), 76))
    for url in (
        f"data:image/png;base64,{text}",
        f"DATA:IMAGE/PNG;BASE64,{text}",
        f"data:;base64,{text}",
        f"data:application/octet-stream;base64,{text}",
        f"data:image/png;charset=utf-8;base64,{broken}",
        f"data:image/png;base64,{text.rstrip('=')}",
        f"data:image/png;base64,{base64.urlsafe_b64encode(data).decode()}",
        f"data:image/png;base64,{text.replace('+', '%2B').replace('=', '%3D')}",
    ):
        assert data_url_bytes(url) == data


@pytest.mark.parametrize(
    ("url", "message"),
    [
        ("data:image/png,abc", "not of the form"),
        ("data:image/png;base64", "not of the form"),
        ("data:text/plain;base64,YWJj", "holds text/plain, not an image"),
        ("data:image/png;base64,a", "not valid base64"),
        ("data:image/png;base64,a*bc", "not valid base64"),
        ("data:image/png;base64," + "A" * 200, "larger than 100 bytes"),
    ],
)
def test_other_data_urls_are_refused(url: str, message: str) -> None:
    with pytest.raises(ImageError, match=message):
        data_url_bytes(url, max_bytes=100)
