"""Open the image of a row, wherever it is."""

from __future__ import annotations

from pathlib import Path

from PIL import Image

from st3.tools.common.errors import ImageError, first_line
from st3.tools.common.images import data_url_bytes, image_size, is_address, is_data_url, open_image


def size(image: str | bytes, base: Path) -> tuple[int, int]:
    """(width, height), read off the header. Raises ImageError, a ValueError, with the reason."""
    return image_size(_source(image, base), name=_name(image))


def load(image: str | bytes, base: Path) -> Image.Image:
    """The image as a model is to see it; see :mod:`st3.tools.common.images`. Raises ImageError."""
    return open_image(_source(image, base), name=_name(image))


def file_size(image: str, base: Path) -> int | None:
    """Bytes of the file that a row names; None for a data URL, and where there is no file."""
    if is_data_url(image):
        return None
    try:
        return _path(image, base).stat().st_size
    except (OSError, ValueError):
        return None


def _source(image: str | bytes, base: Path) -> Path | bytes:
    if isinstance(image, bytes):
        return image
    if is_data_url(image):
        return data_url_bytes(image)
    if is_address(image):
        raise ImageError("the image is an address: download it and give the file")
    path = _path(image, base)
    try:
        found = path.exists()
    except (OSError, ValueError) as error:  # too long a name; a NUL, half a character
        raise ImageError(f"{_name(image)} cannot be read: {first_line(error)}") from error
    if not found:
        raise ImageError(f"no such image: {image!r}")
    return path


def _path(image: str, base: Path) -> Path:
    """Only `~/` stands for the home: a file in a folder may be called `~a.png`."""
    return Path.home() / image[2:] if image.startswith("~/") else base.absolute() / image


def _name(image: str | bytes) -> str:
    if isinstance(image, bytes) or is_data_url(image):
        return "the image"
    return f"image {image!r}"
