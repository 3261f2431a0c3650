"""Images that strangers send: where they may come from, and limits before anything is decoded."""

from __future__ import annotations

import stat
from pathlib import Path
from urllib.parse import unquote, urlsplit

from PIL import Image

from st3.tools.common.errors import ImageError
from st3.tools.common.images import data_url_bytes, image_size, open_image
from st3.tools.serve.errors import ServeError, refused
from st3.tools.serve.settings import Settings

# Pillow's readers for these alone are tried; others (EPS, PSD, FITS ...) reach much more code.
FORMATS = ("PNG", "JPEG", "WEBP", "GIF", "BMP")
PARAM = "messages.image_url"


def is_web(url: str) -> bool:
    return url[:8].partition(":")[0].lower() in ("http", "https")


def read(url: str, settings: Settings) -> bytes:
    """The encoded image of a data or file URL.

    Raises:
        ServeError: 400 with the reason; also for web addresses, which
            :mod:`st3.tools.serve.fetch` asks where the operator allows it.
    """
    scheme = url[:8].partition(":")[0].lower()
    if scheme == "data":
        if len(url) > settings.max_image_bytes * 4 // 3 + 1000:
            raise too_big(settings)
        try:
            return data_url_bytes(url, settings.max_image_bytes)
        except ImageError as error:
            raise refused(str(error), PARAM) from error
    if scheme == "file":
        return _file(url, settings)
    if is_web(url):
        raise refused(
            "images are not fetched by this server: send the image itself as a data URL "
            "(data:image/png;base64,...)",
            PARAM,
        )
    raise refused(
        "an image is a data URL (data:image/png;base64,...), or, where the server allows it, a "
        "file: or https: URL",
        PARAM,
    )


def size(data: bytes, settings: Settings, pixels: int = 0) -> tuple[int, int]:
    """(width, height) off the header, if that is within the limits; nothing is decoded.

    Args:
        pixels: of the request's earlier images.
    """
    if not data:
        raise refused("the image is empty", PARAM)
    if len(data) > settings.max_image_bytes:
        raise too_big(settings)
    try:
        found = image_size(data, formats=FORMATS)
    except ImageError as error:
        raise _unreadable(error) from error
    _check_size(found, settings, pixels)
    return found


def decode(data: bytes, settings: Settings, pixels: int = 0) -> Image.Image:
    """Encoded bytes as an RGB image, within the limits; see :func:`size`."""
    size(data, settings, pixels)
    try:
        return open_image(data, formats=FORMATS)
    except ImageError as error:
        raise _unreadable(error) from error


def _file(url: str, settings: Settings) -> bytes:
    folder = settings.image_folder
    if folder is None:
        raise refused("files of this server may not be read: send the image as a data URL", PARAM)
    try:
        parts = urlsplit(url)
    except ValueError as error:  # brackets, or characters that become others in a host name
        raise refused("this is not a URL", PARAM) from error
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
            raise too_big(settings)
        return path.read_bytes()
    except FileNotFoundError as error:
        raise refused("there is no such file", PARAM) from error
    except (OSError, ValueError, RuntimeError) as error:  # unreadable, a NUL, a loop of links
        raise refused("this file cannot be read", PARAM) from error


def _check_size(size: tuple[int, int], settings: Settings, before: int) -> None:
    width, height = size
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


def _unreadable(error: ImageError) -> ServeError:
    text = str(error)
    if "that Pillow can read" in text:
        text = f"this is not an image of a known format ({', '.join(FORMATS)})"
    return refused(text, PARAM)


def too_big(settings: Settings) -> ServeError:
    return refused(
        f"the image is larger than {settings.max_image_bytes} bytes", PARAM, "image_too_large"
    )
