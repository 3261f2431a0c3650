"""Write the bundled model: ``python -m train.export [--run runs/tiny]``.

Takes the run's checkpoint, writes bf16 weights, configs, tokenizer and processor to
``src/st3/assets/st3-tiny``, measures them on held-out scenes, and writes the model card with
these figures.  Sample images and the fixed test set are drawn with ``--images``.
"""

from __future__ import annotations

import argparse
import platform
from pathlib import Path
from typing import Any

import torch

from train.evaluate import MODEL, load, measure, table
from train.run import Recipe, Trainer
from train.scenes import HELD_OUT, sample_scene
from train.testset import example, held_out, write_set
from train.world import EMOJI, LETTERS

CARD = Path(__file__).with_name("card.md")
SAMPLES = Path("src/st3/assets/samples")
TEST_SET = Path("tests/data/scenes")
# The three sets of held-out scenes do not overlap.
MEASURED_FROM, TESTED_FROM, SAMPLED_FROM = 0, 500_000, 900_000


def write_card(
    folder: Path, figures: dict[str, Any], trainer: Trainer, hardware: str, notes: str
) -> None:
    """The model card, with what was measured and how."""
    recipe = trainer.recipe
    values = {
        "parameters": f"{sum(p.numel() for p in trainer.model.parameters()) / 1e6:.1f}",
        "megabytes": f"{(folder / 'model.safetensors').stat().st_size / 1e6:.0f}",
        "scenes": str(figures["scenes"]),
        "table": table(figures),
        "tower_images": f"{recipe.tower_steps * recipe.tower_batch:,}",
        "tower_steps": f"{recipe.tower_steps:,}",
        "steps": f"{trainer.step - recipe.tower_steps:,}",
        "images": f"{(trainer.step - recipe.tower_steps) * recipe.batch:,}",
        "batch": str(recipe.batch),
        "minutes": f"{trainer.seconds / 60:.0f}",
        "hardware": hardware,
        "torch": torch.__version__,
        "vocabulary": str(len(trainer.processor.tokenizer)),
        "objects": ", ".join(EMOJI),
        "letters": ", ".join(LETTERS),
        "notes": notes,
    }
    text = CARD.read_text()
    for name, value in values.items():
        text = text.replace("{{" + name + "}}", value)
    (folder / "README.md").write_text(text)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--run", type=Path, default=Path("runs/tiny"))
    parser.add_argument("--out", type=Path, default=MODEL)
    parser.add_argument("--tower-steps", type=int, default=Recipe.tower_steps, help="of the run")
    parser.add_argument("--scenes", type=int, default=200, help="held-out scenes to measure")
    parser.add_argument("--hardware", default=platform.processor() or platform.machine())
    parser.add_argument("--notes", default="", help="a paragraph about this run, for the card")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--images", action="store_true", help="draw samples and test set, too")
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    trainer = Trainer(Recipe(tower_steps=args.tower_steps))
    trainer.load(args.run)
    trainer.export(args.out)
    figures = measure(*load(args.out), held_out(args.scenes, MEASURED_FROM))
    write_card(args.out, figures, trainer, args.hardware, args.notes)
    if args.images:
        counts = (4, 4, 6, 6, 9, 9)
        seeds = range(HELD_OUT + SAMPLED_FROM, HELD_OUT + SAMPLED_FROM + len(counts))
        scenes = [sample_scene(seed, n) for seed, n in zip(seeds, counts, strict=True)]
        write_set(SAMPLES, map(example, scenes))
        write_set(TEST_SET, held_out(40, TESTED_FROM))
    print(table(figures))


if __name__ == "__main__":
    main()
