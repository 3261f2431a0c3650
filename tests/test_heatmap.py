"""Heat maps: which patches are shown bright; the animation of annealing."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

import st3
from st3.models.places import Place
from st3.tools.see import heatmap
from tests.serving import load
from tests.test_pages import sample_run


def grid(side: int, picture: int = 0) -> list[Place]:
    """The places of a square grid over a whole picture."""
    cells = [(row, column) for row in range(side) for column in range(side)]
    return [Place(picture, (c / side, r / side, (c + 1) / side, (r + 1) / side)) for r, c in cells]


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
    panel = heatmap.fit(Image.new("RGB", size, "white"))
    boxes = [box for i, place in enumerate(grid(4)) if i in kept and (box := place.box)]
    assert bright(heatmap.dimmed(panel, boxes), 4) == kept


def test_nothing_kept_is_all_dimmed_and_everything_kept_is_the_image_but_for_its_outline() -> None:
    panel = heatmap.fit(Image.new("RGB", (80, 80), "white"))
    assert bright(heatmap.dimmed(panel, []), 4) == set()
    whole = np.asarray(heatmap.dimmed(panel, [p.box for p in grid(4) if p.box]))
    assert (whole[3:-3, 3:-3] == 255).all()
    assert tuple(whole[0, 50]) == heatmap.EDGE


def test_each_image_has_a_row_with_its_own_tokens() -> None:
    images = [Image.new("RGB", (60, 60), "white")] * 2
    # token 3 is the last of image 1, tokens 4 and 6 are the first and third of image 2
    picture = heatmap.draw(images, [*grid(2), *grid(2, picture=1)], {2: [3, 4, 6]})
    panel, gap, caption = heatmap.PANEL, heatmap.GAP, heatmap.CAPTION
    left = gap + panel + gap
    tops = [gap + caption, gap + 2 * caption + panel + gap]
    panels = [picture.crop((left, top, left + panel, top + panel)) for top in tops]
    assert [bright(p, 2) for p in panels] == [{3}, {0, 2}]


def test_tokens_without_a_place_are_counted_and_not_drawn() -> None:
    image = Image.new("RGB", (60, 60), "white")
    places = [*grid(2), Place(0, None)]
    with_newline = heatmap.draw([image], places, {1: [1, 4]})
    left = 2 * heatmap.GAP + heatmap.PANEL
    top = heatmap.GAP + heatmap.CAPTION
    panel = with_newline.crop((left, top, left + heatmap.PANEL, top + heatmap.PANEL))
    assert bright(panel, 2) == {1}


def test_what_does_not_belong_together_is_refused() -> None:
    image = Image.new("RGB", (8, 8))
    with pytest.raises(ValueError, match="lie in image 2"):
        heatmap.draw([image], grid(2, picture=1), {0: [1]})
    with pytest.raises(ValueError, match="places of 4"):
        heatmap.draw([image], grid(2), {0: [4]})


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


def test_the_first_layer_is_shown_where_tokens_are_dropped_before_it() -> None:
    kept = [72] * 5 + [48] * 5 + [32] * 6
    assert heatmap.choose_layers(kept) == [5, 10]
    assert heatmap.choose_layers(kept, whole=144) == [0, 5, 10]
    assert heatmap.choose_layers(kept, 2, whole=144) == [0, 10]
    assert heatmap.choose_layers([72] * 4, whole=144) == [0]
    assert heatmap.choose_layers([144] * 4, whole=144) == [3]


def test_no_layers_is_refused() -> None:
    with pytest.raises(ValueError, match="no layers"):
        heatmap.choose_layers([])


def test_the_animation_dims_what_fewer_layers_see(tmp_path: Path) -> None:
    run = sample_run()
    frames = heatmap.animate(run)
    assert len(frames) == len(run.visible)
    assert len({frame.size for frame in frames}) == 1
    top = heatmap.GAP + heatmap.CAPTION
    panels = [np.asarray(f.convert("L"))[top : top + 200, heatmap.GAP :][:, :300] for f in frames]
    corner = [int(panel[150, 220]) for panel in panels]  # token 3: seen by layer 0 alone
    assert corner[0] == corner[1] > corner[2] == corner[5]
    first = [int(panel[50, 75]) for panel in panels]  # token 0: seen by all, always
    assert first == [255] * 6
    heatmap.save_gif(tmp_path / "a.gif", frames)
    with Image.open(tmp_path / "a.gif") as film:
        assert film.n_frames > 1  # type: ignore[attr-defined]
    assert len(heatmap.animate(run, frames=3)) == 3
    with pytest.raises(ValueError, match="not known"):
        heatmap.animate(sample_run(placed=False))
    with pytest.raises(ValueError, match="there are 1 images"):
        heatmap.animate(run, picture=1)


# In one call --------------------------------------------------------------------------------------


def prompt(processor: Any, *images: Image.Image) -> Any:
    content: list[dict[str, Any]] = [{"type": "image", "image": image} for image in images]
    content.append({"type": "text", "text": "what is at the top left?"})
    return processor.apply_chat_template(
        [{"role": "user", "content": content}],
        add_generation_prompt=True, tokenize=True, return_dict=True, return_tensors="pt",
    )  # fmt: skip


def test_one_call_draws_what_the_latest_prompt_kept(tiny_model: Path) -> None:
    model, processor = load(tiny_model)
    images = [Image.new("RGB", (64, 64), "white"), Image.new("RGB", (90, 60), "white")]
    for shown in (images[:1], images):
        inputs = prompt(processor, *shown)
        with st3.trim(model, "fastv:layer=2,drop=0.75") as trimmer:
            model.generate(**inputs, max_new_tokens=2, do_sample=False)
        given = shown[0] if len(shown) == 1 else shown
        one = st3.heatmap(trimmer, processor, inputs, given, layers=[2], title="")
        places = grid(4)
        if len(shown) == 2:
            places += grid(4, 1)
        kept = {2: trimmer.report.kept_positions(2).tolist()}
        assert one.tobytes() == heatmap.draw(shown, places, kept).tobytes()
    assert st3.heatmap(trimmer, processor, inputs, images).width > one.width / 2


def test_one_call_refuses_what_does_not_belong_together(tiny_model: Path) -> None:
    model, processor = load(tiny_model)
    image = Image.new("RGB", (64, 64), "white")
    inputs, two = prompt(processor, image), prompt(processor, image, image)
    trimmer = st3.trim(model)
    with pytest.raises(st3.TrimStateError, match="prompt with an image"):
        st3.heatmap(trimmer, processor, inputs, image)
    with trimmer:
        model.generate(**inputs, max_new_tokens=1)
    with pytest.raises(ValueError, match="32 visual tokens"):
        st3.heatmap(trimmer, processor, two, [image, image])
    with pytest.raises(ValueError, match="layer 8 does not exist"):
        st3.heatmap(trimmer, processor, inputs, image, layers=[8])
