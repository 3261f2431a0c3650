"""Answers windows of rows with one model: the part that is the same here and on Ray."""

from __future__ import annotations

import dataclasses
import time
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
from jinja2 import TemplateError

from st3.methods.policies import Policy
from st3.tools.batch import images
from st3.tools.batch.inputs import BadRow, Row
from st3.tools.common.chats import ask, encode
from st3.tools.common.conditions import versions
from st3.tools.common.errors import first_line
from st3.tools.common.limits import image_bytes, positions
from st3.tools.common.load import end_tokens, pad_left
from st3.trimmer import trim

# What tokenizers, templates, processors and models raise about a prompt or image.
ABOUT_A_ROW = (
    ValueError, TypeError, LookupError, ArithmeticError, AttributeError, RuntimeError, MemoryError,
    TemplateError,
)  # fmt: skip
MOST_BYTES = 4 << 30
"""For decoding and processing an image."""
MOST_FAILURES = 8
"""So many rows in succession that fail within the model end a run: it is not their fault."""


@dataclasses.dataclass
class Done:
    """A batch that was answered, as plain values.

    Attributes:
        answers: id, answer, prompt_tokens, visual_tokens, new_tokens, kv_share (live over
            untrimmed KV bytes, averaged over the steps of the row's batch) and row
            (:meth:`~st3.tools.batch.inputs.Row.mark`) of each row.
        errors: id and error of each row that could not be answered.
        seconds: that it took.
        ran: precision, device and versions that the answers come from.
    """

    answers: list[dict[str, Any]] = dataclasses.field(default_factory=list)
    errors: list[dict[str, Any]] = dataclasses.field(default_factory=list)
    seconds: float = 0.0
    ran: dict[str, str] = dataclasses.field(default_factory=dict)


class Worker:
    """A model that answers rows, greedily.

    Args:
        model, processor: as transformers loads them.
        policy: how to trim.
        batch_size: rows answered together.
        max_new_tokens: longest answer.
        system: the system prompt of every row; None: none.

    Raises:
        ValueError: a policy that does not fit the model.
    """

    def __init__(
        self,
        model: Any,
        processor: Any,
        policy: str | Policy,
        batch_size: int,
        max_new_tokens: int,
        system: str | None = None,
    ) -> None:
        self.model, self.processor, self.system = model, processor, system
        self.batch_size, self.max_new_tokens = batch_size, max_new_tokens
        self.trimmer = trim(model, policy)
        with self.trimmer:  # refuses now what it would refuse at every row
            pass
        pad_left(processor.tokenizer)
        self.ends = end_tokens(model)
        self.positions = positions(model)
        self.ran = {
            "dtype": str(model.dtype).removeprefix("torch."),
            "device": model.device.type,
            **{name: versions()[name] for name in ("st3", "torch", "transformers")},
        }
        self._failures = 0

    def window(self, rows: Iterable[Row | BadRow], base: Path) -> Iterator[Done]:
        """Answer the rows in batches of like length, longest first; rows that are bad come first.

        The order is of no consequence for the answers: each is what the row gets alone.
        """
        start, bad = time.perf_counter(), Done(ran=self.ran)
        good: list[tuple[tuple[int, int], Row]] = []
        for row in rows:
            try:
                if isinstance(row, BadRow):
                    raise ValueError(row.reason)
                length = self._length(row, base)
                self._check_length(length[1])  # of its text alone; the whole is counted later
                good.append((length, row))
            except ABOUT_A_ROW as error:
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
        needed = image_bytes(self.processor.image_processor, [(width, height)])
        if needed > MOST_BYTES:
            raise ValueError(
                f"the image is {width} x {height} pixels: processing it would take about "
                f"{needed >> 30} GiB of memory"
            )
        count = getattr(self.processor, "_get_num_multimodal_tokens", None)
        visual = 0
        if count is not None:  # not public: if it changes, batches are padded more, no worse
            try:
                visual = int(count(image_sizes=[(height, width)]).num_image_tokens[0])
            except (TypeError, ValueError, AttributeError, KeyError, IndexError):
                visual = width * height
        return visual, len(self.processor.tokenizer(row.prompt)["input_ids"])

    def _check_length(self, tokens: int) -> None:
        """Raises ValueError for a prompt that is too long for the model with its answer."""
        if self.positions is not None and tokens + self.max_new_tokens > self.positions:
            raise ValueError(
                f"it has {tokens} prompt tokens, which with {self.max_new_tokens} new ones are "
                f"more than the model's {self.positions} positions"
            )

    def _batch(self, rows: Sequence[Row], base: Path) -> Done:
        start, done = time.perf_counter(), Done(ran=self.ran)
        shown = []
        for row in rows:
            try:
                shown.append((row, row.mark(base), images.load(row.image, base)))
            except ABOUT_A_ROW as error:
                done.errors.append(_error(row.id, error))
        try:
            done.answers += self._answer(shown)
        except ABOUT_A_ROW as error:
            if len(shown) == 1:
                self._failed(done, shown[0][0].id, error)
            else:  # one of them spoils it: find out which
                for one in shown:
                    try:
                        done.answers += self._answer([one])
                    except ABOUT_A_ROW as alone:
                        self._failed(done, one[0].id, alone)
        done.seconds = time.perf_counter() - start
        return done

    def _failed(self, done: Done, row_id: str, error: BaseException) -> None:
        """Note a row's failure; raise it where it is the model's, not the row's."""
        within = isinstance(error, RuntimeError) and not isinstance(error, torch.OutOfMemoryError)
        self._failures = self._failures + 1 if within else 0
        if self._failures >= MOST_FAILURES or isinstance(error, torch.AcceleratorError):
            raise error  # after a device's error nothing more can be answered
        done.errors.append(_error(row_id, error))

    @torch.no_grad()
    def _answer(self, shown: Sequence[tuple[Row, str, Any]]) -> list[dict[str, Any]]:
        """Answers to rows, given with their marks and images."""
        if not shown:
            return []
        chats = [ask([image], row.prompt, self.system) for row, _, image in shown]
        inputs = encode(self.model, self.processor, chats, padding=True)
        self._check_length(int(inputs["attention_mask"].sum(dim=1).max()))
        width = inputs["input_ids"].shape[1]
        with self.trimmer:
            output = self.model.generate(
                **inputs, max_new_tokens=self.max_new_tokens, do_sample=False, num_beams=1
            )
        self._failures = 0
        report = self.trimmer.report
        answers = []
        for i, (row, mark, _) in enumerate(shown):
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
                    "row": mark,
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
