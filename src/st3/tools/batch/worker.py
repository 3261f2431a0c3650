"""Answers windows of rows with one model: the part that is the same here and on Ray."""

from __future__ import annotations

import dataclasses
import time
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

import torch

from st3.engine import trim
from st3.tools.batch import images
from st3.tools.batch.inputs import BadRow, Row
from st3.tools.common.chats import ask, encode
from st3.tools.common.reasons import first_line

# What processors and models raise about a prompt or image; anything else ends the run.
ABOUT_A_ROW = (ValueError, TypeError, IndexError, KeyError, torch.OutOfMemoryError)


@dataclasses.dataclass
class Done:
    """A batch that was answered, as plain values.

    Attributes:
        answers: id, answer, prompt_tokens, visual_tokens, new_tokens and kv_share (live over
            untrimmed KV bytes, averaged over the steps of the row's batch) of each row.
        errors: id and error of each row that could not be answered.
        seconds: that it took.
    """

    answers: list[dict[str, Any]] = dataclasses.field(default_factory=list)
    errors: list[dict[str, Any]] = dataclasses.field(default_factory=list)
    seconds: float = 0.0


class Worker:
    """A model that answers rows, greedily.

    Args:
        model, processor: as transformers loads them.
        policy: how to trim.
        batch_size: rows answered together.
        max_new_tokens: longest answer.
    """

    def __init__(
        self, model: Any, processor: Any, policy: str, batch_size: int, max_new_tokens: int
    ) -> None:
        self.model, self.processor = model, processor
        self.batch_size, self.max_new_tokens = batch_size, max_new_tokens
        self.trimmer = trim(model, policy)
        tokenizer = processor.tokenizer
        tokenizer.padding_side = "left"  # the next token has one place for all rows
        if tokenizer.pad_token is None:
            tokenizer.pad_token = tokenizer.eos_token
        ends = model.generation_config.eos_token_id
        self.ends = {ends} if isinstance(ends, int) else set(ends or ())

    def window(self, rows: Iterable[Row | BadRow], base: Path) -> Iterator[Done]:
        """Answer the rows in batches of like length, longest first; rows that are bad come first.

        The order is of no consequence for the answers: each is what the row gets alone.
        """
        start, bad = time.perf_counter(), Done()
        good: list[tuple[tuple[int, int], Row]] = []
        for row in rows:
            try:
                if isinstance(row, BadRow):
                    raise ValueError(row.reason)
                good.append((self._length(row, base), row))
            except ValueError as error:
                bad.errors.append(_error(row.id, error))
        if bad.errors:
            bad.seconds = time.perf_counter() - start
            yield bad
        good.sort(key=lambda pair: pair[0], reverse=True)
        for first in range(0, len(good), self.batch_size):
            yield self._batch([row for _, row in good[first : first + self.batch_size]], base)

    def _length(self, row: Row, base: Path) -> tuple[int, int]:
        """(visual tokens, text tokens) as far as they can be told without decoding the image."""
        width, height = images.size(row.image, base)
        count = getattr(self.processor, "_get_num_multimodal_tokens", None)
        visual = 0
        if count is not None:  # not public: if it changes, batches are padded more, no worse
            try:
                visual = int(count(image_sizes=[(height, width)]).num_image_tokens[0])
            except (TypeError, ValueError, AttributeError, KeyError, IndexError):
                visual = width * height
        return visual, len(self.processor.tokenizer(row.prompt)["input_ids"])

    def _batch(self, rows: Sequence[Row], base: Path) -> Done:
        start, done = time.perf_counter(), Done()
        shown = []
        for row in rows:
            try:
                shown.append((row, images.load(row.image, base)))
            except ValueError as error:
                done.errors.append(_error(row.id, error))
        try:
            done.answers += self._answer(shown)
        except ABOUT_A_ROW as error:
            if len(shown) == 1:
                done.errors.append(_error(shown[0][0].id, error))
            else:  # one of them spoils it: find out which
                for pair in shown:
                    try:
                        done.answers += self._answer([pair])
                    except ABOUT_A_ROW as alone:
                        done.errors.append(_error(pair[0].id, alone))
        done.seconds = time.perf_counter() - start
        return done

    @torch.no_grad()
    def _answer(self, shown: Sequence[tuple[Row, Any]]) -> list[dict[str, Any]]:
        if not shown:
            return []
        chats = [ask([image], row.prompt) for row, image in shown]
        inputs = encode(self.model, self.processor, chats, padding=True)
        width = inputs["input_ids"].shape[1]
        with self.trimmer:
            output = self.model.generate(
                **inputs, max_new_tokens=self.max_new_tokens, do_sample=False, num_beams=1
            )
        report = self.trimmer.report
        answers = []
        for i, (row, _) in enumerate(shown):
            new = self._until_end(output[i, width:].tolist())
            answers.append(
                {
                    "id": row.id,
                    "answer": self.processor.tokenizer.decode(
                        new, skip_special_tokens=True
                    ).strip(),
                    "prompt_tokens": report.n_text[i] + report.n_visual[i],
                    "visual_tokens": report.n_visual[i],
                    "new_tokens": len(new),
                    "kv_share": report.kv_mean_ratio,
                }
            )
        return answers

    def _until_end(self, tokens: list[int]) -> list[int]:
        """Up to and with the first end token; padding follows in rows that end early."""
        for i, token in enumerate(tokens):
            if token in self.ends:
                return tokens[: i + 1]
        return tokens


def _error(row_id: str, error: BaseException) -> dict[str, Any]:
    return {"id": row_id, "error": first_line(error)}
