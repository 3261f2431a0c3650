"""The folder that a run writes, and from which a killed run goes on.

``answers-00000.jsonl`` ...: the answers, one object a line. A file is written whole under another
name, then renamed, so that it is there with all of its lines or not at all; the ids in these files
are done. ``errors.jsonl``: the rows that could not be answered in the latest run, which tries
them again. ``run.json``: what was asked for. ``summary.json``: written at the end.
"""

from __future__ import annotations

import json
import os
import time
from collections.abc import Iterable
from pathlib import Path
from types import TracebackType
from typing import Any

try:
    import fcntl
except ImportError:  # Windows: nothing keeps two runs out of one folder there
    fcntl = None  # type: ignore[assignment]


class Store:
    """An output folder, held by one run at a time: a context manager.

    Args:
        folder: made if it is not there.
        asked: what the answers depend on; a folder of other answers is refused.
        rows, seconds: write a file when so many answers wait, or the oldest waits so long.

    Attributes:
        done: id -> (share of KV bytes in use, new tokens), of every answer in the folder.

    Raises:
        ValueError: the folder is in use, or holds answers to something else.
    """

    def __init__(
        self, folder: Path, asked: dict[str, Any], rows: int = 1000, seconds: float = 30.0
    ) -> None:
        self.folder, self.rows, self.seconds = folder, rows, seconds
        self.done: dict[str, tuple[float, int]] = {}
        self.failed = 0
        self._waiting: list[dict[str, Any]] = []
        self._since = 0.0
        try:
            folder.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise ValueError(f"cannot write to {str(folder)!r}: {error.strerror}") from error
        self._lock = self._hold()
        self._check(asked)
        for torn in folder.glob("*.part"):
            torn.unlink()
        files = sorted(folder.glob("answers-*.jsonl"))
        for file in files:
            for line in file.read_text("utf-8").splitlines():
                self._note(json.loads(line))
        self._next = int(files[-1].stem.rpartition("-")[2]) + 1 if files else 0
        self._errors = (folder / "errors.jsonl").open("w", encoding="utf-8")

    def _hold(self) -> Any:
        """A lock that the system lifts when the process dies, however it dies."""
        file = (self.folder / ".lock").open("w")
        if fcntl is not None:
            try:
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except OSError as error:
                file.close()
                raise ValueError(f"another run writes to {str(self.folder)!r} now") from error
        return file

    def _check(self, asked: dict[str, Any]) -> None:
        path = self.folder / "run.json"
        if not any(self.folder.glob("answers-*.jsonl")):
            write_whole(path, json.dumps(asked, indent=1) + "\n")
            return
        if not path.exists():
            raise ValueError(f"{str(self.folder)!r} holds answers but no run.json")
        before = json.loads(path.read_text("utf-8"))
        changed = [name for name in asked if asked[name] != before.get(name)]
        if changed:
            name = changed[0]
            raise ValueError(
                f"{str(self.folder)!r} holds answers of another run ({name} was "
                f"{before.get(name)!r}, now {asked[name]!r}): choose another folder"
            )

    def _note(self, answer: dict[str, Any]) -> None:
        self.done[answer["id"]] = (answer["kv_share"], answer["new_tokens"])

    def add(self, answers: Iterable[dict[str, Any]], errors: Iterable[dict[str, Any]]) -> None:
        """Take answers, which are written by and by, and errors, which are written at once."""
        for answer in answers:
            if answer["id"] not in self.done:  # Ray may answer a row twice when an actor dies
                self._note(answer)
                if not self._waiting:
                    self._since = time.monotonic()
                self._waiting.append(answer)
        for error in errors:
            self._errors.write(json.dumps(error, ensure_ascii=False) + "\n")
            self.failed += 1
        self._errors.flush()
        late = time.monotonic() - self._since > self.seconds
        if len(self._waiting) >= self.rows or (self._waiting and late):
            self.flush()

    def flush(self) -> None:
        """Write the answers that wait."""
        if self._waiting:
            lines = [json.dumps(answer, ensure_ascii=False) + "\n" for answer in self._waiting]
            write_whole(self.folder / f"answers-{self._next:05d}.jsonl", "".join(lines))
            self._next += 1
            self._waiting.clear()

    def __enter__(self) -> Store:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        try:
            self.flush()
        finally:
            self._errors.close()
            self._lock.close()


def write_whole(path: Path, text: str) -> None:
    """Write a file so that it is there whole or not at all, whatever happens meanwhile."""
    part = path.with_name(path.name + ".part")
    with part.open("w", encoding="utf-8") as file:
        file.write(text)
        file.flush()
        os.fsync(file.fileno())
    os.replace(part, path)
