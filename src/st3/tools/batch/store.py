"""The folder that a run writes, and from which a killed run goes on.

``answers-00000.jsonl`` ...: the answers, one object a line. A file is written whole under another
name, then renamed, so that it is there with all of its lines or not at all; the ids in these files
are done. ``errors.jsonl``: the rows that could not be answered in the latest run, which tries
them again. ``stale.jsonl``: answers to rows that the input does not have any more. ``run.json``:
what was asked for, and what answered. ``summary.json``: written at the end.
"""

from __future__ import annotations

import contextlib
import json
import os
import time
from collections.abc import Iterable, Iterator
from pathlib import Path
from types import TracebackType
from typing import Any

from filelock import FileLock, Timeout


class WriteError(RuntimeError):
    """The folder cannot be written, with the remedy in the message."""


class Store:
    """An output folder, held by one run at a time: a context manager.

    Args:
        folder: made if it is not there.
        asked: what the answers depend on; a folder of other answers is refused.
        rows, seconds: write a file when so many answers wait, or the oldest waits so long.

    Attributes:
        done: id -> (share of KV bytes in use, new tokens, mark of the row), of every answer in the
            folder.

    Raises:
        ValueError: the folder is in use, or holds answers to something else.
        WriteError: from every method that writes: the disk is full, say.
    """

    def __init__(
        self, folder: Path, asked: dict[str, Any], rows: int = 1000, seconds: float = 30.0
    ) -> None:
        self.folder, self.rows, self.seconds = folder, rows, seconds
        self.done: dict[str, tuple[float, int, str]] = {}
        self.failed = 0
        self._waiting: list[dict[str, Any]] = []
        self._since = 0.0
        try:
            folder.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise ValueError(f"cannot write to {str(folder)!r}: {error.strerror}") from error
        self._lock = FileLock(folder / ".lock", blocking=False)
        try:
            self._lock.acquire()
        except Timeout as error:
            raise ValueError(f"another run writes to {str(folder)!r} now") from error
        try:
            self._ran = self._check(asked)
            for torn in folder.glob("*.part"):
                torn.unlink()
            files = self._files()
            for file in files:
                for answer in _lines(file):
                    self._note(answer)
            self._errors = (folder / "errors.jsonl").open("w", encoding="ascii")
        except BaseException:
            self._lock.release()
            raise
        self._next = int(files[-1].stem.rpartition("-")[2]) + 1 if files else 0

    def _files(self) -> list[Path]:
        return sorted(self.folder.glob("answers-*.jsonl"))

    def _check(self, asked: dict[str, Any]) -> dict[str, Any]:
        """What run.json says has answered so far, if it is the run that is asked for."""
        path = self.folder / "run.json"
        if not self._files():
            write_whole(path, json.dumps(asked, indent=1) + "\n")
            return {}
        if not path.exists():
            raise ValueError(f"{str(self.folder)!r} holds answers but no run.json")
        try:
            before = json.loads(path.read_text("utf-8"))
            ran: dict[str, Any] = before.pop("ran", {})
        except (ValueError, AttributeError) as error:
            raise ValueError(f"{str(path)!r} is damaged: choose another folder") from error
        self._same(before, asked)
        return ran

    def _same(self, before: dict[str, Any], now: dict[str, Any]) -> None:
        for name, value in now.items():
            if value != before.get(name):
                raise ValueError(
                    f"{str(self.folder)!r} holds answers of another run ({name} was "
                    f"{before.get(name)!r}, now {value!r}): choose another folder"
                )

    def ran(self, what: dict[str, Any]) -> None:
        """Note what answers: device, precision, versions. Raises ValueError if others have."""
        if not self._ran:
            path = self.folder / "run.json"
            asked = json.loads(path.read_text("utf-8"))
            self._write(path, json.dumps({**asked, "ran": what}, indent=1) + "\n")
            self._ran = what
        self._same(self._ran, what)

    def drop(self, ids: set[str]) -> None:
        """Move answers to ``stale.jsonl``: their rows have changed, or are gone."""
        for file in self._files() if ids else ():
            answers = list(_lines(file))
            stale = [answer for answer in answers if answer["id"] in ids]
            if not stale:
                continue
            before = self.folder / "stale.jsonl"
            earlier = list(_lines(before)) if before.exists() else []
            self._write(before, _text([*earlier, *stale]))
            self._write(file, _text([answer for answer in answers if answer["id"] not in ids]))
        for row_id in ids:
            del self.done[row_id]

    def _note(self, answer: dict[str, Any]) -> None:
        self.done[answer["id"]] = (answer["kv_share"], answer["new_tokens"], answer["row"])

    def add(self, answers: Iterable[dict[str, Any]], errors: Iterable[dict[str, Any]]) -> None:
        """Take answers, which are written by and by, and errors, which are written at once."""
        for answer in answers:
            if answer["id"] not in self.done:  # Ray may answer a row twice when an actor dies
                self._note(answer)
                if not self._waiting:
                    self._since = time.monotonic()
                self._waiting.append(answer)
        bad = list(errors)
        try:
            self._errors.write(_text(bad))
            self._errors.flush()
        except OSError as error:
            raise self._cannot(error) from error
        self.failed += len(bad)
        late = time.monotonic() - self._since > self.seconds
        if len(self._waiting) >= self.rows or (self._waiting and late):
            self.flush()

    def flush(self) -> None:
        """Write the answers that wait."""
        if self._waiting:
            path = self.folder / f"answers-{self._next:05d}.jsonl"
            self._write(path, _text(self._waiting))
            self._next += 1
            self._waiting.clear()

    def _write(self, path: Path, text: str) -> None:
        try:
            write_whole(path, text)
        except OSError as error:
            raise self._cannot(error) from error

    def _cannot(self, error: OSError) -> WriteError:
        why = error.strerror or type(error).__name__
        return WriteError(f"cannot write to {str(self.folder)!r}: {why}: make room for it")

    def __enter__(self) -> Store:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        try:
            if not isinstance(error, WriteError):  # else it would only fail once more
                self.flush()
        finally:
            with contextlib.suppress(OSError):
                self._errors.close()
            self._lock.release()


def write_whole(path: Path, text: str) -> None:
    """Write a file so that it is there whole or not at all, whatever happens meanwhile."""
    part = path.with_name(path.name + ".part")
    try:
        with part.open("w", encoding="utf-8") as file:
            file.write(text)
            file.flush()
            os.fsync(file.fileno())
        os.replace(part, path)
    except OSError:
        with contextlib.suppress(OSError):
            part.unlink()
        raise


def _text(rows: Iterable[dict[str, Any]]) -> str:
    """A line for each, of ASCII: names may hold what ends lines elsewhere, or is no character."""
    return "".join(json.dumps(row) + "\n" for row in rows)


def _lines(path: Path) -> Iterator[dict[str, Any]]:
    """The answers in a file. Raises ValueError that names a line which is none."""
    with path.open(encoding="utf-8", newline="\n") as file:
        for number, line in enumerate(file, 1):
            try:
                answer = json.loads(line)
                answer["id"], answer["kv_share"], answer["new_tokens"], answer["row"]
            except (ValueError, TypeError, KeyError) as error:
                raise ValueError(
                    f"{str(path)!r}, line {number}, is not an answer of this version's: take the "
                    "line out, or choose another folder"
                ) from error
            yield answer
