"""What a run found: in a sentence, as policy.json, as Markdown and as one page."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from st3.methods.policies import NoTrim
from st3.methods.policies.saved import ModelFacts, to_dict
from st3.tools.common.conditions import in_words
from st3.tools.common.palette import color
from st3.tools.common.tables import markdown
from st3.tools.see.pages import render
from st3.tools.tune.items import Quality
from st3.tools.tune.measure import Cost
from st3.tools.tune.search import Trial
from st3.tools.tune.tuning import Finalist, Outcome, Tuning, items_for

GAINS = {
    "end-to-end": "of the untrimmed time",
    "prefill": "of the untrimmed time to the first token",
    "memory": "of the untrimmed KV bytes",
}


AXES = {
    "end-to-end": "time of the whole answer, of untrimmed",
    "prefill": "time to the first token, of untrimmed",
    "memory": "KV bytes read, of untrimmed",
}


def sentence(outcome: Outcome, work: Tuning) -> str:
    """The result in one sentence or two."""
    goal, unit = f"{100 * work.goal:g}%", work.given.unit
    count = len(work.given.confirm)
    if outcome.pick is None:
        near = outcome.nearest
        said = "" if near is None else f" Nearest: {near.entry.label}, {_seen(near, work)}."
        keeps = "is certain to keep" if work.sure else "keeps"
        return f"Untrimmed: nothing {keeps} {goal} of the {unit} and saves anything here.{said}"
    pick = outcome.pick
    said = f"{pick.entry.label}: {_seen(pick, work)}."
    if outcome.sure:
        return said
    needed = items_for(work.goal) if work.given.labelled else None
    more = f"; that takes about {needed} without a fault" if needed and needed > count else ""
    return f"{said} {count} items are too few to be sure of {goal}{more}."


def _seen(one: Finalist, work: Tuning) -> str:
    kept = one.confirm.kept if one.confirm else 0.0
    cost = "" if one.cost is None else f" at {one.cost.of(work.aim):.0%} {GAINS[work.aim]}"
    return (
        f"keeps {kept:.1%} of the {work.given.unit} (at least {one.lower or 0.0:.1%}, with "
        f"{one.level:.0%} certainty) on {len(work.given.confirm)} items that it was not chosen on"
        f"{cost}"
    )


def as_dict(
    outcome: Outcome, work: Tuning, model: ModelFacts, given: dict[str, Any]
) -> dict[str, Any]:
    """What policy.json holds; :func:`st3.parse` reads the first three."""
    policy = NoTrim() if outcome.pick is None else outcome.pick.entry.policy
    return {
        **to_dict(policy, model),
        "outcome": "untrimmed" if outcome.pick is None else "pick",
        "summary": sentence(outcome, work),
        "goal": {"kept": work.goal, "for": work.aim, "sure": work.sure},
        "evidence": {
            "counted": work.given.unit,
            "held_against": "labels" if work.given.labelled else "the untrimmed answers",
            "items": {"search": len(work.given.search), "confirm": len(work.given.confirm)},
            "certain": outcome.sure,
            "untrimmed": None if outcome.untrimmed is None else asdict(outcome.untrimmed),
            "finalists": [_finalist(one) for one in outcome.finalists],
            "candidates": [_trial(one) for one in outcome.trials],
            "narrowed": outcome.narrowed,
            "refused": dict(work.candidates.refused),
            "notes": work.given.notes,
        },
        "conditions": given,
    }


def _quality(seen: Quality | None) -> dict[str, Any] | None:
    return None if seen is None else {"kept": seen.kept, "kl": seen.kl, "items": seen.items}


def _finalist(one: Finalist) -> dict[str, Any]:
    return {
        "policy": one.entry.label,
        "name": one.entry.title,
        "verdict": one.verdict,
        "search": _quality(one.search),
        "confirm": _quality(one.confirm),
        "at_least": one.lower,
        "certainty": one.level,
        "mean_share": one.share,
        "cost": None if one.cost is None else asdict(one.cost),
    }


def _trial(one: Trial) -> dict[str, Any]:
    return {
        "policy": one.entry.label,
        "name": one.entry.title,
        "seen": _quality(one.quality),
        "counted_cost": one.counted,
        "mean_share": one.share,
        "rejected": one.reason,
    }


# Markdown ---------------------------------------------------------------------------------------

HEAD = (
    "policy", "mean share", "kept, searching half", "kept, other half", "at least",
    "first token", "whole answer", "KV read", "verdict",
)  # fmt: skip


def rows(outcome: Outcome) -> list[list[str]]:
    """The finalists as cells of :data:`HEAD`."""
    return [
        [
            one.entry.title, f"{one.share:.1%}", _kept(one.search), _kept(one.confirm),
            "-" if one.lower is None else f"{one.lower:.1%}",
            *_costs(one.cost), one.verdict,
        ]
        for one in outcome.finalists
    ]  # fmt: skip


def _kept(seen: Quality | None) -> str:
    return "-" if seen is None else f"{seen.kept:.1%}"


def _costs(cost: Cost | None) -> list[str]:
    if cost is None:
        return ["-"] * 3
    return [f"{value:.0%}" for value in (cost.first_ratio, cost.total_ratio, cost.kv_ratio)]


def notes(outcome: Outcome, work: Tuning) -> str:
    """What the columns are."""
    cost = outcome.untrimmed
    base = ""
    if cost is not None:
        base = (
            f" Untrimmed: {cost.first:.3f} s to the first tokens, {cost.total:.3f} s in all, "
            f"{cost.kv / (1 << 20):.2f} MiB of KV entries."
        )
    return (
        f"kept: {work.given.unit} of the untrimmed model's. The searching half "
        f"({len(work.given.search)} items) chose; the other half ({len(work.given.confirm)} items, "
        "other images) was not seen before. at least: one-sided bootstrap bound over images, as "
        "though one more item had been lost; its certainty is 95 % for the first policy held "
        "against the other half, and more for each after it. Times and KV bytes: of the untrimmed "
        f"model's, medians of {work.rounds} rounds in turn, vision tower included.{base}"
    )


def as_markdown(outcome: Outcome, work: Tuning, given: dict[str, Any]) -> str:
    """A page with the finalists."""
    tried = len(outcome.trials)
    lines = [
        f"# A policy for {given['model']}",
        "",
        sentence(outcome, work),
        "",
        markdown(HEAD, rows(outcome), left=(0, len(HEAD) - 1)),
        "",
        f"{tried} candidates were tried; policy.json names them all, with what became of each. "
        + notes(outcome, work),
        *[f"* {note}" for note in work.given.notes],
        "",
        f"{given['seconds']:.0f} s. {in_words(given)}. Command: `{given['command']}`",
    ]
    return "\n".join(lines) + "\n"


# The page ---------------------------------------------------------------------------------------


def html(outcome: Outcome, work: Tuning, data: dict[str, Any]) -> str:
    """The page as text: nothing in it is fetched from elsewhere."""
    given = data["conditions"]
    looks = {
        entry.label: color(entry.source)
        for entry in (*(o.entry for o in outcome.finalists), *(t.entry for t in outcome.trials))
    }
    shown = {
        **data,
        "axis": AXES[work.aim],
        "cost_of": {"end-to-end": "total_ratio", "prefill": "first_ratio", "memory": "kv_ratio"}[
            work.aim
        ],
        "colors": looks,
        "table_notes": notes(outcome, work),
        "conditions_in_words": in_words(given),
    }
    return render("tune", f"A policy for {given['model']}", shown)


def write(
    out: Path, outcome: Outcome, work: Tuning, model: ModelFacts, given: dict[str, Any]
) -> list[Path]:
    """Write policy.json and, beside it, the page and its Markdown.

    Returns:
        the files, policy.json first.

    Raises:
        OSError: one cannot be written.
    """
    data = as_dict(outcome, work, model, given)
    texts: Sequence[tuple[Path, str]] = (
        (out, json.dumps(data, indent=1, ensure_ascii=False) + "\n"),
        (out.with_suffix(".html"), html(outcome, work, data)),
        (out.with_suffix(".md"), as_markdown(outcome, work, given)),
    )
    for path, text in texts:
        path.write_text(text, encoding="utf-8")
    return [path for path, _ in texts]
