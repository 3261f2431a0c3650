"""Scores that pick one token after the other, and what they rest on, in the plainest way."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import replace
from fractions import Fraction
from typing import Any

import torch
from torch import Tensor

from tests.reference import Seen
from tests.reference_layout import frames_of, shape_of


def row_of(per_row: Any, seen: Seen, row: int) -> Any:
    """The entry of a row of the batch; beams and several answers repeat rows."""
    return per_row[row * len(per_row) // len(seen.valid)]


def visuals(seen: Seen, row: int) -> list[int]:
    """Positions of the visual tokens that are still there."""
    return (seen.visual[row] & seen.kept[row]).nonzero().flatten().tolist()


def texts(seen: Seen, row: int) -> list[int]:
    return (~seen.visual[row] & seen.valid[row]).nonzero().flatten().tolist()


def question(seen: Seen, row: int) -> list[int]:
    end = max(visuals(seen, row), default=-1)
    return [i for i in texts(seen, row) if i > end]


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


def relevance(seen: Seen, row: int, scorer: Any) -> Tensor:
    """Cosine with the mean of the question's tokens, of unit length each."""
    unit = torch.nn.functional.normalize(seen.inputs[0][row].double(), dim=-1)
    return unit @ unit[question(seen, row)].mean(0)


def marginal_relevance(seen: Seen, row: int, scorer: Any, inner: Callable[..., Tensor]) -> Tensor:
    importance = inner(seen, row).double()
    hidden = seen.inputs[seen.layer if seen.layer in seen.inputs else 0][row].double()
    unit = torch.nn.functional.normalize(hidden, dim=-1)
    worth = torch.zeros_like(importance)
    for group in groups(seen, row):
        if group:
            low, high = importance[group].min(), importance[group].max()
            worth[group] = (importance[group] - low) / (high - low).clamp_min(1e-6)

    def pick(free: list[int], taken: list[int]) -> int:
        def value(i: int) -> float:
            alike = max((float(unit[i] @ unit[j]) for j in taken), default=-1.0)
            return scorer.balance * float(worth[i]) - (1 - scorer.balance) * alike

        return max(free, key=value)

    return ordered(seen, row, pick)


def scope(seen: Seen, row: int, scorer: Any, weights: Tensor) -> Tensor:
    unit = torch.nn.functional.normalize(seen.inputs[0][row].double(), dim=-1)
    cosine = unit @ unit.T
    saliency = row_of(weights, seen, row).double() ** scorer.alpha

    def pick(free: list[int], taken: list[int]) -> int:
        every = free + taken
        covered = cosine[every][:, taken].amax(1).clamp_min(0) if taken else torch.zeros(len(every))
        gain = {i: float((cosine[every, i] - covered).clamp_min(0).sum()) for i in free}
        return max(free, key=lambda i: float(saliency[i]) * gain[i])

    return ordered(seen, row, pick)


def vispruner(seen: Seen, row: int, scorer: Any, weights: Tensor) -> Tensor:
    unit = torch.nn.functional.normalize(seen.inputs[0][row].double(), dim=-1)
    looked_at = row_of(weights, seen, row)
    score = torch.zeros(seen.valid.shape[1], dtype=torch.double)
    for there in groups(seen, row):
        order = sorted(there, key=lambda i: -float(looked_at[i]))
        left = 1 if scorer.keep is None else half_up(scorer.keep, len(there))
        first = 0 if scorer.keep is None else int(left * scorer.important)
        rest, gone = order[first:], list[int]()
        while len(rest) > max(1, left - first):
            ones, others = rest[::2], rest[1::2]
            alike = {i: max(float(unit[i] @ unit[j]) for j in others) for i in ones}
            ones = sorted(ones, key=lambda i: -alike[i])
            drop = min(8, len(rest) - (left - first), len(ones))
            gone += ones[:drop]
            rest = ones[drop:] + others
        turn = order[:first] + rest + gone[::-1]
        for token in there:
            score[token] = -turn.index(token)
            if scorer.keep is None:
                score[token] = better_of(order, scorer.important, turn, token)
    return score


def hiprune(seen: Seen, row: int, scorer: Any, weights: list[Tensor], layout: Any) -> Tensor:
    middle, end = (row_of(one, seen, row) for one in weights)
    score = torch.zeros(seen.valid.shape[1], dtype=torch.double)
    near = neighbours(seen, row, layout)
    for there in groups(seen, row):
        by_middle = sorted(there, key=lambda i: -float(middle[i]))
        by_end = sorted(there, key=lambda i: -float(end[i]))
        if scorer.keep is None:
            for i in there:
                score[i] = better_of(by_middle, scorer.alpha, by_end, i)
            continue
        kept = half_up(scorer.keep, len(there))
        anchors = by_middle[: half_up(scorer.alpha / 5, kept)]
        buffers = {j for i in anchors for j in near[i] if j in there} - set(anchors)
        turn = anchors + [i for i in by_end if i in buffers]
        turn += [i for i in by_end if i not in turn]
        for place, token in enumerate(turn):
            score[token] = -place
    return score


def vscan(seen: Seen, row: int, scorer: Any, weights: list[Tensor], layout: Any) -> Tensor:
    shallow, deep = (row_of(one, seen, row) for one in weights)
    score = torch.zeros(seen.valid.shape[1], dtype=torch.double)
    where = places(seen, row, layout)
    for there in groups(seen, row):
        turns = {}
        for token in there:
            picture, y, x = where[token]
            window = [
                i for i in there
                if (where[i][0], where[i][1] // scorer.side, where[i][2] // scorer.side)
                == (picture, y // scorer.side, x // scorer.side)
            ]  # fmt: skip
            window.sort(key=lambda i: -float(shallow[i]))
            turns[token] = (window.index(token) + 0.5) / len(window)
        by_turn = sorted(there, key=lambda i: turns[i])
        by_deep = sorted(there, key=lambda i: -float(deep[i]))
        if scorer.keep is None:
            for i in there:
                score[i] = better_of(by_turn, scorer.local, by_deep, i)
            continue
        half = half_up(scorer.local, half_up(scorer.keep, len(there)))
        order = by_turn[:half] + [i for i in by_deep if i not in by_turn[:half]]
        for place, token in enumerate(order):
            score[token] = -place
    return score


def salient(seen: Seen, row: int, scorer: Any, weights: list[Tensor], cover: Tensor) -> Tensor:
    there = visuals(seen, row)
    looked_at = row_of(weights[0], seen, row)
    by_tower = sorted(there, key=lambda i: -float(looked_at[i]))
    by_grid = sorted(there, key=lambda i: -float(cover[i]))
    score = torch.zeros(seen.valid.shape[1], dtype=torch.double)
    for i in there:
        score[i] = better_of(by_tower, scorer.share, by_grid, i)
    return score


def standout(seen: Seen, row: int, scorer: Any, weights: Any, layout: Any, cover: Tensor) -> Tensor:
    """Of all visual tokens, whoever is still there. Without ``weights`` those stand out that few
    others are like."""
    seen = replace(seen, kept=seen.valid)
    there, where = visuals(seen, row), places(seen, row, layout)
    if weights[0] is None:
        hidden = seen.inputs[0][row].double()
        alike = torch.cosine_similarity(hidden[there, None], hidden[None, there], -1)
        alike.fill_diagonal_(-torch.inf)
        salience = dict(zip(there, (-(20 * (alike - 1)).exp().sum(1)).tolist(), strict=True))
    else:
        looked_at = row_of(weights[0], seen, row)
        salience = {i: float(looked_at[i]) for i in there}
    windows: dict[Any, list[int]] = {}
    for image in row_of(layout, seen, row):
        for place, token in enumerate(image):
            picture, y, x = where[token]
            window = (picture, y // scorer.window, x // scorer.window)
            if shape_of(image, layout) is None:
                window = (picture, place // scorer.window**2, 0)
            windows.setdefault(window, []).append(token)
    turns = {}
    for tokens in windows.values():
        tokens.sort(key=lambda i: -salience[i])
        turns |= {token: Fraction(2 * n + 1, 2 * len(tokens)) for n, token in enumerate(tokens)}
    by_window = sorted(there, key=lambda i: (turns[i], -salience[i]))
    by_grid = sorted(there, key=lambda i: -float(cover[i]))
    score = torch.zeros(seen.valid.shape[1], dtype=torch.double)
    for i in there:
        score[i] = better_of(by_window, scorer.share, by_grid, i)
    return score


def better_of(first: list[int], share: float, second: list[int], token: int) -> float:
    """Minus the better of two places, each over its share."""
    part = Fraction(str(share))
    places = [Fraction(first.index(token)) / part] if part else []
    places += [Fraction(second.index(token)) / (1 - part)] if part < 1 else []
    return -float(min(places))


def places(seen: Seen, row: int, layout: Any) -> dict[int, tuple[int, int, int]]:
    """Picture, row and column of each visual token; what is no grid is one row."""
    found = {}
    for number, image in enumerate(row_of(layout, seen, row)):
        frames = frames_of(image, layout)
        high, wide = shape_of(image, layout) or (1, len(image) // frames)
        for place, token in enumerate(image):
            frame, rest = divmod(place, high * wide)
            found[token] = (100 * number + frame, *divmod(rest, wide))
    return found


def neighbours(seen: Seen, row: int, layout: Any) -> dict[int, list[int]]:
    where = places(seen, row, layout)
    return {
        i: [j for j, (picture, y, x) in where.items()
            if picture == where[i][0] and abs(y - where[i][1]) + abs(x - where[i][2]) == 1]
        for i in where
    }  # fmt: skip


def transprune(seen: Seen, row: int, scorer: Any) -> Tensor:
    there = visuals(seen, row)
    turned = torch.zeros(seen.valid.shape[1], dtype=torch.double)
    drops = [i for i in range(seen.layers) if seen.schedule.kept(i, 10**6)
             < (seen.schedule.kept(i - 1, 10**6) if i else 10**6)]  # fmt: skip
    first, last = (max(0, drops[0] - 1), drops[-1]) if drops else (0, seen.layers)
    for layer in range(first, min(last, seen.layer)):
        then = (seen.visual[row] & seen.kept_in[layer][row]).nonzero().flatten().tolist()
        for name in ("self_attn", "mlp"):
            given, made = (part[row].double() for part in seen.parts[layer, name])
            each = 1 - torch.nn.functional.cosine_similarity(given, made, dim=-1)
            share = torch.zeros_like(turned)
            share[then] = each[then].softmax(0)
            turned += made.norm(dim=-1) / given.norm(dim=-1) * share
    score = turned / turned[there].sum() if turned[there].sum() else turned
    if seen.layer:
        rows = question(seen, row)
        each_row = [seen.attention_in(seen.layer - 1, row, q).mean(0) for q in rows]
        looked = torch.stack(each_row).mean(0).double()
        score = score + looked / looked[there].sum()
    return score


def half_up(share: float, count: int) -> int:
    return math.floor(Fraction(str(share)) * count + Fraction(1, 2))


def prunesid(seen: Seen, row: int, scorer: Any) -> Tensor:
    """The set that stays gets 1; what else there is 0."""
    score = torch.zeros(seen.valid.shape[1], dtype=torch.double)
    hidden = seen.inputs[0][row].double()
    for there in groups(seen, row):
        for place in principal_choice(hidden[there], half_up(scorer.keep, len(there))):
            score[there[place]] = 1
    return score


def principal_choice(tokens: Tensor, kept: int) -> list[int]:
    """PruneSID's choice of ``kept`` of the ``tokens`` [N, D], step by step."""
    count, wanted = len(tokens), min(max(kept // 4, 4), tokens.shape[1] - 1)
    if not count:
        return []
    squashed = tokens.sigmoid().T  # observations are channels, variables are tokens
    squashed = squashed - squashed.mean(0)
    weights = torch.linalg.svd(squashed, full_matrices=False).Vh[:wanted].abs()
    weights = (weights * 65536).round()  # so that equal tokens have equal weights
    member = [int(weights[:, i].argmax()) for i in range(count)]
    unit = torch.nn.functional.normalize(tokens, dim=-1)
    cosine = unit @ unit.T
    limit = max(18 * kept / count, 1) * float(cosine.triu().mean())
    ordered_by_group, free = [], []
    for group in range(wanted):
        own = [i for i in range(count) if member[i] == group]
        queue = sorted(own, key=lambda i: -float(weights[member[i], i]))
        unlike: list[int] = []
        for token in queue:
            if all(float(cosine[token, other]) <= limit for other in unlike):
                unlike.append(token)
        free.append(len(unlike))
        ordered_by_group.append(unlike + [i for i in queue if i not in unlike])
    sizes = [len(own) for own in ordered_by_group]
    low = [min(1, size) for size in sizes]
    high = [min(5 * math.ceil(kept / 64), *both) for both in zip(sizes, free, strict=True)]
    while sum(high) < kept:
        high = [min(one + 1, size) for one, size in zip(high, sizes, strict=True)]
    rest = max(0, kept - sum(low))
    ends = [round(Fraction(sum(free[: i + 1]), sum(free)) * rest) for i in range(wanted)]
    parts = [end - before for end, before in zip(ends, [0, *ends], strict=False)]
    quota = [min(p + one, most) for p, one, most in zip(parts, low, high, strict=True)]
    for group in sorted(range(wanted), key=lambda g: -free[g]):
        quota[group] += max(0, min(high[group] - quota[group], rest + sum(low) - sum(quota)))
    chosen = [i for own, n in zip(ordered_by_group, quota, strict=True) for i in own[:n]]
    return chosen[:kept]
