"""Attention of the prompt's text over its visual tokens, in the variants that are compared."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar, Literal

import torch
from torch import Tensor

from st3.methods.scores.base import LayerView
from st3.methods.scores.registry import register

ROWS_AT_ONCE = 64  # of all text rows' attention, so that long prompts need little memory
VISUAL_HEADS = 4  # a quarter of the heads
FIRST_LAZY = 2
# What the words of a score's name say, "attention-text-rows-max" for example.
WORDS: dict[str, dict[str, object]] = {
    "text-rows": {"rows": "text"},
    "max": {"heads": "max"},
    "visual-heads": {"heads": "visual"},
    "no-rope": {"rotary": False},
    "debiased": {"debias": "divide"},
    "detrended": {"debias": "subtract"},
    **{f"lazy{n}": {"lazy": n} for n in range(2, 33)},
}


@register
@dataclass(frozen=True)
class Attention:
    """Softmax attention of the prompt's last token, mean over the query heads.

    Args:
        heads: how heads are joined: "mean", "max", or "visual", the mean of the quarter of the
            heads that give most of their attention to visual tokens (of each query row).
        rows: "last", the prompt's last token, or "text", the mean over all text tokens. Text before
            an image does not see it and adds nothing.
        rotary: False takes queries and keys without RoPE, and the softmax over the visual tokens
            alone, so that nearness to the end of the image counts for nothing.
        debias: "divide" by the trend over a row's visual tokens, fitted as an exponential of their
            place, or "subtract" it, fitted as a line; "none".
        lazy: blocks of so many layers, from layer 2 on, share the score of their first layer; 0
            takes the score of each layer anew.

    Sources: row and heads follow FastV (arXiv 2403.06764), whose choice ST3 (arXiv 2412.20105)
    takes over. Without RoPE: FEATHER (arXiv 2412.13180). De-biased: arXiv 2508.17807, which fits
    its curve on a data set; here each prompt fits its own. Lazy: what ST3 calls QK heredity, for
    the ranking alone: the layers' own attention is computed as ever.
    """

    forms: ClassVar[str] = (
        "attention with options, joined by hyphens: text-rows, max, visual-heads, no-rope, "
        "debiased, detrended, lazy2 to lazy32"
    )

    heads: Literal["mean", "max", "visual"] = "mean"
    rows: Literal["last", "text"] = "last"
    rotary: bool = True
    debias: Literal["none", "divide", "subtract"] = "none"
    lazy: int = 0

    def __post_init__(self) -> None:
        if self.rows == "text" and not self.rotary:
            raise ValueError(
                "attention without RoPE is taken from the last row alone: leave out text-rows or "
                "no-rope"
            )

    @classmethod
    def named(cls, name: str) -> Attention | None:
        """The score that a name such as "attention-max-lazy4" or "text-rows" says; None for other
        names."""
        if not name.startswith(("attention", "text-rows")):
            return None
        rest = name.removeprefix("attention") if name.startswith("attention") else f"-{name}"
        options: dict[str, Any] = {}
        while rest:
            word = next(
                (w for w in sorted(WORDS, key=len, reverse=True) if rest.startswith(f"-{w}")), ""
            )
            if not word or options.keys() & WORDS[word]:
                return None
            options |= WORDS[word]
            rest = rest[len(word) + 1 :]
        return cls(**options)

    @property
    def name(self) -> str:
        return "-".join(
            ["attention", *(word for word, fields in WORDS.items() if self._is(fields))]
        )

    def _is(self, fields: dict[str, object]) -> bool:
        return all(getattr(self, field) == value for field, value in fields.items())

    @property
    def needs(self) -> frozenset[str]:
        return frozenset() if self.rotary else frozenset({"rotary"})

    @property
    def last_row(self) -> bool:
        """Whether the last row's logits are all that it reads."""
        return self.rows == "last" and self.rotary

    def source(self, layer: int) -> int:
        """The layer whose score ``layer`` uses."""
        if not self.lazy or layer < FIRST_LAZY:
            return layer
        return layer - (layer - FIRST_LAZY) % self.lazy

    def __call__(self, view: LayerView) -> Tensor:
        if not self.rotary:
            logits = view.unrotated_logits()
            lowest = torch.finfo(logits.dtype).min
            logits = logits.masked_fill(~view.visual[:, None], lowest)
            score = self._join(logits.softmax(dim=-1)[:, :, None], view.visual)[:, 0]
        elif self.rows == "last":
            weights = view.last_row_logits().softmax(dim=-1)[:, :, None, view.first_column :]
            score = self._join(weights, view.visual)[:, 0]
        else:
            score = self.over(view, view.text)
        return score if self.debias == "none" else _without_trend(score, view, self.debias)

    def over(self, view: LayerView, rows: Tensor) -> Tensor:
        """Mean attention of the text tokens ``rows`` [B, N] bool over all columns, [B, N]."""
        batch, columns = rows.shape
        count = rows.sum(1)
        # The wanted rows first, in their order; shorter lists end in rows that count for nothing.
        order = torch.argsort((~rows).to(torch.uint8), dim=1, stable=True)
        total = torch.zeros(batch, columns, device=rows.device)
        # (how many there are is known without a wait for the device)
        most = int(count.max()) if view.most_text is None else min(view.most_text, columns)
        for start in range(0, most, ROWS_AT_ONCE):
            part = order[:, start : start + ROWS_AT_ONCE]
            weights = view.row_logits(part).softmax(dim=-1)[..., view.first_column :]
            joined = self._join(weights, view.visual)
            total += joined.masked_fill(~rows.gather(1, part)[..., None], 0.0).sum(1)
        return total / count.clamp_min(1)[:, None]

    def _join(self, weights: Tensor, visual: Tensor) -> Tensor:
        """[B, heads, R, N] -> [B, R, N]."""
        if self.heads == "mean":
            return weights.mean(dim=1)
        if self.heads == "max":
            return weights.amax(dim=1)
        mass = (weights * visual[:, None, None]).sum(-1)
        chosen = mass.topk(max(1, weights.shape[1] // VISUAL_HEADS), dim=1).indices
        return weights.gather(1, chosen[..., None].expand(-1, -1, -1, weights.shape[-1])).mean(1)


def _without_trend(score: Tensor, view: LayerView, debias: str) -> Tensor:
    """``score`` [B, N] less the least-squares line over the visual tokens' places; "divide" works
    on logarithms, where the line is an exponential."""
    y = score.clamp_min(torch.finfo(score.dtype).tiny).log() if debias == "divide" else score
    weight = view.visual.to(y.dtype)
    count = weight.sum(1, keepdim=True).clamp_min(1)
    x = view.ordinal.to(y.dtype)
    x = x - (x * weight).sum(1, keepdim=True) / count
    y = y - (y * weight).sum(1, keepdim=True) / count
    slope = (x * y * weight).sum(1, keepdim=True) / (x * x * weight).sum(1, keepdim=True).clamp_min(
        torch.finfo(y.dtype).tiny
    )
    return y - slope * x
