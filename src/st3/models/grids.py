"""From rasters of tokens to the grid of each image, as the engine counts images."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

from st3.models.layouts import Raster

Shape = tuple[int, ...]
Grids = tuple[tuple[Shape | None, ...], ...]


def grids_of(images: Sequence[Sequence[int]], rasters: Iterable[Raster]) -> Grids:
    """The grid of each image, where the engine takes any run of visual tokens for an image.

    A run of several equal rasters (frames, tiles) is a grid in three dimensions; a run of others of
    one width is one grid, the rasters below each other; a run of whole rows of a raster is a grid
    of these rows.

    Args:
        images: for each row of the batch the visual tokens of each image.
        rasters: those of all rows, in order.

    Returns:
        (rows, columns) or (rasters, rows, columns) of each image, laid out as ``images``; None
        where an image is no grid, and for all of them where images and rasters do not fit.
    """
    known = list(rasters)
    area = sum(high * wide for high, wide in known)
    total = sum(map(sum, images))
    copies = total // area if area else 0
    if copies > 1 and total == copies * area and len(images) % copies == 0:
        # Beams and return sequences: generate() encodes an image once and repeats its row.
        once = grids_of(images[::copies], known)
        return tuple(row for row in once for _ in range(copies))
    if area != total:
        return no_grids(images)
    left: list[tuple[int, int, bool]] = [(*raster, True) for raster in reversed(known)]
    found: list[tuple[Shape | None, ...]] = []
    for row in images:
        grids: list[Shape | None] = []
        for count in row:
            grids.append(_take(left, count))
        found.append(tuple(grids))
    return tuple(found)


def _take(left: list[tuple[int, int, bool]], count: int) -> Shape | None:
    """The grid of the next ``count`` tokens, which are taken off the rasters that are ``left``:
    rows, columns, and whether these are whole rows."""
    taken: list[Raster] = []
    whole = True
    while count:
        high, wide, unbroken = left.pop()
        took = min(high, count // wide)
        if not took:  # a part of a row
            left.append((1, high * wide - count, False))
            return None
        whole &= unbroken
        taken.append((took, wide))
        count -= took * wide
        if took < high:
            left.append((high - took, wide, unbroken))
    if not whole or len({wide for _, wide in taken}) > 1:
        return None
    if len(taken) > 1 and len(set(taken)) == 1:
        return (len(taken), *taken[0])
    return (sum(high for high, _ in taken), taken[0][1])


def no_grids(images: Sequence[Sequence[int]]) -> Grids:
    """None for each image."""
    return tuple((None,) * len(row) for row in images)
