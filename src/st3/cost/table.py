"""What a model costs under several schedules, as rows for people."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from .dims import TextDims
from .flops import Schedule, prefill_flops
from .kv import kv_bytes, mean_kv_bytes

_MIB = 2**20

COLUMNS = (
    "policy", "prefill TFLOPs", "ratio", "visual tokens per layer", "share",
    "KV after prefill, MiB", "ratio", "KV mean, MiB", "ratio",
)  # fmt: skip


@dataclass(frozen=True)
class CostRow:
    """The cost of one prompt under one schedule. Ratios are to the untrimmed model."""

    policy: str
    prefill_tflops: float  # text decoder and head
    prefill_ratio: float
    mean_visual: float  # visual tokens per layer, mean over the layers
    mean_share: float  # the same as a share of all visual tokens
    kv_prefill_mib: float  # live, after the prefill
    kv_prefill_ratio: float
    kv_mean_mib: float  # live, mean over the generation
    kv_mean_ratio: float
    vision_tflops: float | None  # the tower, the same in every row; None: not known

    def cells(self) -> list[str]:
        """What stands in a table under :data:`COLUMNS`; the tower is left out."""
        return [
            self.policy,
            f"{self.prefill_tflops:.3g}",
            f"{self.prefill_ratio:.1%}",
            f"{self.mean_visual:.0f}",
            f"{self.mean_share:.1%}",
            f"{self.kv_prefill_mib:.1f}",
            f"{self.kv_prefill_ratio:.1%}",
            f"{self.kv_mean_mib:.1f}",
            f"{self.kv_mean_ratio:.1%}",
        ]


def cost_table(
    config: Any,
    n_text: int,
    n_visual: int,
    policies: Mapping[str, Schedule],
    new_tokens: int = 128,
    dtype: Any = "bfloat16",
    images: int = 1,
) -> list[CostRow]:
    """One row for the untrimmed model and one for each schedule, in the given order.

    Args:
        config: of any supported vision-language model.
        n_text, n_visual: tokens of the prompt.
        policies: name -> schedule for ``config``'s number of decoder layers.
        new_tokens: length of the generation over which the KV cache is averaged.
        dtype: of the KV cache.
        images: images of equal size in the prompt.

    Raises:
        ValueError: unsupported decoder, schedule of another depth, no visual tokens.
    """
    if n_visual < 1:
        raise ValueError("n_visual must be at least 1: without visual tokens nothing is trimmed")
    dims = TextDims.from_config(config)
    tower = _vision_tflops(config, n_visual)
    rows: list[CostRow] = []
    for name, schedule in [("untrimmed", None), *policies.items()]:
        flops = prefill_flops(dims, n_text, n_visual, schedule, images=images).total
        first = kv_bytes(dims, n_text, n_visual, schedule, 0, dtype)
        mean = mean_kv_bytes(dims, n_text, n_visual, schedule, new_tokens, dtype)
        if schedule is None:
            whole = flops, first, mean
        visual = _mean_visual(dims, n_visual, schedule)
        rows.append(
            CostRow(
                policy=name,
                prefill_tflops=flops / 1e12,
                prefill_ratio=flops / whole[0],
                mean_visual=visual,
                mean_share=visual / n_visual,
                kv_prefill_mib=first / _MIB,
                kv_prefill_ratio=first / whole[1],
                kv_mean_mib=mean / _MIB,
                kv_mean_ratio=mean / whole[2],
                vision_tflops=tower,
            )
        )
    return rows


def _mean_visual(dims: TextDims, n_visual: int, schedule: Schedule | None) -> float:
    if schedule is None:
        return float(n_visual)
    kept = (schedule.kept(layer, n_visual) for layer in range(dims.num_layers))
    return sum(kept) / dims.num_layers


def _vision_tflops(config: Any, n_visual: int) -> float | None:
    from st3.models import config_family

    try:
        return config_family(config).tower_flops(config, n_visual) / 1e12
    except ValueError:  # a tower that is not known; the decoder's rows are right without it
        return None
