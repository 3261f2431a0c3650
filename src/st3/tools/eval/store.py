"""Finished items on disk, so that a killed run goes on where it was."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

ITEMS, SETTINGS, POLICIES = "items.jsonl", "settings.json", "policies.json"
Key = tuple[str, int, str]  # task, item, policy


@dataclass(frozen=True)
class Record:
    """One item under one policy.

    Attributes:
        answers: of each turn.
        loyal: of each turn, whether the answer is the untrimmed one, token by token.
        tokens: of the untrimmed answer (all turns, end token included).
        same_place: tokens of the untrimmed answer that the own answer has at the same place.
        agree, kl: along the untrimmed answer, see :class:`st3.tools.eval.runs.Followed`; None in
            conversations, where the history is the model's own.
        seconds: of the item's batch, divided by its items.
    """

    task: str
    number: int
    policy: str
    answers: list[str]
    loyal: list[bool]
    tokens: int
    same_place: int
    agree: int | None
    kl: float | None
    seconds: float
    share: float
    kv: float
    flops: float | None

    @property
    def key(self) -> Key:
        return self.task, self.number, self.policy


class Store:
    """Records in memory, and in a folder if there is one.

    Raises:
        ValueError: the folder holds results of other settings.
    """

    def __init__(self, folder: Path | None, settings: dict[str, Any]) -> None:
        self.folder = folder
        self.records: dict[Key, Record] = {}
        if folder is None:
            return
        folder.mkdir(parents=True, exist_ok=True)
        path = folder / SETTINGS
        if path.is_file():
            known = json.loads(path.read_text(encoding="utf-8"))
            keys = {**settings, **known}
            if other := [key for key in keys if known.get(key) != settings.get(key)]:
                raise ValueError(
                    f"{folder} holds results with another {', '.join(other)}: name another folder, "
                    "or remove it"
                )
        path.write_text(json.dumps(settings, indent=1) + "\n", encoding="utf-8")
        self._read(folder / ITEMS)

    def use(self, policies: Mapping[str, str]) -> None:
        """Note what the policies of a run are, with all their arguments, by their labels, which
        leave out what is a default: defaults may have changed since.

        Raises:
            ValueError: the folder's results under one of the labels are of another policy.
        """
        if self.folder is None:
            return
        path = self.folder / POLICIES
        known = json.loads(path.read_text(encoding="utf-8")) if path.is_file() else {}
        if other := [
            label for label in policies if known.get(label, policies[label]) != policies[label]
        ]:
            raise ValueError(
                f"{self.folder} holds results of another {other[0]}, from before its defaults "
                "changed: name another folder, or remove it"
            )
        text = json.dumps({**known, **policies}, indent=1)
        path.write_text(text + "\n", encoding="utf-8")

    def _read(self, path: Path) -> None:
        if not path.is_file():
            return
        lines = path.read_text(encoding="utf-8").splitlines(keepends=True)
        if lines and not lines[-1].endswith("\n"):  # the run was killed while it wrote this one
            lines.pop()
            path.write_text("".join(lines), encoding="utf-8")
        for line in lines:
            record = Record(**json.loads(line))
            self.records[record.key] = record

    def add(self, records: Iterable[Record]) -> None:
        """Keep finished records, and write them at once."""
        new = list(records)
        self.records |= {record.key: record for record in new}
        if self.folder is not None:
            with (self.folder / ITEMS).open("a", encoding="utf-8") as file:
                file.writelines(json.dumps(asdict(record)) + "\n" for record in new)


def fingerprint(model: Any) -> str:
    """Tells models apart: a hash of the configuration and of some of the weights' values."""
    config = {key: v for key, v in model.config.to_dict().items() if key != "_name_or_path"}
    digest = hashlib.sha256(json.dumps(config, default=str).encode())
    for name, weight in model.named_parameters():
        flat = weight.detach().flatten()
        some = flat[:: max(1, len(flat) // 16)].float().cpu()
        digest.update(f"{name} {some.tolist()}".encode())
    return digest.hexdigest()[:16]
