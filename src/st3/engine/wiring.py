"""Where the layers of a decoder get their keys and values from.

In most decoders each layer has entries of its own in the KV cache. In hybrids some layers have none
(a recurrent or a convolutional state stands for all tokens before), and in some decoders the last
layers read the entries of earlier ones.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property


@dataclass(frozen=True)
class Wiring:
    """The layers of a decoder, by where their keys and values come from.

    Attributes:
        sources: for each layer the one whose KV entries it reads: its own number, that of an
            earlier layer, or None for a layer with a state.
        in_order: whether an index beside the KV entries counts them by column, so that they must
            stay in the order of the sequence.
        borrows: for each layer whether it goes by columns that the index of the layer before chose,
            so that both must see the same tokens; empty if none does.
        pads: whether rows of a batch may be padded: not where an index counts padding, too.
    """

    sources: tuple[int | None, ...]
    in_order: bool = False
    borrows: tuple[bool, ...] = ()
    pads: bool = True

    @cached_property
    def plain(self) -> bool:
        """Whether every layer has entries of its own, in whatever order."""
        return len(self.own) == len(self.sources) and not self.in_order

    @cached_property
    def own(self) -> tuple[int, ...]:
        """The layers with entries of their own."""
        return tuple(layer for layer, source in enumerate(self.sources) if source == layer)

    @cached_property
    def states(self) -> tuple[bool, ...]:
        """For each layer whether it has a state in place of softmax attention."""
        return tuple(source is None for source in self.sources)

    @cached_property
    def first_shared(self) -> int:
        """The first layer that reads an earlier one's entries; the number of layers if none does.
        From there on no layer has entries of its own."""
        reads = (i for i, s in enumerate(self.sources) if s is not None and s != i)
        return next(reads, len(self.sources))

    @cached_property
    def shared_sources(self) -> frozenset[int]:
        """The layers whose entries later ones read."""
        return frozenset(s for i, s in enumerate(self.sources) if s is not None and s != i)

    @cached_property
    def scorers(self) -> tuple[int | None, ...]:
        """For each layer the latest one, up to itself, with entries of its own: whose attention
        says what was looked at last. None before the first."""
        found: list[int | None] = []
        for layer, source in enumerate(self.sources):
            before = found[-1] if found else None
            found.append(layer if source == layer else before)
        return tuple(found)

    def waits(self, layer: int) -> bool:
        """Whether ``layer`` must see the tokens of the one before."""
        return layer < len(self.borrows) and self.borrows[layer]

    @property
    def has_states(self) -> bool:
        return any(self.states)

    @property
    def shares(self) -> bool:
        """Whether any layer reads an earlier one's entries."""
        return self.first_shared < len(self.sources)
