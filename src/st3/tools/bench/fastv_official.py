"""FastV the way its authors' code does it, for comparison with FastV on st3's engine.

Reproduced, from the authors' ``fastv_forward`` for LLaMA (github.com/pkunlp-icler/FastV, the
version with KV cache):

* layer ``K - 1`` runs with ``output_attentions``: no kernel gives the attention map back, so that
  the layer falls back to eager attention with a dense causal mask and a softmax in float32;
* the map [B, heads, T, T] is averaged over the heads as a whole, and only then row 0 of the batch
  and its last query are taken: all rows of the batch drop the columns that the first one chooses;
* before layer ``K`` the hidden states are gathered to the kept columns, in their order, with their
  original positions; ``round(V * (1 - R))`` visual tokens stay;
* layers from ``K`` on cache fewer entries than those before.

Not reproduced, in the authors' favour: their dense mask in all other layers (here those keep the
kernel's own causal masking), and the variant of their repository that runs layer ``K - 1`` twice.
Their code takes one image in one row at fixed places; this takes the visual columns of row 0.
(They know no sliding windows: here layers behind the drop see all kept tokens.)
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from st3.engine.select import gather_positions
from st3.hf.attention import attention_set
from st3.models import find_parts


@contextmanager
def fastv_official(
    model: nn.Module, visual: Tensor, layer: int = 2, drop: float = 0.5
) -> Iterator[None]:
    """Run ``model`` with the authors' FastV while in the block; it is as before afterwards.

    Args:
        visual: [B, T] bool, the prompt's visual columns.
        layer: the paper's K, first layer with fewer tokens (0-based, at least 1).
        drop: the paper's R.

    Raises:
        ValueError: a layer that does not exist, or rows of different layout.
    """
    parts = find_parts(model)
    if not 1 <= layer < len(parts.layers):
        raise ValueError(f"layer must lie between 1 and {len(parts.layers) - 1}, got {layer}")
    if not bool((visual == visual[:1]).all()):
        raise ValueError("the authors' FastV takes row 0's tokens for all rows: use equal rows")
    run = _Run(visual[0], drop)
    rating = parts.layers[layer - 1]
    config = parts.attentions[layer - 1].config
    eager = ExitStack()

    def to_eager(module: nn.Module, args: Any, kwargs: dict[str, Any]) -> Any:
        hidden = args[0] if args else kwargs["hidden_states"]
        run.begin(hidden)
        if run.prefill:
            eager.enter_context(attention_set(config, "eager"))
            kwargs["attention_mask"] = _dense_causal_mask(hidden)
        return args, kwargs

    def rate(module: nn.Module, args: Any, kwargs: dict[str, Any], output: Any) -> None:
        if run.prefill:
            eager.close()
            run.choose(output[1])

    hooks = [
        rating.register_forward_pre_hook(to_eager, with_kwargs=True),
        parts.attentions[layer - 1].register_forward_hook(rate, with_kwargs=True),
    ]
    for index, module in enumerate(parts.layers[layer:]):
        hooks.append(module.register_forward_pre_hook(run.gather(index == 0), with_kwargs=True))
    try:
        yield
    finally:
        eager.close()
        for hook in hooks:
            hook.remove()


class _Run:
    """The pass under way: whether it is the prompt's prefill, and what of it stays."""

    def __init__(self, visual: Tensor, drop: float) -> None:
        self.columns = visual.nonzero()[:, 0]
        self.others = (~visual).nonzero()[:, 0]
        self.stay = round(len(self.columns) * (1 - drop))
        self.prefill = False
        self.kept: Tensor | None = None
        self.tables: Any = None

    def begin(self, hidden: Tensor) -> None:
        length = len(self.columns) + len(self.others)
        self.prefill = hidden.shape[1] == length and length > 1

    def choose(self, attention: Tensor) -> None:
        """attention: [B, heads, T, T]."""
        score = attention.mean(dim=1)[0][-1]
        best = self.columns[score[self.columns].topk(self.stay).indices]
        self.kept = torch.cat([self.others, best]).sort().values

    def gather(self, first: bool) -> Any:
        def hook(module: nn.Module, args: Any, kwargs: dict[str, Any]) -> Any:
            if not self.prefill or self.kept is None:
                return None
            hidden = args[0] if args else kwargs.pop("hidden_states")
            if first:
                hidden = hidden[:, self.kept]
                index = self.kept.expand(hidden.shape[0], -1)
                tables = kwargs["position_embeddings"]
                self.tables = tuple(gather_positions(table, index) for table in tables)
            # All rows start together: no mask, so that the kernel masks by itself.
            kwargs["attention_mask"] = kwargs["position_ids"] = None
            kwargs["position_embeddings"] = self.tables
            return (hidden, *args[1:]), kwargs

        return hook


def _dense_causal_mask(hidden: Tensor) -> Tensor:
    """[1, 1, T, T], 0 or the smallest number."""
    size = hidden.shape[1]
    lowest = torch.finfo(hidden.dtype).min
    return hidden.new_full((size, size), lowest).triu(1)[None, None]
