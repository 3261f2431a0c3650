"""A whole run: search on one half, time the finalists, confirm on the other half, decide."""

from __future__ import annotations

import contextlib
import json
import math
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from st3.methods.policies import parse
from st3.tools.eval.budget import Entry
from st3.tools.eval.data import CAPTION, Dataset, Item
from st3.tools.eval.evaluate import ANSWER_TOKENS, CAPTION_TOKENS, Evaluation
from st3.tools.eval.stats import LEVEL
from st3.tools.eval.store import Record, Store
from st3.tools.tune.candidates import BASELINES, Candidates
from st3.tools.tune.items import Quality, Questions, quality
from st3.tools.tune.measure import ROUNDS, Cost, costs, steps
from st3.tools.tune.search import Search, Trial

TIMED = 8  # finalists, at most
WORTH = 0.98  # of the untrimmed model's cost: what saves less is not worth a change
UNLABELLED_TOKENS = 64  # of an answer that is held against nothing but the untrimmed one
TIMES = "times.json"

Progress = Callable[[str, int], None]
"""Called with what is done now, and with how many steps are finished."""


@dataclass(frozen=True)
class Finalist:
    """A candidate that was timed, or held against the other half.

    Attributes:
        search, confirm: quality on the halves; None where it was not asked.
        lower: what is kept on the confirming half is not below this, with certainty ``level``.
        verdict: what became of it.
    """

    entry: Entry
    search: Quality | None
    cost: Cost | None
    share: float
    confirm: Quality | None = None
    lower: float | None = None
    level: float = LEVEL
    verdict: str = ""


@dataclass(frozen=True)
class Outcome:
    """What was found.

    Attributes:
        pick: the policy to use; None: stay untrimmed.
        nearest: where there is none, what came nearest to the goal.
        sure: whether the lower bound, too, meets the goal.
        finalists: the pick, the default, the baselines and all that was timed; by cost.
        trials: all candidates.
        narrowed: policies that were not tried at lower budgets, with the reason.
        untrimmed: cost of the untrimmed model.
    """

    pick: Finalist | None
    nearest: Finalist | None
    sure: bool
    finalists: tuple[Finalist, ...]
    trials: tuple[Trial, ...]
    narrowed: dict[str, str]
    untrimmed: Cost | None


@dataclass
class Tuning:
    """A run for one model and goal; what is finished is kept in ``store``.

    Args:
        sure: take only what meets the goal with its lower 95 % bound.
        max_new_tokens: longest answer; None: as :class:`~st3.tools.eval.Evaluation`, and 64 for
            questions without labels.
    """

    model: Any
    processor: Any
    given: Questions
    candidates: Candidates
    store: Store
    goal: float
    aim: str
    budgets: Sequence[float]
    sure: bool = False
    batch: int = 16
    max_new_tokens: int | None = None
    rounds: int = ROUNDS
    on_step: Progress = lambda what, count: None

    def __post_init__(self) -> None:
        if self.max_new_tokens is None and not self.given.labelled:
            self.max_new_tokens = UNLABELLED_TOKENS
        self.search = Search(
            self.given, self.candidates, self._answer, self.goal, self.aim, self.budgets
        )

    def steps(self) -> int:
        """About how many steps a run reports."""
        confirmed = (3 + len(BASELINES)) * len(self.given.confirm)
        return self.search.pairs() + steps(TIMED + 2, self.rounds) + confirmed

    def run(self) -> Outcome:
        """Everything.

        Raises:
            ValueError: nothing can be tried, or the untrimmed model has nothing right.
        """
        ranked = self.search.run()
        meets = [trial for trial in ranked if trial.quality.kept >= self.goal]
        chosen = self._to_time(meets or ranked[:3])
        untrimmed, *timed = self._timed([self.candidates.untrimmed, *(t.entry for t in chosen)])
        finalists = [
            Finalist(trial.entry, trial.quality, cost, trial.share)
            for trial, cost in zip(chosen, timed, strict=True)
        ]
        finalists.sort(key=self._cost)
        pick, seen = self._confirmed(finalists, {trial.entry.label for trial in meets})
        nearest = None
        if pick is None:
            nearest = max(seen.values(), key=self._kept)
        self._compared(pick or nearest, finalists, seen)
        finalists = [seen.pop(one.entry.label, one) for one in finalists] + list(seen.values())
        finalists = [self._judged(one, pick) for one in finalists]
        if pick is not None:
            pick = next(one for one in finalists if one.entry == pick.entry)
        return Outcome(
            pick, nearest,
            sure=pick is not None and pick.lower is not None and pick.lower >= self.goal,
            finalists=tuple(finalists),
            trials=tuple(self.search.trials.values()),
            narrowed=self.search.narrowed,
            untrimmed=untrimmed,
        )  # fmt: skip

    # Asking -------------------------------------------------------------------------------------

    def _answer(self, entries: Sequence[Entry], items: Sequence[Item]) -> list[Record]:
        data = Dataset(self.given.data.path, tuple(items), self.given.data.vocabulary)
        rows = [self.candidates.untrimmed, *entries]
        work = Evaluation(
            self.model, self.processor, data, rows, self.store, self.batch, self.max_new_tokens,
            lambda count, what: self.on_step(what, count),
        )  # fmt: skip
        return work.run()

    def _tokens(self, item: Item) -> int:
        if self.max_new_tokens is not None:
            return self.max_new_tokens
        return CAPTION_TOKENS if item.kind == CAPTION else ANSWER_TOKENS

    # Timing -------------------------------------------------------------------------------------

    def _cost(self, finalist: Finalist) -> float:
        return math.inf if finalist.cost is None else finalist.cost.of(self.aim)

    def _to_time(self, trials: Sequence[Trial]) -> list[Trial]:
        """The default, the best, and the cheapest by their counts, without those of the same."""
        default = self.search.trials[self.candidates.default.label]
        cheap = sorted(trials, key=lambda trial: trial.counted)
        found = {t.entry.label: t for t in (default, *trials[:1], *cheap)}
        return list(found.values())[: TIMED + 1]

    def _timed(self, entries: Sequence[Entry]) -> list[Cost]:
        """The costs, of the run's folder if they were measured before."""
        labels = [entry.label for entry in entries]
        path = None if self.store.folder is None else self.store.folder / TIMES
        known = _known(path)
        if not all(label in known for label in labels):
            found = costs(
                self.model, self.processor, self.given.search,
                [entry.policy for entry in entries], self._tokens, self.rounds,
                lambda: self.on_step("timing the finalists", 1),
            )  # fmt: skip
            known = dict(zip(labels, found, strict=True))
            if path is not None:
                text = json.dumps({label: asdict(cost) for label, cost in known.items()}, indent=1)
                path.write_text(text + "\n", encoding="utf-8")
        return [known[label] for label in labels]

    # Deciding -----------------------------------------------------------------------------------

    def _confirm(self, one: Finalist, level: float = LEVEL) -> Finalist:
        items = self.given.confirm
        records = self._answer([one.entry], items)
        seen = quality(self.given, items, records[1::2], records[::2])
        share = sum(record.share for record in records[1::2]) / len(items)
        return replace(one, confirm=seen, lower=seen.lower(level), level=level, share=share)

    def _kept(self, one: Finalist) -> float:
        """What is held against the goal."""
        seen = one.confirm.kept if one.confirm else 0.0
        return (one.lower or 0.0) if self.sure else seen

    def _confirmed(
        self, finalists: Sequence[Finalist], meets: set[str]
    ) -> tuple[Finalist | None, dict[str, Finalist]]:
        """The cheapest finalist that meets the goal on both halves. Each that fails makes the bound
        of the next one wider: having several tries is no proof."""
        seen: dict[str, Finalist] = {}
        able = [one for one in finalists if one.entry.label in meets and self._cost(one) <= WORTH]
        for tries, one in enumerate(able, 1):
            tried = self._confirm(one, 1 - (1 - LEVEL) / tries)
            if self._kept(tried) >= self.goal:
                seen[one.entry.label] = replace(tried, verdict="the pick")
                return seen[one.entry.label], seen
            seen[one.entry.label] = replace(tried, verdict="failed on the other half")
        if not seen:  # nothing was worth a try: show how near the best came
            best = max(finalists, key=lambda one: one.search.key if one.search else (0.0, 0.0))
            seen[best.entry.label] = self._confirm(best)
        return None, seen

    def _compared(
        self, shown: Finalist | None, finalists: Sequence[Finalist], seen: dict[str, Finalist]
    ) -> None:
        """The default, random choice and the even grid on the confirming half, the latter two at
        the mean share of what is shown."""
        rows = [self.candidates.default]
        for name in BASELINES if shown is not None else ():
            share = shown.entry.budget or round(shown.share, 3) if shown else 1.0
            with contextlib.suppress(ValueError):  # a share that it cannot have
                made = parse(name).at_budget(self.candidates.layers, share)
                rows.append(Entry(made, share, source=name))
        timed = {one.entry.label: one for one in finalists}
        for entry in rows:
            if entry.label not in seen:
                own = timed.get(entry.label, Finalist(entry, None, None, 1.0))
                seen[entry.label] = self._confirm(own)

    def _judged(self, one: Finalist, pick: Finalist | None) -> Finalist:
        """With a verdict in words."""
        if one.verdict:
            return one
        if one.search is not None and one.search.kept < self.goal:
            verdict = f"keeps {one.search.kept:.1%} on the searching half"
        elif one.cost is not None and self._cost(one) > WORTH:
            verdict = "hardly saves anything here"
        elif one.cost is None:
            verdict = "for comparison"
        elif pick is not None and self._cost(one) >= self._cost(pick):
            verdict = "costs more than the pick"
        else:
            verdict = "for comparison"
        return replace(one, verdict=verdict)


def _known(path: Path | None) -> dict[str, Cost]:
    if path is None or not path.is_file():
        return {}
    found = json.loads(path.read_text(encoding="utf-8"))
    return {label: Cost(**cost) for label, cost in found.items()}


def items_for(goal: float, level: float = LEVEL) -> int | None:
    """Items without a fault after which the goal is certain; None for a goal of everything."""
    return None if goal >= 1 else math.ceil(math.log(1 - level) / math.log(goal))
