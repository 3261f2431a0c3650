"""What each score must say, in the plainest way: row by row, loops, float64, all tokens there.

Nothing here is shared with the code under test, but the formula of the two scores that are nothing
but a formula of a token's place.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor

from st3.methods import scores
from tests.reference import Score, Seen
from tests.zoo import Family

GOLDEN = 0.6180339887498949


def reference_score(scorer: Any, family: Family, model: Any, batch: Any) -> Score | None:
    """The reference's score for one of the engine's; None for the last row's attention."""
    if scorer == scores.Attention():
        return None
    if isinstance(scorer, scores.ClassAttention):
        weights = tower_weights(model, batch, family)
        return Score(lambda seen: by_row(seen, visionzip, scorer, weights), "embeds")
    if isinstance(scorer, scores.Feather | scores.Grid | scores.Mixed):
        layout = image_rows(family, model, batch)
        stage = "embeds" if isinstance(scorer, scores.Grid) else "attention"
        of = LAID_OUT[type(scorer)]
        return Score(lambda seen: by_row(seen, of, scorer, layout), stage)
    if isinstance(scorer, scores.RandomScore | scores.Uniform):
        return Score(lambda seen: scorer(SimpleNamespace(ordinal=ordinals(seen))), "embeds")
    of, stage = TABLE[type(scorer)]
    return Score(lambda seen: by_row(seen, of, scorer), stage)


def by_row(seen: Seen, of: Callable[..., Tensor], *more: Any) -> Tensor:
    return torch.stack([of(seen, row, *more) for row in range(len(seen.valid))])


def row_of(per_row: Any, seen: Seen, row: int) -> Any:
    """The entry of a row of the batch; beams and several answers repeat rows."""
    return per_row[row * len(per_row) // len(seen.valid)]


def ordinals(seen: Seen) -> Tensor:
    return seen.visual.long().cumsum(1) - 1


def visuals(seen: Seen, row: int) -> list[int]:
    """Positions of the visual tokens that are still there."""
    return (seen.visual[row] & seen.kept[row]).nonzero().flatten().tolist()


def texts(seen: Seen, row: int) -> list[int]:
    return (~seen.visual[row] & seen.valid[row]).nonzero().flatten().tolist()


def question(seen: Seen, row: int) -> list[int]:
    end = max(visuals(seen, row), default=-1)
    return [i for i in texts(seen, row) if i > end]


def attention_of(seen: Seen, row: int, query: int) -> Tensor:
    """Softmax attention of one position over those before it that are there, [heads, T]."""
    logits = torch.einsum("hd,htd->ht", seen.query[row, :, query], seen.key[row]) * seen.scaling
    if seen.softcap is not None:
        logits = torch.tanh(logits / seen.softcap) * seen.softcap
    hidden = ~seen.kept[row].clone()
    hidden[query + 1 :] = True
    return logits.masked_fill(hidden, -torch.inf).softmax(-1)


def join(weights: Tensor, how: str, looked_at: list[int]) -> Tensor:
    """[heads, T] -> [T]."""
    if how == "mean":
        return weights.mean(0)
    if how == "max":
        return weights.max(0).values
    masses = weights[:, looked_at].sum(-1)
    best = masses.argsort(descending=True)[: max(1, len(weights) // 4)]
    return weights[best].mean(0)


def attention(seen: Seen, row: int, scorer: Any) -> Tensor:
    source = seen.layer
    if scorer.lazy and seen.layer >= 2:
        source = 2 + (seen.layer - 2) // scorer.lazy * scorer.lazy
    if source < seen.layer:
        return seen.scores[source][row]
    there = visuals(seen, row)
    if not scorer.rotary:
        score = join(without_rope(seen, row, there), scorer.heads, there)
    else:
        rows = [seen.last[row]] if scorer.rows == "last" else texts(seen, row)
        each = [join(attention_of(seen, row, q), scorer.heads, there) for q in rows]
        score = torch.stack(each).mean(0)
    if scorer.debias == "none" or len(there) < 2:
        return score
    y = score[there].double()
    y = y.log() if scorer.debias == "divide" else y
    x = ordinals(seen)[row, there].double()
    line = torch.stack([torch.ones_like(x), x], 1)
    trend = line @ torch.linalg.lstsq(line, y[:, None]).solution
    score = score.double()
    score[there] = y - trend[:, 0]
    return score


def without_rope(seen: Seen, row: int, there: list[int]) -> Tensor:
    """Softmax of the last row's products with the visual tokens as projected, [heads, T]."""
    heads, size = seen.query.shape[1], seen.query.shape[3]
    q = seen.plain[seen.layer, "q"][row].view(-1, heads, size)[seen.last[row]]
    k = seen.plain[seen.layer, "k"][row]
    k = k.reshape(k.shape[0], -1, size)
    k = k.repeat_interleave(heads // k.shape[1], dim=1)
    weights = torch.zeros(heads, k.shape[0])
    if there:
        logits = torch.einsum("hd,thd->ht", q, k[there]) * seen.scaling
        weights[:, there] = logits.softmax(-1)
    return weights


def text_raters(seen: Seen, row: int, scorer: Any) -> Tensor:
    all_visual = seen.visual[row].nonzero().flatten().tolist()
    end = max(all_visual, default=-1)
    asked = [i for i in texts(seen, row) if i > end]
    raters = asked
    if all_visual:
        hidden = seen.inputs[0][row]
        relevance = (hidden[all_visual] @ hidden[asked].T).softmax(-1).mean(0)
        above = [i for i, r in zip(asked, relevance, strict=True) if r > relevance.mean()]
        raters = above or asked
    return torch.stack([attention_of(seen, row, q).mean(0) for q in raters]).mean(0)


def key_norm(seen: Seen, row: int, scorer: Any) -> Tensor:
    return -seen.key[row].norm(dim=-1).mean(0)


def hidden_change(seen: Seen, row: int, scorer: Any) -> Tensor:
    if seen.layer == 0:
        return spread(seen, row)
    return (seen.inputs[seen.layer][row] - seen.inputs[seen.layer - 1][row]).pow(2).sum(-1).sqrt()


def spread(seen: Seen, row: int) -> Tensor:
    return (ordinals(seen)[row].double() * GOLDEN).frac().float()


def dart(seen: Seen, row: int, scorer: Any) -> Tensor:
    if seen.layer == 0:
        return spread(seen, row)
    there, asked = visuals(seen, row), question(seen, row)
    size = seen.keys[seen.layer - 1][row].abs().sum((0, 2))
    image = sorted(there, key=lambda i: -float(size[i]))[: scorer.image_pivots]
    text = sorted(asked, key=lambda i: -float(size[i]))[: scorer.text_pivots]
    hidden = seen.inputs[seen.layer][row]
    others = [i for i in there if i not in image]
    best: dict[int, tuple[int, float]] = {}
    for pivot in image + text:
        alike = {i: float(torch.cosine_similarity(hidden[i], hidden[pivot], 0)) for i in others}
        for place, token in enumerate(sorted(others, key=lambda i: alike[i])):
            best[token] = min(best.get(token, (len(others), 1.0)), (place, alike[token]))
    score = torch.zeros(len(size), dtype=torch.double)
    for place, token in enumerate(image + sorted(others, key=lambda i: best[i])):
        score[token] = -place
    return score


def feather(seen: Seen, row: int, scorer: Any, layout: Any) -> Tensor:
    there = visuals(seen, row)
    score = without_rope(seen, row, there).mean(0)
    if len(there) == int(seen.visual[row].sum()) and whole(seen):
        for image in row_of(layout, seen, row):
            shape = shape_of(image, layout)
            for i, token in enumerate(image):
                if shape is not None:
                    on = i // shape[1] % scorer.stride == 0 and i % shape[1] % scorer.stride == 0
                else:
                    on = i % scorer.stride**2 == 0
                score[token] += float(on)
    return score


def whole(seen: Seen) -> bool:
    """Whether no visual token of the batch has been dropped."""
    return not bool((seen.visual & ~seen.kept).any())


class Layout(list[list[list[int]]]):
    """For each row the positions of each image's tokens.

    Attributes:
        shapes: (rows, columns) by the number of tokens, for models that say it of each image.
    """

    shapes: dict[int, tuple[int, int]] | None = None


def shape_of(image: list[int], layout: Layout) -> tuple[int, int] | None:
    """The grid of an image's tokens: what the batch says, or a square; None if it has none."""
    if layout.shapes is not None:
        return layout.shapes.get(len(image))
    side = math.isqrt(len(image))
    return (side, side) if side * side == len(image) else None


def image_rows(family: Family, model: Any, batch: Any) -> Layout:
    """For each row the positions of each image's tokens: runs of visual tokens, cut where two
    images touch, as the engine sees them."""
    rows = Layout()
    if "image_grid_thw" in batch:
        merge = model.config.vision_config.spatial_merge_size
        sides = [
            (high // merge, wide // merge) for _, high, wide in batch["image_grid_thw"].tolist()
        ]
        rows.shapes = {high * wide: (high, wide) for high, wide in sides}
    visual, spans = family.visual_mask(model, batch), family.visual_spans(model, batch)
    for mask, row_spans in zip(visual, spans, strict=True):
        starts = {start for start, _ in row_spans}
        found: list[list[int]] = []
        for place in mask.nonzero().flatten().tolist():
            if found and found[-1][-1] == place - 1 and place not in starts:
                found[-1].append(place)
            else:
                found.append([place])
        rows.append(found)
    return rows


def groups(seen: Seen, row: int) -> list[list[int]]:
    there = visuals(seen, row)
    if seen.spans is None:
        return [there]
    return [[i for i in there if start <= i < end] for start, end in seen.spans[row]]


def ordered(seen: Seen, row: int, pick: Callable[[list[int], list[int]], int]) -> Tensor:
    """Scores that give the order in which ``pick(free, taken)`` takes each group's tokens."""
    score = torch.zeros(seen.valid.shape[1], dtype=torch.double)
    for group in groups(seen, row):
        free, taken = list(group), list[int]()
        while free:
            token = pick(free, taken)
            score[token] = -len(taken)
            free.remove(token)
            taken.append(token)
    return score


def divprune(seen: Seen, row: int, scorer: Any) -> Tensor:
    unit = torch.nn.functional.normalize(seen.inputs[0][row].double(), dim=-1)
    distance = 1 - unit @ unit.T

    def pick(free: list[int], taken: list[int]) -> int:
        def gap(i: int) -> float:
            return min((float(distance[i, j]) for j in taken or free if j != i), default=0.0)

        return max(free, key=gap)

    return ordered(seen, row, pick)


def cdpruner(seen: Seen, row: int, scorer: Any) -> Tensor:
    """The greedy choice by its definition: the largest ratio of determinants."""
    unit = torch.nn.functional.normalize(seen.inputs[0][row].double(), dim=-1)
    there = visuals(seen, row)
    relevance = torch.zeros(len(unit), dtype=torch.double)
    if there:
        cosine = (unit @ unit[question(seen, row)].mean(0))[there]
        relevance[there] = (cosine - cosine.min() + 1e-6) / (cosine.max() - cosine.min())
    kernel = relevance[:, None] * (unit @ unit.T) * relevance[None]

    def pick(free: list[int], taken: list[int]) -> int:
        def det(chosen: list[int]) -> float:
            return float(torch.linalg.det(kernel[chosen][:, chosen])) if chosen else 1.0

        return max(free, key=lambda i: det([*taken, i]))

    return ordered(seen, row, pick)


def grid(seen: Seen, row: int, scorer: Any, layout: Any) -> Tensor:
    score = torch.zeros(seen.valid.shape[1], dtype=torch.double)
    for image in row_of(layout, seen, row):
        shape = shape_of(image, layout)
        if shape is not None:
            bayer = torch.zeros(1, 1)
            while len(bayer) < max(shape):
                top = torch.cat([4 * bayer, 4 * bayer + 2], 1)
                bayer = torch.cat([top, torch.cat([4 * bayer + 3, 4 * bayer + 1], 1)], 0)
            key = bayer[: shape[0], : shape[1]].flatten()
        else:
            key = -(torch.arange(len(image)).double() * GOLDEN).frac().float()
        for place, i in enumerate(key.argsort(stable=True).tolist()):
            score[image[i]] = -(place + 0.5) / len(image)
    return score.float()


def mixed(seen: Seen, row: int, scorer: Any, layout: Any) -> Tensor:
    there = visuals(seen, row)
    attended = attention(seen, row, scorer.attention)
    cover = grid(seen, row, scorer.cover, layout)
    looked_at, covering = (sorted(there, key=lambda i: -float(by[i])) for by in (attended, cover))
    taken: list[int] = []
    for turn in range(len(there) * scorer.every):
        queue = looked_at if turn % scorer.every == scorer.every - 1 else covering
        if queue and (token := queue.pop(0)) not in taken:
            taken.append(token)
    score = torch.zeros(seen.valid.shape[1], dtype=torch.double)
    for place, token in enumerate(taken):
        score[token] = -place
    return score


def visionzip(seen: Seen, row: int, scorer: Any, weights: Tensor) -> Tensor:
    there = visuals(seen, row)
    by_class = sorted(there, key=lambda i: -float(row_of(weights, seen, row)[i]))
    even = spread(seen, row)
    by_spread = sorted(there, key=lambda i: -float(even[i]))
    score = torch.zeros(seen.valid.shape[1], dtype=torch.double)
    for i in there:
        places = [by_class.index(i) / scorer.dominant] if scorer.dominant else []
        if scorer.dominant < 1:
            places.append(by_spread.index(i) / (1 - scorer.dominant))
        score[i] = -min(places)
    return score


def tower_weights(model: Any, batch: Any, family: Family) -> Tensor:
    """[B, T]: what the tower's class token attends to, from attention maps of the whole tower."""
    inner, config = model.model, model.config
    tower = inner.vision_tower
    pixels = batch["pixel_values"]
    tiles = [1] * len(pixels)
    if pixels.dim() == 5:  # images of several tiles, filled up with empty ones
        tiles = [int(image.flatten(1).any(1).sum()) for image in pixels]
        pixels = torch.cat([image[:n] for image, n in zip(pixels, tiles, strict=True)])
    before = tower.config._attn_implementation
    tower.config._attn_implementation = "eager"
    with torch.no_grad():
        maps = tower(pixels, output_attentions=True).attentions
    tower.config._attn_implementation = before
    name = "vision_feature_layer"  # ViP-LLaVA's is in the plural on transformers 5.17
    feature_layer = getattr(config, name if hasattr(config, name) else f"{name}s")
    if not isinstance(feature_layer, int):  # several layers, of which the last one counts
        feature_layer = feature_layer[-1]
    index = feature_layer if feature_layer < 0 else feature_layer - 1
    patches = maps[index][:, :, 0, 1:].mean(1)
    if hasattr(inner, "pixel_shuffle"):
        side = math.isqrt(patches.shape[1])
        number = torch.arange(patches.shape[1]).float().view(1, side, side, 1)
        joined = inner.pixel_shuffle(number, scale_factor=config.downsample_ratio)
        tokens = [p[joined.flatten(0, 2).long()].mean(-1) for p in patches]
    elif "image_sizes" in batch:
        numbers = torch.arange(1, patches.numel() + 1).float().view(*patches.shape, 1)
        packed, _ = inner.pack_image_features(
            torch.split(numbers, tiles),
            batch["image_sizes"],
            vision_feature_select_strategy="default",
            image_newline=torch.zeros(1),
        )
        table = torch.cat([torch.zeros(1), patches.flatten()])
        tokens = [table[p.flatten().long()] for p in packed]
    else:
        tokens = list(patches)
    visual = family.visual_mask(model, batch)
    weights = torch.zeros(visual.shape)
    weights[visual] = torch.cat(tokens)
    return weights


TABLE: dict[type, tuple[Callable[..., Tensor], str]] = {
    scores.Attention: (attention, "attention"),
    scores.TextRaters: (text_raters, "attention"),
    scores.KeyNorm: (key_norm, "attention"),
    scores.HiddenChange: (hidden_change, "input"),
    scores.Dart: (dart, "input"),
    scores.MaxMin: (divprune, "embeds"),
    scores.ConditionalDPP: (cdpruner, "embeds"),
}
LAID_OUT: dict[type, Callable[..., Tensor]] = {
    scores.Feather: feather,
    scores.Grid: grid,
    scores.Mixed: mixed,
}
