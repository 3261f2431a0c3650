"""Images that strangers send: where they may come from, and limits before anything is decoded."""

from __future__ import annotations

import base64
import binascii
import re
import stat
import warnings
from io import BytesIO
from pathlib import Path
from urllib.parse import unquote, urlsplit

from PIL import Image, ImageOps, UnidentifiedImageError

from st3.tools.common.reasons import first_line
from st3.tools.serve.errors import ServeError, refused
from st3.tools.serve.fetch import fetch
from st3.tools.serve.settings import Settings

# Pillow's readers for these alone are tried; others (EPS, PSD, FITS ...) reach much more code.
FORMATS = ("PNG", "JPEG", "WEBP", "GIF", "BMP")
_DATA = re.compile(r"data:([\w.+-]+/[\w.+-]+)?((?:;[\w.=+-]+)*),", re.ASCII)
PARAM = "messages.image_url"


def load(url: str, settings: Settings, pixels: int = 0) -> Image.Image:
    """The image behind a URL, as RGB and turned as its EXIF data says.

    Args:
        pixels: of the request's earlier images.

    Raises:
        ServeError: 400 with the reason.
    """
    return decode(_bytes(url, settings), settings, pixels)


def _bytes(url: str, settings: Settings) -> bytes:
    scheme = url[:8].partition(":")[0].lower()
    if scheme == "data":
        return _data(url, settings)
    if scheme == "file":
        return _file(url, settings)
    if scheme in ("http", "https"):
        if not settings.http_images:
            raise refused(
                "images are not fetched by this server: send the image itself as a data URL "
                "(data:image/png;base64,...)",
                PARAM,
            )
        return fetch(url, settings.max_image_bytes, settings.body_timeout)
    raise refused(
        "an image is a data URL (data:image/png;base64,...), or, where the server allows it, a "
        "file: or https: URL",
        PARAM,
    )


def _data(url: str, settings: Settings) -> bytes:
    head = _DATA.match(url[:200])
    if head is None or ";base64" not in head[2].lower():
        raise refused("this data URL is not of the form data:image/png;base64,...", PARAM)
    if head[1] and not head[1].lower().startswith("image/"):
        raise refused(f"this data URL holds {head[1]}, not an image", PARAM)
    text = url[head.end() :]
    if len(text) > settings.max_image_bytes * 4 // 3 + 4:
        raise _too_big(settings)
    try:
        return base64.b64decode(text, validate=True)
    except (binascii.Error, ValueError) as error:
        raise refused(f"the image is not valid base64: {error}", PARAM) from error


def _file(url: str, settings: Settings) -> bytes:
    folder = settings.image_folder
    if folder is None:
        raise refused("files of this server may not be read: send the image as a data URL", PARAM)
    parts = urlsplit(url)
    if parts.netloc not in ("", "localhost") or parts.query or parts.fragment:
        raise refused("a file URL has the form file:///folder/image.png", PARAM)
    root = folder.resolve()
    outside = refused("this file does not lie in the folder that the server allows", PARAM)
    try:
        path = Path(unquote(parts.path, errors="strict")).resolve()
        if not path.is_relative_to(root):
            raise outside
        found = path.stat()
        if not stat.S_ISREG(found.st_mode):
            raise refused("this is not a file", PARAM)
        if found.st_size > settings.max_image_bytes:
            raise _too_big(settings)
        return path.read_bytes()
    except FileNotFoundError as error:
        raise refused("there is no such file", PARAM) from error
    except (OSError, ValueError, RuntimeError) as error:  # unreadable, a NUL, a loop of links
        raise refused("this file cannot be read", PARAM) from error


def decode(data: bytes, settings: Settings, pixels: int = 0) -> Image.Image:
    """Encoded bytes as an RGB image, within the limits."""
    if not data:
        raise refused("the image is empty", PARAM)
    if len(data) > settings.max_image_bytes:
        raise _too_big(settings)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of its own, higher limit, and of odd metadata
            with Image.open(BytesIO(data), formats=FORMATS) as image:
                _check_size(image.size, settings, pixels)
                rgb = ImageOps.exif_transpose(image).convert("RGB")
    except ServeError:
        raise
    except UnidentifiedImageError as error:
        known = ", ".join(FORMATS)
        raise refused(f"this is not an image of a known format ({known})", PARAM) from error
    except Exception as error:  # Pillow's readers raise all kinds of them on broken files
        raise refused(f"the image cannot be read: {first_line(error)}", PARAM) from error
    return rgb


def _check_size(size: tuple[int, int], settings: Settings, before: int) -> None:
    width, height = size
    if width < 1 or height < 1:
        raise refused("the image has no pixels", PARAM)
    if width * height > settings.max_pixels:
        raise refused(
            f"the image has {width} x {height} pixels; this server takes {settings.max_pixels} "
            "in all: send a smaller one",
            PARAM,
            "image_too_large",
        )
    if before + width * height > settings.max_total_pixels:
        raise refused(
            f"the request's images have more than {settings.max_total_pixels} pixels together: "
            "send fewer or smaller ones",
            PARAM,
            "image_too_large",
        )


def _too_big(settings: Settings) -> ServeError:
    return refused(
        f"the image is larger than {settings.max_image_bytes} bytes", PARAM, "image_too_large"
    )
