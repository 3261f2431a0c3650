"""Does the installed transformers fit? Asked at attach, of the thing itself."""

from __future__ import annotations

import inspect
import warnings
from functools import cache
from typing import Any

import transformers

from st3.errors import UnsupportedModelError
from st3.hf.attention import attention_of
from st3.hf.cache import TrimmedLayer
from st3.hf.call import CACHE_NAMES
from st3.models import Parts
from st3.models.parts import ALONE, INDEXED, STATES

OLDEST, NEWEST = "5.16", "5.24"  # the minor versions that the whole test suite has passed
LAYER_TYPES = frozenset({"full_attention", "sliding_attention", *STATES, *ALONE, *INDEXED})


def check(parts: Parts) -> None:
    """Look whether a model's calls are ones that the seam can read and write.

    Raises:
        UnsupportedModelError: with the installed and the tested versions, if not.
    """
    _warn_if_newer()
    taken = inspect.signature(type(parts.text).forward).parameters
    names = [name for name in CACHE_NAMES if name in taken]
    if "inputs_embeds" not in taken or not names:
        _refuse(f"{type(parts.text).__name__}.forward takes no inputs_embeds and KV cache")
    for kind in {type(layer) for layer in parts.layers}:
        first = list(inspect.signature(kind.forward).parameters)[1:2]
        if first != ["hidden_states"]:
            _refuse(f"{kind.__name__}.forward does not take hidden_states first")
    missing = sorted(TrimmedLayer.__abstractmethods__)
    if missing:
        _refuse(f"cache layers must now have {', '.join(missing)}")
    if "flash" in attention_of(parts.text.config):
        _check_flash(parts)
    unknown = set(getattr(parts.text.config, "layer_types", None) or ()) - LAYER_TYPES
    if unknown:
        _refuse(f"decoder layers of type {', '.join(sorted(unknown))} are not known")


def _check_flash(parts: Parts) -> None:
    if any(source not in (layer, None) for layer, source in enumerate(parts.sources)):
        raise UnsupportedModelError(
            "flash attention cannot express what layers see that share another one's KV entries: "
            "load this model with attn_implementation='sdpa'"
        )
    if any(parts.windows):
        raise UnsupportedModelError(
            "flash attention counts a sliding window in stored tokens, which trimming shifts: load "
            "this model with attn_implementation='sdpa'"
        )


def _refuse(reason: str) -> Any:
    raise UnsupportedModelError(
        f"{reason}: st3 is tested with transformers {OLDEST} to {NEWEST}, this is "
        f"{transformers.__version__}. Install one of those, or a newer st3"
    )


@cache  # once in a process
def _warn_if_newer() -> None:
    if _minor(transformers.__version__) > _minor(NEWEST):
        warnings.warn(
            f"st3 is tested with transformers {OLDEST} to {NEWEST}; this is "
            f"{transformers.__version__}. If something fails, install an older one",
            stacklevel=2,
        )


def _minor(version: str) -> tuple[int, int]:
    major, minor = version.split(".")[:2]
    return int(major), int(minor)
