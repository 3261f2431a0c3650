"""From records to figures: each with its interval and its paired difference to the untrimmed."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch

from st3.tools.eval import text
from st3.tools.eval.budget import Entry
from st3.tools.eval.data import CAPTION, KINDS, Dataset, Item
from st3.tools.eval.stats import Estimate, Metric, metric
from st3.tools.eval.store import Record

Pair = tuple[Item, Record]


@dataclass(frozen=True)
class Row:
    """The figures of one policy on items of one kind.

    Attributes:
        values: by name, see :data:`NAMES`.
        differences: to the untrimmed model, of those that it has.
        tasks: accuracy of each task.
        hard: how many answers, or objects, are hard at this budget.
        share, kv, flops: what is left on average, of 1; None: no cost model of this decoder.
        seconds: for each item, on average; the same number of tokens for every policy, except in
            conversations.
        time: seconds over the untrimmed model's.
    """

    entry: Entry
    values: dict[str, Estimate]
    differences: dict[str, Estimate]
    tasks: dict[str, Estimate]
    hard: int
    share: float
    kv: float
    flops: float | None
    seconds: float
    time: float


@dataclass(frozen=True)
class Summary:
    """The tables: for each kind of items its rows, the untrimmed model first."""

    rows: dict[str, list[Row]]
    items: dict[str, int]
    images: int
    notes: list[str] = field(default_factory=list)


NAMES: dict[str, str] = {
    "accuracy": "answers that are right",
    "recall": "objects named, of those in the reference",
    "first": "of those in the first third of the reference's order",
    "middle": "of those in the second third",
    "last": "of those in the last third",
    "made_up": "objects named that are not there, of all named",
    "hard": "right, or named, of what untrimmed is and with the image made smaller is not",
    "cider": "CIDEr-D",
    "bleu4": "BLEU-4",
    "rouge_l": "ROUGE-L",
    "loyal_answers": "answers that are the untrimmed ones, token by token",
    "loyal_tokens": "tokens of the untrimmed answers at the same place",
    "agreement": "tokens chosen as untrimmed, led along the untrimmed answers",
    "kl": "KL divergence of the next-token distribution, nats a token, along those",
}


def summarise(
    data: Dataset, entries: Sequence[Entry], records: Sequence[Record], notes: Sequence[str] = ()
) -> Summary:
    """The figures of a finished evaluation.

    Args:
        data: what was asked.
        entries: the policies, the untrimmed model first.
        records: of every item under every policy.
        notes: what a reader has to know of it.

    Raises:
        KeyError: a record is missing.
    """
    by_key = {record.key: record for record in records}
    rows: dict[str, list[Row]] = {}
    for kind in KINDS:
        items = [item for item in data.items if item.kind == kind]
        if not items:
            continue
        rows[kind] = []
        base: dict[str, Metric] = {}
        untrimmed = 0.0
        all_pairs = {
            entry.label: [(i, by_key[(i.task, i.number, entry.label)]) for i in items]
            for entry in entries
        }
        for entry in entries:
            pairs = all_pairs[entry.label]
            metrics = _metrics(kind, pairs, data.vocabulary)
            smaller = _smaller(entry, entries, pairs)
            if smaller is not None:
                whole, small = all_pairs[entries[0].label], all_pairs[smaller.label]
                metrics |= hard(kind, pairs, whole, small, data.vocabulary)
            seconds = sum(record.seconds for _, record in pairs) / len(pairs)
            if not rows[kind]:
                base, untrimmed = metrics, seconds
            rows[kind].append(_row(entry, pairs, metrics, base, seconds, seconds / untrimmed))
    images = len({image for item in data.items for image in item.images})
    return Summary(
        rows, {kind: len([i for i in data.items if i.kind == kind]) for kind in rows}, images,
        list(notes),
    )  # fmt: skip


def _row(
    entry: Entry,
    pairs: Sequence[Pair],
    metrics: dict[str, Metric],
    base: dict[str, Metric],
    seconds: float,
    time: float,
) -> Row:
    tasks = {}
    if "accuracy" in metrics:
        for task in dict.fromkeys(item.task for item, _ in pairs):
            own = _labelled([pair for pair in pairs if pair[0].task == task])
            if own:
                tasks[task] = _accuracy(own).estimate()
    flops = [record.flops for _, record in pairs if record.flops is not None]
    return Row(
        entry=entry,
        values={name: one.estimate() for name, one in metrics.items()},
        differences={n: one.difference(base[n]) for n, one in metrics.items() if n in base},
        tasks=tasks,
        hard=int(metrics["hard"].parts[:, 1].sum()) if "hard" in metrics else 0,
        share=sum(record.share for _, record in pairs) / len(pairs),
        kv=sum(record.kv for _, record in pairs) / len(pairs),
        flops=sum(flops) / len(flops) if len(flops) == len(pairs) else None,
        seconds=seconds,
        time=time,
    )


def _metrics(kind: str, pairs: Sequence[Pair], vocabulary: dict[str, str]) -> dict[str, Metric]:
    found: dict[str, Metric] = {}
    if kind == CAPTION:
        found |= _object_metrics(pairs, vocabulary)
        found |= _caption_metrics(pairs)
    else:
        labelled = _labelled(pairs)
        if labelled:
            found["accuracy"] = _accuracy(labelled)
    found["loyal_answers"] = _each(pairs, lambda i, r: (sum(r.loyal), len(r.loyal)))
    found["loyal_tokens"] = _each(pairs, lambda i, r: (r.same_place, r.tokens))
    if all(record.kl is not None for _, record in pairs):
        found["agreement"] = _each(pairs, lambda i, r: (r.agree or 0, r.tokens))
        found["kl"] = _each(pairs, lambda i, r: (r.kl or 0.0, r.tokens))
    return found


def _clusters(pairs: Sequence[Pair]) -> tuple[str, ...]:
    return tuple(str(item.images[0]) for item, _ in pairs)


def _each(pairs: Sequence[Pair], parts: Callable[[Item, Record], Sequence[float]]) -> Metric:
    return metric([parts(item, record) for item, record in pairs], _clusters(pairs))


def _labelled(pairs: Sequence[Pair]) -> list[Pair]:
    """Those whose right answers are known, of one turn at least."""
    return [pair for pair in pairs if any(turn.answers for turn in pair[0].turns)]


def _accuracy(pairs: Sequence[Pair]) -> Metric:
    return _each(pairs, lambda i, r: _share(_hits(i.kind, (i, r), {})))


def _share(hits: list[bool]) -> tuple[int, int]:
    return sum(hits), len(hits)


def _smaller(entry: Entry, entries: Sequence[Entry], pairs: Sequence[Pair]) -> Entry | None:
    """The row whose images show as much as this one's budget; None if there is none."""
    share = entry.shrink or entry.budget or sum(record.share for _, record in pairs) / len(pairs)
    near = [one for one in entries if one.shrink is not None and abs(one.shrink - share) < _NEAR]
    return min(near, key=lambda one: abs((one.shrink or 0) - share), default=None)


_NEAR = 0.03  # methods that have whole layers only miss their budget by less


def hard(
    kind: str,
    pairs: Sequence[Pair],
    whole: Sequence[Pair],
    small: Sequence[Pair],
    vocabulary: dict[str, str],
) -> dict[str, Metric]:
    """The share that is right of the hard answers (of descriptions: named, of the hard objects):
    those that are right untrimmed and wrong with a smaller image. Where a smaller image is as good,
    no method shows what it is for.

    Args:
        kind: one of :data:`~st3.tools.eval.data.KINDS`.
        pairs: each item with the record of the policy.
        whole: the same items untrimmed.
        small: the same items, untrimmed, with images as small as the policy's budget.
        vocabulary: the objects that may be named, phrase -> name.

    Source: group A of VTC-Bench (arXiv 2510.07143).
    """
    parts = []
    for own, first, second in zip(pairs, whole, small, strict=True):
        each = zip(*(_hits(kind, pair, vocabulary) for pair in (own, first, second)), strict=True)
        asked = [hit for hit, there, missed in each if there and not missed]
        parts.append((sum(asked), len(asked)))
    if not any(count for _, count in parts):
        return {}
    return {"hard": metric(parts, _clusters(pairs))}


def _hits(kind: str, pair: Pair, vocabulary: dict[str, str]) -> list[bool]:
    """Of each turn whose answer is known whether it is right, or of each object whether it is
    named."""
    item, record = pair
    if kind == CAPTION:
        said = text.mentioned(record.answers[0], vocabulary)
        return [vocabulary.get(name, name) in said for name in item.objects or ()]
    answers = zip(item.turns, record.answers, strict=True)
    return [text.is_right(own, turn.answers) for turn, own in answers if turn.answers]


def _object_metrics(pairs: Sequence[Pair], vocabulary: dict[str, str]) -> dict[str, Metric]:
    pairs = [pair for pair in pairs if pair[0].objects is not None]
    if not pairs:
        return {}
    counts: dict[str, list[tuple[int, int]]] = {
        name: [] for name in ("recall", "first", "middle", "last", "made_up")
    }
    for item, record in pairs:
        there = [vocabulary.get(name, name) for name in item.objects or ()]
        said = text.mentioned(record.answers[0], vocabulary)
        named = [name in said for name in there]
        thirds = [3 * place // max(len(there), 1) for place in range(len(there))]
        counts["recall"].append((sum(named), len(named)))
        for number, third in enumerate(("first", "middle", "last")):
            own = [hit for hit, place in zip(named, thirds, strict=True) if place == number]
            counts[third].append((sum(own), len(own)))
        counts["made_up"].append((len(set(said) - set(there)), len(said)))
    return {name: metric(rows, _clusters(pairs)) for name, rows in counts.items()}


def _caption_metrics(pairs: Sequence[Pair]) -> dict[str, Metric]:
    pairs = [pair for pair in pairs if pair[0].captions]
    if not pairs:
        return {}
    texts = [record.answers[0] for _, record in pairs]
    references = [item.captions for item, _ in pairs]
    clusters = _clusters(pairs)
    rouge = [text.rouge_l(own, group) for own, group in zip(texts, references, strict=True)]
    bleu = [text.bleu_counts(own, group) for own, group in zip(texts, references, strict=True)]
    return {
        "cider": metric([(score, 1) for score in text.cider_d(texts, references)], clusters),
        "bleu4": Metric(torch.stack(bleu).double(), clusters, text.bleu4),
        "rouge_l": metric([(score, 1) for score in rouge], clusters),
    }


def to_dict(summary: Summary, given: dict[str, Any]) -> dict[str, Any]:
    """Plain values, ready for JSON: each figure as [value, low, high].

    Args:
        summary: of a finished evaluation.
        given: the conditions.
    """
    return {
        "conditions": given,
        "images": summary.images,
        "notes": summary.notes,
        "kinds": {
            kind: {"items": summary.items[kind], "rows": [_row_dict(row) for row in rows]}
            for kind, rows in summary.rows.items()
        },
    }


def _row_dict(row: Row) -> dict[str, Any]:
    return {
        "policy": row.entry.label,
        "budget": row.entry.budget,
        "random_beside": row.entry.beside,
        "source": row.entry.source,
        "mean_share": row.share,
        "kv_mean": row.kv,
        "prefill_flops": row.flops,
        "seconds_per_item": row.seconds,
        "time": row.time,
        "values": {name: value.to_list() for name, value in row.values.items()},
        "differences": {name: value.to_list() for name, value in row.differences.items()},
        "tasks": {name: value.to_list() for name, value in row.tasks.items()},
        "hard_items": row.hard,
    }
