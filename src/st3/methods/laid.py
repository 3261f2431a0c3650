"""A method's schedule on a decoder in which not every layer has KV entries of its own."""

from __future__ import annotations

from dataclasses import dataclass
from fractions import Fraction

from st3.methods.policies.base import Policy
from st3.methods.schedule import Schedule


@dataclass(frozen=True)
class Laid(Schedule):
    """A method's schedule, laid over a decoder.

    Nothing can be dropped before something has ranked the visual tokens, so earlier drops are put
    off to the first layer behind that. And no visual token enters the layers that read the KV
    entries of earlier ones: nobody looks at what it becomes there.

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
        return () if asked is None else tuple(filter(asked.prunes, range(self.first)))

    @property
    def asked_share(self) -> float:
        """The mean share of the visual tokens, over all layers, that the method itself keeps."""
        return self.mean_share if self.asked is None else self.asked.mean_share


def lay(policy: Policy, layers: int, first: int, shared: int) -> Schedule:
    """The schedule of a method on ``layers`` decoder layers; see :class:`Laid`.

    Raises:
        ValueError: if the method cannot be laid out on the ``shared`` layers that it drops in.
    """
    whole = policy.schedule(layers)
    if not whole.drops:
        return whole
    asked = policy.schedule(shared)
    shares = tuple(share if i >= first else Fraction(1) for i, share in enumerate(asked.shares))
    shares += (Fraction(0),) * (layers - shared)
    return Laid(shares, asked.anneal, asked.anneal_from, asked=asked, first=first, shared=shared)
