"""What the engine refuses, always with the remedy."""


class UnsupportedModelError(ValueError):
    """The model (or this use of it) cannot be trimmed; the message says why and what to do."""


class TrimStateError(RuntimeError):
    """A trimmed cache or a trimmer was used in a way that would give wrong answers."""


class OtherModelWarning(Warning):
    """A policy's file was made for a model of another name, or by an st3 with other defaults."""
