"""The prompts of decoders whose layers are not all alike.

Layers with a state (linear attention, short convolutions) take in one token after another, so
padding behind a row would change the state that it leaves. Rows of such decoders therefore end in
the same column, and their padding, in front, is masked out of the states.

Layers that read the KV entries of an earlier one see what that layer sees. No visual token enters
them: nobody looks at what it would become there. Some text models themselves go on with the last
columns alone.

Image features that a text model adds between later layers (late deepstack) are kept from it, and
added here to the tokens that are still there.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any, cast

import torch
from torch import Tensor

from st3.engine.calls import AttentionCall, LateFeatures, LayerInputs
from st3.engine.masks import as_bool, causal, finish, gather_mask
from st3.engine.prefill import Prefill
from st3.engine.prompt import Block
from st3.engine.select import block_features, select
from st3.errors import UnsupportedModelError


class MixedPrefill(Prefill):
    """A prompt with visual tokens.

    Args:
        late: image features that are added between decoder layers, or None.

    Attributes:
        cut: whether the text model itself has gone on with the last columns alone.
    """

    cut = False

    def __init__(self, *args: Any, late: LateFeatures | None = None, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.late, self._first = late, self.block
        self._check_padding(self.block)
        self.ends_together = not self.plan.wiring.plain
        # Of layers whose entries later ones read: the mask that they had, and for each column of
        # now its column then, [B, N].
        self._seen: dict[int, Any] = {}
        self._then: dict[int, Tensor] = {}
        self._made: dict[int, Tensor | None] = {}  # masks of the layers that read them

    def _check_padding(self, block: Block) -> None:
        if block.valid is not None and not self.plan.wiring.pads:
            raise UnsupportedModelError(
                "this model's indexes count padding as tokens, so that rows of other lengths, or "
                "that lose other numbers of tokens, would get other answers: run them one by one"
            )

    # Before a layer ---------------------------------------------------------------------------

    def enter(self, layer: int, inputs: LayerInputs) -> None:
        if self.late is not None and layer in self.late.features:
            inputs.hidden = self._with_late(layer, inputs.hidden)
        super().enter(layer, inputs)

    def _with_late(self, layer: int, hidden: Tensor) -> Tensor:
        """Hidden states that the text model would add image features to before ``layer``."""
        block = self.blocks.get(layer - 1, self._first).to(hidden.device)
        late = cast(LateFeatures, self.late)
        here, features = block_features(block, late.visual, late.features[layer])
        hidden = hidden.clone()
        hidden[here] += features.to(hidden.dtype)
        return hidden

    def _choose_block(self, layer: int, hidden: Tensor) -> None:
        if layer == self.plan.wiring.first_shared and layer not in self.blocks:
            self.blocks[layer] = self._text_block(layer, hidden.shape[-2])
        super()._choose_block(layer, hidden)

    def _text_block(self, layer: int, width: int) -> Block:
        """The columns of the layers that read earlier ones' entries: those that are not visual, or
        the last ``width`` if the text model has left no more."""
        block = self.block
        columns = block.visual.shape[1]
        if width < columns:
            self.cut = True
            self._then = {source: then[:, -width:] for source, then in self._then.items()}
            return _last_columns(block, width)
        if not self.plan.prunes[layer]:
            return block
        equal = torch.zeros(block.visual.shape, device=block.visual.device)
        block, chosen = select(block, equal, self._kept[layer], right=True)
        self._columns[layer] = chosen
        self._follow(chosen)
        self.events.kept(layer, block)
        return block

    def _drop(self, layer: int) -> None:
        super()._drop(layer)
        self._check_padding(self.blocks[layer])
        self._follow(self._columns[layer])

    def _follow(self, columns: Tensor) -> None:
        for source, then in self._then.items():
            self._then[source] = then.gather(1, columns.to(then.device))

    def _narrow(self, layer: int, inputs: LayerInputs) -> None:
        if self.cut:  # by the text model, which has cut everything but the keys
            inputs.changed = True
            inputs.mask = self._narrow_mask(layer, inputs.mask, inputs.hidden)
        else:
            super()._narrow(layer, inputs)

    # Masks ------------------------------------------------------------------------------------

    def _narrow_mask(self, layer: int, mask: Any, hidden: Tensor) -> Any:
        wiring = self.plan.wiring
        source = wiring.sources[layer]
        if source is None:
            return None if self.extends else self.block.valid
        if source == layer:
            return super()._narrow_mask(layer, mask, hidden)
        if source not in self._made:
            self._made[source] = self._shared_mask(source, hidden)
        return self._made[source]

    def _mask(self, mask: Any, hidden: Tensor) -> Tensor | None:
        """The mask of rows that end together: the shorter ones have padding in front."""
        block = self.block.to(hidden.device)
        valid = block.valid
        columns = hidden.shape[-2]
        if valid is None and self.plan.wiring.in_order:  # indexes ask for a mask
            seen = causal(columns, columns, hidden.device)[None, None]
            return finish(seen, self.plan.kind, hidden.dtype)
        if valid is None or not self.ends_together:
            return super()._mask(mask, hidden)
        if mask is None or mask.dim() == 2:
            seen = causal(columns, columns, hidden.device) & valid[:, None, None, :]
        else:
            seen = as_bool(gather_mask(mask.to(hidden.device), block.source_columns(), valid))
        # Padding sees itself: a row without any key is NaN in some kernels, which a state would
        # keep although it is masked (0 * NaN).
        itself = torch.eye(columns, dtype=torch.bool, device=hidden.device)
        return finish(seen | itself, self.plan.kind, hidden.dtype)

    def _shared_mask(self, source: int, hidden: Tensor) -> Tensor | None:
        """What the present columns saw in the layer whose keys these are."""
        mask, rows = self._seen[source], self._then[source].to(hidden.device)
        keys = self.blocks[source].visual.shape[1]
        if mask is None:  # causal, no padding
            if rows.shape[1] in (1, keys):  # the last column, or all: what kernels take as causal
                return None
            place = torch.arange(keys, device=rows.device)
            return finish((place <= rows[:, :, None])[:, None], self.plan.kind, hidden.dtype)
        mask = mask.to(hidden.device).expand(rows.shape[0], -1, -1, -1)
        return mask.gather(2, rows[:, None, :, None].expand(-1, -1, -1, mask.shape[3]))

    # In a layer -------------------------------------------------------------------------------

    def attend(self, layer: int, call: AttentionCall) -> tuple[Tensor, Tensor | None]:
        wiring = self.plan.wiring
        source = wiring.sources[layer]
        if source is not None and source != layer:
            self.events.attention(layer, call, self.blocks[source])
            return call.run()
        if layer in wiring.shared_sources and layer not in self._then:
            columns = self.block.visual
            place = torch.arange(columns.shape[1], device=columns.device)
            self._then[layer] = place.expand(columns.shape)
        output = super().attend(layer, call)
        if layer in wiring.shared_sources:
            self._seen[layer] = call.mask
        return output

    def finish(self, hidden: Tensor) -> Tensor:
        if self.cut:
            self.block = replace(self.block, index=None)  # these are the text model's own columns
        return super().finish(hidden)


def _last_columns(block: Block, width: int) -> Block:
    """The last columns of a block whose rows end together."""
    visual = block.visual[:, -width:]
    return Block(
        index=block.source_columns()[:, -width:],
        visual=visual,
        ordinal=block.ordinal[:, -width:],
        group=None,
        valid=None if block.valid is None else block.valid[:, -width:],
        last=block.last - (block.visual.shape[1] - width),
        counts=tuple(min(count, width) for count in block.counts),
        kept=tuple((0,) * len(row) for row in block.kept),
    )
