"""docs/long-answers.md, from the JSON of benchmarks/long_answers.py."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from st3.tools.common.conditions import check_current, in_words
from st3.tools.common.style import canvas
from st3.tools.common.tables import markdown

PAGE, PICTURE = Path("docs/long-answers.md"), Path("docs/img/long-answers.png")
# Okabe and Ito's colours; a marker of its own for each line.
LOOKS = (("#4d4d4d", "o"), ("#e69f00", "v"), ("#009e73", "s"), ("#0072b2", "D"),
         ("#cc79a7", "^"), ("#d55e00", "X"), ("#999933", "P"), ("#56b4e9", "<"))  # fmt: skip

TOO_FAR = 0.1  # of the objects named untrimmed: behind that there is nothing left to lose

INTRO = """# Long answers and long conversations

Annealing hides visual tokens while text grows. So it shows where much text stands between the image
and what is said of it. Here the bundled model is first asked about things that are not in the image
("is there a cat?", "no"). These answers give nothing away. When 100, 200 or 400 tokens stand behind
the prompt, it is asked for a description, which is some 100 tokens long. All of it runs on one
cache.

* {items} scenes of the half that no setting was chosen on. [low, high] are 95 % bootstrap intervals
  over images.
* **made up**: of the objects named those that are not there (as CHAIR counts them).
* **first, middle, last**: objects by third of the reference's order, and so by place in the answer.
* **still seen**: visual tokens that a layer shows half way through the description, of all of them.
* *annealed alone* drops nothing in the prefill. *Evicted after the prefill* does not either, and
  then keeps 35 % in each layer. The other rows keep 35 % in the prefill, on average over layers.

![Objects named and made up, by tokens between prompt and description](img/{picture})

"""
REPRODUCE = """
## Reproduce

<!-- no-test: takes minutes on one core -->
```bash
python -m benchmarks.long_answers          # goes on where it was
python -m benchmarks.long_answers --page   # this page from benchmarks/results/long-answers.json
```
"""


def write_page(results: Path) -> list[Path]:
    """Write the page and its picture; the paths written.

    Raises:
        ValueError: results of a tree with changes, or of another version of the core.
    """
    found = json.loads(results.read_text(encoding="utf-8"))
    given, rows = found["conditions"], found["rows"]
    check_current(given)
    judged: list[dict[str, Any]] = []
    parts = [INTRO.format(items=given["items"], picture=PICTURE.name)]
    for distance in sorted({row["distance"] for row in rows}):
        own = [row for row in rows if row["distance"] == distance]
        tokens = max(row["tokens"] for row in own)
        title = f"{tokens:.0f} tokens in between" if distance else "Asked right away"
        named = own[0]["values"]["recall"][0]
        if named < TOO_FAR:
            said = (
                f"Untrimmed, the model names {named:.0%} of the objects here: it was not trained "
            )
            said += "to talk for so long. What annealing does there cannot be told with it."
            parts += [f"## {title}\n", said, ""]
            continue
        judged += own
        parts += [f"## {title}\n", table(own), ""]
    parts += [f"{in_words(given)}.", REPRODUCE]
    PAGE.write_text("\n".join(parts), encoding="utf-8")
    draw(judged, PICTURE)
    return [PAGE, PICTURE]


def table(rows: Sequence[dict[str, Any]]) -> str:
    """Markdown of one distance."""
    lines = []
    for row in rows:
        values = row["values"]
        lines.append([
            row["policy"], f"{row['visible']:.0%}", _cell(values["recall"]),
            *(f"{100 * values[name][0]:.1f}" for name in ("first", "middle", "last")),
            _cell(values["made_up"]),
        ])  # fmt: skip
    heads = ["", "still seen", "objects named, %", "first", "middle", "last", "made up, %"]
    return markdown(heads, lines)


def _cell(figure: Sequence[float]) -> str:
    value, low, high = (100 * part for part in figure)
    return f"{value:.1f} [{low:.1f}, {high:.1f}]"


def draw(rows: Sequence[dict[str, Any]], path: Path) -> None:
    """Objects named and made up against the distance, with intervals."""
    policies = list(dict.fromkeys(row["policy"] for row in rows))
    with canvas((9.6, 4.2)) as figure:
        panels: Any = figure.subplots(1, 2)
        for panel, name, title in zip(panels, ("recall", "made_up"),
                                      ("objects named, %", "objects made up, %"),
                                      strict=True):  # fmt: skip
            panel.grid()
            panel.set_title(title)
            panel.set_xlabel("tokens between the prompt and the description")
            panel.set_xticks(sorted({row["tokens"] for row in rows}))
            for place, (policy, (shade, mark)) in enumerate(zip(policies, LOOKS, strict=False)):
                own = [row for row in rows if row["policy"] == policy]
                xs = [row["tokens"] + 2 * (place - 3.5) for row in own]  # beside each other
                ys = [100 * row["values"][name][0] for row in own]
                panel.plot(xs, ys, color=shade, marker=mark, linewidth=1.4, label=policy)
                for x, row in zip(xs, own, strict=True):
                    low, high = (100 * part for part in row["values"][name][1:])
                    panel.plot([x, x], [low, high], color=shade, linewidth=0.8, alpha=0.6)
        figure.legend(*panels[0].get_legend_handles_labels(), loc="outside lower center", ncols=3)
        figure.savefig(path, dpi=110)
