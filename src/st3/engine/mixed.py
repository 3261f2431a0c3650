"""The passes of decoders in which not every layer has KV entries of its own.

Layers with a state (linear attention, short convolutions) take in one token after another, so
padding behind a row would change the state that it leaves. Rows of such decoders therefore end in
the same column, and their padding, in front, is masked out of the states.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from st3.engine.masks import as_bool, causal, finish, gather_mask
from st3.engine.prefill import Prefill
from st3.engine.steps import TextStep


class MixedPrefill(Prefill):
    """A prompt with visual tokens."""

    ends_together = True

    def _narrow_mask(self, layer: int, mask: Any, hidden: Tensor) -> Any:
        if self.plan.wiring.states[layer]:
            return None if self.extends else self.block.valid
        return super()._narrow_mask(layer, mask, hidden)

    def _mask(self, mask: Any, hidden: Tensor) -> Tensor | None:
        """The mask of rows that end together: the shorter ones have padding in front."""
        block = self.block.to(hidden.device)
        valid = block.valid
        if valid is None:
            return super()._mask(mask, hidden)
        columns = hidden.shape[-2]
        if mask is None or mask.dim() == 2:
            seen = causal(columns, columns, hidden.device) & valid[:, None, None, :]
        else:
            seen = as_bool(gather_mask(mask.to(hidden.device), block.source_columns(), valid))
        # Padding sees itself: a row without any key is NaN in some kernels, which a state would
        # keep although it is masked (0 * NaN).
        itself = torch.eye(columns, dtype=torch.bool, device=hidden.device)
        return finish(seen | itself, self.plan.kind, hidden.dtype)


class MixedStep(TextStep):
    """Text behind a prompt."""

    def _mask(self, layer: int, hidden: Tensor) -> Tensor | None:
        if self.plan.wiring.states[layer]:
            return None  # nothing behind a prompt is padding
        return super()._mask(layer, hidden)
