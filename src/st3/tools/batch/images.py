"""Open the image of a row, wherever it is."""

from __future__ import annotations

import base64
import binascii
from io import BytesIO
from pathlib import Path

from PIL import Image, ImageOps, UnidentifiedImageError

from st3.tools.common.reasons import first_line


def size(image: str | bytes, base: Path) -> tuple[int, int]:
    """(width, height), read off the header. Raises ValueError with the reason."""
    try:
        with Image.open(_source(image, base)) as opened:
            return opened.size
    except Exception as error:  # Pillow's readers raise all kinds of them on broken files
        raise ValueError(_reason(error, image)) from error


def load(image: str | bytes, base: Path) -> Image.Image:
    """The image as RGB, turned as its EXIF data says. Raises ValueError with the reason."""
    try:
        with Image.open(_source(image, base)) as opened:
            return ImageOps.exif_transpose(opened).convert("RGB")
    except Exception as error:
        raise ValueError(_reason(error, image)) from error


def _source(image: str | bytes, base: Path) -> Path | BytesIO:
    if isinstance(image, bytes):
        return BytesIO(image)
    if image.startswith("data:"):
        head, comma, text = image.partition(",")
        if not comma or not head.endswith(";base64"):
            raise ValueError("the data URL is not of the form data:image/png;base64,...")
        return BytesIO(base64.b64decode(text, validate=True))
    if image.startswith(("http://", "https://")):
        raise ValueError("the image is an address: download it and give the file")
    return base / Path(image).expanduser()


def _reason(error: Exception, image: str | bytes) -> str:
    name = "the image" if isinstance(image, bytes) or image[:5] == "data:" else f"image {image!r}"
    if isinstance(error, binascii.Error):
        return f"{name} is not valid base64"
    if isinstance(error, FileNotFoundError):
        return f"no such image: {image!r}"
    if isinstance(error, IsADirectoryError):
        return f"{name} is a folder"
    if isinstance(error, UnidentifiedImageError):
        return f"{name} is not an image that Pillow can read"
    return f"{name} cannot be read: {first_line(error)}"
