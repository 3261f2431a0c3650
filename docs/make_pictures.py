"""Draw docs/img/schedule.png: python docs/make_pictures.py"""

from __future__ import annotations

from pathlib import Path

import matplotlib
import matplotlib.pyplot as plt

import st3

matplotlib.use("Agg")
OUT = Path(__file__).parent / "img"
LAYERS, VISUAL = 32, 576
# Okabe and Ito's colours, which colour-blind readers tell apart.
COLOURS = {"st3-7b": "#0072B2", "fastv": "#E69F00", "vtw": "#009E73", "none": "#888888"}


def main() -> None:
    """The paper's 7B setting beside its baselines: by depth, and over the answer."""
    figure, (left, right) = plt.subplots(1, 2, figsize=(10, 3.6), dpi=160)
    for name, colour in COLOURS.items():
        schedule = st3.policies.parse(name).schedule(LAYERS)
        kept = [schedule.kept(layer, VISUAL) for layer in range(LAYERS)]
        label = f"{name} (mean {schedule.mean_share:.0%})"
        left.step(range(LAYERS), kept, where="mid", color=colour, label=label, lw=2)
        steps = range(0, 301, 2)
        shown = [
            sum(schedule.visible(layer, VISUAL, step) for layer in range(LAYERS)) / LAYERS
            for step in steps
        ]
        right.plot(steps, shown, color=colour, lw=2)
    left.set(title="Prefill: visual tokens kept", xlabel="decoder layer", ylabel="visual tokens")
    right.set(title="Decode: visual KV entries shown", xlabel="generated tokens")
    right.set_ylabel("mean over the layers")
    for axis in (left, right):
        axis.set_ylim(0, VISUAL * 1.05)
        axis.grid(alpha=0.3)
        axis.spines[["top", "right"]].set_visible(False)
    left.legend(frameon=False, fontsize=9, loc=(0.54, 0.6))
    figure.suptitle(f"{LAYERS} layers, {VISUAL} visual tokens", fontsize=11)
    figure.tight_layout()
    OUT.mkdir(exist_ok=True)
    figure.savefig(OUT / "schedule.png", facecolor="white")


if __name__ == "__main__":
    main()
