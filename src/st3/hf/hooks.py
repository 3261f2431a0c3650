"""What is put on a model while it is trimmed, in one list, so that all of it comes off again."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from torch import nn

_ABSENT = object()


class Hooks:
    """What hangs on a model: forward hooks and attributes of single instances.

    Classes are never changed. :meth:`restore` takes everything back in the reverse order; whatever
    an instance had in an attribute's place before, the user's own wrapper included, is there again.
    """

    def __init__(self) -> None:
        self._undo: list[Callable[[], None]] = []

    def __bool__(self) -> bool:
        return bool(self._undo)

    def before(self, module: nn.Module, hook: Callable[..., Any]) -> None:
        """Call ``hook(module, args, kwargs)`` before each forward pass of ``module``."""
        self._undo.append(module.register_forward_pre_hook(hook, with_kwargs=True).remove)

    def after(self, module: nn.Module, hook: Callable[..., Any]) -> None:
        """Call ``hook(module, args, kwargs, output)`` after each forward pass of ``module``."""
        self._undo.append(module.register_forward_hook(hook, with_kwargs=True).remove)

    def replace(self, owner: Any, name: str, value: Any) -> None:
        """Give this one object (a module or a config) an attribute of its own."""
        own = vars(owner)
        before = own.get(name, _ABSENT)
        own[name] = value

        def undo() -> None:
            if before is _ABSENT:
                own.pop(name, None)
            else:
                own[name] = before

        self._undo.append(undo)

    def assign(self, owner: Any, name: str, value: Any) -> None:
        """Assign to an attribute the ordinary way (a property with a setter), and back."""
        before = getattr(owner, name)
        setattr(owner, name, value)
        self._undo.append(lambda: setattr(owner, name, before))

    def restore(self) -> None:
        """Take everything off again. May be called more than once."""
        while self._undo:
            self._undo.pop()()
