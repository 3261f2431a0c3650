"""A task's generation settings as arguments of generate()."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from transformers import GenerationConfig

MAX_NEW_TOKENS = 128  # where a task does not say
# Settings that have no meaning where rows are not sampled; transformers warns of them.
_OF_SAMPLING = (
    "temperature",
    "top_p",
    "top_k",
    "min_p",
    "typical_p",
    "epsilon_cutoff",
    "eta_cutoff",
)


def arguments(settings: Mapping[str, Any]) -> tuple[dict[str, Any], list[str]]:
    """Arguments of generate(), and the names of what it has none for (``image_aspect_ratio`` and
    the like, which tasks carry for one model or another). ``until`` is the caller's.

    A temperature above 0 samples, unless the task says ``do_sample: false``; a temperature of 0 is
    greedy whatever else it says.
    """
    given = {key: value for key, value in settings.items() if key != "until" and value is not None}
    known = set(vars(GenerationConfig()))
    left_out = sorted(key for key in given if key not in known)
    told = {key: value for key, value in given.items() if key in known}
    temperature = told.get("temperature")
    sampled = bool(told.get("do_sample", temperature)) and temperature != 0
    if not sampled:
        told = {key: value for key, value in told.items() if key not in _OF_SAMPLING}
    return {
        "max_new_tokens": MAX_NEW_TOKENS,
        "num_beams": 1,
        **told,
        "do_sample": sampled,
    }, left_out


def policy_text(policy: str, options: Mapping[str, Any]) -> str:
    """A policy's string with further arguments, which lmms-eval has read as Python values."""
    parts = [
        f"{key}={str(value).lower() if value is None or isinstance(value, bool) else value}"
        for key, value in options.items()
    ]
    if not parts:
        return policy
    return policy + ("," if ":" in policy else ":") + ",".join(parts)


def ends(settings: Mapping[str, Any]) -> list[str]:
    """The strings behind which a task cuts an answer."""
    until = settings.get("until") or []
    return [end for end in ([until] if isinstance(until, str) else until) if end.strip()]
