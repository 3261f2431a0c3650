"""The cost model: FLOPs and bytes of a vision-language model under a schedule, from its config.

>>> from st3.cost.shapes import shape
>>> dims = TextDims.from_config(shape("llava-1.5-7b").config)
>>> round(prefill_flops(dims, n_text=64, n_visual=576).total / 1e12, 2)  # TFLOPs
8.4
"""

from .dims import LayerDims, TextDims
from .flops import LayerFlops, PrefillFlops, Schedule, decode_flops, prefill_flops
from .kv import (
    AllocationRule,
    as_needed,
    decode_bytes,
    kv_allocated_bytes,
    kv_bytes,
    kv_entries,
    mean_kv_bytes,
    state_bytes,
    with_headroom,
)
from .table import COLUMNS, CostRow, cost_table
from .vision import VisionDims, vision_flops

__all__ = [
    "COLUMNS",
    "AllocationRule",
    "CostRow",
    "LayerDims",
    "LayerFlops",
    "PrefillFlops",
    "Schedule",
    "TextDims",
    "VisionDims",
    "as_needed",
    "cost_table",
    "decode_bytes",
    "decode_flops",
    "kv_allocated_bytes",
    "kv_bytes",
    "kv_entries",
    "mean_kv_bytes",
    "prefill_flops",
    "state_bytes",
    "vision_flops",
    "with_headroom",
]
