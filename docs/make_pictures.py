"""Draw the pictures of the documentation: python docs/make_pictures.py

docs/img/schedule.png, and the gallery: docs/img/gallery-* and docs/pages/*, with the bundled model.
`--schedule` draws the first alone. A few minutes on two cores.
"""

from __future__ import annotations

import os
import shutil
import sys
import tempfile
from pathlib import Path

import st3
from st3.tools.cli import app
from st3.tools.common.palette import looks
from st3.tools.common.style import canvas

HERE = Path(__file__).resolve().parent
OUT, PAGES = HERE / "img", HERE / "pages"
LAYERS, VISUAL = 32, 576
POLICIES = ("balanced", "st3", "fastv", "vtw", "none")
PROMPT = "describe the image in detail."


def schedule() -> None:
    """The default policy, the paper's and baselines: by depth, and over the answer."""
    with canvas((10, 3.6)) as figure:
        left, right = figure.subplots(1, 2)
        colours = [look[0] for look in looks(POLICIES).values()]
        for name, colour in zip(POLICIES, colours, strict=True):
            counts = st3.parse(name).schedule(LAYERS)
            kept = [counts.kept(layer, VISUAL) for layer in range(LAYERS)]
            label = f"{name} (mean {counts.mean_share:.0%})"
            left.step(range(LAYERS), kept, where="mid", color=colour, label=label, lw=2)
            steps = range(0, 301, 2)
            shown = [
                sum(counts.visible(layer, VISUAL, step) for layer in range(LAYERS)) / LAYERS
                for step in steps
            ]
            right.plot(steps, shown, color=colour, lw=2)
        left.set(title="Prefill: visual tokens kept", xlabel="decoder layer")
        left.set_ylabel("visual tokens")
        right.set(title="Decode: visual KV entries shown", xlabel="generated tokens")
        right.set_ylabel("mean over the layers")
        for axis in (left, right):
            axis.set_ylim(0, VISUAL * 1.05)
            axis.grid()
        left.legend(loc=(0.54, 0.5))
        figure.suptitle(f"{LAYERS} layers, {VISUAL} visual tokens")
        figure.savefig(OUT / "schedule.png", dpi=160)


def gallery() -> None:
    """A heat map, an animation, a run's page, the analysis and its figures, by the commands."""
    os.chdir(HERE.parent)  # the pages tell their commands: with paths from here
    image = Path(os.path.relpath(st3.sample_images()[0]))
    with tempfile.TemporaryDirectory() as scratch:
        run, seen = Path(scratch) / "run", Path(scratch) / "seen"
        command("generate", image, "-p", PROMPT, "--compare", "--heatmap", OUT / "gallery-kept.png",
                "--save", run)  # fmt: skip
        command("report", run, "--out", PAGES / "report.html",
                "--gif", OUT / "gallery-annealing.gif")  # fmt: skip
        command("analyze", "-i", image.parent, "-p", PROMPT, "-o", seen, "--max-new-tokens", 96)
        shutil.copy(seen / "analysis.html", PAGES)
        for figure in seen.glob("*.png"):
            shutil.copy(figure, OUT / f"gallery-{figure.name}")


def command(*words: object) -> None:
    """One st3 command, in this process."""
    code = app([str(word) for word in words], standalone_mode=False)
    if code:
        sys.exit(int(code))


if __name__ == "__main__":
    OUT.mkdir(exist_ok=True)
    PAGES.mkdir(exist_ok=True)
    schedule()
    if "--schedule" not in sys.argv[1:]:
        gallery()
