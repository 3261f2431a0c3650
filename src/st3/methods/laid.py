"""A method's schedule on a decoder in which not every layer has KV entries of its own, or not in
whatever order."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from fractions import Fraction

from st3.methods.policies.base import Policy
from st3.methods.schedule import NO_ANNEAL, Schedule


@dataclass(frozen=True)
class Laid(Schedule):
    """A method's schedule, laid over a decoder.

    Nothing can be dropped before something has ranked the visual tokens, nor between two layers of
    which one goes by the columns of the other, so earlier drops are put off to the next layer that
    can. No visual token enters the layers that read the KV entries of earlier ones: nobody looks at
    what it becomes there. And where an index counts KV entries by column, nothing is annealed.

    Args:
        asked: what the method asks for, of the layers before those.
        first: the first layer before which tokens can be dropped.
        shared: the first layer that reads an earlier one's KV entries; the number of layers if none
            does.
    """

    asked: Schedule | None = None
    first: int = 0
    shared: int = 0

    @property
    def put_off(self) -> tuple[int, ...]:
        """The layers before which the method would drop tokens, and cannot yet."""
        asked = self.asked
        if asked is None:
            return ()
        drops = filter(asked.prunes, range(asked.num_layers))
        return tuple(i for i in drops if self.shares[i] > asked.shares[i])

    @property
    def not_annealed(self) -> bool:
        """Whether the method would anneal, and this decoder cannot."""
        return self.asked is not None and self.asked.anneals and not self.anneals

    @property
    def departures(self) -> list[tuple[str, str]]:
        """Where this is not what the method asks for, in words: what, and how."""
        found = []
        if self.put_off:
            first = next((layer for layer in range(self.num_layers) if self.prunes(layer)), None)
            late = first is None or max(self.put_off) > first
            to = "each to the next layer that can" if late else f"to layer {first}"
            found.append(
                ("put off", f"drops before layer {', '.join(map(str, self.put_off))}, {to}")
            )
        if self.not_annealed:
            found.append(("not annealed", "this model's indexes count KV entries by column"))
        return found

    @property
    def asked_share(self) -> float:
        """The mean share of the visual tokens, over all layers, that the method itself keeps."""
        return self.mean_share if self.asked is None else self.asked.mean_share


def lay(
    policy: Policy,
    layers: int,
    first: int,
    shared: int,
    borrows: Sequence[bool] = (),
    in_order: bool = False,
) -> Schedule:
    """The schedule of a method on ``layers`` decoder layers; see :class:`Laid`.

    Args:
        borrows: for each layer whether it goes by columns that the layer before chose.
        in_order: whether the cache must hold tokens in their order, so that none can be annealed.

    Raises:
        ValueError: if the method cannot be laid out on the ``shared`` layers that it drops in.
    """
    whole = policy.schedule(layers)
    if not whole.drops:
        return whole
    asked = policy.schedule(shared)
    shares: list[Fraction] = []
    for layer, share in enumerate(asked.shares):
        waits = layer < first or (layer < len(borrows) and borrows[layer])
        before = shares[-1] if shares else Fraction(1)
        shares.append(before if waits else share)
    shares += [Fraction(0)] * (layers - shared)
    return Laid(
        tuple(shares),
        NO_ANNEAL if in_order else asked.anneal,
        asked.anneal_from,
        counted=asked.counted,
        asked=asked,
        first=first,
        shared=shared,
    )
