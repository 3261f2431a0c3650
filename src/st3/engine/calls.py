"""What a model hands to the engine, and gets back: tensors, without the model's own names for them.

:mod:`st3.hf` reads these from transformers' calls and writes them back.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol

from torch import Tensor

from st3.engine.kv.base import Store
from st3.engine.kv.store import KVStore

Images = tuple[tuple[int, ...], ...]
Grids = tuple[tuple[tuple[int, ...] | None, ...], ...]


class Cache(Protocol):
    """The KV cache of a call."""

    @property
    def stores(self) -> dict[int, Store]:
        """The engine's stores in it, by decoder layer; none in an untrimmed cache."""
        ...

    def entry_bytes(self) -> tuple[int, ...]:
        """Bytes of one KV entry in each layer that holds any."""
        ...

    def install(self, make: Callable[[int], KVStore]) -> dict[int, KVStore]:
        """Put stores in the place of the cache's own layers; they take over what is there."""
        ...


@dataclass(frozen=True)
class LateFeatures:
    """Image features that a text model adds to visual tokens between its decoder layers.

    Attributes:
        visual: [B, T] bool, the tokens of the chunk that they belong to.
        features: [visual tokens, hidden size], by the layer that they are added before.
    """

    visual: Tensor
    features: Mapping[int, Tensor]


@dataclass
class Chunk:
    """A forward pass of the text model.

    Attributes:
        embeds: [B, T, hidden size].
        attention_mask: [B, past + T] or None.
        visual: [B, T] bool, the visual tokens among them; None if there are none.
        sizes: tokens of each image, in order, as the encoder made them; empty if unknown.
        grids: gives the shape of each image's tokens, see :class:`st3.engine.prompt.Rows`, for the
            visual tokens of each image of each row. May wait for the device.
        candidates: trailing tokens of the pass that assisted decoding puts up for a check.
        cache: the KV cache, or None.
        past: logical length of the cache before the pass.
        tower: gives what the vision tower attends to, [looks, B, T], for visual tokens
            [B, T] bool.
        late: features that are added between decoder layers, or None.
    """

    embeds: Tensor
    attention_mask: Tensor | None = None
    visual: Tensor | None = None
    sizes: Sequence[int] = ()
    grids: Callable[[Images], Grids] | None = None
    candidates: int = 0
    cache: Cache | None = None
    past: int = 0
    tower: Callable[[Tensor], Tensor | None] | None = None
    late: LateFeatures | None = None

    @property
    def tokens(self) -> int:
        """Columns of the pass."""
        return int(self.embeds.shape[1])


@dataclass
class LayerInputs:
    """What a decoder layer is given. A pass changes it in place.

    Attributes:
        hidden: [B, N, hidden size].
        mask: the attention mask in the form of the model's kernel, or None.
        tables: position tables, or None.
        others: further tensors by name.
        changed: whether anything but ``hidden`` was changed.
    """

    hidden: Tensor
    mask: Any = None
    tables: Any = None
    others: dict[str, Tensor] = field(default_factory=dict)
    changed: bool = False


@dataclass
class AttentionCall:
    """A call of a decoder layer's attention function.

    Attributes:
        base: the model's own function.
        query: [B, heads, Q, size]; key, value: [B, KV heads, K, size]; all after RoPE.
        given: its keyword arguments, ``scaling`` and ``softcap`` among them.
    """

    base: Callable[..., tuple[Tensor, Tensor | None]]
    module: Any
    query: Tensor
    key: Tensor
    value: Tensor
    mask: Any
    given: dict[str, Any]

    def run(self) -> tuple[Tensor, Tensor | None]:
        """[B, Q, heads, size], and whatever else the function gives."""
        return self.base(self.module, self.query, self.key, self.value, self.mask, **self.given)


class Pass(Protocol):
    """A forward pass of the text model under way."""

    def leaves(self, layer: int) -> bool:
        """Whether a decoder layer that is given no mask is given all else as it is: then there is
        no need to :meth:`enter`."""
        ...

    def enter(self, layer: int, inputs: LayerInputs) -> None:
        """A decoder layer is about to run: change what it is given."""

    def attend(self, layer: int, call: AttentionCall) -> tuple[Tensor, Tensor | None]:
        """Run a decoder layer's attention."""

    def finish(self, hidden: Tensor) -> Tensor:
        """All layers have run: [B, N, hidden size] in, [B, T, hidden size] out."""
