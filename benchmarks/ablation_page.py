"""The ablations' page and pictures, from their JSON."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from st3.tools.common.conditions import check_current, in_words
from st3.tools.common.palette import INK, color
from st3.tools.common.style import canvas
from st3.tools.common.tables import markdown

PAGE = Path("docs/ablations.md")
PICTURES = Path("docs/img/ablations")
QUESTIONS, CAPTIONS = "questions", "descriptions"
# Kind, figure, heading, factor, more is better.
FIGURES = (
    (QUESTIONS, "accuracy", "answers right, %", 100, True),
    (CAPTIONS, "recall", "objects named, %", 100, True),
    (QUESTIONS, "kl", "KL, answers", 1, False),
    (CAPTIONS, "kl", "KL, descriptions", 1, False),
)
THIRDS = (("first", "first third"), ("middle", "middle"), ("last", "last third"))

INTRO = """# Ablations

What each choice of the default policy, `thirds`, and then those of annealing and of the scores (on
`balanced` and `st3`), do to the answers of the bundled model,
st3-tiny, on {items} questions and descriptions of the half of its bundled scenes that settings are
chosen on, greedy. **KL** is the
divergence (nats a token) of the next token's distribution from the untrimmed model's, along the
untrimmed answers: it moves long before an answer changes. Intervals are 95 % bootstrap over images;
*differences are paired, to the first row of each table*. A small model of 16 layers is no
LLaVA-1.5-7B: run this on yours before you believe it there.
[What follows for the defaults](policies.md#how-the-defaults-were-chosen).

"""
OUTRO = """
## Reproduce

<!-- no-test: takes half an hour on one core -->
```bash
python -m benchmarks.ablations --limit 10  # 10 items of each task; goes on where it was
python -m benchmarks.ablations --page      # this page from benchmarks/results/ablations.json
```

{conditions}.
"""


def write_page(results: dict[str, Any]) -> list[Path]:
    """Write the page and a picture for each ablation; the paths written.

    Raises:
        ValueError: results of a tree with changes, or of another version of the core.
    """
    check_current(results["conditions"])
    PICTURES.mkdir(parents=True, exist_ok=True)
    items = sum(kind["items"] for kind in results["untrimmed"].values())
    lines = [INTRO.format(items=items), _untrimmed(results["untrimmed"])]
    written = [PAGE]
    for ablation in results["ablations"]:
        picture = PICTURES / f"{ablation['name']}.png"
        draw(ablation, results["untrimmed"], picture)
        written.append(picture)
        question = ablation["question"] + (
            "" if ablation["budget"] is None else f" (mean share {ablation['budget']:.0%})"
        )
        lines += [f"## {ablation['name'].capitalize().replace('-', ' ')}\n\n{question}.\n"]
        lines += [table(ablation), "", *[f"* {line}" for line in verdicts(ablation)], ""]
        lines += [f"![{ablation['name']}](img/ablations/{picture.name})\n"]
    lines.append(OUTRO.format(conditions=in_words(results["conditions"])))
    PAGE.write_text("\n".join(lines), encoding="utf-8")
    return written


def _figures(kinds: dict[str, Any]) -> list[tuple[str, str, str, int, bool]]:
    return [f for f in FIGURES if f[0] in kinds and f[1] in kinds[f[0]]["rows"][0]["values"]]


def _untrimmed(kinds: dict[str, Any]) -> str:
    parts = [
        f"{heading.partition(',')[0]} {factor * kinds[kind]['rows'][0]['values'][name][0]:.1f} %"
        for kind, name, heading, factor, _ in _figures(kinds)
        if name != "kl"
    ]
    return f"Untrimmed: {', '.join(parts)}.\n"


def table(ablation: dict[str, Any]) -> str:
    """Markdown: figures with their paired difference to the first row."""
    kinds = ablation["kinds"]
    shown = _figures(kinds)
    thirds = CAPTIONS in kinds and "first" in kinds[CAPTIONS]["rows"][0]["values"]
    heads = ["", "mean share", "KV", *(f[2] for f in shown)]
    heads += [name for _, name in THIRDS] if thirds else []
    heads.append("time")
    lines = []
    for number, label in enumerate(ablation["labels"]):
        rows = {kind: part["rows"][number] for kind, part in kinds.items()}
        any_row = rows.get(CAPTIONS) or rows[QUESTIONS]
        cells = [label, f"{any_row['mean_share']:.1%}", f"{any_row['kv_mean']:.1%}"]
        for kind, name, _, factor, _ in shown:
            value = factor * rows[kind]["values"][name][0]
            low, high = (factor * v for v in rows[kind]["differences"][name][1:])
            digits = 1 if factor == 100 else 3
            change = "" if number == 0 else f" [{low:+.{digits}f}, {high:+.{digits}f}]"
            cells.append(f"{value:.{digits}f}{change}")
        if thirds:
            cells += [f"{100 * rows[CAPTIONS]['values'][name][0]:.1f}" for name, _ in THIRDS]
        cells.append(f"{any_row['time']:.0%}")
        lines.append(cells)
    return markdown(heads, lines)


def verdicts(ablation: dict[str, Any]) -> list[str]:
    """One line a variant: where its paired interval excludes no difference to the first row."""
    kinds, (first, *others) = ablation["kinds"], ablation["labels"]
    lines = []
    for number, label in enumerate(others, 1):
        better, worse = [], []
        for kind, name, heading, _, more in _figures(kinds):
            _, low, high = kinds[kind]["rows"][number]["differences"][name]
            if low > 0 or high < 0:
                (better if (low > 0) == more else worse).append(heading.removesuffix(", %"))
        said = [f"better by {', '.join(better)}"] if better else []
        said += [f"worse by {', '.join(worse)}"] if worse else []
        lines.append(f"**{label}** against {first}: {'; '.join(said) or 'no difference shown'}.")
    return lines


def draw(ablation: dict[str, Any], untrimmed: dict[str, Any], path: Path) -> None:
    """A panel for each figure, the variants below each other with their intervals; in the panel of
    the objects the thirds of the text as well."""
    labels, kinds = ablation["labels"], ablation["kinds"]
    shown = _figures(kinds)
    with canvas((10.2, 1.25 + 0.36 * len(labels))) as figure:
        panels: Any = figure.subplots(1, len(shown), sharey=True, squeeze=False)[0]
        for panel, (kind, name, heading, factor, _) in zip(panels, shown, strict=True):
            panel.grid()
            rows = kinds[kind]["rows"]
            for place, label in enumerate(labels):
                value, low, high = (factor * v for v in rows[place]["values"][name])
                shade = color("random") if label == "random choice" else color("thirds")
                panel.plot([low, high], [place, place], color=shade, linewidth=1.4)
                first = place == 0
                panel.scatter([value], [place], color=shade, s=46 if first else 30, zorder=3,
                              marker="D" if first else "o")  # fmt: skip
                if name == "recall":
                    for third, mark in zip(THIRDS, "123", strict=True):
                        x = 100 * rows[place]["values"][third[0]][0]
                        panel.scatter([x], [place - 0.27], marker=f"${mark}$", color=INK, s=24,
                                      linewidths=0.3)  # fmt: skip
            if name != "kl":
                top = factor * untrimmed[kind]["rows"][0]["values"][name][0]
                panel.axvline(top, color=color("none"), linestyle=":", linewidth=1)
            panel.set_title(heading)
            panel.set_yticks(range(len(labels)), labels)
        panels[0].set_ylim(len(labels) - 0.6, -0.6)
        note = "diamond: what the others are compared with; dotted: untrimmed; bars: 95 %"
        if any(name == "recall" for _, name, *_ in shown):
            note += "; 1 2 3: objects of the first, middle, last third of the text"
        figure.supxlabel(note)
        figure.savefig(path, dpi=110)
