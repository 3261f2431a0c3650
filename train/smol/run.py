"""Train the second model: ``python -m train.smol.run [--resume] [--minutes M]``.

The two phases are those of ``train.run``: first projector and tower adapters learn to place in
each patch what its cell shows, next to SmolLM2's own embeddings of the words, then everything
learns descriptions and questions. SmolLM2 and DINOv2 stay as they are; low-rank adapters and the
projector are all that changes. Made for one GPU; a CPU does some steps for testing.
"""

from __future__ import annotations

import argparse
import os
import random
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch.nn import functional
from torch.utils.data import DataLoader
from transformers import LlavaForConditionalGeneration, LlavaProcessor, PreTrainedTokenizerFast

from train.data import ANSWER_WEIGHT, IGNORE
from train.grounding import ANSWERING, pointing_loss, token_targets
from train.model import run_decoder
from train.run import Recipe, Tower, Trainer, _adamw, fit
from train.scenes import sample_drill, sample_scene
from train.smol.data import Packed, SmolPacker, Steps, as_it_is, attend
from train.smol.inputs import INPUTS, use_font
from train.smol.model import (
    IMAGE_MEAN,
    IMAGE_STD,
    add_adapters,
    build,
    load_parts,
    load_trained,
    trained_state,
)
from train.world import COLUMNS, NAMES, ROWS

TRAINED = "trained.safetensors"


@dataclass(frozen=True)
class SmolRecipe(Recipe):
    """The training's numbers. Not tuned: no run on a GPU has been made yet."""

    tower_steps: int = 300
    tower_batch: int = 64
    steps: int = 4000
    batch: int = 32
    lr: float = 5e-4
    cells: float = 0.3
    pointing: float = 0.0  # attention is left to the language model
    drills: int = 16
    rank: int = 16  # of the decoder's adapters
    tower_rank: int = 8


class Cells(Tower):
    """Phase 1 in words of several tokens: their mean embedding stands for them."""

    def __init__(self, model: LlavaForConditionalGeneration, tokenizer: PreTrainedTokenizerFast):
        super().__init__(model, [], [])
        self.name_ids = pieces(tokenizer, [*NAMES, "nothing"])
        self.place_ids = pieces(tokenizer, [*ROWS, *COLUMNS])

    def words(self, ids: torch.Tensor) -> torch.Tensor:
        there = (ids >= 0)[..., None]
        table = self.model.get_input_embeddings().weight
        return (table[ids.clamp(min=0)] * there).sum(1) / there.sum(1)

    def forward(self, features: torch.Tensor) -> tuple[torch.Tensor, ...]:
        """As in :class:`Tower`, for any number of patches: a cell is the mean of its patches."""
        side = int(features.shape[1] ** 0.5)
        third = torch.arange(side, device=features.device) * 3 // side
        cell = functional.one_hot((3 * third[:, None] + third).flatten(), 9).to(features.dtype)
        cells = (cell / cell.sum(0)).T @ features
        cells = functional.rms_norm(cells, cells.shape[-1:])
        heads = (head(cells) for head in self.heads())
        return cells @ self.words(self.name_ids).T, *heads


def pieces(tokenizer: PreTrainedTokenizerFast, words: list[str]) -> torch.Tensor:
    """The tokens of each word as it stands inside a sentence, (words, most tokens), rest -1."""
    ids = [tokenizer(" " + word, add_special_tokens=False)["input_ids"] for word in words]
    most = max(map(len, ids))
    return torch.tensor([row + [-1] * (most - len(row)) for row in ids])


class SmolTrainer(Trainer):
    """A run on ``device``, its batches made by ``workers`` further processes (0: by this one)."""

    recipe: SmolRecipe

    def __init__(
        self,
        recipe: SmolRecipe,
        model: LlavaForConditionalGeneration,
        processor: LlavaProcessor,
        device: str = "cpu",
        workers: int = 0,
    ):
        self.recipe, self.processor, self.model = recipe, processor, model
        self.workers = workers
        torch.manual_seed(recipe.seed)
        add_adapters(model, recipe.rank, recipe.tower_rank)
        self.packer = SmolPacker(processor, model.config.image_seq_length)
        self.tower = Cells(model, processor.tokenizer).to(device)
        self.step = 0
        self.seconds = 0.0
        self._coming: Any = None
        self.calibrate()
        self.optimizer = self._optimizer()

    @torch.no_grad()
    def calibrate(self) -> None:
        """Starts the projector so that it takes in features of mean 0 and deviation 1 and gives out
        what is as large as the words' embeddings."""
        packed = Packed({}, [sample_scene(seed) for seed in self._seeds(0, 8)], 0).draw()
        projector = self.model.model.multi_modal_projector
        kept: list[torch.Tensor] = []
        hook = projector.register_forward_pre_hook(lambda _, args: kept.append(args[0].float()))
        with torch.autocast(self.model.device.type, torch.bfloat16):
            self._features(packed)
        hook.remove()
        mean, deviation = kept[0].mean((0, 1)), kept[0].std((0, 1)).clamp(min=1e-3)
        first, second = projector.linear_1, projector.linear_2
        first.weight.copy_(torch.randn_like(first.weight) * first.in_features**-0.5 / deviation)
        first.bias.copy_(-first.weight @ mean)
        second.weight.copy_(torch.randn_like(second.weight) * second.in_features**-0.5)
        second.bias.zero_()
        with torch.autocast(self.model.device.type, torch.bfloat16):
            size = self._features(packed).float().square().mean().sqrt()
        words = self.model.get_input_embeddings().weight.float().square().mean().sqrt()
        second.weight.mul_(words / size)

    def _optimizer(self) -> torch.optim.AdamW:
        tower = [p for p in self.model.model.vision_tower.parameters() if p.requires_grad]
        heads = [p for head in self.tower.heads() for p in head.parameters()]
        rest = [*self.model.model.multi_modal_projector.parameters(), *heads]
        if self.in_tower:
            return _adamw([{"params": [*tower, *rest]}])
        decoder = [p for p in self.model.model.language_model.parameters() if p.requires_grad]
        return _adamw(
            [
                {"params": [*decoder, *rest], "scale": 1.0},
                {"params": tower, "scale": self.recipe.tower_lr_share},
            ]
        )

    # Batches --------------------------------------------------------------------------------

    def make(self, step: int) -> Packed:
        """What ``step`` trains on: depends on the seed and the step alone."""
        recipe = self.recipe
        drills = [sample_drill(seed) for seed in self._seeds(step * recipe.drills, recipe.drills)]
        if step < recipe.tower_steps:
            size = recipe.tower_batch
            scenes = [sample_scene(seed) for seed in self._seeds(step * size, size)]
            return Packed({}, scenes + drills, 0)
        at = step - recipe.tower_steps
        first = recipe.tower_steps * recipe.tower_batch + at * recipe.batch
        seeds = self._seeds(first, recipe.batch)
        pairs = at >= recipe.pairs_from * recipe.steps
        if pairs and random.Random(seeds[0]).random() < recipe.pairs:
            packed = self.packer.pair(seeds[: max(1, recipe.batch // 2)])
        else:
            packed = self.packer.quiz(seeds) if at % 2 else self.packer.single(seeds)
        return replace(packed, scenes=packed.scenes + drills)

    def _next(self) -> Packed:
        if self._coming is None:
            self._coming = iter(
                DataLoader(
                    Steps(self.make, self.last),
                    sampler=range(self.step, self.last),
                    batch_size=None,
                    num_workers=self.workers,
                    collate_fn=as_it_is,
                    prefetch_factor=4 if self.workers else None,
                )
            )
        packed: Packed = next(self._coming)
        return packed

    def _features(self, packed: Packed) -> torch.Tensor:  # type: ignore[override]
        """The projected patches of all images, (V, patches, hidden)."""
        pixels = torch.as_tensor(packed.pixels).to(self.model.device)
        pixels = pixels.permute(0, 3, 1, 2).float()
        side = self.model.config.vision_config.image_size
        # What the image processor does, but for rounding to whole numbers in between.
        pixels = functional.interpolate(pixels, (side, side), mode="bicubic", antialias=True)
        mean, std = (
            torch.tensor(values, device=pixels.device)[:, None, None]
            for values in (IMAGE_MEAN, IMAGE_STD)
        )
        images = (pixels.clamp(0, 255) / 255 - mean) / std
        weights = self.model.model.vision_tower.embeddings.patch_embeddings.projection.weight
        return torch.stack(
            list(self.model.get_image_features(images.to(weights.dtype)).pooler_output)
        )

    # Losses ---------------------------------------------------------------------------------

    def _tower_loss(self) -> tuple[torch.Tensor, dict[str, float]]:
        packed = self._next()
        return self.tower.loss(self._features(packed), packed.scenes)

    def _loss(self) -> tuple[torch.Tensor, dict[str, float]]:
        packed = self._next()
        fields = {k: torch.as_tensor(v).to(self.model.device) for k, v in packed.tokens.items()}
        ids, labels = fields["input_ids"], fields["labels"]
        looks = attend(fields["segments"])
        features = self._features(packed)
        last, entering, rotary = run_decoder(
            self.model, ids, features[: packed.shown], fields["position_ids"], looks
        )
        cells, figures = self.tower.loss(features, packed.scenes)
        learnt = labels[:, 1:] != IGNORE
        logits = self.model.lm_head(last[:, :-1][learnt]).float()
        labels, weights = labels[:, 1:][learnt], fields["weights"][:, 1:][learnt].float()
        losses = functional.cross_entropy(logits, labels, reduction="none")
        right = (logits.argmax(-1) == labels).float()
        read = fields["sought"][:, :-1][learnt] != 0  # what comes next is read off a cell
        answer = weights == ANSWER_WEIGHT
        if self.recipe.pointing:
            bits = token_targets(ids, self.model.config.image_token_id, features.shape[1])
            for layer in (0, *(at for at in ANSWERING if at < len(entering))):
                wanted = fields["sought"] if layer else fields["named"]
                pointing, mass = pointing_loss(
                    self.model, layer, entering[layer], rotary, looks, wanted, bits
                )
                cells, figures[f"at{layer}"] = cells + self.recipe.pointing * pointing, mass.item()
        loss = (losses * weights).sum() / weights.sum() + self.recipe.cells * cells
        return loss, figures | {
            "told": losses.mean().item(),
            "described": right[read & ~answer].mean().item(),
            "answered": right[answer & (labels != self.packer.tokenizer.eos_token_id)]
            .mean()
            .item(),
        }

    # Files ----------------------------------------------------------------------------------

    def _learning(self) -> dict[str, torch.Tensor]:
        return trained_state(self.tower)

    def save(self, folder: Path) -> None:
        """Writes ``checkpoint.pt``, for resuming, and the trained part, for assembling."""
        folder.mkdir(parents=True, exist_ok=True)
        state = {
            "step": self.step,
            "seconds": self.seconds,
            "weights": self._learning(),
            "optimizer": self.optimizer.state_dict(),
        }
        torch.save(state, folder / "checkpoint.tmp")
        os.replace(folder / "checkpoint.tmp", folder / "checkpoint.pt")
        part = {
            name: p.to(torch.bfloat16).cpu().contiguous()
            for name, p in trained_state(self.model).items()
        }
        about = {
            "image_size": self.model.config.vision_config.image_size,
            "rank": self.recipe.rank,
            "tower_rank": self.recipe.tower_rank,
            "step": self.step,
            "minutes": round(self.seconds / 60),
        }
        save_file(part, folder / TRAINED, {name: str(value) for name, value in about.items()})

    def load(self, folder: Path) -> None:
        file = folder / "checkpoint.pt"
        if not file.exists():
            raise FileNotFoundError(f"no checkpoint in {folder}: start without --resume")
        state = torch.load(file, weights_only=True, map_location=self.model.device)
        self.step, self.seconds = state["step"], state["seconds"]
        load_trained(self.tower, state["weights"])
        self.optimizer = self._optimizer()
        self.optimizer.load_state_dict(state["optimizer"])
        self._coming = None


def main() -> None:
    recipe = SmolRecipe()
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--inputs", type=Path, default=INPUTS, help="of train.smol.inputs")
    parser.add_argument("--out", type=Path, default=Path("runs/smol/run"))
    parser.add_argument("--resume", action="store_true", help="go on from the checkpoint in --out")
    parser.add_argument("--minutes", type=float, help="stop after so long, with a checkpoint")
    parser.add_argument("--steps", type=int, default=recipe.steps, help="of phase 2")
    parser.add_argument("--tower-steps", type=int, default=recipe.tower_steps)
    parser.add_argument("--tower-batch", type=int, default=recipe.tower_batch)
    parser.add_argument("--batch", type=int, default=recipe.batch)
    parser.add_argument("--drills", type=int, default=recipe.drills)
    parser.add_argument("--lr", type=float, default=recipe.lr)
    parser.add_argument(
        "--pointing", type=float, default=recipe.pointing, help="weight of the pointing loss"
    )
    parser.add_argument("--image-size", type=int, default=336, help="336: 576 tokens, 224: 256")
    parser.add_argument("--seed", type=int, default=recipe.seed)
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--workers", type=int, default=max(0, (os.cpu_count() or 1) - 2))
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--save-every", type=float, default=3.0, help="minutes")
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    use_font(args.inputs)
    fields = ("steps", "tower_steps", "tower_batch", "batch", "drills", "lr", "pointing", "seed")
    model, processor = build(*load_parts(args.inputs), image_size=args.image_size)
    trainer = SmolTrainer(
        SmolRecipe(**{name: getattr(args, name) for name in fields}),
        model,
        processor,
        args.device,
        args.workers,
    )
    if args.resume:
        trainer.load(args.out)
    fit(trainer, args.out, args.minutes, args.save_every, export=False)


if __name__ == "__main__":
    main()
