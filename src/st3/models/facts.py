"""What tells a model from another one: for policies that were found for one of them."""

from __future__ import annotations

from pathlib import PurePath
from typing import Any

from st3.methods.policies.saved import ModelFacts


def model_facts(config: Any) -> ModelFacts:
    """Of a model's config: the name it was loaded by, its type and its decoder layers."""
    return ModelFacts(
        name=PurePath(str(getattr(config, "name_or_path", "") or "")).name,
        type=str(config.model_type),
        layers=int(config.get_text_config(decoder=True).num_hidden_layers),
    )
