"""A mean budget in place of a policy's own counts."""

from __future__ import annotations

from dataclasses import dataclass
from fractions import Fraction
from typing import ClassVar

from st3.methods.policies.base import Policy, Wrapped
from st3.methods.policies.saved import plain
from st3.methods.schedule import Schedule, check_share
from st3.methods.scores.base import Score


@dataclass(frozen=True)
class Budgeted(Wrapped):
    """A policy at a mean budget, found by its ``at_budget`` once the model's layers are known.

    Made by :func:`~st3.methods.policies.registry.parse` from "fastv:budget=0.35" or
    ``parse("fastv", budget=0.35)``.

    Args:
        policy: the policy whose counts are scaled.
        budget: share of the visual tokens that enter a layer, averaged over the layers.

    Raises:
        ValueError: a budget outside [0, 1]; from :meth:`schedule` and :meth:`on`, one that the
            policy cannot have on so many layers.
    """

    budget: float

    name: ClassVar[str] = "budgeted"

    def __post_init__(self) -> None:
        check_share("budget", self.budget)

    def on(self, num_layers: int) -> Policy:
        """The policy that it comes to on a model of ``num_layers`` layers."""
        return self.policy.at_budget(num_layers, self.budget)

    def schedule(self, num_layers: int) -> Schedule:
        return self.on(num_layers).schedule(num_layers)

    def scorer(self) -> Score:
        """By what the visual tokens are ranked.

        Raises:
            ValueError: a score that depends on how many tokens stay.
        """
        score = self.policy.scorer()
        if any(getattr(score, name, None) is not None for name in ("keep", "above")):
            raise ValueError(
                f"what policy {self} ranks by is known with the model's layers: see with_budget()"
            )
        return score

    def __str__(self) -> str:
        text = str(self.policy)
        return f"{text}{',' if ':' in text else ':'}budget={self.budget}"


def with_budget(policy: Policy, num_layers: int, budget: float | None = None) -> Policy:
    """``policy`` as it is on a model of ``num_layers`` layers, at the mean ``budget``; without one,
    at the budget that it was given itself, if any.

    Raises:
        ValueError: a budget that the policy cannot have on so many layers.
    """
    policy = plain(policy)
    if budget is not None:
        return policy.at_budget(num_layers, budget)
    return policy.on(num_layers) if isinstance(policy, Budgeted) else policy


def read_budget(value: object) -> float:
    """A budget as people write it, "35%", "0.35" or 0.35: the one reader of all commands, of the
    server's requests and of vLLM's settings.

    Raises:
        ValueError: no share within [0, 1].
    """
    try:
        if isinstance(value, bool) or not isinstance(value, (str, int, float, Fraction)):
            raise ValueError
        text = str(value).strip()
        number = text.removesuffix("%")
        share = float(value) if isinstance(value, Fraction) else float(number)
        share = round(share / 100, 12) if number != text else share
        check_share("budget", share)
    except ValueError:
        shown = str(value)[:40]  # a request may send a megabyte
        raise ValueError(
            f"budget {shown} is no share of the visual tokens: write 35% or 0.35"
        ) from None
    return share
