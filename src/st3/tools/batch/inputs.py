"""Where the rows come from: JSON lines, Parquet, or a folder of images.

A source is scanned once for the ids, which are all that a run keeps in memory, and read piece by
piece by whoever answers the rows: on Ray that is another machine, which must see the same path.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple, Protocol

from PIL import Image

from st3.tools.batch import images

# Of a folder's files those are images whose names end as one of these formats does: Pillow knows
# more, but writes some only (PDF), and tells others (films, weather data) without reading them.
FORMATS = frozenset({
    "AVIF", "BMP", "DIB", "GIF", "JPEG", "JPEG2000", "MPO", "PCX", "PNG", "PPM", "QOI", "SGI",
    "TGA", "TIFF", "WEBP",
})  # fmt: skip


class Ref(NamedTuple):
    """A row's id, and where the source finds it again."""

    id: str
    place: int


@dataclass(frozen=True)
class Row:
    """A question. image: a path, a data URL, or an encoded image."""

    id: str
    image: str | bytes
    prompt: str

    def mark(self, base: Path) -> str:
        """Tells whether a row is still the one that was answered, wherever it stands: a hash of its
        prompt and of its image as the input has it, and the size of the file that it names."""
        if isinstance(self.image, bytes):
            told, size = hashlib.blake2b(self.image, digest_size=16).hexdigest(), None
        else:
            told, size = self.image, images.file_size(self.image, base)
        text = json.dumps([self.prompt, told])
        said = hashlib.blake2b(text.encode(), digest_size=8).hexdigest()
        return said if size is None else f"{said}-{size}"


def same_row(before: str, now: str) -> bool:
    """Whether two marks are of the same row. An image that has gone is no other image."""
    (said, _, size), (said_now, _, size_now) = before.partition("-"), now.partition("-")
    return said == said_now and size_now in (size, "")


@dataclass(frozen=True)
class BadRow:
    """A row that cannot be answered, and why."""

    id: str
    reason: str


class Source(Protocol):
    """Rows that can be found again by their refs. base: what relative image paths start from."""

    base: Path

    def scan(self) -> Iterator[Ref]: ...

    def read(self, refs: Sequence[Ref]) -> Iterator[Row | BadRow]: ...


def open_source(path: Path, prompt: str | None = None) -> Source:
    """The source at ``path``. prompt: for rows without one; a folder needs it.

    Raises:
        ValueError: a path that is none of the three, or a folder without a prompt.
    """
    if path.is_dir():
        if prompt is None:
            raise ValueError(
                f"{str(path)!r} is a folder of images: say what to ask of each with -p"
            )
        return Folder(path, prompt)
    if not path.is_file():
        raise ValueError(f"no such file or folder: {str(path)!r}")
    if path.suffix.lower() == ".parquet":
        return Parquet(path, prompt)
    if path.suffix.lower() in (".jsonl", ".ndjson"):
        return JsonLines(path, prompt)
    raise ValueError(f"{str(path)!r} is not a folder, nor a .jsonl or .parquet file")


class JsonLines:
    """One object {"id"?, "image", "prompt"?} in each line; a place is the line's offset."""

    def __init__(self, path: Path, prompt: str | None) -> None:
        self.path, self.base, self.prompt = path, path.parent, prompt

    def scan(self) -> Iterator[Ref]:
        offset = 0
        with self.path.open("rb") as file:
            for number, line in enumerate(file, 1):
                if line.strip():
                    try:
                        fields = json.loads(line)
                        given = fields.get("id") if isinstance(fields, dict) else None
                    except (ValueError, RecursionError):
                        given = None
                    yield Ref(_id(given, number), offset)
                offset += len(line)

    def read(self, refs: Sequence[Ref]) -> Iterator[Row | BadRow]:
        with self.path.open("rb") as file:
            for ref in refs:
                file.seek(ref.place)
                try:
                    fields = json.loads(file.readline())
                except (ValueError, RecursionError) as error:
                    yield BadRow(ref.id, f"this line is not JSON: {error}")
                    continue
                yield _row(ref, fields, self.prompt)


class Parquet:
    """Columns "id"?, "image" and "prompt"?; a place is the row's number in the file.

    An image is a string as in JSON lines, bytes, or a struct of ``bytes`` and ``path`` as the
    ``datasets`` library writes it. Needs pyarrow, which comes with the extra ``st3[ray]``.
    """

    def __init__(self, path: Path, prompt: str | None) -> None:
        try:
            import pyarrow.parquet
        except ImportError as error:
            raise ValueError(
                "reading Parquet needs pyarrow: pip install pyarrow, or give a .jsonl file"
            ) from error
        self.path, self.base, self.prompt = path, path.parent, prompt
        try:
            self.file: Any = pyarrow.parquet.ParquetFile(path)
        except (OSError, ValueError) as error:  # pyarrow's errors are ValueErrors
            raise ValueError(f"{str(path)!r} is not a Parquet file: {error}") from error
        self.columns = [n for n in ("id", "image", "prompt") if n in self.file.schema_arrow.names]
        if "image" not in self.columns:
            raise ValueError(f"{str(path)!r} has no column 'image'")
        self._group: tuple[int, Any] | None = None

    def scan(self) -> Iterator[Ref]:
        if "id" not in self.columns:
            for place in range(self.file.metadata.num_rows):
                yield Ref(_id(None, place + 1), place)
            return
        place = 0
        for batch in self.file.iter_batches(columns=["id"]):
            for given in batch.column(0).to_pylist():
                yield Ref(_id(given, place + 1), place)
                place += 1

    def read(self, refs: Sequence[Ref]) -> Iterator[Row | BadRow]:
        for ref in refs:
            yield _row(ref, self._fields(ref.place), self.prompt)

    def _fields(self, place: int) -> dict[str, Any]:
        group, rows = 0, self.file.metadata.row_group(0).num_rows
        while place >= rows:
            place -= rows
            group += 1
            rows = self.file.metadata.row_group(group).num_rows
        if self._group is None or self._group[0] != group:
            self._group = group, self.file.read_row_group(group, columns=self.columns)
        table = self._group[1]
        return {name: table.column(name)[place].as_py() for name in self.columns}


class Folder:
    """Every image file in a folder and the folders in it; its id is its path from there. What is
    hidden (``.thumbnails``, ``._a.png``) is left out, with all in it."""

    def __init__(self, path: Path, prompt: str) -> None:
        self.base, self.prompt = path, prompt

    def scan(self) -> Iterator[Ref]:
        known = {end for end, kind in Image.registered_extensions().items() if kind in FORMATS}
        for path in sorted(self.base.rglob("*")):
            inside = path.relative_to(self.base)
            hidden = any(part.startswith(".") for part in inside.parts)
            if not hidden and path.suffix.lower() in known and path.is_file():
                yield Ref(inside.as_posix(), 0)

    def read(self, refs: Sequence[Ref]) -> Iterator[Row | BadRow]:
        for ref in refs:
            yield _row(ref, {"image": ref.id}, self.prompt)


def _id(given: Any, number: int) -> str:
    """The id that a row says, or its number, from 1."""
    plain = isinstance(given, (str, int)) and not isinstance(given, bool)
    return str(given) if plain else str(number)


def _row(ref: Ref, fields: Any, default: str | None) -> Row | BadRow:
    if not isinstance(fields, dict):
        return BadRow(ref.id, "this line is not a JSON object")
    given, image, prompt = fields.get("id"), fields.get("image"), fields.get("prompt")
    if given is not None and _id(given, 0) != ref.id:
        return BadRow(ref.id, "its id is neither a string nor a whole number")
    if isinstance(image, dict):
        image = image.get("bytes") or image.get("path")
    if not image or not isinstance(image, (str, bytes)):
        return BadRow(ref.id, "it has no image: give a path or a data URL")
    prompt = default if prompt is None else prompt
    if not isinstance(prompt, str) or not prompt.strip():
        return BadRow(ref.id, "it has no prompt, and none was given for all rows")
    return Row(ref.id, image, prompt)
