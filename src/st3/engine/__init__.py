"""How visual tokens are trimmed: hooks, attention, selection, cache, masks, model families."""

from st3.engine.errors import TrimStateError, UnsupportedModelError
from st3.engine.trimmer import Trimmer, trim

__all__ = ["TrimStateError", "Trimmer", "UnsupportedModelError", "trim"]
