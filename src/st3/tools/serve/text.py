"""Text out of tokens as they come, up to a stop string."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

_UNFINISHED = "\ufffd"  # what a tokenizer writes for the first bytes of a character


class TextStream:
    """Turns one answer's tokens into text.

    Args:
        tokenizer: of the model; special tokens are left out of the text.
        stop: strings that end the answer; neither they nor what follows are given out.
    """

    def __init__(self, tokenizer: Any, stop: Sequence[str] = ()) -> None:
        self.tokenizer = tokenizer
        self.stop = tuple(stop)
        self.stopped = False
        self.text = ""
        self._ids: list[int] = []
        self._context = self._done = 0  # tokens before `_done` are text already
        self._held = ""

    def push(self, token: int) -> str:
        """The text that this token makes certain."""
        self._ids.append(token)
        # A word's text depends on the word before it: both are decoded, the first is cut off.
        before = self._decode(self._ids[self._context : self._done])
        after = self._decode(self._ids[self._context :])
        if len(after) <= len(before) or after.endswith(_UNFINISHED):
            return ""
        self._context, self._done = self._done, len(self._ids)
        return self._give(after[len(before) :])

    def close(self) -> str:
        """What is left when the answer is over."""
        if self.stopped:
            return ""
        before = self._decode(self._ids[self._context : self._done])
        after = self._decode(self._ids[self._context :])
        rest = self._give(after[len(before) :])
        return rest if self.stopped else rest + self._release(len(self._held))

    def _decode(self, ids: list[int]) -> str:
        text: str = self.tokenizer.decode(ids, skip_special_tokens=True)
        return text

    def _give(self, text: str) -> str:
        """Add ``text``; what may be the beginning of a stop string is held back."""
        self._held += text
        found = [place for stop in self.stop if (place := self._held.find(stop)) >= 0]
        if found:
            self.stopped = True
            return self._release(min(found))
        hold = max(
            (n for stop in self.stop for n in range(1, len(stop)) if self._held.endswith(stop[:n])),
            default=0,
        )
        return self._release(len(self._held) - hold)

    def _release(self, characters: int) -> str:
        out, self._held = self._held[:characters], self._held[characters:]
        self.text += out
        return out
