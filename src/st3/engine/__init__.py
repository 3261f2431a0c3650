"""How visual tokens are trimmed, on tensors alone: selection, prefill, decode steps, KV cache."""

from st3.engine.trimmer import Trimmer, trim

__all__ = ["Trimmer", "trim"]
