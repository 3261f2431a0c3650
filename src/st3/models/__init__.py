"""All that differs between model families: one object for each."""

from st3.models.base import Family
from st3.models.facts import model_facts
from st3.models.grids import Grids
from st3.models.layouts import Layout, Tile, UnknownPlaces
from st3.models.parts import Parts, base_model, find_parts
from st3.models.refused import REFUSED
from st3.models.registry import config_family, families, family_of, register
from st3.models.rotary import Unrotate
from st3.models.visual import Encoded, VisualTokens

__all__ = [
    "REFUSED",
    "Encoded",
    "Family",
    "Grids",
    "Layout",
    "Parts",
    "Tile",
    "UnknownPlaces",
    "Unrotate",
    "VisualTokens",
    "base_model",
    "config_family",
    "families",
    "family_of",
    "find_parts",
    "model_facts",
    "register",
]
