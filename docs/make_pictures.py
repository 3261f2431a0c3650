"""Draw the pictures of the documentation: python docs/make_pictures.py

docs/img/schedule*.png and demo*.png, and the gallery: docs/img/gallery-* and docs/pages/*, with the
bundled model. `--no-gallery` draws the first alone. A few minutes on two cores.
"""

from __future__ import annotations

import os
import shutil
import sys
import tempfile
import textwrap
from itertools import zip_longest
from pathlib import Path

from transformers import AutoModelForImageTextToText, AutoProcessor

import st3
from st3.methods import DEFAULT_POLICY
from st3.models import places
from st3.tools.cli import app
from st3.tools.common.chats import ask, encode
from st3.tools.common.images import open_image
from st3.tools.common.palette import color
from st3.tools.common.style import DARK, LIGHT, Theme, canvas
from st3.tools.see.heatmap import dimmed, fit

HERE = Path(__file__).resolve().parent
OUT, PAGES = HERE / "img", HERE / "pages"
LAYERS, VISUAL = 32, 576
POLICIES = tuple(dict.fromkeys((DEFAULT_POLICY, "balanced", "st3", "fastv", "vtw", "none")))
PROMPT = "describe the image in detail."
DEMO = 0  # of the sample images


def schedule() -> None:
    """The default policy, the paper's and baselines: by depth, and over the answer."""
    counts = {name: st3.parse(name).schedule(LAYERS) for name in POLICIES}
    order = sorted(POLICIES, key=lambda name: -counts[name].mean_share)
    for theme in (LIGHT, DARK):
        with canvas((6.6, 7.2), font=12, theme=theme) as figure:
            left, right = figure.subplots(2, 1)
            for name in order:
                colour, plan = color(name), counts[name]
                if theme is DARK:
                    colour = lighter(colour)
                kept = [plan.kept(layer, VISUAL) for layer in range(LAYERS)]
                known = "untrimmed" if name == "none" else name
                label = f"{known}: {plan.mean_share:.0%} on average"
                left.step(range(LAYERS), kept, where="mid", color=colour, label=label, lw=2)
                steps = range(0, 301, 2)
                shown = [
                    sum(plan.visible(layer, VISUAL, step) for layer in range(LAYERS)) / LAYERS
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
            figure.legend(*left.get_legend_handles_labels(), loc="outside lower center", ncols=2)
            figure.suptitle(f"{LAYERS} layers, {VISUAL} visual tokens")
            figure.savefig(OUT / f"schedule{suffix(theme)}.png", dpi=130)


def suffix(theme: Theme) -> str:
    return "" if theme is LIGHT else "-dark"


def lighter(colour: str) -> str:
    """For dark grounds: half way to white."""
    parts = [int(colour[i : i + 2], 16) for i in (1, 3, 5)]
    return "#" + "".join(f"{(part + 255) // 2:02x}" for part in parts)


def demo() -> None:
    """The first picture of the README: one question, both answers, and what three layers see."""
    folder = st3.bundled_model()
    model = AutoModelForImageTextToText.from_pretrained(folder)
    processor = AutoProcessor.from_pretrained(folder)
    image = open_image(st3.sample_images()[DEMO])
    inputs = encode(model, processor, [ask([image], PROMPT)])

    def answer() -> str:
        out = model.generate(**inputs, max_new_tokens=200, do_sample=False)
        new = out[0, inputs["input_ids"].shape[1] :]
        return str(processor.tokenizer.decode(new, skip_special_tokens=True)).strip()

    before = answer()
    with st3.trim(model) as trimmer:
        after = answer()
    report = trimmer.report
    found = places.places(
        model, inputs, [image], lambda drawn: encode(model, processor, [ask(drawn, PROMPT)])
    )
    kept = report.kept[0]
    layers = (1, len(kept) // 2 + 1, len(kept) - 1)
    panels = [("The picture: 144 visual tokens", fit(image))]
    for layer in layers:
        boxes = [box for i in report.kept_positions(layer).tolist() if (box := found[i].box)]
        panel = dimmed(fit(image), boxes)
        panels.append((f"Layer {layer} of {len(kept)} sees {kept[layer]}", panel))
    pairs = list(zip_longest(before.split(), after.split()))
    changed = sum(one != other for one, other in pairs)
    same = f"{changed} of {len(pairs)} words differ" if changed else "the same answer"
    flops = report.prefill_flops_ratio or 0.0
    facts = (
        f"{report.mean_share:.0%} of the visual tokens on average, {flops:.0%} of the prefill "
        f"FLOPs,\n{report.kv_mean_ratio:.0%} of the KV memory: {same}"
    )
    for theme in (LIGHT, DARK):
        with canvas((8, 11.4), font=15, theme=theme) as figure:
            figure.get_layout_engine().set(h_pad=0.12, w_pad=0.12)
            axes = figure.subplots(3, 2, gridspec_kw={"height_ratios": (4, 4, 2.2)})
            for axis, (title, picture) in zip(axes[:2].flat, panels, strict=True):
                axis.imshow(picture)
                axis.set_title(title)
                axis.axis("off")
            for axis, name, text in zip(
                axes[2], ("All visual tokens", "Trimmed"), (before, after), strict=True
            ):
                axis.axis("off")
                axis.set_title(name)
                lines = textwrap.wrap(from_difference(text, before, after), 31)
                shown = "\n".join(lines[:7]) + (" ..." if len(lines) > 7 else "")
                axis.text(0.0, 1, shown, va="top", fontsize=15, transform=axis.transAxes)
            figure.suptitle(f"Asked: \u201c{PROMPT}\u201d")
            figure.supxlabel(facts, fontsize=17)
            figure.savefig(OUT / f"demo{suffix(theme)}.png", dpi=120)


def from_difference(text: str, before: str, after: str) -> str:
    """An answer from some words before the two begin to differ."""
    pairs = zip(before.split(), after.split(), strict=False)
    same = next((i for i, (one, other) in enumerate(pairs) if one != other), 0)
    words = text.split()
    first = max(0, min(same - 6, len(words) - 32))
    return "... " * bool(first) + " ".join(words[first:])


def gallery() -> None:
    """A heat map, an animation, a run's page, the analysis and its figures, by the commands."""
    os.chdir(HERE.parent)  # the pages tell their commands: with paths from here
    image = Path(os.path.relpath(st3.sample_images()[0]))
    with tempfile.TemporaryDirectory() as scratch:
        run, seen = Path(scratch) / "run", Path(scratch) / "seen"
        kept = OUT / "gallery-kept.png"
        command("generate", image, "-p", PROMPT, "--max-new-tokens", 1, "--heatmap", kept)
        # Annealing is faster here than by default, so that it is seen in a short answer.
        command("generate", image, "-p", PROMPT, "--compare", "--policy", "balanced:tau=64",
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
    demo()
    if "--no-gallery" not in sys.argv[1:]:
        gallery()
