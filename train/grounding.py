"""The pointing loss: the name of an object in a question must look at that object.

Questions like "what is left of the cat?" need a head that finds the cat by its name.  Next-word
labels alone did not bring one about (the answers stayed at chance for 20,000 images while all
else was learnt), so some heads of the first layer are told where to look.
"""

from __future__ import annotations

import torch
from transformers import LlavaForConditionalGeneration
from transformers.models.llama.modeling_llama import apply_rotary_pos_emb

HEADS = 2  # of the first layer


def pointing_loss(
    model: LlavaForConditionalGeneration,
    input_ids: torch.Tensor,
    features: torch.Tensor,
    position_ids: torch.Tensor,
    attend: torch.Tensor,
    cells: torch.Tensor,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Mean of -log(attention on the named object's patches), and of that attention.

    ``features`` are the visual tokens (V * 144, hidden) in order; ``cells`` (B, T) holds the cell
    of the object that a token names, -1 for all other tokens.
    """
    decoder = model.model.language_model
    layer = decoder.layers[0]
    embeds = decoder.embed_tokens(input_ids)
    visual = input_ids == model.config.image_token_id
    embeds = embeds.masked_scatter(visual[..., None], features.to(embeds.dtype))
    normed = layer.input_layernorm(embeds)
    width = HEADS * layer.self_attn.head_dim
    q, k = (
        torch.nn.functional.linear(normed, p.weight[:width]).unflatten(-1, (HEADS, -1))
        for p in (layer.self_attn.q_proj, layer.self_attn.k_proj)
    )
    cos, sin = decoder.rotary_emb(embeds, position_ids)
    q, k = apply_rotary_pos_emb(q.transpose(1, 2), k.transpose(1, 2), cos, sin)
    rows, tokens = (cells >= 0).nonzero(as_tuple=True)
    scores = torch.einsum("nhd,nhtd->nht", q[rows, :, tokens], k[rows])
    scores = scores.float() * layer.self_attn.scaling
    allowed = attend[rows, 0, tokens][:, None]
    patch_cell = _patch_cells(model.config.image_seq_length)
    # The n-th visual token of the row's first image; later images are never pointed at.
    order = (visual.cumsum(1) - 1)[rows]
    inside = visual[rows] & (order < len(patch_cell))
    at = patch_cell[order.clamp(0, len(patch_cell) - 1)]
    target = (inside & (at == cells[rows, tokens][:, None]))[:, None]
    low = torch.finfo(torch.float32).min
    total = scores.masked_fill(~allowed, low).logsumexp(-1)
    hit = scores.masked_fill(~target, low).logsumexp(-1)
    return (total - hit).mean(), (hit - total).exp().mean()


def _patch_cells(patches: int) -> torch.Tensor:
    third = torch.arange(int(patches**0.5)) * 3 // int(patches**0.5)
    return (3 * third[:, None] + third[None]).flatten()
