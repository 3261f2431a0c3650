"""Train st3-tiny: ``python -m train.run [--resume] [--minutes M]``.

Phase 1 trains the vision tower, the projector and the names' embeddings: the projected
patches of a cell, averaged, must look like the embedding of the object's name.  Phase 2
trains the whole model on descriptions and questions.  Without phase 1 nothing is grounded
for a long time, because a wrong tower teaches the decoder to guess from the grammar alone.

Each step's data and learning rate depend on the seed and the step's number only, so a
resumed run equals an uninterrupted one.
"""

from __future__ import annotations

import argparse
import copy
import json
import math
import os
import random
import shutil
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch.nn import functional
from tqdm import tqdm  # type: ignore[import-untyped]
from transformers import LlavaForConditionalGeneration

from train.data import ANSWER_WEIGHT, IGNORE, Packer, to_pixels
from train.grounding import ANSWERING, pointing_loss, token_targets
from train.model import build_config, build_model, run_decoder
from train.scenes import Scene, sample_drill, sample_scene
from train.tokenizer import build_processor
from train.world import BACKGROUNDS, COLUMNS, INKS, NAMES, ROWS


@dataclass(frozen=True)
class Recipe:
    """The training's numbers; the defaults are those at the end of the shipped model's run."""

    tower_steps: int = 450
    tower_batch: int = 48
    tower_lr: float = 1e-3
    steps: int = 2600  # of phase 2
    batch: int = 16
    lr: float = 8e-4
    tower_lr_share: float = 0.5  # of lr, in phase 2
    cells: float = 0.5  # weight of phase 1's loss in phase 2
    pointing: float = 1.0  # weight of the pointing loss, times that of the cells
    # Share of the rows whose text sees the image only down to a random depth.  Left to itself the
    # model reads the image in its last layers, too; large pretrained models hardly do
    # (arXiv 2412.20105, Fig. 4a; arXiv 2405.05803).
    shallow: float = 0.6
    depths: tuple[int, int] = (4, 12)
    drills: int = 12  # scenes full of digits and letters a step, for the cells' loss alone
    warmup: int = 100
    decay: float = 0.25  # share of the steps, at the end, in which lr falls to 0 by a cosine
    pairs_from: float = 0.75  # share of the steps after which two-image batches come in
    pairs: float = 0.08  # and their share from there on
    clip: float = 1.0
    seed: int = 0


class Tower(torch.nn.Module):
    """Phase 1: the cells' classifier; its heads are thrown away afterwards."""

    def __init__(
        self,
        model: LlavaForConditionalGeneration,
        name_ids: list[int],
        place_ids: list[int],
    ):
        super().__init__()
        self.model = model
        self.name_ids: torch.Tensor
        self.register_buffer("name_ids", torch.tensor(name_ids), persistent=False)
        hidden = model.config.text_config.hidden_size
        self.place_ids: torch.Tensor
        self.register_buffer("place_ids", torch.tensor(place_ids), persistent=False)
        self.size = torch.nn.Linear(hidden, 3)
        self.ink = torch.nn.Linear(hidden, len(INKS) + 1)
        self.background = torch.nn.Linear(hidden, len(BACKGROUNDS))

    def loss(
        self, features: torch.Tensor, scenes: list[Scene]
    ) -> tuple[torch.Tensor, dict[str, float]]:
        labels = tuple(column.to(features.device) for column in cell_labels(scenes))
        logits = self(features)
        losses = [
            functional.cross_entropy(out.flatten(0, 1).float(), want.flatten())
            for out, want in zip(logits, labels, strict=True)
        ]
        filled = labels[0] < len(NAMES)
        right = (logits[0].argmax(-1) == labels[0])[filled].float().mean()
        loss = losses[0] + 0.3 * sum(losses[1:]) + self.patch_loss(features, labels[0])
        return loss, {"names": right.item()}

    def patch_loss(self, features: torch.Tensor, names: torch.Tensor) -> torch.Tensor:
        """Each patch must look like the words for its cell's object, row and column.

        The decoder finds "the cat" and "top left" by these words, wherever it looks in a cell.
        """
        side = int(features.shape[1] ** 0.5)
        cell = torch.arange(side, device=features.device) * 3 // side
        grid = names.unflatten(1, (3, 3))[:, cell][:, :, cell].flatten()
        rows = cell[None, :, None].expand(len(features), side, side).flatten()
        columns = cell[None, None, :].expand(len(features), side, side).flatten()
        patches = functional.rms_norm(features, features.shape[-1:]).flatten(0, 1)
        loss = torch.zeros((), device=features.device)
        for ids, labels, weight in (
            (self.name_ids, grid, 0.5),
            (self.place_ids[:3], rows, 0.3),
            (self.place_ids[3:], columns, 0.3),
        ):
            logits = (patches @ self.words(ids).T).float()
            loss = loss + weight * functional.cross_entropy(logits, labels)
        return loss

    def words(self, ids: torch.Tensor) -> torch.Tensor:
        """The embeddings that stand for words, (words, hidden)."""
        return self.model.get_input_embeddings().weight[ids]

    def trained(self) -> list[torch.nn.Parameter]:
        parts = (self.model.model.vision_tower, self.model.model.multi_modal_projector)
        embeddings = self.model.get_input_embeddings()
        return [p for m in (*parts, embeddings, *self.heads()) for p in m.parameters()]

    def heads(self) -> tuple[torch.nn.Linear, ...]:
        return self.size, self.ink, self.background

    def forward(self, features: torch.Tensor) -> tuple[torch.Tensor, ...]:
        """Logits of the name, size, ink and background of each cell: (V, 9, classes) each.

        ``features`` are the projected patches (V, 144, hidden).
        """
        side = int(features.shape[1] ** 0.5)
        cells = features.unflatten(1, (3, side // 3, 3, side // 3)).mean(dim=(2, 4)).flatten(1, 2)
        cells = functional.rms_norm(cells, cells.shape[-1:])
        return (
            cells @ self.words(self.name_ids).T,
            self.size(cells),
            self.ink(cells),
            self.background(cells),
        )


def cell_labels(scenes: list[Scene]) -> tuple[torch.Tensor, ...]:
    """Classes of each cell's name (last: nothing), size, ink and background, (B, 9) each."""
    rows = []
    for scene in scenes:
        for cell in range(9):
            thing = scene.at(cell)
            name = NAMES.index(thing.name) if thing else len(NAMES)
            size = 0 if thing is None else 1 + (thing.size_word == "large")
            ink = 0 if thing is None or not thing.colour else 1 + list(INKS).index(thing.colour)
            rows.append((name, size, ink, list(BACKGROUNDS).index(scene.background)))
    return tuple(torch.tensor(column).view(-1, 9) for column in zip(*rows, strict=True))


def _adamw(groups: list[dict[str, Any]]) -> torch.optim.AdamW:
    return torch.optim.AdamW(groups, lr=0.0, betas=(0.9, 0.95), weight_decay=0.01, fused=True)


class Trainer:
    """The state of a run; ``step`` counts through both phases."""

    def __init__(self, recipe: Recipe, **sizes: int):
        self.recipe = recipe
        self.processor = build_processor()
        tokenizer = self.processor.tokenizer
        config = build_config(tokenizer, **sizes)
        self.model = build_model(config, recipe.seed)
        self.packer = Packer(tokenizer, config.image_seq_length)
        self.tower = Tower(
            self.model,
            tokenizer.convert_tokens_to_ids([*NAMES, "nothing"]),
            tokenizer.convert_tokens_to_ids([*ROWS, *COLUMNS]),
        )
        self.step = 0
        self.seconds = 0.0  # of training, over all resumes
        self.optimizer = self._optimizer()

    @property
    def in_tower(self) -> bool:
        return self.step < self.recipe.tower_steps

    @property
    def last(self) -> int:
        return self.recipe.tower_steps + self.recipe.steps

    def _optimizer(self) -> torch.optim.AdamW:
        if self.in_tower:
            return _adamw([{"params": self.tower.trained()}])
        tower = list(self.model.model.vision_tower.parameters())
        seen = set(map(id, tower))
        rest = [p for p in self.tower.parameters() if id(p) not in seen]
        groups = [
            {"params": rest, "scale": 1.0},
            {"params": tower, "scale": self.recipe.tower_lr_share},
        ]
        return _adamw(groups)

    def _lr(self) -> float:
        recipe, step = self.recipe, self.step
        if self.in_tower:
            peak, steps, decay = recipe.tower_lr, recipe.tower_steps, 0.7
        else:
            step -= recipe.tower_steps
            peak, steps, decay = recipe.lr, recipe.steps, recipe.decay
        left = min(1.0, (steps - step) / (decay * steps))
        return peak * min(1.0, (step + 1) / recipe.warmup) * math.sin(left * math.pi / 2) ** 2

    def advance(self) -> dict[str, float]:
        """One optimizer step; returns what is worth logging."""
        started = time.monotonic()
        lr = self._lr()
        for group in self.optimizer.param_groups:
            group["lr"] = lr * group.get("scale", 1.0)
        with torch.autocast(self.model.device.type, torch.bfloat16):
            loss, figures = self._tower_loss() if self.in_tower else self._loss()
        loss.backward()
        params = [p for group in self.optimizer.param_groups for p in group["params"]]
        torch.nn.utils.clip_grad_norm_(params, self.recipe.clip)
        self.optimizer.step()
        self.optimizer.zero_grad()
        self.step += 1
        if self.step == self.recipe.tower_steps:
            self.optimizer = self._optimizer()
        self.seconds += time.monotonic() - started
        return {"loss": loss.item(), **figures}

    def _tower_loss(self) -> tuple[torch.Tensor, dict[str, float]]:
        size = self.recipe.tower_batch
        scenes = [sample_scene(seed) for seed in self._seeds(self.step * size, size)]
        scenes += self._drills()
        return self.tower.loss(self._features(scenes), scenes)

    def _drills(self) -> list[Scene]:
        size = self.recipe.drills
        return [sample_drill(seed) for seed in self._seeds(self.step * size, size)]

    def _features(self, scenes: list[Scene]) -> torch.Tensor:
        """The projected patches, (V, 144, hidden)."""
        images = self.model.get_image_features(to_pixels(scenes)).pooler_output
        return torch.stack(list(images))

    def _loss(self) -> tuple[torch.Tensor, dict[str, float]]:
        recipe = self.recipe
        step = self.step - recipe.tower_steps
        seeds = self._seeds(
            recipe.tower_steps * recipe.tower_batch + step * recipe.batch, recipe.batch
        )
        pairs = step >= recipe.pairs_from * recipe.steps
        if pairs and random.Random(seeds[0]).random() < recipe.pairs:
            batch = self.packer.pair(seeds[: max(1, recipe.batch // 2)])
        elif step % 2:
            batch = self.packer.quiz(seeds)
        else:
            batch = self.packer.single(seeds)
        features = self._features(batch.scenes)
        last, entering, rotary = run_decoder(
            self.model,
            batch.input_ids,
            features,
            batch.position_ids,
            batch.attend,
            self._depths(seeds[0], len(batch.input_ids)),
        )
        cells, figures = self.tower.loss(features, batch.scenes)
        if recipe.drills:
            drills = self._drills()
            drilled, drilled_figures = self.tower.loss(self._features(drills), drills)
            cells, figures["drilled"] = cells + drilled, drilled_figures["names"]
        learnt = batch.labels[:, 1:] != IGNORE
        logits = self.model.lm_head(last[:, :-1][learnt]).float()
        labels, weights = batch.labels[:, 1:][learnt], batch.weights[:, 1:][learnt]
        losses = functional.cross_entropy(logits, labels, reduction="none")
        right = (logits.argmax(-1) == labels).float()
        told = torch.isin(labels, self.tower.name_ids)
        answer = weights == ANSWER_WEIGHT
        bits = token_targets(batch.input_ids, self.model.config.image_token_id, features.shape[1])
        for layer in (0, *(at for at in ANSWERING if at < len(entering))):
            wanted = batch.sought if layer else batch.named
            pointing, mass = pointing_loss(
                self.model, layer, entering[layer], rotary, batch.attend, wanted, bits
            )
            cells, figures[f"at{layer}"] = cells + recipe.pointing * pointing, mass.item()
        loss = (losses * weights).sum() / weights.sum() + recipe.cells * cells
        return loss, figures | {
            "told": losses.mean().item(),
            "described": right[told & ~answer].mean().item(),
            "answered": right[answer & (labels != self.packer.tokenizer.eos_token_id)]
            .mean()
            .item(),
        }

    def _depths(self, seed: int, rows: int) -> torch.Tensor:
        """The layer from which each row's text no longer sees the image, (B,)."""
        rng, recipe = random.Random(seed), self.recipe
        layers = self.model.config.text_config.num_hidden_layers
        return torch.tensor(
            [
                rng.randint(*recipe.depths) if rng.random() < recipe.shallow else layers
                for _ in range(rows)
            ]
        )

    def _seeds(self, first: int, count: int) -> range:
        start = self.recipe.seed * 10**7 + first
        return range(start, start + count)

    def compile(self) -> None:
        """Compiles the layers (about 1.5 times faster on a CPU; needs a C++ compiler)."""
        for layer in self.model.model.language_model.layers:
            layer.compile(dynamic=True)
        for layer in self.model.model.vision_tower.encoder.layers:
            layer.compile(dynamic=True)

    def save(self, folder: Path) -> None:
        """Writes ``checkpoint.pt`` at once or not at all."""
        folder.mkdir(parents=True, exist_ok=True)
        state = {
            "step": self.step,
            "seconds": self.seconds,
            "model": self.tower.state_dict(),
            "optimizer": self.optimizer.state_dict(),
        }
        torch.save(state, folder / "checkpoint.tmp")
        os.replace(folder / "checkpoint.tmp", folder / "checkpoint.pt")

    def load(self, folder: Path) -> None:
        file = folder / "checkpoint.pt"
        if not file.exists():
            raise FileNotFoundError(f"no checkpoint in {folder}: start without --resume")
        state = torch.load(file, weights_only=True)
        self.step, self.seconds = state["step"], state["seconds"]
        self.tower.load_state_dict(state["model"])
        self.optimizer = self._optimizer()
        self.optimizer.load_state_dict(state["optimizer"])

    def export(self, folder: Path) -> None:
        """A folder that ``from_pretrained`` loads: bf16 weights, configs and processor."""
        draft, old = folder.with_suffix(".draft"), folder.with_suffix(".old")
        shutil.rmtree(draft, ignore_errors=True)
        model = copy.deepcopy(self.model).to(torch.bfloat16)
        model.save_pretrained(draft)
        self.processor.save_pretrained(draft)
        if folder.exists():
            folder.rename(old)
        draft.rename(folder)
        shutil.rmtree(old, ignore_errors=True)


def fit(
    trainer: Trainer,
    out: Path,
    minutes: float | None = None,
    save_every: float = 5.0,
    export: bool = True,
) -> None:
    """Trains to the last step or for so many minutes, with checkpoints and a log in ``out``.

    ``export`` also writes the model beside ``out`` with every checkpoint of phase 2.
    """
    out.mkdir(parents=True, exist_ok=True)
    latest = out.with_name(out.name + "-latest")
    started = saved = time.monotonic()
    with tqdm(total=trainer.last, initial=trainer.step, mininterval=10) as bar:
        while trainer.step < trainer.last:
            figures = trainer.advance()
            bar.update()
            bar.set_postfix(
                {name: f"{value:.3f}" for name, value in figures.items()}, refresh=False
            )
            if trainer.step % 10 == 0:
                with (out / "log.jsonl").open("a") as log:
                    figures |= {"step": trainer.step, "seconds": round(trainer.seconds)}
                    log.write(json.dumps(figures) + "\n")
            now = time.monotonic()
            over = minutes is not None and now - started > 60 * minutes
            if now - saved > 60 * save_every or over or trainer.step == trainer.last:
                trainer.save(out)
                if export and not trainer.in_tower:
                    trainer.export(latest)
                saved = time.monotonic()
            if over:
                break


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, default=Path("runs/tiny"))
    parser.add_argument("--resume", action="store_true", help="go on from the checkpoint in --out")
    parser.add_argument("--minutes", type=float, help="stop after so long, with a checkpoint")
    parser.add_argument("--steps", type=int, default=Recipe.steps, help="of phase 2")
    parser.add_argument("--tower-steps", type=int, default=Recipe.tower_steps)
    parser.add_argument("--batch", type=int, default=Recipe.batch)
    parser.add_argument("--lr", type=float, default=Recipe.lr)
    parser.add_argument("--seed", type=int, default=Recipe.seed)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--save-every", type=float, default=5.0, help="minutes")
    parser.add_argument("--compile", action="store_true", help="needs a C++ compiler")
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    recipe = Recipe(
        tower_steps=args.tower_steps,
        steps=args.steps,
        batch=args.batch,
        lr=args.lr,
        seed=args.seed,
    )
    trainer = Trainer(recipe)
    if args.resume:
        trainer.load(args.out)
    if args.compile:
        trainer.compile()
    fit(trainer, args.out, args.minutes, args.save_every)


if __name__ == "__main__":
    main()
