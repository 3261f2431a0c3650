"""Where visual tokens lie: by construction, on the models and on the processors."""

from __future__ import annotations

import inspect
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import pytest
import torch
import transformers
from PIL import Image
from torch import Tensor
from transformers import AttentionInterface

from st3.models import UnknownPlaces, config_family, families, find_parts
from st3.models.places import image_token, places
from tests.zoo import FAMILIES, I, T, V, build
from tests.zoo.base import features


def _alone(module: Any, query: Tensor, key: Tensor, value: Tensor, *_: Any, **__: Any) -> Any:
    """Attention of each token to itself alone: what a patch shows stays where it is."""
    groups = query.shape[1] // value.shape[1]
    return value.repeat_interleave(groups, dim=1).transpose(1, 2), None


AttentionInterface.register("tests_alone", _alone)


@contextmanager
def local_vision(model: Any) -> Iterator[None]:
    text = {id(m) for m in find_parts(model).text.modules()}
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

    hook = find_parts(model).text.register_forward_pre_hook(take, with_kwargs=True)
    with torch.no_grad(), local_vision(model), pytest.raises(_Enough):
        model(**batch)
    hook.remove()
    return seen[0]


KNOWN = {family.model_type for family in families() if family.layout.placed}
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
    layout = config_family(model.config).layout
    tiles = layout.tiles(model, {**batch, "pixel_values": numbered}, len(visual))
    # Models that pack tiles, or put tokens around their rows, say which token a cell becomes.
    counts = [tile.rows * tile.columns for tile in tiles]
    number = torch.arange(sum(counts)).float()
    number = layout.arrange(model, batch, tiles, number[:, None].split(counts))[:, 0]
    assert layout.pictures(model, batch, tiles, [3] * len(tiles)) == [3] * len(visual)
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


# From the picture to the token, through real processors ---------------------------------------


@dataclass(frozen=True)
class Real:
    """A zoo model with a real image processor of its geometry."""

    family: str
    processor: str
    options: dict[str, Any]
    size: tuple[int, int] = (72, 48)
    count: int = 1
    nested: bool = False

    def process(self, images: list[Image.Image]) -> dict[str, Any]:
        try:
            made = getattr(transformers, self.processor)(**self.options)
        except ImportError as error:  # transformers 5.17 has some for torchvision alone
            pytest.skip(str(error).strip().splitlines()[0])
        given = [images] if self.nested else images
        return dict(made(images=given, return_tensors="pt"))


SQUARE = {"height": 16, "width": 16}
REAL = {
    "crop": Real(
        "llava", "CLIPImageProcessor", {"size": {"shortest_edge": 16}, "crop_size": SQUARE}
    ),
    "stretch": Real("llava", "SiglipImageProcessor", {"size": SQUARE}, (50, 90), 2),
    "pad": Real(
        "llava",
        "LlavaImageProcessor",
        {"do_pad": True, "size": {"shortest_edge": 16}, "crop_size": SQUARE},
    ),
    "llava_next": Real(
        "llava_next",
        "LlavaNextImageProcessor",
        {
            "size": {"shortest_edge": 8},
            "crop_size": {"height": 8, "width": 8},
            "image_grid_pinpoints": [[8, 16], [16, 8], [16, 16]],
        },
        (60, 44),
    ),
    "llava_onevision": Real(
        "llava_onevision",
        "LlavaOnevisionImageProcessor",
        {"size": SQUARE, "image_grid_pinpoints": [[16, 16], [16, 32], [32, 16]]},
        (100, 44),
    ),
    "qwen2_5_vl": Real(
        "qwen2_5_vl",
        "Qwen2VLImageProcessor",
        {"patch_size": 4, "merge_size": 2, "min_pixels": 600, "max_pixels": 2000},
        (100, 60),
        2,
    ),
    "glm4v": Real(
        "glm4v",
        "Glm4vImageProcessor",
        {
            "patch_size": 4,
            "merge_size": 2,
            "size": {"shortest_edge": 1200, "longest_edge": 4000},
        },
        (100, 60),
    ),
    "paddleocr_vl": Real(
        "paddleocr_vl",
        "PaddleOCRVLImageProcessor",
        {
            "patch_size": 4,
            "merge_size": 2,
            "size": {"shortest_edge": 600, "longest_edge": 2000},
        },
        (60, 100),
    ),
    "idefics3": Real(
        "idefics3",
        "Idefics3ImageProcessor",
        {"size": {"longest_edge": 64}, "max_image_size": {"longest_edge": 32}},
        (90, 60),
        nested=True,
    ),
    "internvl": Real(
        "internvl",
        "GotOcr2ImageProcessor",
        {
            "crop_to_patches": True,
            "min_patches": 1,
            "max_patches": 4,
            "size": {"height": 32, "width": 32},
        },
        (120, 50),
        2,
    ),
    "mistral3": Real(
        "mistral3",
        "PixtralImageProcessor",
        {"size": {"longest_edge": 48}, "patch_size": {"height": 8, "width": 8}},
        (90, 60),
    ),
    "gemma3": Real(
        "gemma3", "Gemma3ImageProcessor", {"size": {"height": 32, "width": 32}}, (90, 60)
    ),
    "gemma4": Real(
        "gemma4",
        "Gemma4ImageProcessor",
        {"patch_size": 4, "pooling_kernel_size": 2, "max_soft_tokens": 70},
        (90, 60),
    ),
    "janus": Real(
        "janus",
        "JanusImageProcessor",
        {"size": SQUARE, "min_size": 4},
        (80, 40),
    ),
}


def _noise(size: tuple[int, int], seed: int) -> Image.Image:
    rng = torch.Generator().manual_seed(seed)
    small = torch.randint(60, 200, (6, 6, 3), generator=rng, dtype=torch.uint8)
    return Image.fromarray(small.numpy()).resize(size, Image.Resampling.BILINEAR)


def _overlap(box: Any, other: Any) -> float:
    """The part of ``box`` that lies in ``other``."""
    wide = max(0.0, min(box[2], other[2]) - max(box[0], other[0]))
    high = max(0.0, min(box[3], other[3]) - max(box[1], other[1]))
    return wide * high / ((box[2] - box[0]) * (box[3] - box[1]))


def _grown(box: Any) -> Any:
    wide, high = box[2] - box[0], box[3] - box[1]
    return (box[0] - wide / 2, box[1] - high / 2, box[2] + wide / 2, box[3] + high / 2)


@pytest.mark.parametrize("name", REAL)
def test_a_painted_rectangle_changes_the_tokens_that_lie_on_it(name: str) -> None:
    """Paint a part of a picture, and see which of the model's visual tokens become others."""
    case = REAL[name]
    _, model = build(case.family)
    images = [_noise(case.size, seed) for seed in range(case.count)]
    inputs = case.process(images)
    with torch.no_grad():
        names = inspect.signature(model.model.get_image_features).parameters
        given = {key: value for key, value in inputs.items() if key in names}
        count = features(model.model.get_image_features(**given, return_dict=True))
    image = [*[image_token(model.config)] * (count // case.count), 42]
    ids = torch.tensor([[40, 41, *image * case.count]])
    inputs["input_ids"] = ids
    visual = ids[0] == image_token(model.config)
    found = places(model, inputs, images, case.process)
    assert len(found) == count
    assert {place.picture for place in found} == set(range(case.count))
    painted = 0
    for rectangle in ((0.1, 0.1, 0.45, 0.4), (0.55, 0.5, 0.95, 0.95), (0.3, 0.4, 0.7, 0.6)):
        for number in range(case.count):
            other = [image.copy() for image in images]
            corners = [
                round(v * side) for v, side in zip(rectangle, (*case.size, *case.size), strict=True)
            ]
            other[number].paste((255, 0, 255), tuple(corners))
            before, after = (
                embeddings(model, _whole(model, case.process(pictures), ids))[visual]
                for pictures in (images, other)
            )
            change = (after - before).abs().amax(1)
            moved = (change > 0.05 * change.max()).tolist()  # resizing bleeds a little
            for place, changed in zip(found, moved, strict=True):
                if place.box is None:
                    continue
                if place.picture != number or _overlap(_grown(place.box), rectangle) == 0:
                    assert not changed, (place, rectangle)
                elif _overlap(place.box, rectangle) > 0.4:
                    assert changed, (place, rectangle)
                    painted += 1
    assert painted >= 3  # the rectangles were seen


def _whole(model: Any, inputs: dict[str, Any], ids: Tensor) -> dict[str, Any]:
    """What the model's forward takes of it."""
    kinds = (ids == image_token(model.config)).long()
    extra = {"input_ids": ids, "mm_token_type_ids": kinds, "token_type_ids": kinds}
    names = inspect.signature(model.forward).parameters
    inner = inspect.signature(model.model.forward).parameters
    return {k: v for k, v in {**inputs, **extra}.items() if k in names or k in inner}


def test_boxes_of_a_centre_crop_are_exact() -> None:
    _, model = build("llava")
    image = Image.new("RGB", (96, 48))
    inputs = {**REAL["crop"].process([image]), "input_ids": torch.full((1, 16), 10)}
    found = places(model, inputs, [image], REAL["crop"].process)
    for token, place in enumerate(found):
        row, column = divmod(token, 4)
        wanted = (0.25 + column / 8, row / 4, 0.25 + (column + 1) / 8, (row + 1) / 4)
        assert place.box == pytest.approx(wanted, abs=0.01)


@pytest.mark.parametrize("name", ["qwen2_vl", "qwen3_vl", "llava_onevision", "llava_next_video"])
def test_video_tokens_lie_in_their_frames(name: str) -> None:
    """Change one frame of the pixel input: its tokens become others, and only they."""
    family, model = build(name)
    batch = family.inputs(model, [[T(3), V(4), T(2)]])
    found = places(model, batch, [], lambda images: {})
    visual = torch.isin(batch["input_ids"][0], torch.tensor(family.visual_ids))
    assert len(found) == int(visual.sum())
    pixels = batch["pixel_values_videos"]
    frames = pixels.view(4, -1) if name.startswith("qwen") else pixels[0]
    before = embeddings(model, batch)[visual]
    for frame in range(4):
        changed = frames.clone()
        changed[frame] += torch.randn(
            changed[frame].shape, generator=torch.Generator().manual_seed(1)
        )
        other = {**batch, "pixel_values_videos": changed.view_as(pixels)}
        moved = ((embeddings(model, other)[visual] - before).abs().amax(1) > 1e-4).tolist()
        assert moved == [p.picture == frame and p.box is not None for p in found]
    boxes = [p.box for p in found if p.picture == 0 and p.box]
    assert boxes[0][:2] == (0, 0)
    assert boxes[-1][2:] == (1, 1)
    assert boxes == sorted(boxes, key=lambda b: (b[1], b[0]))


def test_what_is_not_known_is_refused() -> None:
    _, aria = build("aria")
    inputs = {"input_ids": torch.full((1, 12), 10), "pixel_values": torch.zeros(1, 3, 24, 24)}
    with pytest.raises(UnknownPlaces, match=r"'aria' models .* is not known"):
        places(aria, inputs, [Image.new("RGB", (24, 24))], lambda images: inputs)
    _, llava = build("llava")
    image = Image.new("RGB", (24, 24))
    wrong = {"input_ids": torch.full((1, 15), 10), "pixel_values": torch.zeros(1, 3, 16, 16)}
    with pytest.raises(UnknownPlaces, match="not a square grid"):
        places(llava, wrong, [image], lambda images: wrong)

    def mirrored(images: list[Image.Image]) -> dict[str, Any]:
        made = REAL["stretch"].process(images)
        return {"pixel_values": made["pixel_values"].flip(3)}

    right = {"input_ids": torch.full((1, 16), 10), **mirrored([image])}
    with pytest.raises(UnknownPlaces, match="does not just resize"):
        places(llava, right, [image], mirrored)
    two = {"input_ids": torch.full((2, 16), 10)}
    with pytest.raises(UnknownPlaces, match="one row"):
        places(llava, two, [image], mirrored)
