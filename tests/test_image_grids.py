"""The grid of each image's tokens, on every family where there is one."""

from __future__ import annotations

from math import prod
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from st3.engine.prompt import read_prompt
from st3.hf.hooks import Hooks
from st3.methods.scores import score_named
from st3.models import Encoded, Grids, config_family, families
from st3.models.grids import grids_of
from tests.zoo import FAMILIES, I, T, V, build

SQUARE = [
    "llava",
    "vipllava",
    "internvl",
    "aya_vision",
    "cohere2_vision",
    "paligemma",
    "paligemma2",
    "gemma3",
    "idefics3",
    "smolvlm",
    "granite_docling",
    "ovis2",
    "deepseek_vl",
    "deepseek_vl_hybrid",
    "janus",
    "qianfan_ocr",
    "got_ocr2",
    "step3p7",
    "perception_lm",
    "fast_vlm",
]
WIDE = [
    "qwen2_vl",
    "qwen2_5_vl",
    "qwen3_vl",
    "qwen3_vl_moe",
    "qwen2_5_omni_thinker",
    "qwen3_omni_moe_thinker",
    "glm4v",
    "glm4v_moe",
    "glm46v",
    "glm_ocr",
    "ernie4_5_vl_moe",
    "paddleocr_vl",
    "video_llama_3",
    "exaone4_5",
    "cohere_compass",
    "cosmos3_edge",
    "cosmos3_omni",
    "hyperclovax_vision_v2",
    "kimi_k25",
    "muse_glimmer",
    "muse_spark",
    "gemma4",
    "gemma4_moe",
    "gemma4_per_layer",
    "gemma4_unified",
]
RUNS = ((1, 4),) * 6  # each row of an image is a run of its own
# What two images of a row are, as the engine counts images: their grids.
GRIDS: dict[str, tuple[Any, ...]] = {
    **dict.fromkeys(SQUARE, ((4, 4), (4, 4))),
    **dict.fromkeys(WIDE, ((3, 4), (3, 4))),
    **dict.fromkeys(["mistral3", "mistral3_window", "pixtral", "lighton_ocr", "fuyu"], RUNS),
    "molmo2": ((1, 2), (1, 2), (1, 4), (1, 4)) * 2,
    "video_llava": ((3, 3), (3, 3)),
    "emu3": ((4, 5), (4, 5)),
    # Tiles with newlines, a frame of tokens, learned queries: no grid.
    **dict.fromkeys(
        ["llava_next", "llava_onevision", "llava_next_video", "hunyuan_vl", "idefics2", "aria"],
        (None, None),
    ),
    "deepseek_ocr2": (None,),
}
SUPPORTED = {family.model_type for family in families()}
NAMES = [
    name for name, family in FAMILIES.items() if (family.model_type or name) in SUPPORTED
    or name in ("paligemma2", "pixtral")
]  # fmt: skip


def grids(name: str, rows: Any, copies: int = 1) -> Grids:
    """As the engine asks: what the encoders got, and its own count of images."""
    family, model = build(name)
    ours, batch, hooks = config_family(model.config), family.inputs(model, rows), Hooks()
    heard = ours.visual_tokens(model, ours.parts(model))
    heard.listen(hooks)
    with torch.no_grad():
        model(**batch)
    hooks.restore()
    visual = family.visual_mask(model, batch).repeat_interleave(copies, dim=0)
    mask = batch["attention_mask"].repeat_interleave(copies, dim=0)
    counted, _ = read_prompt(visual, mask, 0, False, heard.take_sizes())
    found = ours.image_grids(model, heard.encoded, counted.images)
    for grid_row, image_row in zip(found, counted.images, strict=True):
        for grid, count in zip(grid_row, image_row, strict=True):
            assert grid is None or prod(grid) == count
    return found


@pytest.mark.parametrize("name", NAMES)
def test_images_are_the_grids_that_they_are(name: str) -> None:
    family = FAMILIES[name]
    if not family.multi_image:
        assert grids(name, [[T(3), I(), T(2)]]) == (GRIDS[name],)
        return
    rows = [[T(3), I(), T(2), I(), T(2)], [T(2), I(), T(4)]]
    if family.text_rows:
        rows.append([T(5)])
    one = GRIDS[name][: len(GRIDS[name]) // 2]
    wanted = (GRIDS[name], one, ()) if family.text_rows else (GRIDS[name], one)
    assert grids(name, rows) == wanted
    assert grids(name, rows[:2], copies=2) == (wanted[0],) * 2 + (wanted[1],) * 2


@pytest.mark.parametrize(
    ("name", "rows", "wanted"),
    [
        # 18 x 32 tokens are not the 24 x 24 of their square root.
        ("qwen2_5_vl", [[T(2), I(18, 32), T(2)]], (((18, 32),),)),
        ("qwen3_vl", [[T(2), I(2, 8), T(2), I(4, 4), T(1)]], (((2, 8), (4, 4)),)),
        ("mistral3", [[T(2), I(2, 5), T(2)]], (((1, 5), (1, 5)),)),
        ("gemma4", [[T(2), I(2, 8), T(2), I(4, 4), T(1)]], (((2, 8), (4, 4)),)),
        # Each tile is a run of its own.
        ("smolvlm", [[T(2), I(1, 2), T(2)], [T(3)]], (((4, 4),) * 3, ())),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_sizes_other_than_the_usual(name: str, rows: Any, wanted: Grids) -> None:
    assert grids(name, rows) == wanted


# A newline token behind the video is none of its raster.
FRAMES = {
    "qwen2_vl": ((4, 2, 3),),
    "qwen2_5_vl": ((4, 2, 3),),
    "qwen3_vl": ((2, 3),) * 4,
    "glm4v": ((2, 3),) * 4,
    "gemma4": ((2, 3),) * 4,
    "llava_next_video": ((4, 2, 2),),
    "llava_onevision": (None,),
    "video_llava": (None,),
}


@pytest.mark.parametrize("name", FRAMES)
def test_frames_of_a_video_are_rasters(name: str) -> None:
    assert grids(name, [[T(3), V(), T(4)]]) == (FRAMES[name],)


def test_an_image_and_a_video_in_one_prompt_have_no_known_order() -> None:
    assert grids("qwen2_vl", [[T(3), V(), T(2), I(), T(4)]]) == ((None, None),)


@pytest.mark.parametrize("name", ["llava", "qwen2_5_vl", "mistral3"])
def test_generate_encodes_before_its_first_pass(name: str) -> None:
    """The forward call gets no pixels, and a row for each beam."""
    family, model = build(name)
    batch = family.inputs(model, [[T(3), I(), T(2)]])
    ours, hooks = config_family(model.config), Hooks()
    heard = ours.visual_tokens(model, ours.parts(model))
    heard.listen(hooks)
    model.generate(**batch, max_new_tokens=2, num_beams=2)
    hooks.restore()
    heard.take_sizes()
    (call,) = heard.encoded  # once for both beams, or for each (transformers 5.16)
    assert call.tokens in ((16, 32) if name == "llava" else (12, 24))
    assert call.inputs["pixel_values"].device.type == "meta"  # shapes alone are kept
    visual = family.visual_mask(model, batch).repeat_interleave(2, dim=0)
    rows, _ = read_prompt(visual, None, 0, False)
    one = GRIDS[name][: len(GRIDS[name]) // 2]
    assert ours.image_grids(model, heard.encoded, rows.images) == (one, one)
    assert ours.image_grids(model, heard.encoded, [[5]]) == ((None,),)  # of another prompt
    heard.take_sizes()
    assert heard.encoded == ()


def test_ready_made_features_say_nothing_of_a_grid() -> None:
    _, model = build("qwen2_vl")
    assert config_family(model.config).image_grids(model, (), [[16], []]) == ((None,), ())


def test_images_of_rasters() -> None:
    assert grids_of([[6, 4], [9]], [(2, 3), (2, 2), (3, 3)]) == (((2, 3), (2, 2)), ((3, 3),))
    # Tiles in one run, of one width and of two.
    assert grids_of([[12]], [(2, 3), (2, 3)]) == (((2, 2, 3),),)
    assert grids_of([[15]], [(2, 3), (3, 3)]) == (((5, 3),),)
    assert grids_of([[10]], [(2, 3), (2, 2)]) == ((None,),)
    # Whole rows in runs of their own, and parts of rows.
    assert grids_of([[3, 6]], [(3, 3)]) == (((1, 3), (2, 3)),)
    assert grids_of([[2, 7, 4]], [(3, 3), (2, 2)]) == ((None, None, (2, 2)),)
    # A repeated batch, and one that does not fit.
    assert grids_of([[4], [4], [6], [6]], [(2, 2), (3, 2)]) == (((2, 2),),) * 2 + (((3, 2),),) * 2
    assert grids_of([[5], []], [(2, 2)]) == ((None,), ())
    assert grids_of([[], []], []) == ((), ())


def test_a_grid_score_covers_an_image_of_18_by_32_tokens_evenly() -> None:
    """Not in bands, as 24 by 24 would be."""
    _, model = build("qwen2_5_vl")
    ours = config_family(model.config)
    call = Encoded(False, {"image_grid_thw": torch.tensor([[1, 36, 64]])}, 18 * 32)
    known = ours.image_grids(model, [call], [[18 * 32]])
    view: Any = SimpleNamespace(ordinal=torch.arange(576)[None], images=((576,),), grids=known)
    kept = score_named("grid")(view)[0].topk(144).indices
    rows, columns = (kept // 32).bincount(minlength=18), (kept % 32).bincount(minlength=32)
    assert rows.tolist() == [16, 0] * 9
    assert columns.tolist() == [9, 0] * 16
