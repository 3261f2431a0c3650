"""What each score must say, in the plainest way: row by row, loops, float64, all tokens there.

Nothing here is shared with the code under test, but the formula of the two scores that are nothing
but a formula of a token's place.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor

from st3.methods import scores
from st3.methods.scores.looks import looks_of
from tests.reference import Score, Seen
from tests.reference_layout import frames_of, image_rows, shape_of
from tests.reference_picks import (
    cdpruner,
    divprune,
    groups,
    half_up,
    hiprune,
    marginal_relevance,
    prunesid,
    question,
    relevance,
    row_of,
    salient,
    scope,
    standout,
    texts,
    transprune,
    vispruner,
    visuals,
    vscan,
)
from tests.reference_pixels import pixel_surprise
from tests.reference_tower import tower_weights
from tests.zoo import Family

GOLDEN = 0.6180339887498949
Formula = Callable[..., Tensor]  # of (seen, row), [T]


def reference_score(scorer: Any, family: Family, model: Any, batch: Any) -> Score | None:
    """The reference's score for one of the engine's; None for the last row's attention."""
    if scorer == scores.Attention():
        return None
    of, stage = formula(scorer, family, model, batch)
    later = getattr(scorer, "later", None)
    if later is None:
        return Score(all_rows(of), stage, above=getattr(scorer, "above", None))
    return Score(all_rows(of), stage, all_rows(formula(later, family, model, batch)[0]))


def all_rows(of: Formula) -> Callable[[Seen], Tensor]:
    return lambda seen: torch.stack([of(seen, row) for row in range(len(seen.valid))])


def formula(scorer: Any, family: Family, model: Any, batch: Any) -> tuple[Formula, str]:
    """What a row's score is, as a function of what was seen, and when it is taken."""
    kind = type(scorer)
    if kind is scores.MarginalRelevance:
        inner, stage = formula(scorer.of, family, model, batch)
        return partial(marginal_relevance, scorer=scorer, inner=inner), stage
    if kind in TOWER:
        looks = [tower_weights(model, batch, family, look) for look in looks_of(scorer)]
        if kind is scores.Standout:
            layout = image_rows(family, model, batch)
            return lambda seen, row: standout(
                seen, row, scorer, looks, layout, grid(seen, row, scores.Grid(), layout)
            ), "embeds"
        if kind is scores.Salient:
            layout = image_rows(family, model, batch)
            return lambda seen, row: salient(
                seen, row, scorer, looks, grid(seen, row, scores.Grid(), layout)
            ), "embeds"
        if kind in (scores.Hierarchy, scores.LocalGlobal):
            layout = image_rows(family, model, batch)
            return partial(TOWER[kind], scorer=scorer, weights=looks, layout=layout), "embeds"
        return partial(TOWER[kind], scorer=scorer, weights=looks[0]), "embeds"
    if kind is scores.Novelty:
        surprise = pixel_surprise(model, batch, family, scorer.threshold)
        layout = image_rows(family, model, batch)

        def novelty(seen: Seen, row: int) -> Tensor:
            mine, even = row_of(surprise, seen, row), grid(seen, row, scores.Grid(), layout)
            return torch.where(mine > scorer.threshold, mine, even)

        return novelty, "embeds"
    if kind is scores.Mixed:
        cover, _ = formula(scorer.cover, family, model, batch)
        return partial(mixed, scorer=scorer, cover=cover), "attention"
    if kind in LAID_OUT:
        of, stage = LAID_OUT[kind]
        return partial(of, scorer=scorer, layout=image_rows(family, model, batch)), stage
    if kind in (scores.RandomScore, scores.Uniform):
        return lambda seen, row: scorer(SimpleNamespace(ordinal=ordinals(seen)))[row], "embeds"
    of, stage = TABLE[kind]
    return partial(of, scorer=scorer), stage


def ordinals(seen: Seen) -> Tensor:
    return seen.visual.long().cumsum(1) - 1


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
    return -seen.key[row].mean(0).norm(dim=-1)


def hidden_change(seen: Seen, row: int, scorer: Any) -> Tensor:
    if seen.layer == 0:
        return spread(seen, row)
    return (seen.inputs[seen.layer][row] - seen.inputs[seen.layer - 1][row]).pow(2).sum(-1).sqrt()


def spread(seen: Seen, row: int) -> Tensor:
    return (ordinals(seen)[row].double() * GOLDEN).frac().float()


def dart(seen: Seen, row: int, scorer: Any) -> Tensor:
    if seen.layer == 0:
        return spread(seen, row)
    size = seen.keys[seen.layer - 1][row].abs().sum((0, 2))
    text = sorted(question(seen, row), key=lambda i: -float(size[i]))[: scorer.text_pivots]
    hidden = seen.inputs[seen.layer][row]
    score = torch.zeros(len(size), dtype=torch.double)
    for there in groups(seen, row):
        image = sorted(there, key=lambda i: -float(size[i]))[: scorer.image_pivots]
        free = [i for i in there if i not in image]
        lists = [
            sorted(free, key=lambda i: float(torch.cosine_similarity(hidden[i], hidden[pivot], 0)))
            for pivot in image + text
        ]
        if scorer.keep is None:
            order = by_best_place(lists, hidden, image + text, free)
        else:
            order = in_turn(lists, half_up(scorer.keep, len(there)) - len(image))
        for place, token in enumerate(image + order):
            score[token] = len(size) - place
    return score


def by_best_place(
    lists: list[list[int]], hidden: Tensor, pivots: list[int], free: list[int]
) -> list[int]:
    best: dict[int, tuple[int, float]] = {}
    for pivot, ranking in zip(pivots, lists, strict=True):
        for place, token in enumerate(ranking):
            alike = float(torch.cosine_similarity(hidden[token], hidden[pivot], 0))
            best[token] = min(best.get(token, (len(free), 1.0)), (place, alike))
    return sorted(free, key=lambda i: best[i])


def in_turn(lists: list[list[int]], left: int) -> list[int]:
    """One pivot after the other takes its part of ``left`` from its list, and no token twice."""
    taken: list[int] = []
    for number, ranking in enumerate(lists):
        part = left // len(lists) + (number < left % len(lists))
        taken += [i for i in ranking if i not in taken][: max(part, 0)]
    return taken


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


def grid(seen: Seen, row: int, scorer: Any, layout: Any) -> Tensor:
    score = torch.zeros(seen.valid.shape[1], dtype=torch.double)
    for image in row_of(layout, seen, row):
        shape, frames = shape_of(image, layout), frames_of(image, layout)
        if shape is not None:
            bayer = torch.zeros(1, 1)
            while len(bayer) < max(shape):
                top = torch.cat([4 * bayer, 4 * bayer + 2], 1)
                bayer = torch.cat([top, torch.cat([4 * bayer + 3, 4 * bayer + 1], 1)], 0)
            key = bayer[: shape[0], : shape[1]].flatten().repeat(frames)
        else:
            key = -(torch.arange(len(image)).double() * GOLDEN).frac().float()
        for place, i in enumerate(key.argsort(stable=True).tolist()):
            score[image[i]] = -(place + 0.5) / len(image)
    return score.float()


def frame_change(seen: Seen, row: int, scorer: Any, layout: Any) -> Tensor:
    """Of a row with one video, or with images alone, which are first frames."""
    score = grid(seen, row, scorer, layout)
    hidden = seen.inputs[0][row].double()
    for video in row_of(layout, seen, row):
        places = len(video) // frames_of(video, layout)
        for earlier, token in zip(video, video[places:], strict=False):
            score[token] = -4 - torch.cosine_similarity(hidden[earlier], hidden[token], 0)
    return score


def frame_quota(seen: Seen, row: int, scorer: Any, layout: Any) -> Tensor:
    score = torch.zeros(seen.valid.shape[1], dtype=torch.double)
    for video in row_of(layout, seen, row):
        tokens = seen.inputs[0][row][video]
        steady = tokens.var(0, correction=0).argsort()[: tokens.shape[1] // 2]
        unit = torch.nn.functional.normalize(tokens[:, steady].double(), dim=-1)
        frames = unit.unflatten(0, (frames_of(video, layout), -1))
        to_video = near(frames, frames.mean((0, 1)))
        redundant = to_video + near(frames, frames.mean(1, keepdim=True))
        unusual = (-to_video.mean(1) / 0.01).softmax(0)
        for number, frame in enumerate(redundant):
            part = min(1.0, scorer.keep * float(1 + unusual[number] - unusual.mean()))
            quota = max(1, round(part * len(frame)))
            for place, i in enumerate(frame.argsort().tolist()):
                first = 16 if place < quota else 0
                score[video[number * len(frame) + i]] = first - frame[i]
    return score


def near(frames: Tensor, centre: Tensor) -> Tensor:
    squared = (frames - centre).pow(2).sum(-1)
    return torch.stack([(-squared / (2 * a)).exp() for a in (0.125, 0.25, 0.5, 1, 2)]).sum(0)


def mixed(seen: Seen, row: int, scorer: Any, cover: Formula) -> Tensor:
    there = visuals(seen, row)
    attended = attention(seen, row, scorer.attention)
    covers = cover(seen, row)
    looked_at, covering = (sorted(there, key=lambda i: -float(by[i])) for by in (attended, covers))
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
    looked_at = row_of(weights, seen, row)
    score = torch.zeros(seen.valid.shape[1], dtype=torch.double)
    if scorer.keep is not None:
        for there in groups(seen, row):
            kept = half_up(scorer.keep, len(there))
            dominant = half_up(scorer.dominant, kept)
            by_class = sorted(there, key=lambda i: -float(looked_at[i]))
            rest = sorted(by_class[dominant:])
            every = max(1, len(rest) // max(1, kept - dominant))
            for token in by_class[:dominant] + rest[::every][: kept - dominant]:
                score[token] = 1
        return score
    there = visuals(seen, row)
    by_class = sorted(there, key=lambda i: -float(looked_at[i]))
    even = spread(seen, row)
    by_spread = sorted(there, key=lambda i: -float(even[i]))
    for i in there:
        places = [by_class.index(i) / scorer.dominant] if scorer.dominant else []
        if scorer.dominant < 1:
            places.append(by_spread.index(i) / (1 - scorer.dominant))
        score[i] = -min(places)
    return score


TABLE: dict[type, tuple[Formula, str]] = {
    scores.Attention: (attention, "attention"),
    scores.TextRaters: (text_raters, "attention"),
    scores.KeyNorm: (key_norm, "attention"),
    scores.HiddenChange: (hidden_change, "input"),
    scores.Dart: (dart, "input"),
    scores.MaxMin: (divprune, "embeds"),
    scores.ConditionalDPP: (cdpruner, "embeds"),
    scores.Relevance: (relevance, "embeds"),
    scores.Transition: (transprune, "input"),
    scores.Principal: (prunesid, "embeds"),
}
TOWER: dict[type, Formula] = {
    scores.ClassAttention: visionzip,
    scores.Scope: scope,
    scores.Distinct: vispruner,
    scores.Hierarchy: hiprune,
    scores.LocalGlobal: vscan,
    scores.Salient: salient,
    scores.Standout: standout,
}
LAID_OUT: dict[type, tuple[Formula, str]] = {
    scores.Feather: (feather, "attention"),
    scores.Grid: (grid, "embeds"),
    scores.FrameChange: (frame_change, "embeds"),
    scores.FrameQuota: (frame_quota, "embeds"),
}
