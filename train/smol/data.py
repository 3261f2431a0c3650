"""Training batches in the second model's own tokens.

SmolLM2 cuts words into pieces of its own, so that what a token stands for is found by the
characters it ends at.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch.utils.data import Dataset
from transformers import LlavaProcessor

from train.data import ANSWER_WEIGHT, IGNORE, Packer, Token
from train.grounding import where_answered, where_is
from train.scenes import Scene, draw
from train.tasks import Turn
from train.world import NAMES

FIELDS = ("input_ids", "position_ids", "segments", "labels", "weights", "named", "sought")


@dataclass
class Packed:
    """A batch as plain arrays, for the way from one process to another.

    ``tokens`` holds (B, T) arrays by the names of ``FIELDS``, nothing for images alone. The first
    ``shown`` of ``scenes`` belong to the tokens.
    """

    tokens: dict[str, np.ndarray]
    scenes: list[Scene]
    shown: int
    pixels: np.ndarray | None = None  # (V, 96, 96, 3) uint8

    def draw(self) -> Packed:
        self.pixels = np.stack([np.asarray(draw(scene)) for scene in self.scenes])
        return self


class SmolPacker(Packer):
    """The rows of :class:`Packer` in SmolLM2's tokens and chat format."""

    def __init__(self, processor: LlavaProcessor, image_tokens: int, turns: int = 9):
        self.tokenizer = processor.tokenizer
        self.turns = turns
        self.image = [self.tokenizer.convert_tokens_to_ids("<image>")] * image_tokens
        self.opening = self._ids("<|im_start|>user\n")
        self.reply = self._ids("<|im_end|>\n<|im_start|>assistant\n")
        self.next_turn = self._ids("\n<|im_start|>user\n")

    def _row(
        self,
        images: list[list[int]],
        chats: list[list[Turn]],
        scenes: list[Scene],
        second_at: int | None = None,
    ) -> list[Token]:
        """Per token: id, position, segment (0: seen by all), label, weight, named, sought."""
        prefix = [*self.opening, *(token for image in images for token in image)]
        row: list[Token] = [(token, i, 0, IGNORE, 0.0, 0, 0) for i, token in enumerate(prefix)]
        for segment, chat in enumerate(chats, start=1):
            position = len(prefix)
            for number, turn in enumerate(chat):
                task, question, answer = turn
                asked = [(token, 0) for token in self.next_turn] if number else []
                asked += [(token, 0) for token in self.image] if number == second_at else []
                asked += zip(*self._named(question, scenes), strict=True)
                asked += [(token, 0) for token in self.reply[:-1]]
                said, sought = self._sought(answer, task == "describe")
                said, sought = [*said, self.tokenizer.eos_token_id], [*sought, 0]
                weight = 1.0 if task == "describe" else ANSWER_WEIGHT
                for token, label, w, at_name, at_answer in [
                    *((t, IGNORE, 0.0, at, 0) for t, at in asked),
                    (self.reply[-1], IGNORE, 0.0, 0, where_answered(turn, scenes)),
                    *((t, t, weight, 0, at) for t, at in zip(said, sought, strict=True)),
                ]:
                    row.append((token, position, segment, label, w, at_name, at_answer))
                    position += 1
        return row

    def _ends(self, text: str) -> tuple[list[int], list[int]]:
        """The tokens of a text, and the character that each ends before."""
        coded = self.tokenizer(text, add_special_tokens=False, return_offsets_mapping=True)
        return coded["input_ids"], [end for _, end in coded["offset_mapping"]]

    def _named(self, question: str, scenes: list[Scene]) -> tuple[list[int], list[int]]:
        """Tokens, and at the last token of each object's name the cells that show the object."""
        ids, ends = self._ends(question)
        named = {
            word.end(): where_is(word[0], scenes)
            for word in re.finditer(r"\w+", question)
            if word[0] in NAMES
        }
        return ids, [named.get(end, 0) for end in ends]

    def _sought(self, answer: str, described: bool) -> tuple[list[int], list[int]]:
        """Tokens, and, in a description, the cell that each is spoken of, as a bit: from the
        place's last token to the one before the last of the object's name."""
        ids, ends = self._ends(answer)
        cells = [0] * len(ids)
        clauses = re.finditer(r"at the ([a-z ]+?) there is ([^,.]+)", answer) if described else ()
        for cell, clause in enumerate(clauses):
            for i, end in enumerate(ends):
                if clause.end(1) <= end < clause.end(2):
                    cells[i] = 1 << cell
        return ids, cells

    def _ids(self, text: str) -> list[int]:
        return self._ends(text)[0]

    def _batch(self, rows: list[list[Token]], scenes: list[Scene]) -> Any:
        length = max(len(row) for row in rows)
        padding = (self.tokenizer.pad_token_id, 0, -1, IGNORE, 0.0, 0, 0)
        padded = [row + [padding] * (length - len(row)) for row in rows]
        tokens = {
            name: np.array([[token[field] for token in row] for row in padded])
            for field, name in enumerate(FIELDS)
        }
        return Packed(tokens, scenes, len(scenes))


def attend(segments: torch.Tensor) -> torch.Tensor:
    """(B, 1, T, T), True where a token looks: at its own segment and at 0, never ahead."""
    same = segments[:, :, None] == segments[:, None, :]
    return (same | (segments[:, None, :] == 0)).tril()[:, None]


class Steps(Dataset[Packed]):
    """What each step of a run trains on."""

    def __init__(self, make: Any, steps: int):
        self.make = make
        self.steps = steps

    def __len__(self) -> int:
        return self.steps

    def __getitem__(self, step: int) -> Packed:
        packed: Packed = self.make(step)
        return packed.draw()


def as_it_is(packed: Packed) -> Packed:
    """No collation: tensors would go through shared memory, which containers have little of."""
    return packed
