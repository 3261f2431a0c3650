"""Writes reports: an observer of a trimmed model's passes."""

from __future__ import annotations

from collections.abc import Sequence
from functools import cached_property
from typing import Any

from st3.cost import TextDims
from st3.engine.events import Observer, PassEvent, PromptEvent
from st3.engine.kv.base import Store
from st3.engine.prompt import Block
from st3.errors import TrimStateError
from st3.methods.schedule import Schedule
from st3.report.report import KVSample, Report


class Reporter(Observer):
    """Writes a :class:`Report` for each prompt with an image.

    Args:
        config: the model's, for the cost model.
    """

    def __init__(self, policy: str, schedule: Schedule, config: Any) -> None:
        self._policy, self._schedule, self._config = policy, schedule, config
        self._report: Report | None = None
        self._why = "run the model on a prompt with an image first"
        self._end = 0  # logical length of the prompt, of a run in which nothing is trimmed

    @property
    def report(self) -> Report:
        """The latest.

        Raises:
            TrimStateError: if there is none.
        """
        if self._report is None:
            raise TrimStateError(f"nothing to report: {self._why}")
        return self._report

    @cached_property
    def _dims(self) -> TextDims | None:
        try:
            return TextDims.from_config(self._config)
        except ValueError:  # a family that the cost model does not describe
            return None

    def _freeze(self) -> None:
        """What a cache does from now on is not the latest report's."""
        if self._report is not None:
            self._report._steps, self._report._timeline = self._report.steps, None

    def prompt(self, event: PromptEvent) -> None:
        self._freeze()
        self._report = Report.of(self._policy, self._schedule, self._dims, event)
        self._end = event.past + event.rows.length - event.rows.tail

    def counted(self, budgets: tuple[tuple[int, ...], ...]) -> None:
        if self._report is not None:
            self._report.budgets = budgets

    def text_prompt(self) -> None:
        self._freeze()
        self._report, self._why = (
            None,
            "the latest prompt had no image; run the model on a prompt with an image",
        )

    def kept(self, layer: int, block: Block) -> None:
        if self._report is not None:
            self._report._blocks[layer] = block

    def passed(self, event: PassEvent) -> None:
        report = self._report
        if report is None:
            return
        if event.stores:
            self.sample(event.stores)
        elif report._timeline is None and not report.samples and event.length:
            report._steps = max(0, event.length - self._end)
            if not report.entry_bytes:  # a decoder that the cost model does not describe
                report.entry_bytes = event.entry_bytes()

    def sample(self, stores: Sequence[Store]) -> None:
        """Note the KV bytes after a pass; a pass that was rolled back is overwritten. Passes of
        another cache, an earlier conversation's, are not this report's."""
        report = self._report
        if report is None or not stores or stores[0].timeline is not report._timeline:
            return
        # What this process holds: under a tensor parallel plan a share of the heads.
        sizes = {store.layer: store.entry_bytes for store in stores}
        report.entry_bytes = tuple(sizes.get(la, 0) for la in range(self._schedule.num_layers))
        live, allocated = map(sum, zip(*(store.footprint() for store in stores), strict=True))
        while report.samples and report.samples[-1].step >= report.steps:
            report.samples.pop()
        report.samples.append(KVSample(report.steps, live, allocated))
