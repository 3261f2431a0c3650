"""Training batches.

One image carries several independent chats behind the same visual tokens: a full
description, and a conversation of short questions.  They do not see each other (a block
mask, equal positions), so the costly visual tokens are paid for once.
"""

from __future__ import annotations

import random
from dataclasses import dataclass

import numpy as np
import torch
from transformers import PreTrainedTokenizerFast

from train.grounding import where_answered, where_is
from train.scenes import Scene, draw, sample_scene
from train.tasks import DESCRIBE, Turn, conversation, describe, pair_conversation
from train.world import EMOJI, NAMES

# A one-word answer has 1 or 2 labels and a description about 105.
ANSWER_WEIGHT = 4.0
IGNORE = -100
Token = tuple[int, int, int, int, float, int, int]


@dataclass
class Batch:
    """T tokens a row, V images in all; ``attend`` is (B, 1, T, T), True where a token looks."""

    input_ids: torch.Tensor
    position_ids: torch.Tensor
    attend: torch.Tensor
    labels: torch.Tensor
    weights: torch.Tensor
    pixel_values: torch.Tensor
    named: torch.Tensor  # (B, T): the cells of the object that a question's word names, as bits
    sought: torch.Tensor  # (B, T): the cells that a token's next word is read from, as bits
    scenes: list[Scene]  # one per image


def to_pixels(scenes: list[Scene]) -> torch.Tensor:
    """(V, 3, 96, 96), scaled to [-1, 1] as the image processor does."""
    stacked = np.stack([np.asarray(draw(scene)) for scene in scenes])
    return torch.from_numpy(stacked).permute(0, 3, 1, 2).float() / 127.5 - 1


class Packer:
    """Builds batches from scenes; the same seed gives the same batch."""

    def __init__(self, tokenizer: PreTrainedTokenizerFast, image_tokens: int, turns: int = 9):
        self.tokenizer = tokenizer
        self.turns = turns
        self.image = [tokenizer.convert_tokens_to_ids("<image>")] * image_tokens
        self.user = tokenizer.convert_tokens_to_ids("<user>")
        self.assistant = tokenizer.convert_tokens_to_ids("<assistant>")
        self.there = tokenizer.convert_tokens_to_ids("there")
        self.nothing = tokenizer.convert_tokens_to_ids("nothing")
        self.names = {self._ids(name)[0]: name for name in NAMES}

    def single(self, seeds: range) -> Batch:
        """One image a row, with a description and a conversation."""
        scenes = [sample_scene(seed) for seed in seeds]
        rows = []
        for scene in scenes:
            rng = random.Random(scene.seed)
            full = [("describe", rng.choice(DESCRIBE), describe(scene))]
            turns = conversation(scene, rng, self.turns)
            if rng.random() < 0.25:  # a description as a later turn, too
                full = conversation(scene, rng, 1) + full
            rows.append(self._row([self.image], [full, turns], [scene]))
        return self._batch(rows, scenes)

    def quiz(self, seeds: range) -> Batch:
        """One image a row, with three conversations: more answers for the same visual tokens."""
        scenes = [sample_scene(seed) for seed in seeds]
        rows = []
        for scene in scenes:
            rng = random.Random(scene.seed)
            chats = [conversation(scene, rng, self.turns - 1) for _ in range(3)]
            rows.append(self._row([self.image], chats, [scene]))
        return self._batch(rows, scenes)

    def pair(self, seeds: range) -> Batch:
        """Two images a row and questions about both; the second may come in a later turn."""
        scenes: list[Scene] = []
        rows = []
        for seed in seeds:
            rng = random.Random(seed)
            first = sample_scene(seed)
            shared = [name for name in first.names if name in EMOJI][: rng.randint(0, 3)]
            second = sample_scene(7 * seed + 3, include=tuple(shared))
            turns = pair_conversation(first, second, rng, self.turns)
            shown = [first, second]
            if rng.random() < 0.5:
                rows.append(self._row([self.image, self.image], [turns], shown))
            else:
                opening = conversation(first, rng, 1)
                rows.append(self._row([self.image], [opening + turns], shown, second_at=1))
            scenes += [first, second]
        return self._batch(rows, scenes)

    def _row(
        self,
        images: list[list[int]],
        chats: list[list[Turn]],
        scenes: list[Scene],
        second_at: int | None = None,
    ) -> list[Token]:
        """Per token: id, position, segment (0: seen by all), label, weight, named, sought."""
        named = {token: where_is(name, scenes) for token, name in self.names.items()}
        shown = [token for image in images for token in image]
        prefix = [self.tokenizer.bos_token_id, self.user, *shown]
        row: list[Token] = [(token, i, 0, IGNORE, 0.0, 0, 0) for i, token in enumerate(prefix)]
        for segment, chat in enumerate(chats, start=1):
            position = len(prefix)
            for number, turn in enumerate(chat):
                task, question, answer = turn
                asked = [self.user] if number else []
                asked += self.image if number == second_at else []
                asked += self._ids(question)
                said = [*self._ids(answer), self.tokenizer.eos_token_id]
                weight = 1.0 if task == "describe" else ANSWER_WEIGHT
                sought = self._described(said) if task == "describe" else [0] * len(said)
                for token, label, w, at_name, at_answer in [
                    *((t, IGNORE, 0.0, named.get(t, 0), 0) for t in asked),
                    (self.assistant, IGNORE, 0.0, 0, where_answered(turn, scenes)),
                    *((t, t, weight, 0, at) for t, at in zip(said, sought, strict=True)),
                ]:
                    row.append((token, position, segment, label, w, at_name, at_answer))
                    position += 1
        return row

    def _described(self, said: list[int]) -> list[int]:
        """The cell that each token of a description speaks of, as a bit.

        From the place's last word to the one before the object's name: what comes next is read
        off that cell.
        """
        cells = [0] * len(said)
        at, speaking = -1, False
        for i, token in enumerate(said):
            if token == self.there:
                at, speaking = at + 1, True
                cells[i - 1] = 1 << at
            if token in self.names or token == self.nothing:
                speaking = False
            if speaking:
                cells[i] = 1 << at
        return cells

    def _ids(self, text: str) -> list[int]:
        return self.tokenizer(text, add_special_tokens=False)["input_ids"]

    def _batch(self, rows: list[list[Token]], scenes: list[Scene]) -> Batch:
        length = max(len(row) for row in rows)
        padding = (self.tokenizer.pad_token_id, 0, -1, IGNORE, 0.0, 0, 0)
        padded = [row + [padding] * (length - len(row)) for row in rows]
        ids, positions, segments, labels, weights, named, sought = (
            torch.tensor([[token[field] for token in row] for row in padded]) for field in range(7)
        )
        same = segments[:, :, None] == segments[:, None, :]
        attend = (same | (segments[:, None, :] == 0)).tril()
        return Batch(
            ids,
            positions,
            attend[:, None],
            labels,
            weights,
            to_pixels(scenes),
            named,
            sought,
            scenes,
        )
