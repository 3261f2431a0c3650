"""The pointing loss: tokens that ask for an object must look at that object.

Questions like "what is to the left of the cat?" need a head that finds the cat by its name,
then one that looks to the left of it.  Next-word labels alone did not bring these about (the
answers stayed at chance for 20,000 images while all else was learnt), so two heads of a few
layers are told where to look:

* of the first layer, at the object that a question's word names;
* of ``ANSWERING`` layers, from a question's last token at the objects that hold the answer, and
  from a description's words at the object that they describe.

What is not in any image is looked for at the first token, where attention rests when there is
nothing to see.
"""

from __future__ import annotations

import re
from collections.abc import Sequence

import torch
from transformers import LlavaForConditionalGeneration
from transformers.models.llama.modeling_llama import apply_rotary_pos_emb

from train.scenes import Scene
from train.tasks import Turn
from train.world import NAMES, PLACES

HEADS = 2
ANSWERING = (2, 4, 6, 8)
CELLS = 9
# Targets are bit masks: bit 9 i + c is cell c of image i, and this one is the first token.
NOWHERE = 1 << 40


def where_is(name: str, scenes: Sequence[Scene]) -> int:
    """The cells that show an object, in any image; ``NOWHERE`` if none does."""
    found = [(i, scene.find(name)) for i, scene in enumerate(scenes)]
    return sum(1 << (CELLS * i + thing.cell) for i, thing in found if thing) or NOWHERE


def where_answered(turn: Turn, scenes: Sequence[Scene]) -> int:
    """The cells that a question's answer is read from; 0 for questions about no object."""
    task, question, answer = turn
    words = re.findall(r"\w+", question)
    nth = 1 if "second" in words else 0
    shown = [
        sum(1 << (CELLS * i + thing.cell) for thing in scene.things)
        for i, scene in enumerate(scenes)
    ]
    if task in ("describe", "list", "count", "count of"):
        return shown[nth]
    if task == "more":
        return sum(shown)
    if task in ("place", "place of", "where"):
        text = answer if task == "where" else question
        cell = max((place in text, len(place), i) for i, place in enumerate(PLACES))[2]
        return 1 << (CELLS * nth + cell)
    if task in ("relation", "digit", "letter"):
        return where_is(answer, scenes)
    if task == "colour":
        kind = next((kind for kind in ("letter", "digit") if kind in words), None)
        return sum(1 << thing.cell for thing in scenes[0].things if thing.kind == kind)
    if task in ("exists", "which image", "both images"):
        return where_is(next(word for word in reversed(words) if word in NAMES), scenes)
    raise ValueError(f"unknown task {task!r}")


def token_targets(input_ids: torch.Tensor, image_token: int, patches: int) -> torch.Tensor:
    """The bit of every token that can be looked at, (B, T): a patch's cell, the first token."""
    visual = input_ids == image_token
    order = (visual.cumsum(1) - 1).clamp(min=0)
    side = int(patches**0.5)
    third = torch.arange(side, device=input_ids.device) * 3 // side
    cells = (3 * third[:, None] + third[None]).flatten()
    bits = torch.ones_like(order) << (CELLS * (order // patches) + cells[order % patches])
    bits = bits * visual
    bits[:, 0] = NOWHERE
    return bits


def pointing_loss(
    model: LlavaForConditionalGeneration,
    layer_index: int,
    hidden: torch.Tensor,
    rotary: tuple[torch.Tensor, torch.Tensor],
    attend: torch.Tensor,
    wanted: torch.Tensor,
    bits: torch.Tensor,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Mean of -log(attention on the wanted tokens) of a layer's heads, and of that attention.

    ``hidden`` (B, T, hidden) enters the layer; ``wanted`` (B, T) is each token's target, 0 for
    none; ``bits`` are the :func:`token_targets`.
    """
    layer = model.model.language_model.layers[layer_index]
    rows, tokens = (wanted != 0).nonzero(as_tuple=True)
    target = (bits[rows] & wanted[rows, tokens][:, None]) != 0
    allowed = attend[rows, 0, tokens]
    # A second image may come after the token: then there is nothing to look at yet.
    seen = (target & allowed).any(1)
    rows, tokens, target, allowed = rows[seen], tokens[seen], target[seen], allowed[seen]
    normed = layer.input_layernorm(hidden)
    width, groups = layer.self_attn.head_dim, layer.self_attn.num_key_value_groups
    key_heads = -(-HEADS // groups)  # with grouped queries, several heads share one key head
    q, k = (
        torch.nn.functional.linear(normed, p.weight[: heads * width]).unflatten(-1, (heads, -1))
        for p, heads in ((layer.self_attn.q_proj, HEADS), (layer.self_attn.k_proj, key_heads))
    )
    k = k.repeat_interleave(groups, dim=2)[:, :, :HEADS]
    q, k = apply_rotary_pos_emb(q.transpose(1, 2), k.transpose(1, 2), *rotary)
    scores = k.new_empty(len(rows), HEADS, k.shape[2])
    at = 0
    for row, count in enumerate(rows.bincount(minlength=len(k)).tolist()):
        part = tokens[at : at + count]
        scores[at : at + count] = (q[row][:, part] @ k[row].transpose(1, 2)).transpose(0, 1)
        at += count
    scores = scores.float() * layer.self_attn.scaling
    low = torch.finfo(torch.float32).min
    total = scores.masked_fill(~allowed[:, None], low).logsumexp(-1)
    hit = scores.masked_fill(~(target & allowed)[:, None], low).logsumexp(-1)
    return (total - hit).mean(), (hit - total).exp().mean()
