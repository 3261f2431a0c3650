"""Where visual tokens lie: by construction, on the models and on the processors."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import AttentionInterface

from st3.engine.families import parts_of
from st3.grid import image_token
from st3.tiles import ANYRES, KNOWN, image_tiles, pack
from tests.zoo import FAMILIES, I, T, build


def _alone(module: Any, query: Tensor, key: Tensor, value: Tensor, *_: Any, **__: Any) -> Any:
    """Attention of each token to itself alone: what a patch shows stays where it is."""
    groups = query.shape[1] // value.shape[1]
    return value.repeat_interleave(groups, dim=1).transpose(1, 2), None


AttentionInterface.register("tests_alone", _alone)


@contextmanager
def local_vision(model: Any) -> Iterator[None]:
    text = {id(m) for m in parts_of(model).text.modules()}
    configs = {id(m.config): m.config for m in model.modules()
               if hasattr(m, "config") and id(m) not in text}  # fmt: skip
    names = {}
    for key, config in configs.items():
        names[key] = config._attn_implementation
        config._attn_implementation = "tests_alone"
    try:
        yield
    finally:
        for key, config in configs.items():
            config._attn_implementation = names[key]


class _Enough(Exception):
    pass


def embeddings(model: Any, batch: dict[str, Any]) -> Tensor:
    """What the text model gets, [T, D]."""
    seen = []

    def take(module: Any, args: Any, kwargs: dict[str, Any]) -> None:
        seen.append(kwargs["inputs_embeds"][0])
        raise _Enough

    hook = parts_of(model).text.register_forward_pre_hook(take, with_kwargs=True)
    with torch.no_grad(), local_vision(model), pytest.raises(_Enough):
        model(**batch)
    hook.remove()
    return seen[0]


MAPPED = [name for name, family in FAMILIES.items() if (family.model_type or name) in KNOWN
          or name in ("pixtral", "paligemma2")]  # fmt: skip


@pytest.mark.parametrize("name", MAPPED)
def test_a_tiles_pixels_reach_the_token_that_is_said_to_lie_there(name: str) -> None:
    family, model = build(name)
    rows: list[Any] = [T(3), I(), T(2)]
    if family.multi_image:
        rows = [T(3), I(), T(2), I(), T(2)]
    batch = family.inputs(model, [rows])
    visual = (batch["input_ids"][0] == image_token(model.config)).nonzero().flatten()
    pixels = batch["pixel_values"]
    # The tiles of a tensor of consecutive numbers say which pixels each cell is made of.
    numbered = torch.arange(pixels.numel(), dtype=torch.float64).view_as(pixels)
    tiles = image_tiles(model, {**batch, "pixel_values": numbered}, len(visual))
    # In models that pack tiles, their packing says which token a cell becomes, if any.
    counts = [tile.rows * tile.columns for tile in tiles]
    number = torch.arange(sum(counts)).float()
    if model.config.model_type in ANYRES:
        boxes = number.view(len(tiles), -1, 1).expand(-1, -1, 4)
        number = pack(model, batch, boxes)[:, 0]
    assert len(number) == len(visual)
    before = embeddings(model, batch)[visual]
    rng = torch.Generator().manual_seed(0)
    first = 0
    for tile, count in zip(tiles, counts, strict=True):
        high, wide = tile.pixels.shape[1] // tile.rows, tile.pixels.shape[2] // tile.columns
        for place in torch.randperm(count, generator=rng)[:2].tolist():
            row, column = divmod(place, tile.columns)
            cell = tile.pixels[:, row * high :, column * wide :][:, :high, :wide].flatten().long()
            changed = pixels.flatten().clone()
            changed[cell] += 3 * torch.randn(len(cell), generator=rng)
            after = embeddings(model, {**batch, "pixel_values": changed.view_as(pixels)})[visual]
            moved = (after - before).abs().amax(1) > 1e-4
            assert torch.equal(moved, number == first + place), (row, column)
        first += count
