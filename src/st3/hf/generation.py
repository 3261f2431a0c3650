"""What generate(), and some families, call on a model: as it is, but noticed or narrowed."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from typing import Any

from torch import Tensor

from st3.engine.prefill import Prefill
from st3.engine.select import block_features
from st3.engine.session import Session
from st3.errors import UnsupportedModelError

NO_CACHE = (
    "st3: generate(use_cache=False) prunes the whole sequence anew at each step, by its newest "
    "token, and can anneal nothing: leave use_cache at True"
)


def check_generation(generation_config: Any) -> None:
    """Raise :class:`~st3.UnsupportedModelError` for settings that a trimmed prompt cannot have."""
    if getattr(generation_config, "prefill_chunk_size", None) is not None:
        raise UnsupportedModelError(
            "chunked prefill is not supported: a chunk does not see the prompt's last token. "
            "Set prefill_chunk_size to None, also in the model's generation_config"
        )


def checked_prefill(prefill: Callable[..., Any], drops: bool) -> Callable[..., Any]:
    """generate()'s prefill, which is told only there that prompts shall come in chunks, or without
    a cache; ``drops``: whether the policy drops anything."""

    def checked(input_ids: Any, generation_config: Any, *args: Any, **kwargs: Any) -> Any:
        check_generation(generation_config)
        if generation_config.use_cache is False and drops:
            warnings.warn(NO_CACHE, stacklevel=2)
        return prefill(input_ids, generation_config, *args, **kwargs)

    return checked


def noticed_candidates(make: Callable[..., Any], notice: Callable[[], None]) -> Callable[..., Any]:
    """What makes the generator of candidates in assisted decoding. The model's next pass behind
    each round of candidates checks them; only there more than one logit to keep means candidates.

    Args:
        notice: called behind each round.
    """

    def made(*args: Any, **kwargs: Any) -> Any:
        generator = make(*args, **kwargs)
        propose = generator.get_candidates

        def get_candidates(*given: Any, **named: Any) -> Any:
            found = propose(*given, **named)
            notice()
            return found

        generator.get_candidates = get_candidates
        return generator

    return made


def narrowed_deepstack(original: Callable[..., Tensor], session: Session) -> Callable[..., Tensor]:
    """DeepStack (Qwen3-VL) adds image features to the first layers' outputs: give it the features
    of the tokens that are still there."""

    def process(hidden: Tensor, visual_mask: Tensor, features: Tensor) -> Tensor:
        current = session.current
        if isinstance(current, Prefill) and current.block.index is not None:
            visual_mask, features = block_features(current.block, visual_mask, features)
        return original(hidden, visual_mask, features)

    return process
