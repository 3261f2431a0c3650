"""What a score may look at, and what it returns."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any, Literal, Protocol

import torch
from torch import Tensor

from st3.methods.schedule import exact
from st3.methods.upload import upload

Stage = Literal["embeds", "input", "attention"]
Shape = tuple[int, ...]
"""The grid of an image's tokens (rows, columns), or of a video's (frames, rows, columns)."""


@dataclass(kw_only=True)
class TokenView:
    """What a prompt shows at the input of a decoder layer during prefill.

    ``B`` rows, ``N`` columns still present (text, kept visual tokens, padding).

    Attributes:
        layer: decoder layer, 0-based.
        hidden: [B, N, hidden size], the layer's input; in layer 0 the embeddings, of visual tokens
            the projected ones.
        visual: [B, N] bool, the visual tokens still present.
        ordinal: [B, N] int, a visual token's place among its row's original visual tokens.
        last: [B] int, column of the prompt's last token.
        valid: [B, N] bool, columns that are not padding; None when all are.
        group: [B, N] int, the image whose budget a visual token draws on; None when a row has one
            budget for all.
        images: for each row the original visual tokens of each image; empty if unknown.
        grids: for each row the shape of each image's tokens in reading order, (rows, columns) or
            (frames, rows, columns) of a video, None where they are no grid; empty if unknown.
        most_text: the most text tokens of any row; None if the host does not know.
        complete: whether no visual token has been dropped so far.
        at_end: whether the prompt's last token is known to stand in the last column of every row.
        wanted: the most visual tokens that any row will keep of those it ranks; None for all, where
            the whole order counts.
        before: [B, N, hidden size], the input of the layer before; None in layer 0.
        keys: [B, KV heads, N, head size], the keys of the layer before; for those that need "keys".
        towers: [looks, B, N], what the vision tower attends to, by each of the score's looks; for
            those that need "tower", or "pixels". ``tower`` [B, N] is the first of them.
        noted: [B, N], what the score's ``note`` returned in the attention of the layer before.
        turned: [B, N], sums of what the score's ``turn`` returned in the layers before.
        prepared: [B, N], what the score's ``prepare`` returned in layer 0.
    """

    layer: int
    hidden: Tensor | None
    visual: Tensor
    ordinal: Tensor
    last: Tensor
    valid: Tensor | None = None
    group: Tensor | None = None
    images: tuple[tuple[int, ...], ...] = ()
    grids: tuple[tuple[Shape | None, ...], ...] = ()
    most_text: int | None = None
    complete: bool = True
    at_end: bool = False
    wanted: int | None = None
    before: Tensor | None = None
    keys: Tensor | None = None
    towers: Tensor | None = None
    noted: Tensor | None = None
    turned: Tensor | None = None
    prepared: Tensor | None = None

    @property
    def tower(self) -> Tensor | None:
        return None if self.towers is None else self.towers[0]

    @property
    def text(self) -> Tensor:
        """The prompt's other tokens, up to its last one, [B, N] bool."""
        place = torch.arange(self.visual.shape[1], device=self.visual.device)
        text = ~self.visual & (place <= self.last[:, None])
        return text if self.valid is None else text & self.valid

    def budgets(self) -> Iterator[tuple[Tensor, Tensor]]:
        """The visual tokens that share a budget, all of a row or each image: which they are, [B, N]
        bool, and how many they were before any was dropped, [B, 1] int."""
        sharing = [(self.visual, [sum(row) for row in self.images])]
        if self.group is not None:
            sharing = [
                (self.visual & (self.group == i), [sum(row[i : i + 1]) for row in self.images])
                for i in range(max(map(len, self.images), default=0))
            ]
        for tokens, counts in sharing:
            yield tokens, upload(counts, tokens.device)[:, None]

    @property
    def question(self) -> Tensor:
        """The text behind the last visual token, [B, N] bool; all text in rows without one."""
        place = torch.arange(self.visual.shape[1], device=self.visual.device)
        return self.text & (place > (place * self.visual).amax(1, keepdim=True))


@dataclass(kw_only=True)
class LayerView(TokenView):
    """What one decoder layer's attention shows of a prompt during prefill.

    There are ``K >= N`` keys (more than ``N`` only when an earlier turn is in the cache: the new
    columns are the last ``N``).

    Attributes:
        query: [B, query heads, N, head size], after RoPE.
        key: [B, KV heads, K, head size], after RoPE.
        scaling: factor on ``query @ key``.
        softcap: tanh cap on the scaled logits (Gemma 2), or None.
        key_valid: [B, K] bool, keys that are neither padding nor dropped; None when all are.
        last_query: [B, query heads, 1, head size], the last token's; where it stands for ``query``.
        over_ranks: the mean, over the processes that share a layer's heads, of what each has found.
        unrotate: gives the new columns' queries and keys without RoPE, [B, query or KV heads, N,
            head size], for scores that need "rotary".
    """

    query: Tensor
    key: Tensor
    scaling: float
    softcap: float | None
    key_valid: Tensor | None
    last_query: Tensor | None = None
    over_ranks: Callable[[Tensor], Tensor] = lambda score: score
    unrotate: Callable[[], tuple[Tensor, Tensor]] | None = None

    @classmethod
    def of(cls, query: Tensor, key: Tensor, given: Mapping[str, Any], **facts: Any) -> LayerView:
        """The view of a call of an attention function; ``given`` are its keyword arguments."""
        scaling = given.get("scaling")
        return cls(
            query=query,
            key=key,
            scaling=query.shape[-1] ** -0.5 if scaling is None else scaling,
            softcap=given.get("softcap"),
            **facts,
        )

    @property
    def first_column(self) -> int:
        """Index among the keys of column 0."""
        return self.key.shape[-2] - self.visual.shape[-1]

    def last_row_logits(self) -> Tensor:
        """Scaled attention logits of the prompt's last token over the keys, [B, heads, K], fp32;
        see :meth:`row_logits`."""
        if not self.at_end:
            return self._logits(self.last_rows(), self.last[:, None])[:, :, 0]
        logits = self._scaled(self.last_rows())[:, :, 0]  # nothing is behind the last token
        if self.key_valid is not None:
            logits = logits.masked_fill(~self.key_valid[:, None], float("-inf"))
        return logits

    def last_rows(self) -> Tensor:
        """The queries of the prompts' last tokens, [B, query heads, 1, head size]."""
        if self.last_query is not None:
            return self.last_query
        return last_rows(self.query, self.last, self.at_end)

    def row_logits(self, rows: Tensor) -> Tensor:
        """Scaled attention logits of the columns ``rows`` [B, R] over the keys, [B, heads, R, K],
        fp32.

        Keys after a row (candidates of assisted decoding, right padding), padding and dropped keys
        are -inf: causal, whatever the family's mask. Sliding windows are left out on purpose:
        beyond a window the attention is exactly 0, which ranks nothing.
        """
        return self._logits(_pick(self.query, rows), rows)

    def _logits(self, picked: Tensor, rows: Tensor) -> Tensor:
        keys, columns = self.key.shape[2], self.visual.shape[1]
        logits = self._scaled(picked)
        past = keys - columns
        seen = torch.arange(keys, device=rows.device) <= (rows + past)[..., None]
        if self.key_valid is not None:
            seen = seen & self.key_valid[:, None]
        return logits.masked_fill(~seen[:, None], float("-inf"))

    def _scaled(self, picked: Tensor) -> Tensor:
        logits = products(picked, self.key) * self.scaling
        if self.softcap is not None:
            logits = torch.tanh(logits / self.softcap) * self.softcap
        return logits

    def unrotated_logits(self) -> Tensor:
        """Scaled products of the last token's query with the new columns' keys, both without RoPE,
        [B, heads, N], fp32."""
        if self.unrotate is None:
            raise ValueError("a score that removes RoPE must list 'rotary' in its needs")
        query, key = self.unrotate()
        return products(_pick(query, self.last[:, None]), key)[:, :, 0] * self.scaling


def last_rows(query: Tensor, last: Tensor, at_end: bool) -> Tensor:
    """``query`` [B, heads, N, size] at the columns ``last`` [B], which ``at_end`` says to be the
    end of each row: [B, heads, 1, size]."""
    return query.narrow(2, query.shape[2] - 1, 1) if at_end else _pick(query, last[:, None])


def _pick(query: Tensor, rows: Tensor) -> Tensor:
    """``query`` [B, heads, N, size] at columns ``rows`` [B, R]: [B, heads, R, size]."""
    batch = torch.arange(query.shape[0], device=query.device)[:, None]
    return query[batch, :, rows].transpose(1, 2)


def products(query: Tensor, key: Tensor) -> Tensor:
    """``query`` [B, heads, R, size] times all ``key`` [B, KV heads, K, size]: [B, heads, R, K],
    fp32."""
    batch, heads, rows, size = query.shape
    kv_heads, keys = key.shape[1], key.shape[2]
    picked = query.reshape(batch, kv_heads, -1, size)
    if key.stride(-1) == 1:
        # Long operand first: on CPUs `key @ row` is up to 40 times faster than `row @ key^T`. (A
        # matmul comes to the same, by many small steps.)
        found = torch.bmm(key.flatten(0, 1), picked.flatten(0, 1).transpose(1, 2)).transpose(1, 2)
    else:  # unless keys are stored as key^T
        found = torch.matmul(picked, key.transpose(-1, -2))
    return found.reshape(batch, heads, rows, keys).float()


class Score(Protocol):
    """Ranks the visual tokens of a prompt: the higher, the longer a token is kept.

    Optional attributes, read with a default:
        stage: when it is taken. "attention" (the default): in a layer's attention, for that layer's
            cache and the drop behind it. "input": at the input of a layer, for that layer's cache
            and the drop before it. "embeds": once, at the input of layer 0, for all layers; only
            such a score can drop tokens before layer 0.
        needs: what it asks for beyond the view's own fields: "keys", "grids", "rotary", "tower",
            "pixels".
        spares: what of its needs it has another way without; its view then has no ``towers``.
        last_row: True if of a layer's attention it reads :meth:`LayerView.last_row_logits` alone:
            where only the cache asks for it, it is taken when the first further token comes.
        looks: what it wants of the vision tower, for those that need "tower"; see
            :mod:`st3.methods.scores.looks`.
        of_pixels: a function of the pixels of the tokens of an image or tile, [rows, columns, D],
            whose result [rows, columns] the view carries as ``tower``; for those that need
            "pixels".
        above: the score, a number, that a token must exceed or leave before layer 0; for policies
            whose schedule is ``counted``.
        later: another score, of the stage "attention", for the drops within the decoder and for the
            caches: then this one, of the stage "embeds", is for the drop before the decoder alone.
        note: a function of a layer's :class:`LayerView`, whose result [B, N] the view of the next
            layer's input carries as ``noted``.
        turn: a function of what goes into an attention or an MLP, of what comes out of it, [B, N,
            hidden size], and of the view's ``visual``, whose results [B, N] add up to ``turned``
            from the layer before the first drop to the one before the last.
        keep: the share of the visual tokens that it is made for, if its choice depends on it.
        prepare: a function of the :class:`TokenView` of layer 0, whose result [B, N] later views
            carry as ``prepared``.
        source: a function that maps a layer to the layer, at or before it, whose score it uses.
    """

    @property
    def name(self) -> str: ...

    def __call__(self, view: Any) -> Tensor:
        """Scores of all columns, [B, N] float; only visual columns are read.

        Args:
            view: a :class:`LayerView` at the stage "attention", else a :class:`TokenView`.
        """
        ...


def stage_of(score: Score) -> Stage:
    """When a score is taken."""
    stage: Stage = getattr(score, "stage", "attention")
    return stage


def needs_of(score: Score) -> frozenset[str]:
    """What a score asks for beyond the view's own fields."""
    return frozenset(getattr(score, "needs", ()))


def spares_of(score: Any) -> frozenset[str]:
    """What of its needs a score has another way without."""
    return frozenset(getattr(score, "spares", ()))


def share_of(share: float, count: Tensor) -> Tensor:
    """``share`` of the whole numbers ``count``, rounded half up as the schedules do."""
    part = exact(share)
    return (2 * part.numerator * count + part.denominator) // (2 * part.denominator)


def ranks(score: Tensor, among: Tensor, names: Tensor | None = None) -> Tensor:
    """Place of each column of ``among`` [B, N] bool by ``score`` [..., B, N], 0 the best; others
    stand behind. On equal scores the earlier column is the better. With ``names`` [..., 1, N] the
    place ``i`` is called ``names[..., i]``."""
    lowest = float("-inf") if score.is_floating_point() else torch.iinfo(score.dtype).min
    order = score.masked_fill(~among, lowest).sort(dim=-1, descending=True, stable=True).indices
    if names is None:
        names = torch.arange(score.shape[-1], device=score.device)
    return names.new_empty(order.shape).scatter_(-1, order, names.expand_as(order))
