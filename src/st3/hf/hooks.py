"""What is put on a model while it is trimmed, in one list, so that all of it comes off again."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

from torch import nn

_ABSENT = object()
Undo = Callable[[], None]


class Hooks:
    """What hangs on a model: forward hooks and attributes of single instances.

    Classes are never changed. :meth:`restore` takes everything back in the reverse order; whatever
    an instance had in an attribute's place before, the user's own wrapper included, is there again.
    """

    def __init__(self) -> None:
        self._put: list[Callable[[], Undo]] = []
        self._undo: list[Undo] = []

    def __bool__(self) -> bool:
        return bool(self._put)

    def before(self, module: nn.Module, hook: Callable[..., Any]) -> None:
        """Call ``hook(module, args, kwargs)`` before each forward pass of ``module``."""
        self._add(lambda: module.register_forward_pre_hook(hook, with_kwargs=True).remove)

    def after(self, module: nn.Module, hook: Callable[..., Any]) -> None:
        """Call ``hook(module, args, kwargs, output)`` after each forward pass of ``module``."""
        self._add(lambda: module.register_forward_hook(hook, with_kwargs=True).remove)

    def always_after(self, module: nn.Module, hook: Callable[..., Any]) -> None:
        """Call ``hook(module, args, output)`` after each forward pass, failed ones included."""
        self._add(lambda: module.register_forward_hook(hook, always_call=True).remove)

    def replace(self, owner: Any, name: str, value: Any) -> None:
        """Give this one object (a module or a config) an attribute of its own."""
        own = vars(owner)

        def put() -> Undo:
            before = own.get(name, _ABSENT)
            own[name] = value

            def undo() -> None:
                if own.get(name) is not value:
                    return  # somebody has put something else on top since: that is theirs
                if before is _ABSENT:
                    own.pop(name, None)
                else:
                    own[name] = before

            return undo

        self._add(put)

    def assign(self, owner: Any, name: str, value: Any) -> None:
        """Assign to an attribute the ordinary way (a property with a setter), and back."""

        def put() -> Undo:
            before = getattr(owner, name)
            setattr(owner, name, value)
            return lambda: setattr(owner, name, before)

        self._add(put)

    def copies_clean(self, module: nn.Module) -> None:
        """Let ``copy.deepcopy(module)`` give a module without any of these."""

        def deepcopy(memo: dict[int, Any]) -> Any:
            with self.suspended():
                return copy.deepcopy(module, memo)

        self.replace(module, "__deepcopy__", deepcopy)

    def restore(self) -> None:
        """Take everything off again. May be called more than once."""
        self._take_off()
        self._put.clear()

    @contextmanager
    def suspended(self) -> Iterator[None]:
        """Everything is off in the block, and on again behind it."""
        self._take_off()
        try:
            yield
        finally:
            self._undo.extend([put() for put in self._put])

    def _add(self, put: Callable[[], Undo]) -> None:
        self._undo.append(put())
        self._put.append(put)

    def _take_off(self) -> None:
        while self._undo:
            self._undo.pop()()
