"""docs/quality.md, from the JSON of benchmarks/quality.py."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any, TypeVar

from st3.methods import DEFAULT_POLICY
from st3.tools.common.conditions import check_current, in_words
from st3.tools.common.tables import markdown

PAGE = Path("docs/quality.md")
PICTURES = ("quality-budget.png", "quality-time.png")
ALWAYS = ("none", DEFAULT_POLICY, "covered", "grid", "downsample")
ROWS = 10  # of a table, at most
QUESTIONS, CAPTIONS = "questions", "descriptions"
BARS = {0.35: 0.98, 0.2: 0.95}  # share of the untrimmed figure that the default is to keep
# Figure, heading, factor, digits.
COLUMNS = {
    "accuracy": ("right", 100, 1), "recall": ("objects named", 100, 1), "hard": ("hard", 100, 1),
    "last": ("last third", 100, 1), "made_up": ("made up", 100, 1), "kl": ("KL", 1, 3),
}  # fmt: skip

INTRO = """# What it costs in answers

Every method for images on the bundled model, st3-tiny, at equal mean visual share: 35 % and 20 % of
the visual tokens over the decoder layers. It is a small model: 16 layers, 144 visual tokens.

* **No setting was chosen on these scenes.** They are the half of the bundled set that is marked
  "report". Settings are chosen on the other half (`st3 eval --half choose`).
* **downsample** is the untrimmed model on an image made smaller to that share of its pixels, then
  brought back to its old size, because this model makes 144 tokens of any image. It saves nothing
  here. A model whose tokens follow the image would save all of it.
* **hard** is the share that is right of what the untrimmed model has right and downsample at this
  budget has wrong. What a smaller image shows as well needs no method.
* [low, high] are 95 % bootstrap intervals over images. **KL** is that of the next token from the
  untrimmed model's, nats a token, along the untrimmed answers.
* A table has at most {rows} rows: the baselines, this project's policies and the best of the
  others. All rows are in `{all}`.

[How it is measured](eval.md), also on your own model and images.
[What each choice of the default does](ablations.md).
"""
REPRODUCE = """
## Reproduce

<!-- no-test: takes an hour on one core -->
```bash
python -m benchmarks.quality          # goes on where it was
python -m benchmarks.quality --whole  # all items, fewer policies
python -m benchmarks.quality --page   # this page from benchmarks/results/quality-reported.json
```
"""

R = TypeVar("R")
MARK = "<!-- all items -->"


def write_page(results: Path, whole: Path | None = None) -> Path:
    """Write docs/quality.md; ``whole`` holds the results of all items, if they were asked.

    Raises:
        ValueError: results of a tree with changes, or of another version of the core.
    """
    found = json.loads(results.read_text(encoding="utf-8"))
    check_current(found["conditions"])
    text = page(found, results)
    if whole is not None and whole.is_file():
        more = json.loads(whole.read_text(encoding="utf-8"))
        check_current(more["conditions"])
        text = text.replace(MARK, of_whole(more))
    PAGE.write_text(text.replace(MARK, ""), encoding="utf-8")
    return PAGE


def page(found: dict[str, Any], results: Path) -> str:
    """The page's text."""
    given, kinds = found["conditions"], found["kinds"]
    all_rows = results.with_suffix(".md").as_posix()
    parts = [INTRO.format(rows=ROWS, all=all_rows), "## The default against its bars\n",
             bars(kinds), verdict(kinds), MARK]  # fmt: skip
    budgets = [row["budget"] for row in kinds[QUESTIONS]["rows"] if row["budget"] is not None]
    for kind, own in kinds.items():
        for budget in sorted(set(budgets), reverse=True):
            title = f"{kind[0].upper()}{kind[1:]} ({own['items']}) at {budget:.0%}"
            rows = chosen_rows([r for r in own["rows"] if r["budget"] in (None, budget)])
            parts += [f"## {title}\n", table(rows), ""]
        if tasks := by_task(own["rows"]):
            title = f"{kind[0].upper()}{kind[1:]}: right by task, %, at {max(budgets):.0%}"
            parts += [f"## {title}\n", tasks, ""]
    parts += [f"![{name}](img/{name})\n" for name in PICTURES]
    parts += [f"* {note}" for note in found["notes"]]
    parts += ["", f"{given['items']} items, {found['images']} images; greedy. {in_words(given)}; "
              "times beside other work on the machine.", REPRODUCE]  # fmt: skip
    return "\n".join(parts)


def of_whole(found: dict[str, Any]) -> str:
    """The same bars on all items, and the figures of each policy in short."""
    kinds, given = found["kinds"], found["conditions"]
    asked, said = kinds[QUESTIONS], kinds[CAPTIONS]
    lines = []
    for row, told in zip(asked["rows"], said["rows"], strict=True):
        budget = "-" if row["budget"] is None else f"{row['budget']:.0%}"
        lines.append([budget, _title(row), _cell(row, "accuracy"), _cell(row, "hard"),
                      _cell(row, "kl"), _cell(told, "recall"), _cell(told, "made_up")])  # fmt: skip
    lines.sort(key=lambda line: {"-": 0, "35%": 1}.get(line[0], 2))
    heads = ["budget", "policy", "right", "hard", "KL, answers", "objects named", "made up"]
    title = f"## On all {asked['items']} questions and {said['items']} descriptions of the half"
    return "\n".join([
        f"{title}\n", "Every item of these kinds, fewer policies: narrower intervals. "
        f"Commit {given.get('commit', 'unknown')}.\n",
        bars(kinds), markdown(heads, lines, left=(0, 1)), "",
    ])  # fmt: skip


def chosen_rows(rows: Sequence[R]) -> list[R]:
    """Of the rows of a table, of one budget or of all, those that are shown: the baselines, this
    project's policies, and the best of the others by right answers or objects named."""
    always = [row for row in rows if _source(row) in ALWAYS or _is_random(row)]
    others = [row for row in rows if row not in always]
    best: dict[str, float] = {}
    for row in others:
        best[_source(row)] = max(best.get(_source(row), 0.0), _main(row))
    names = sorted(best, key=lambda name: -best[name])
    budgets = len({_budget(row) for row in rows} - {None}) or 1
    room = ROWS - (len(always) - 1) // budgets - 1
    shown = [row for row in others if _source(row) in names[: max(0, room)]]
    return [row for row in rows if row in always or row in shown]


def _source(row: Any) -> str:
    return str(row["source"] if isinstance(row, dict) else row.entry.source)


def _budget(row: Any) -> float | None:
    found: float | None = row["budget"] if isinstance(row, dict) else row.entry.budget
    return found


def _is_random(row: Any) -> bool:
    return bool(row["random_beside"] if isinstance(row, dict) else row.entry.beside)


def _main(row: Any) -> float:
    values = row["values"] if isinstance(row, dict) else row.values
    found = values["accuracy" if "accuracy" in values else "recall"]
    return float(found[0] if isinstance(found, list) else found.value)


def table(rows: Sequence[dict[str, Any]]) -> str:
    """Markdown of one budget."""
    shown = [name for name in COLUMNS if any(name in row["values"] for row in rows)]
    heads = ["policy", "mean share", "KV", "FLOPs", "time"]
    for name in shown:
        heads += [COLUMNS[name][0]] + (["to untrimmed"] if name in ("accuracy", "recall") else [])
    lines = []
    for row in rows:
        flops = row["prefill_flops"]
        line = [_title(row), f"{row['mean_share']:.1%}", f"{row['kv_mean']:.1%}",
                "-" if flops is None else f"{flops:.1%}", f"{row['time']:.0%}"]  # fmt: skip
        for name in shown:
            line.append(_cell(row, name))
            if name in ("accuracy", "recall"):
                line.append(_change(row, name))
        lines.append(line)
    return markdown(heads, lines)


def _title(row: dict[str, Any]) -> str:
    return _source(row) if _is_random(row) else f"`{_source(row)}`"


def _cell(row: dict[str, Any], name: str) -> str:
    if name not in row["values"] or (name == "hard" and _source(row) == "downsample"):
        return "-"
    _, factor, digits = COLUMNS[name]
    value, low, high = (f"{factor * figure:.{digits}f}" for figure in row["values"][name])
    of = f" of {row['hard_items']}" if name == "hard" else ""
    return f"{value} [{low}, {high}]{of}"


def _change(row: dict[str, Any], name: str) -> str:
    if _source(row) == "none" or name not in row["differences"]:
        return "-"
    value, low, high = (f"{100 * figure:+.1f}" for figure in row["differences"][name])
    return f"{value} [{low}, {high}]"


def by_task(rows: Sequence[dict[str, Any]]) -> str:
    """Right answers by task, at the largest budget; empty if there is one task."""
    tasks = list(rows[0]["tasks"])
    if len(tasks) < 2:
        return ""
    most = max(row["budget"] for row in rows if row["budget"] is not None)
    shown = chosen_rows([row for row in rows if row["budget"] in (None, most)])
    lines = [
        [_title(row), *(f"{100 * row['tasks'][task][0]:.1f}" for task in tasks)] for row in shown
    ]
    return markdown(["policy", *tasks], lines)


FIGURES = (
    (QUESTIONS, "accuracy", "answers right"),
    (QUESTIONS, "hard", "hard answers right"),
    (CAPTIONS, "recall", "objects named"),
    (CAPTIONS, "hard", "hard objects named"),
)


def bars(kinds: dict[str, Any]) -> str:
    """What the default keeps of the untrimmed figures, and who is above it at its budget."""
    heads = ["budget", "figure", "untrimmed", f"`{DEFAULT_POLICY}`", "kept", "bar",
             "above it at this budget"]  # fmt: skip
    lines = []
    for budget, bar in BARS.items():
        for kind, name, title in FIGURES:
            rows = kinds.get(kind, {}).get("rows", [])
            ours = [r for r in rows if r["budget"] == budget and _source(r) == DEFAULT_POLICY]
            if not ours or name not in ours[0]["values"]:
                continue
            own = ours[0]["values"][name][0]
            whole = rows[0]["values"].get(name, [1.0])[0]
            above = sorted(
                (r for r in rows if r["budget"] == budget and name in r["values"]
                 and r["values"][name][0] > own + 1e-9),
                key=lambda r: -r["values"][name][0],
            )  # fmt: skip
            said = ", ".join(f"{_title(r)} {r['values'][name][0]:.1%}" for r in above[:4])
            said += f" and {len(above) - 4} more" if len(above) > 4 else ""
            kept = own / whole if whole else 1.0
            judged = "-" if name == "hard" else f"{bar:.0%}: {'met' if kept >= bar else 'missed'}"
            lines.append([f"{budget:.0%}", title, f"{whole:.1%}", f"{own:.1%}", f"{kept:.1%}",
                          judged, said or "none"])  # fmt: skip
    return markdown(heads, lines, left=(0, 1, 6)) + "\n"


def verdict(kinds: dict[str, Any]) -> str:
    """Whether one policy is at or above every other in all that is judged."""
    lines = []
    for budget in BARS:
        best = None
        for kind, name, _ in FIGURES:
            rows = [r for r in kinds.get(kind, {}).get("rows", [])
                    if r["budget"] == budget and name in r["values"]]  # fmt: skip
            if not rows:
                continue
            top = max(r["values"][name][0] for r in rows)
            here = {_title(r) for r in rows if r["values"][name][0] >= top - 1e-9}
            best = here if best is None else best & here
        said = "no policy is at or above every other in all four figures"
        if best:
            said = f"{', '.join(sorted(best))} is at or above every other in all four figures"
        lines.append(f"At {budget:.0%} {said}.")
    return " ".join(lines) + "\n"
