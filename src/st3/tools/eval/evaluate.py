"""Every policy on every item: the untrimmed model first, the others held against it."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

from st3.methods.policies import Policy
from st3.tools.eval.budget import Entry
from st3.tools.eval.data import CAPTION, TURNS, Dataset, Item
from st3.tools.eval.runs import Kept, Reference, Runner
from st3.tools.eval.store import Record, Store

ANSWER_TOKENS, CAPTION_TOKENS = 16, 160
_WARM_UP = 2
SEEDS = {"random choice": 0, "bootstrap": 0}
"""What is drawn in an evaluation: answers are greedy."""


@dataclass
class Evaluation:
    """A run of ``entries`` (the first is the untrimmed model) on a set.

    Args:
        max_new_tokens: longest answer; None: 160 for descriptions, 16 for questions.
        system: the system prompt of every item; None: none.
        on_items: called with the number of (item, policy) pairs that are finished further, and
            what is worked on.
    """

    model: Any
    processor: Any
    data: Dataset
    entries: Sequence[Entry]
    store: Store
    batch: int = 16
    max_new_tokens: int | None = None
    on_items: Callable[[int, str], None] = lambda count, what: None
    system: str | None = None

    def __post_init__(self) -> None:
        self.runner = Runner(self.model, self.processor, self.system)
        self._warm = False

    @property
    def missing(self) -> int:
        """(item, policy) pairs that are still to do."""
        return sum(len(self._missing(item)) for item in self.data.items)

    def run(self) -> list[Record]:
        """Do what is missing; all records of this set and these policies.

        Raises:
            ValueError: the model, a policy or an image cannot be used, or the store holds results
                of another policy of the same label.
        """
        self.store.use({entry.label: entry.identity for entry in self.entries})
        for batch, missing in self._batches():
            if not self._warm:  # the first call of a process pays for what later ones find ready
                self.runner.reference(batch[:1], _WARM_UP)
                self._warm = True
            for records in (
                self._talks(batch, missing) if _is_talk(batch) else self._batch(batch, missing)
            ):
                self.store.add(records)
                self.on_items(len(records), f"{records[0].task}: {records[0].policy}")
        return [
            self.store.records[(item.task, item.number, entry.label)]
            for item in self.data.items
            for entry in self.entries
        ]

    def _missing(self, item: Item) -> tuple[Entry, ...]:
        return tuple(
            e for e in self.entries if (item.task, item.number, e.label) not in self.store.records
        )

    def _batches(self) -> Iterator[tuple[list[Item], tuple[Entry, ...]]]:
        """Items that lack the same policies, together."""
        for task in self.data.tasks:
            groups: dict[tuple[Entry, ...], list[Item]] = defaultdict(list)
            for item in self.data.items:
                if item.task == task and (missing := self._missing(item)):
                    groups[missing].append(item)
            for missing, items in groups.items():
                kinds = {item.kind for item in items}
                for kind in sorted(kinds):
                    same = [item for item in items if item.kind == kind]
                    size = 1 if kind == TURNS else self.batch
                    for start in range(0, len(same), size):
                        yield same[start : start + size], missing

    def _tokens(self, item: Item) -> int:
        default = CAPTION_TOKENS if item.kind == CAPTION else ANSWER_TOKENS
        return default if self.max_new_tokens is None else self.max_new_tokens

    def _batch(self, items: list[Item], missing: Sequence[Entry]) -> Iterator[list[Record]]:
        longest = self._tokens(items[0])
        reference = self.runner.reference(items, longest)
        texts = self.runner.texts(reference.tokens)
        tokens = [self.runner.cut(row) for row in reference.tokens]
        for entry in missing:
            if entry is self.entries[0]:
                seconds, untouched = reference.seconds / len(items), Kept(1.0, 1.0, 1.0)
                yield [
                    _record(item, entry, [text], [row], [row], len(row), 0.0, seconds, untouched)
                    for item, text, row in zip(items, texts, tokens, strict=True)
                ]
            else:
                yield self._followed(items, entry, reference, texts, tokens, longest)

    def _followed(
        self,
        items: list[Item],
        entry: Entry,
        reference: Reference,
        texts: list[str],
        tokens: list[list[int]],
        longest: int,
    ) -> list[Record]:
        led = self.runner.follow(items, entry.policy, reference, entry.shrink)
        # Greedy answers are the untrimmed ones as long as every token would have been chosen.
        answers, own = list(texts), list(tokens)
        strayed = [i for i, row in enumerate(tokens) if led.agree[i] < len(row)]
        if strayed:
            own_items = [items[i] for i in strayed]
            given = self.runner.answers(own_items, entry.policy, longest, entry.shrink)
            for i, text, row in zip(strayed, *given, strict=True):
                answers[i], own[i] = text, row
        seconds = led.seconds / len(items)
        return [
            _record(item, entry, [answers[i]], [own[i]], [tokens[i]],
                    led.agree[i], led.kl[i], seconds, led.kept)
            for i, item in enumerate(items)
        ]  # fmt: skip

    def _talks(self, items: list[Item], missing: Sequence[Entry]) -> Iterator[list[Record]]:
        (item,) = items
        longest = self._tokens(item)
        untrimmed = self.runner.converse(item, self.entries[0].policy, longest)
        for entry in missing:
            first = entry is self.entries[0]
            talk = untrimmed
            if not first:
                talk = self.runner.converse(item, entry.policy, longest, entry.shrink)
            yield [
                _record(item, entry, talk.answers, talk.tokens, untrimmed.tokens,
                        None, None, talk.seconds, talk.kept)
            ]  # fmt: skip


def _is_talk(items: Sequence[Item]) -> bool:
    return items[0].kind == TURNS


def _record(
    item: Item,
    entry: Entry,
    answers: list[str],
    own: list[list[int]],
    untrimmed: list[list[int]],
    agree: int | None,
    kl: float | None,
    seconds: float,
    kept: Kept,
) -> Record:
    pairs = list(zip(own, untrimmed, strict=True))
    return Record(
        task=item.task,
        number=item.number,
        policy=entry.label,
        answers=answers,
        loyal=[a == b for a, b in pairs],
        tokens=sum(map(len, untrimmed)),
        same_place=sum(x == y for a, b in pairs for x, y in zip(a, b, strict=False)),
        agree=agree,
        kl=kl,
        seconds=seconds,
        share=kept.share,
        kv=kept.kv,
        flops=kept.flops,
    )


def label_policies(policies: Sequence[str]) -> list[Policy]:
    """Policies from strings; ``all`` stands for every registered one with its defaults.

    Raises:
        ValueError: no policy, or one that :func:`st3.methods.policies.parse` refuses.
    """
    from st3.methods.policies import available, parse

    found: list[Policy] = []
    for text in policies:
        if text == "all":
            found += [parse(name) for name in available() if name not in ("none", "random")]
        else:
            found.append(parse(text))
    if not found:
        raise ValueError("no policy to evaluate: give at least one, such as st3")
    return list(dict.fromkeys(found))
