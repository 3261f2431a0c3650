"""The calls of a model's encoders of images and videos, as those who listen see them."""

from __future__ import annotations

import functools
import inspect
import threading
from collections.abc import Callable
from typing import Any

from st3.hf.hooks import Hooks

Note = Callable[[bool, dict[str, Any], Any], None]
_ENCODERS = {"get_image_features": False, "get_video_features": True}


class _Calls(threading.local):
    """Whether a thread is within a call."""

    inside = False


def listen(hooks: Hooks, inner: Any, note: Note) -> None:
    """Show ``note`` each call of the encoders of ``inner``, behind it; the class stays as it is.

    Args:
        note: is given whether the call is of videos, its arguments by name, and its result. It is
            not told of a call within a call: videos are encoded as images are.
    """
    calls = _Calls()
    for name, video in _ENCODERS.items():
        if hasattr(inner, name):
            hooks.replace(inner, name, _shown(getattr(inner, name), video, calls, note))


def _shown(
    encode: Callable[..., Any], video: bool, calls: _Calls, note: Note
) -> Callable[..., Any]:
    signature = inspect.signature(encode)

    @functools.wraps(encode)  # generate() reads the signature
    def shown(*args: Any, **kwargs: Any) -> Any:
        if calls.inside:
            return encode(*args, **kwargs)
        calls.inside = True
        try:
            result = encode(*args, **kwargs)
        finally:
            calls.inside = False
        given = signature.bind(*args, **kwargs).arguments
        note(video, {**given, **given.get("kwargs", {})}, result)
        return result

    return shown
