"""Open images: one way for all tools, so that every one of them shows a model the same picture.

The model gets what a viewer shows on white paper: turned as the EXIF data says, transparent parts
white, 16 bits scaled to 8. Anything that cannot be shown so is an
:class:`~st3.tools.common.errors.ImageError` of one line.
"""

from __future__ import annotations

import base64
import binascii
import contextlib
import os
import re
import warnings
from collections.abc import Callable
from io import BytesIO
from pathlib import Path
from urllib.parse import unquote_to_bytes

import numpy as np
from PIL import Image, ImageOps, UnidentifiedImageError

from st3.tools.common.errors import ImageError, first_line

# Several image processors scale the SHORT side to a fixed length before they crop: of a line one
# pixel wide and n long they make 336 x 336 n, a gigabyte of a file of 90 bytes. Qwen2-VL's
# processor refuses the same ratio.
MAX_ASPECT = 200

Source = str | os.PathLike[str] | bytes

_SIXTEEN = ("I;16", "I;16L", "I;16B", "I;16N")
_PAPER = (255, 255, 255)
_DATA = re.compile(r"data:([\w.+-]+/[\w.+-]+)?((?:;[\w.=+-]+)*),", re.ASCII | re.IGNORECASE)


def open_image(
    source: Source,
    *,
    formats: tuple[str, ...] | None = None,
    check: Callable[[tuple[int, int]], None] | None = None,
    name: str | None = None,
) -> Image.Image:
    """The image as RGB, as a viewer shows it: see :func:`to_rgb`. Of an animation the first frame.

    Args:
        source: a path, or the bytes of a file.
        formats: of Pillow, the only ones to be tried; None: all.
        check: called with (width, height) before anything is decoded; what it raises is passed on.
        name: for messages; None: the path, or "the image" for bytes.

    Raises:
        ImageError: no such file, not an image, broken, too large (Pillow's limit against
            decompression bombs), thinner than 1 : 200, or of values without a known range.
    """
    shown = _name(source, name)
    with _opened(source, shown, formats) as image:
        if check is not None:
            check(image.size)
        _check_shape(image.size, shown)
        try:
            return to_rgb(image)
        except Exception as error:  # Pillow's readers raise all kinds of them on broken files
            raise ImageError(_reason(error, source, shown)) from error


def image_size(
    source: Source, *, formats: tuple[str, ...] | None = None, name: str | None = None
) -> tuple[int, int]:
    """(width, height) as stored, read off the header: nothing is decoded.

    Args:
        formats, name: as for :func:`open_image`.

    Raises:
        ImageError: what is no image, or has a shape that :func:`open_image` refuses.
    """
    shown = _name(source, name)
    with _opened(source, shown, formats) as image:
        _check_shape(image.size, shown)
        return image.size


def to_rgb(image: Image.Image) -> Image.Image:
    """An opened image as RGB: turned as its EXIF data says, transparency on white, 16-bit grey
    scaled to 8 bits (Pillow's own conversion cuts all above 255 off, so that it becomes white).

    Raises:
        ValueError: 32-bit values, of which nothing says which are black and white.
    """
    image.load()
    # Orientation is advice: EXIF data that cannot be read leaves the image as it is stored.
    with contextlib.suppress(Exception):
        image = ImageOps.exif_transpose(image)
    if image.mode in _SIXTEEN or image.mode == "I":
        image = _eight_bits(image)
    elif image.mode == "F":
        raise ValueError("its values are floating-point numbers without a range: save it as 8-bit")
    if not image.has_transparency_data:
        return image.convert("RGB")
    if image.mode == "RGB":  # one colour is transparent; a 16-bit file names it in 16 bits
        key = image.info["transparency"]
        if isinstance(key, tuple) and max(key) > 255:
            image.info["transparency"] = tuple(value >> 8 for value in key)
    layer = image.convert("RGBA")
    paper = Image.new("RGBA", layer.size, (*_PAPER, 255))
    return Image.alpha_composite(paper, layer).convert("RGB")


def is_address(source: Source) -> bool:
    """Whether it is an http(s) address, which no tool opens by itself."""
    return isinstance(source, str) and source[:8].lower().startswith(("http://", "https://"))


def is_data_url(source: Source) -> bool:
    return isinstance(source, str) and source[:5].lower() == "data:"


def data_url_bytes(url: str, max_bytes: int | None = None) -> bytes:
    """What a base64 data URL holds. White space, missing padding and the URL-safe alphabet are
    taken, as browsers take them.

    Args:
        max_bytes: a longer one is not decoded.

    Raises:
        ImageError: another form, another type than an image, too long, not base64.
    """
    head = _DATA.match(url[:200])
    if head is None or ";base64" not in head[2].lower():
        raise ImageError("this data URL is not of the form data:image/png;base64,...")
    kind = (head[1] or "image/").lower()
    if not kind.startswith("image/") and kind != "application/octet-stream":
        raise ImageError(f"this data URL holds {head[1]}, not an image")
    text = url[head.end() :]
    if max_bytes is not None and len(text) > max_bytes * 4 // 3 + 4:
        raise ImageError(f"the image is larger than {max_bytes} bytes")
    if "%" in text:
        text = unquote_to_bytes(text).decode("latin-1")
    text = "".join(text.split()).translate({ord("-"): "+", ord("_"): "/"}).rstrip("=")
    try:
        return base64.b64decode(text + "=" * (-len(text) % 4), validate=True)
    except (binascii.Error, ValueError) as error:
        raise ImageError(f"the image is not valid base64: {first_line(error)}") from error


def _opened(source: Source, shown: str, formats: tuple[str, ...] | None) -> Image.Image:
    if is_address(source):
        raise ImageError(f"{shown} is an address: download the image and give the file")
    try:
        file = BytesIO(source) if isinstance(source, bytes) else Path(source).expanduser()
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of half its limit, and of odd metadata
            return Image.open(file, formats=formats)
    except Exception as error:
        raise ImageError(_reason(error, source, shown)) from error


def _check_shape(size: tuple[int, int], shown: str) -> None:
    width, height = size
    if min(size) < 1:
        raise ImageError(f"{shown} has no pixels")
    if max(size) > MAX_ASPECT * min(size):
        raise ImageError(
            f"{shown} is {width} x {height} pixels, thinner than 1 : {MAX_ASPECT}: cut it"
        )


def _eight_bits(image: Image.Image) -> Image.Image:
    """16-bit grey as "L", or as "LA" where one grey is transparent."""
    values = np.asarray(image).astype(np.int64)
    # Pillow keeps 16 bits of some formats in mode "I", and 32 bits of others.
    wide = values.min() < 0 or values.max() > 0xFFFF
    if image.mode == "I" and (wide or image.format not in (None, "PNG", "PPM")):
        raise ValueError("its values are 32-bit numbers without a known range: save it as 8-bit")
    grey = Image.fromarray(((values + 128) // 257).astype(np.uint8))
    key = image.info.get("transparency")
    if not isinstance(key, int):
        return grey
    return Image.merge("LA", (grey, Image.fromarray(np.where(values == key, 0, 255).astype("u1"))))


def _name(source: Source, name: str | None) -> str:
    if name is not None:
        return name
    if isinstance(source, bytes) or is_data_url(source):
        return "the image"
    return f"image {os.fspath(source)!r}"


def _reason(error: Exception, source: Source, shown: str) -> str:
    if isinstance(error, FileNotFoundError):
        return f"no such image: {os.fspath(source)!r}"
    if isinstance(error, IsADirectoryError):
        return f"{shown} is a folder, not an image"
    if isinstance(error, UnidentifiedImageError):
        return f"{shown} is not an image that Pillow can read"
    if isinstance(error, Image.DecompressionBombError):
        limit = 2 * (Image.MAX_IMAGE_PIXELS or 0)
        return f"{shown} has more than {limit} pixels: send a smaller one"
    return f"{shown} cannot be read: {first_line(error)}"
