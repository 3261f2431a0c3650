"""A running batch with the tickets of its rows; the engine's figures."""

from __future__ import annotations

from dataclasses import dataclass

from st3.tools.serve.batch import JoinedBatch, Prefilled
from st3.tools.serve.budget import Columns, widest
from st3.tools.serve.ticket import Ticket


@dataclass(frozen=True)
class Stats:
    """A moment of the engine. Bytes are of KV entries.

    Attributes:
        running, waiting: requests that decode; that are queued.
        lanes: batches that decode, one after another.
        reserved: bytes promised to the running requests; never above ``budget``.
        allocated: bytes of the batches' buffers now.
        most_running: the most that ran at once so far.
        steps, tokens: decode steps of batches and tokens generated so far.
    """

    running: int
    waiting: int
    lanes: int
    budget: int
    reserved: int
    allocated: int
    most_running: int
    steps: int
    tokens: int


class Lane:
    """A batch and the tickets of its rows."""

    def __init__(self, batch: JoinedBatch) -> None:
        self.batch = batch
        self.tickets: list[Ticket] = []
        self.leaving: set[int] = set()
        self.new: list[tuple[Ticket, Prefilled]] = []

    def columns(self) -> list[Columns]:
        """What those who stay and those who come need."""
        stay = [t.columns for i, t in enumerate(self.tickets) if i not in self.leaving]
        return stay + [ticket.columns for ticket, _ in self.new]

    def change(self) -> None:
        """Carry out who leaves and who joins."""
        if not self.leaving and not self.new:
            return
        new = [prompt for _, prompt in self.new]
        by_row = {id(ticket.row): ticket for ticket in self.tickets}
        by_row.update((id(ticket.row), ticket) for ticket, _ in self.new)
        left = self.columns()
        self.batch.change(self.leaving, new, widest(left) if left else None)
        self.tickets = [by_row[id(row)] for row in self.batch.rows]
        self.leaving, self.new = set(), []
