"""Even coverage of images: the grid score, of images of any shape."""

from __future__ import annotations

import gc
import math

import torch

from st3.methods.schedule import exact
from st3.methods.scores import TokenView, score_named
from st3.methods.scores.grid import on_stride


def image_of(*shape: int, known: bool = True) -> TokenView:
    """A prompt of one image and nothing else."""
    count = math.prod(shape)
    return TokenView(
        layer=0,
        hidden=None,
        visual=torch.ones(1, count, dtype=torch.bool),
        ordinal=torch.arange(count)[None],
        last=torch.tensor([count - 1]),
        images=((count,),),
        grids=((shape if known else None,),),
    )


def test_a_quarter_of_the_grid_is_every_second_row_and_column() -> None:
    score = score_named("grid")(image_of(8, 8))[0]
    kept = sorted(score.topk(16).indices.tolist())
    assert kept == [8 * y + x for y in range(0, 8, 2) for x in range(0, 8, 2)]
    half = score.topk(32).indices
    assert ((half // 8 + half % 8) % 2 == 0).all()  # a checkerboard


def test_an_image_of_a_square_number_of_tokens_is_no_square() -> None:
    """18 x 32 = 24 x 24."""
    kept = score_named("grid")(image_of(18, 32))[0].topk(144).indices
    assert sorted(kept.tolist()) == [32 * y + x for y in range(0, 18, 2) for x in range(0, 32, 2)]
    unknown = image_of(18, 32, known=False)
    order = score_named("grid")(unknown)[0].argsort(descending=True)
    assert torch.equal(order, score_named("uniform")(unknown)[0].argsort(descending=True))
    on = on_stride(image_of(18, 32), 3)[0].nonzero().flatten().tolist()
    assert on == [32 * y + x for y in range(0, 18, 3) for x in range(0, 32, 3)]
    assert on_stride(unknown, 3)[0].nonzero().flatten().tolist() == list(range(0, 576, 9))


def test_a_grid_that_is_not_the_images_is_none() -> None:
    """A row of newline tokens is in the count, and not in the grid."""
    wrong = image_of(4, 5)
    wrong.grids = (((4, 4),),)
    unknown = image_of(4, 5, known=False)
    assert torch.equal(score_named("grid")(wrong), score_named("grid")(unknown))


def test_the_frames_of_a_video_are_covered_alike() -> None:
    kept = score_named("grid")(image_of(3, 4, 6))[0].topk(18).indices
    frame = [6 * y + x for y in range(0, 4, 2) for x in range(0, 6, 2)]
    assert sorted(kept.tolist()) == [24 * t + place for t in range(3) for place in frame]
    on = on_stride(image_of(2, 4, 6), 3)[0].nonzero().flatten().tolist()
    assert on == [24 * t + 6 * y + x for t in range(2) for y in (0, 3) for x in (0, 3)]


def test_images_of_several_shapes_in_ragged_rows() -> None:
    """Each image is ordered as it is alone."""
    view = image_of(1)
    view.images, view.grids = ((20, 16), (7,), ()), (((4, 5), (4, 4)), (None,), ())
    view.ordinal = torch.arange(36).expand(3, 36)
    view.visual = torch.tensor([[True] * 36, [True] * 7 + [False] * 29, [False] * 36])
    score = score_named("grid")(view)
    alone = [image_of(4, 5), image_of(4, 4), image_of(7, known=False)]
    parts = [score[0, :20], score[0, 20:], score[1, :7]]
    for image, part in zip(alone, parts, strict=True):
        assert torch.equal(score_named("grid")(image)[0], part)


def test_a_score_keeps_nothing_of_the_sizes_it_has_seen() -> None:
    """A server with images of any size meets thousands of them."""
    gc.collect()
    before = len(gc.get_objects())
    for count in range(100, 400):
        score_named("grid")(image_of(count, known=False))
        on_stride(image_of(count, known=False), 3)
    gc.collect()
    assert len(gc.get_objects()) - before < 100
    for value in range(5000):
        exact(value / 7919)
    assert exact.cache_info().currsize <= exact.cache_info().maxsize
