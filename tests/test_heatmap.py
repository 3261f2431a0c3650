"""Heat maps: where a visual token lies in the image, and which patches are shown bright."""

from __future__ import annotations

from types import SimpleNamespace

import numpy as np
import pytest
from PIL import Image

from st3 import heatmap


def bright(panel: Image.Image, side: int) -> set[int]:
    """Indices of the cells of a side x side grid whose middle is white, not dimmed."""
    pixels = np.asarray(panel.convert("L"))
    height, width = pixels.shape
    cells = [(row, column) for row in range(side) for column in range(side)]
    return {
        row * side + column
        for row, column in cells
        if pixels[int((row + 0.5) * height / side), int((column + 0.5) * width / side)] > 250
    }


@pytest.mark.parametrize("size", [(100, 100), (120, 80), (37, 90)])
def test_kept_patches_stay_bright_and_the_others_are_dimmed(size: tuple[int, int]) -> None:
    kept = {0, 5, 6, 15}
    white = Image.new("RGB", size, "white")
    panel, box = heatmap._fit(white, (0.0, 0.0, *map(float, size)))
    assert bright(heatmap._dimmed(panel, box, 4, kept), 4) == kept


def test_nothing_kept_is_all_dimmed_and_everything_kept_is_the_image_but_for_its_outline() -> None:
    panel, box = heatmap._fit(Image.new("RGB", (80, 80), "white"), (0.0, 0.0, 80.0, 80.0))
    assert bright(heatmap._dimmed(panel, box, 4, set()), 4) == set()
    whole = heatmap._dimmed(panel, box, 4, set(range(16)))
    inner = np.asarray(whole)[3:-3, 3:-3]
    assert (inner == 255).all()


def test_several_images_split_the_rows_tokens_in_order() -> None:
    images = [Image.new("RGB", (60, 60), "white")] * 2
    boxes = [(0.0, 0.0, 60.0, 60.0)] * 2
    # token 3 is the last of image 1, tokens 4 and 6 are the first and third of image 2
    picture = heatmap.draw(images, boxes, [4, 4], {2: [3, 4, 6]})
    panel, gap, caption = heatmap.PANEL, heatmap.GAP, heatmap.CAPTION
    left = gap + panel + gap
    tops = [gap + caption, gap + 2 * caption + panel + gap]
    panels = [picture.crop((left, top, left + panel, top + panel)) for top in tops]
    assert [bright(p, 2) for p in panels] == [{3}, {0, 2}]


@pytest.mark.parametrize("n_visual", [0, 2, 577])
def test_tokens_that_are_no_square_grid_are_refused(n_visual: int) -> None:
    with pytest.raises(ValueError, match="not a square grid"):
        heatmap.grid_side(n_visual)


def test_tokens_split_evenly_over_the_images() -> None:
    assert heatmap.split_evenly(32, 2) == [16, 16]
    for n_visual, images in ((33, 2), (16, 0)):
        with pytest.raises(ValueError, match="do not split"):
            heatmap.split_evenly(n_visual, images)


def test_counts_that_do_not_belong_together_are_refused() -> None:
    with pytest.raises(ValueError, match="do not belong together"):
        heatmap.draw([Image.new("RGB", (8, 8))], [(0, 0, 8, 8)], [4, 4], {0: [1]})


def test_unknown_model_types_are_refused() -> None:
    heatmap.check_supported("llava")
    with pytest.raises(ValueError, match="no heat map for 'qwen2_vl'"):
        heatmap.check_supported("qwen2_vl")


def test_seen_box_is_the_whole_image_without_a_crop() -> None:
    processor = SimpleNamespace(do_center_crop=False)
    assert heatmap.seen_box((120, 80), processor) == (0.0, 0.0, 120.0, 80.0)


def test_seen_box_of_a_centre_crop() -> None:
    square = {"height": 336, "width": 336}
    clip = SimpleNamespace(do_center_crop=True, size={"shortest_edge": 336}, crop_size=square)
    assert heatmap.seen_box((120, 80), clip) == pytest.approx((20, 0, 100, 80))
    assert heatmap.seen_box((80, 120), clip) == pytest.approx((0, 20, 80, 100))
    larger = SimpleNamespace(do_center_crop=True, size={"shortest_edge": 672}, crop_size=square)
    assert heatmap.seen_box((80, 80), larger) == pytest.approx((20, 20, 60, 60))


def test_seen_box_matches_what_the_image_processor_does() -> None:
    """White margins around a black box that is exactly seen_box: the model sees no white."""
    from transformers import CLIPImageProcessor

    processor = CLIPImageProcessor(
        size={"shortest_edge": 24}, crop_size={"height": 24, "width": 24}, do_normalize=False
    )
    image = Image.new("RGB", (96, 48), "white")
    left, top, right, bottom = (round(v) for v in heatmap.seen_box(image.size, processor))
    image.paste("black", (left, top, right, bottom))
    pixels = processor(image, return_tensors="np")["pixel_values"][0]
    assert pixels[:, :, 2:-2].max() < 0.01
    assert (left, right) == (24, 72)


@pytest.mark.parametrize(
    ("kept", "count", "layers"),
    [
        ([16, 16, 16, 8, 8, 4, 4], 4, [3, 5]),
        ([16, 16, 16], 4, [2]),
        ([16, 15, 14, 13, 12, 11, 10], 3, [1, 3, 6]),
        ([16, 15, 14], 1, [2]),
    ],
)
def test_chosen_layers_are_where_the_number_changes(
    kept: list[int], count: int, layers: list[int]
) -> None:
    assert heatmap.choose_layers(kept, count) == layers


def test_no_layers_is_refused() -> None:
    with pytest.raises(ValueError, match="no layers"):
        heatmap.choose_layers([])
