"""What the tools say when something that they were given cannot be used."""

from __future__ import annotations


class InputError(ValueError):
    """Something given cannot be used; the message is one line, with the remedy if there is one."""


class ImageError(InputError):
    """An image that cannot be shown to a model; the message names it."""


class LoadError(InputError):
    """A model or device that cannot be had. usage: it was asked for wrongly."""

    def __init__(self, message: str, *, usage: bool = False) -> None:
        super().__init__(message)
        self.usage = usage


def first_line(error: BaseException) -> str:
    """The first line of an exception's message, or its type where it has none; of an error of the
    system what it means and the file, without its number."""
    if isinstance(error, OSError) and error.strerror:
        file = "" if error.filename is None else f": {error.filename!r}"
        return f"{error.strerror}{file}".splitlines()[0]
    lines = str(error).strip().splitlines()
    return lines[0] if lines else type(error).__name__
