"""The tables of an evaluation, for the terminal and as Markdown."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

from st3.tools.common.conditions import in_words
from st3.tools.common.tables import markdown
from st3.tools.eval.data import CAPTION
from st3.tools.eval.stats import Estimate
from st3.tools.eval.summary import Row, Summary

Column = tuple[str, Callable[[Row], str]]

NOTES = """
[low, high]: 95 % bootstrap interval over images, 2,000 draws; differences to the untrimmed model
are paired. random: the counts of the policy above it, chosen at random. downsample: untrimmed, the
image made smaller to that share of its pixels (where a model makes as many tokens of any image,
brought to its old size again, so that it saves nothing). hard: of the answers, or objects, that
untrimmed has right and downsample at this budget has wrong. mean share: visual tokens
that a decoder layer sees at prefill. KV: live KV entries over the whole generation; FLOPs: of the
prefill; time: of the whole generation, the vision tower included, along the untrimmed answers (in
conversations: of each one's own answers); all of the untrimmed model's. loyal: answers, or tokens
at their place, that are the untrimmed ones. agree, KL: next tokens chosen as untrimmed, and KL
divergence (nats a token), along the untrimmed answers.
"""


def percent(value: float | None) -> str:
    return "-" if value is None else f"{value:.1%}"


def with_interval(one: Estimate, signed: bool = False) -> str:
    """``61.0% [55.8, 66.1]``; a difference in points, ``-3.2 [-5.0, -1.1]``.

    Args:
        one: a share, and the ends of its 95 % interval.
        signed: it is a difference.
    """
    if signed:
        return f"{100 * one.value:+.1f} [{100 * one.low:+.1f}, {100 * one.high:+.1f}]"
    return f"{one.value:.1%} [{100 * one.low:.1f}, {100 * one.high:.1f}]"


def _value(name: str) -> Callable[[Row], str]:
    return lambda row: with_interval(row.values[name]) if name in row.values else "-"


def _plain(name: str, scale: float = 100, digits: int = 1) -> Callable[[Row], str]:
    return lambda row: f"{scale * row.values[name].value:.{digits}f}" if name in row.values else "-"


def _change(name: str) -> Callable[[Row], str]:
    def cell(row: Row) -> str:
        known = name in row.differences and row.entry.source != "none"
        return with_interval(row.differences[name], signed=True) if known else "-"

    return cell


def _hard(row: Row) -> str:
    """``40.0% [21.1, 60.0] of 30``; the image made smaller has none of them, by choice."""
    if "hard" not in row.values or row.entry.shrink is not None:
        return "-"
    return f"{with_interval(row.values['hard'])} of {row.hard}"


_COST: list[Column] = [
    ("policy", lambda row: row.entry.title),
    ("mean share", lambda row: percent(row.share)),
    ("KV", lambda row: percent(row.kv)),
    ("FLOPs", lambda row: percent(row.flops)),
    ("time", lambda row: percent(row.time)),
]
_ANSWERS: list[Column] = [
    *_COST,
    ("right", _value("accuracy")),
    ("to untrimmed", _change("accuracy")),
    ("hard", _hard),
    ("loyal", _plain("loyal_answers")),
    ("agree", _plain("agreement")),
    ("KL", _plain("kl", 1, 3)),
]
_CAPTIONS: list[Column] = [
    *_COST,
    ("objects named", _value("recall")),
    ("to untrimmed", _change("recall")),
    ("hard", _hard),
    ("last third", _plain("last")),
    ("made up", _plain("made_up")),
    ("CIDEr-D", _plain("cider", 10)),
    ("BLEU-4", _plain("bleu4")),
    ("ROUGE-L", _plain("rouge_l")),
    ("loyal tokens", _plain("loyal_tokens")),
    ("agree", _plain("agreement")),
    ("KL", _plain("kl", 1, 3)),
]


# What a terminal has room for, and what it shows without its interval.
_BRIEF = (
    "policy", "mean share", "time", "right", "objects named", "to untrimmed", "hard", "loyal", "KL"
)  # fmt: skip
_SHORT = ("right", "objects named", "hard")


def columns(kind: str, rows: Sequence[Row], brief: bool) -> list[Column]:
    """The columns of a kind, without those that no row has anything in.

    Args:
        kind: one of :data:`~st3.tools.eval.data.KINDS`.
        rows: of that kind.
        brief: few enough for a terminal.
    """
    found = _CAPTIONS if kind == CAPTION else _ANSWERS
    shown: list[Column] = []
    for name, cell in found:
        if any(cell(row) != "-" for row in rows) and (not brief or name in _BRIEF):
            shown.append((name, _without_interval(cell) if brief and name in _SHORT else cell))
    return shown


def _without_interval(cell: Callable[[Row], str]) -> Callable[[Row], str]:
    return lambda row: cell(row).partition(" ")[0]


def by_task(rows: Sequence[Row]) -> list[Column]:
    """Accuracy of each task; empty if there is only one."""
    tasks = list(rows[0].tasks)
    if len(tasks) < 2:
        return []

    def of(task: str) -> Callable[[Row], str]:
        return lambda row: f"{100 * row.tasks[task].value:.1f}"

    return [_COST[0], _COST[1], *((task, of(task)) for task in tasks)]


def tables(summary: Summary, brief: bool = False) -> list[tuple[str, list[Column], list[Row]]]:
    """(title, columns, rows) of every table.

    Args:
        summary: of a finished evaluation.
        brief: few columns, and none by task: for a terminal.
    """
    found = []
    for kind, rows in summary.rows.items():
        title = f"{kind[0].upper()}{kind[1:]} ({summary.items[kind]})"
        found.append((title, columns(kind, rows, brief), rows))
        if tasks := by_task(rows):
            found.append((f"{title}: right by task, %", tasks, rows))
    return found


def as_markdown(summary: Summary, given: dict[str, Any], pictures: Sequence[str] = ()) -> str:
    """A page with all tables.

    Args:
        summary: of a finished evaluation.
        given: the conditions, as :func:`~st3.tools.common.conditions.conditions` has them.
        pictures: files to show, by their names.
    """
    lines = [f"# Quality of {given['model']}", ""]
    for title, names, rows in tables(summary):
        cells = [[cell(row) for _, cell in names] for row in rows]
        for row, line in zip(rows, cells, strict=True):
            if not row.entry.beside:
                line[0] = f"`{line[0]}`"
        lines += [f"## {title}", "", markdown([name for name, _ in names], cells), ""]
    lines += [f"![{name}]({name})\n" for name in pictures]
    lines += [f"* {note}" for note in summary.notes]
    lines += [
        "",
        f"{given['items']} items on {summary.images} images of {given['data']}; greedy. "
        f"{' '.join(NOTES.split())}",
        "",
        f"{in_words(given)}. Command: `{given['command']}`",
    ]
    return "\n".join(lines) + "\n"
