"""Successive halving: many policies on few items, few policies on many."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

from st3.tools.eval.budget import Entry
from st3.tools.eval.data import Item
from st3.tools.eval.store import Record
from st3.tools.tune.candidates import BASELINES, Candidates
from st3.tools.tune.items import Quality, Questions, quality

FIRST = 4  # items, at least, on which a policy is first seen
NARROW, HALVE = 2 / 3, 1 / 3
FEWEST = 4  # candidates that go on, at least

Answer = Callable[[Sequence[Entry], Sequence[Item]], list[Record]]
"""Records of the untrimmed model and of these rows on these items, item by item."""


@dataclass(frozen=True)
class Trial:
    """A candidate, and how far it came.

    Attributes:
        quality: on the last items that it was asked.
        counted: cost by the counts of tokens, of the untrimmed model's: see :func:`counted`.
        reason: why it was not the one; empty while it is in the race.
    """

    entry: Entry
    quality: Quality
    counted: float
    share: float
    reason: str = ""


def counted(records: Sequence[Record], aim: str) -> float:
    """What a policy costs by its tokens, without a clock, so that a busy machine decides nothing
    early on: prefill FLOPs, KV bytes, or the mean of the two for whole answers."""

    def mean(values: Sequence[float]) -> float:
        return sum(values) / len(values)

    flops = mean([record.share if record.flops is None else record.flops for record in records])
    kv = mean([record.kv for record in records])
    return {"prefill": flops, "memory": kv, "end-to-end": (flops + kv) / 2}[aim]


class Search:
    """Over the searching half of the questions.

    Args:
        answer: asks the model.
        goal: share to be kept.
        aim: what is to be saved: end-to-end, prefill or memory.
        budgets: mean shares, tried from the largest on.

    Attributes:
        trials: all candidates by label.
        narrowed: by a policy as given, why it was not tried at lower budgets.
    """

    def __init__(
        self,
        given: Questions,
        candidates: Candidates,
        answer: Answer,
        goal: float,
        aim: str,
        budgets: Sequence[float],
    ) -> None:
        self.given, self.candidates, self.answer = given, candidates, answer
        self.goal, self.aim = goal, aim
        self.budgets = sorted(budgets, reverse=True)
        self.trials: dict[str, Trial] = {}
        self.narrowed: dict[str, str] = {}
        whole = len(given.search)
        first = min(whole, max(FIRST, whole // 5))
        self.sizes = (first, min(whole, max(first, whole // 2)), whole)

    def pairs(self) -> int:
        """About how many (item, policy) pairs a whole search asks."""
        rows, tried, done = float(len(self.candidates.policies)), 0.0, 0
        for _ in self.budgets:
            tried, rows = tried + rows, max(rows * NARROW, FEWEST)
        total = 0.0
        for size in self.sizes:
            total += tried * (size - done)
            tried, done = max(tried * HALVE, FEWEST), size
        return round(total)

    def run(self) -> list[Trial]:
        """The finalists: what is left on the whole half, the best first."""
        pool = self._narrow()
        for size in self.sizes[1:]:
            pool = self._ask(self._halve(pool), size)
        return sorted(pool, key=lambda trial: trial.quality.key, reverse=True)

    def _ask(self, entries: Sequence[Entry], size: int) -> list[Trial]:
        items = self.given.search[:size]
        records = self.answer(entries, items)
        width = len(entries) + 1
        rows = [records[place::width] for place in range(width)]
        found = []
        for entry, own in zip(entries, rows[1:], strict=True):
            seen = quality(self.given, items, own, rows[0])
            share = sum(record.share for record in own) / len(own)
            trial = Trial(entry, seen, counted(own, self.aim), share)
            self.trials[entry.label] = trial
            found.append(trial)
        return found

    def _narrow(self) -> list[Trial]:
        """Every policy at the largest budget, and the better ones at the next: what loses much
        with many tokens does not win with fewer."""
        names = [str(policy) for policy in self.candidates.policies]
        pool = self._ask([self.candidates.default], self.sizes[0])
        for budget in self.budgets:
            entries = [e for e in self.candidates.at(budget, names) if e.label not in self.trials]
            asked = self._ask(entries, self.sizes[0]) if entries else []
            pool += asked
            best = sorted(asked, key=lambda trial: trial.quality.key, reverse=True)
            count = max(FEWEST, math.ceil(NARROW * len(best)))
            always = {*BASELINES, self.candidates.default.source}
            for place, trial in enumerate(best[count:], count + 1):
                source = trial.entry.source
                if source not in always:
                    names.remove(source)
                    self.narrowed[source] = (
                        f"not tried below {budget:.0%}: {place} of {len(best)} there"
                    )
        return pool

    def _halve(self, pool: Sequence[Trial]) -> list[Entry]:
        """A third of them, by fronts: first those that no other one beats in both cost and quality,
        then those that only the first ones beat. Others get their reason."""
        count = max(FEWEST, math.ceil(HALVE * len(pool)))
        able = [trial for trial in pool if self._reachable(trial)]
        rest = [trial for trial in pool if not self._reachable(trial)]
        rest.sort(key=lambda trial: trial.quality.key, reverse=True)
        chosen: list[Trial] = []
        while able and len(chosen) < count:
            front = [trial for trial in able if not any(_beats(one, trial) for one in able)]
            chosen += self._ordered(front)[: count - len(chosen)]
            able = [trial for trial in able if trial not in front]
        chosen += rest[: max(0, min(FEWEST, count) - len(chosen))]
        entries = [trial.entry for trial in chosen]
        for trial in pool:
            if trial.entry not in entries:
                self._reject(trial, self._why(trial, chosen))
        if self.candidates.default not in entries:  # always to be compared with
            entries.append(self.candidates.default)
        return entries

    def _ordered(self, front: Sequence[Trial]) -> list[Trial]:
        """The best, as what to fall back on; then what meets the goal, the cheapest first."""
        best = max(front, key=lambda trial: trial.quality.key)
        return sorted(
            front,
            key=lambda t: (t is not best, t.quality.kept < self.goal, self._rank(t)),
        )

    def _rank(self, trial: Trial) -> float:
        return trial.counted if trial.quality.kept >= self.goal else -trial.quality.kept

    def _reachable(self, trial: Trial) -> bool:
        """Whether the goal may still be met: what is kept on these items is no more than about two
        standard errors below it."""
        return trial.quality.kept + 2 * trial.quality.error >= self.goal

    def _why(self, trial: Trial, chosen: Sequence[Trial]) -> str:
        seen = f"{trial.quality.kept:.1%} of {self.given.unit} on {trial.quality.items} items"
        if not self._reachable(trial):
            return f"keeps {seen}: {100 * self.goal:g}% is out of reach"
        better = [one for one in chosen if _beats(one, trial)]
        if better:
            best = max(better, key=lambda one: one.quality.key)
            return f"{best.entry.title} is at least as good at no more cost ({seen})"
        return f"others keep more ({seen})"

    def _reject(self, trial: Trial, reason: str) -> None:
        self.trials[trial.entry.label] = replace(trial, reason=reason)


def _beats(one: Trial, other: Trial) -> bool:
    """At least as good in quality and in cost, and better in one of the two."""
    mine, its = (one.quality.key, -one.counted), (other.quality.key, -other.counted)
    return mine != its and mine[0] >= its[0] and mine[1] >= its[1]
