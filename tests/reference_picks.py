"""Scores that pick one token after the other, and what they rest on, in the plainest way."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from tests.reference import Seen
from tests.zoo import Family


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
