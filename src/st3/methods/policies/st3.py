"""ST3: progressive visual token pruning in prefill (PVTP), annealing while decoding (VTA)."""

from __future__ import annotations

from dataclasses import dataclass, field
from fractions import Fraction
from typing import ClassVar

from st3.methods.policies.progressive import Progressive
from st3.methods.policies.registry import register, register_preset
from st3.methods.schedule import Anneal

# Eq. 9's C, of LLaVA-1.5-7B and of 13B.
FINAL_KEEP = Fraction(1, 100)
FINAL_KEEP_OF = {40: Fraction(5, 100)}


@register
@dataclass(frozen=True)
class ST3(Progressive):
    """ST3: drop more visual tokens the deeper the layer, and more as text is generated.

    The paper's: half of the visual tokens leave at the 4th layer, more at every few layers after
    it, down to 1 % of them (5 % in a model of 40 layers), by the attention that the prompt's last
    token gives them in the layer before; while text is generated a layer shows ever fewer of those
    that it has, along a cosine. How many layers lie between drops, the cosine's period and its
    floor, and that it is a quarter wave, the paper's sources do not print: they are this project's
    reading. In a model of neither 32 nor 40 layers, layers stand at the same depth as in 32.

    Args: see :class:`~st3.methods.policies.progressive.Progressive`, which has the equation.

    Source: arXiv 2412.20105 (AAAI 2025), eq. 9.
    """

    anneal: Anneal = field(default_factory=lambda: Anneal(tau=128))

    name: ClassVar[str] = "st3"
    paper: ClassVar[str] = "arXiv 2412.20105 (AAAI 2025)"

    def default_last_share(self, num_layers: int) -> Fraction:
        return min(FINAL_KEEP_OF.get(num_layers, FINAL_KEEP), self.first_share)


# LLaVA-1.5-7B's and 13B's layers, whatever the model: eq. 9 gives R = 7 % of 32 layers and R = 5 %
# of 40, with the stride that is this project's reading.
register_preset("st3-7b", ST3(first_layer=3, stride=4, final_keep=0.01))
register_preset("st3-13b", ST3(first_layer=3, stride=4, final_keep=0.05))
