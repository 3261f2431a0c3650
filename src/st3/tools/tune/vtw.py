"""Settings found on samples: the layer from which a model no longer needs its visual tokens."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from st3.methods.policies.base import check_layer
from st3.methods.policies.vtw import VTW
from st3.trimmer import trim

FIRST_LAYER = 5  # from which on the authors search


@dataclass(frozen=True)
class VTWCalibration:
    """What :func:`calibrate_vtw` found.

    Attributes:
        policy: VTW at the first layer whose divergence lies below the threshold.
        first_layer: the first candidate.
        divergence: for each candidate layer, from ``first_layer`` on, the mean KL divergence in
            nats of the next token's distribution without visual tokens from that layer on, and the
            full model's.
        threshold: the largest divergence accepted.
        samples: prompts that the mean is over.
    """

    policy: VTW
    first_layer: int
    divergence: tuple[float, ...]
    threshold: float
    samples: int


@torch.no_grad()
def calibrate_vtw(
    model: nn.Module,
    batches: Iterable[Mapping[str, Any]],
    threshold: float = 0.003,
    *,
    first_layer: int = FIRST_LAYER,
    progress: Callable[[int, int], None] | None = None,
) -> VTWCalibration:
    """Find VTW's layer K: the first from which on the visual tokens can leave without changing the
    distribution of the next token by more than ``threshold``.

    Args:
        model: as for :func:`st3.trim`.
        batches: inputs of the model, such as a processor returns; the paper takes about 20 prompts.
        threshold: mean KL divergence in nats, KL(trimmed model || full model) as in the authors'
            code, which has 0.003 for LLaVA-1.5-7B, 0.0005 for 13B and 0.0001 for LLaVA-NeXT-7B.
        first_layer: the first candidate (the authors' is 5), at most the model's last layer.
        progress: called with (forward passes done, passes in all).

    Returns:
        the calibrated policy and the divergence of every layer.

    Raises:
        ValueError: no prompts, a threshold that is not positive, a first layer that is none, or no
            layer that meets the threshold.

    Source: VTW (arXiv 2405.05803), section 3.3, and its code. Each layer's tokens are withdrawn in
    a run of its own, one forward pass per layer and batch.
    """
    if not threshold > 0:
        raise ValueError(f"threshold must be a positive number of nats, got {threshold!r}")
    inputs = [dict(batch) for batch in batches]
    if not inputs:
        raise ValueError("no prompts to calibrate on: give at least one batch, better 20 prompts")
    layers = model.config.get_text_config(decoder=True).num_hidden_layers  # type: ignore[union-attr,operator]
    check_layer("first_layer", first_layer)
    if first_layer < 1:
        raise ValueError("first_layer must be at least 1: at 0 the model would never see the image")
    first_layer = min(first_layer, layers - 1)
    total = [0.0] * (layers - first_layer)
    samples = done = 0
    for batch in inputs:
        full = _next_token(model, batch)
        samples += len(full)
        for layer in range(first_layer, layers):
            with trim(model, VTW(layer)):
                trimmed = _next_token(model, batch)
            difference = torch.nn.functional.kl_div(
                full, trimmed, log_target=True, reduction="none"
            )
            total[layer - first_layer] += float(difference.sum())
            done += 1
            if progress is not None:
                progress(done, len(inputs) * len(total))
    divergence = tuple(value / samples for value in total)
    found = next((i for i, value in enumerate(divergence, first_layer) if value <= threshold), None)
    if found is None:
        raise ValueError(
            f"no layer comes below a divergence of {threshold} (the least is {min(divergence):.3g}"
            f" at layer {first_layer + divergence.index(min(divergence))}): use a larger threshold"
        )
    return VTWCalibration(VTW(found), first_layer, divergence, threshold, samples)


def _next_token(model: nn.Module, batch: dict[str, Any]) -> Tensor:
    """Log probabilities of the token behind each prompt, [B, vocabulary], fp32."""
    logits = model(**batch, use_cache=False).logits
    mask = batch.get("attention_mask")
    last = torch.full((len(logits),), logits.shape[1] - 1, device=logits.device)
    if mask is not None:
        place = torch.arange(mask.shape[1], device=mask.device)
        last = (place * mask.bool()).amax(1).to(logits.device)
    row = torch.arange(len(logits), device=logits.device)
    return logits[row, last].float().log_softmax(-1)
