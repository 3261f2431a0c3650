"""Put the second model together: ``python -m train.smol.assemble --out FOLDER``.

The folder is one that ``from_pretrained`` loads: SmolLM2 and DINOv2 from their packages, the
projector and the adapters, merged into the weights, from the trained part.
"""

from __future__ import annotations

import argparse
from pathlib import Path

import torch
from safetensors import safe_open
from transformers import LlavaForConditionalGeneration, LlavaProcessor

from train.smol.inputs import INPUTS, collect
from train.smol.model import add_adapters, build, load_parts, load_trained, merge
from train.smol.run import TRAINED

SHIPPED = Path(__file__).with_name(TRAINED)
CARD = Path(__file__).with_name("card.md")


@torch.no_grad()
def assemble(inputs: Path, trained: Path) -> tuple[LlavaForConditionalGeneration, LlavaProcessor]:
    """The model, bf16, and its processor."""
    with safe_open(trained, "pt") as file:
        about = file.metadata()
        state = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
    model, processor = build(*load_parts(inputs), image_size=int(about["image_size"]))
    add_adapters(model, int(about["rank"]), int(about["tower_rank"]))
    load_trained(model, state)
    merge(model)
    return model, processor


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, required=True, help="the folder to write")
    parser.add_argument("--inputs", type=Path, default=INPUTS, help="collected if it is not there")
    parser.add_argument("--trained", type=Path, default=SHIPPED)
    args = parser.parse_args()
    if not args.trained.exists():
        parser.error(
            f"{args.trained} does not exist: train it with python -m train.smol.run, then pass "
            f"--trained runs/smol/run/{TRAINED}"
        )
    if not (args.inputs / "tower").is_dir():
        collect(args.inputs, args.inputs.with_name("wheels"))
    model, processor = assemble(args.inputs, args.trained)
    model.save_pretrained(args.out)
    processor.save_pretrained(args.out)
    (args.out / "README.md").write_text(CARD.read_text())
    print(f"{args.out}: st3 generate --model {args.out} IMAGE -p 'describe the image in detail.'")


if __name__ == "__main__":
    main()
