"""From a conversation to the inputs of the model."""

from __future__ import annotations

import threading
from collections.abc import Mapping, Sequence
from typing import Any

from jinja2 import TemplateError

from st3.tools.common.limits import positions
from st3.tools.serve.errors import refused

# The processor's names for what stands for an image in the text.
_PLACEHOLDERS = ("image_token", "video_token", "audio_token")
# Text is counted in pieces of so many characters before the whole of it is tokenised; a cut adds at
# most so many tokens to those of the whole.
_PIECE, _CUT = 8192, 8
# Longer text is judged by its characters, so many a token. Prose has 3 to 6; only a text that is
# hardly anything but one repeated character has more.
_CHARACTERS = 16


class Prompts:
    """Tokenises conversations for one model.

    Args:
        max_tokens: of a prompt, untrimmed; None: as many as the model has positions.
    """

    def __init__(self, model: Any, processor: Any, max_tokens: int | None = None) -> None:
        if not getattr(processor, "chat_template", None):
            raise ValueError("this model has no chat template: a conversation cannot be written")
        self.processor = processor
        self.positions = positions(model)
        self.max_tokens = max_tokens
        names = ("image_token_id", "image_token_index", "video_token_id", "video_token_index")
        ids = (getattr(model.config, name, None) for name in names)
        self._visual = sorted({token for token in ids if isinstance(token, int)})
        marks = (getattr(processor, name, None) for name in _PLACEHOLDERS)
        self._placeholders = tuple(mark for mark in marks if isinstance(mark, str) and mark)
        # Fast tokenizers are not to be called by two threads at once.
        self._lock = threading.Lock()

    def tokenise(self, messages: Sequence[dict[str, Any]]) -> tuple[Mapping[str, Any], int, int]:
        """The model's inputs (one row), the tokens of the prompt, and how many are visual.

        Of text that is too long in any case no more is tokenised than shows it: the inputs are
        empty then, and the tokens those that were counted or judged, for :meth:`check_length` to
        refuse.

        Raises:
            ServeError: for what the chat template or the processor refuses.
        """
        texts = [part["text"] for m in messages for part in m["content"] if part["type"] == "text"]
        for text in texts:
            self._check_text(text)
        try:
            with self._lock:
                counted = self._count(texts)
                if counted is not None:
                    return {}, counted, 0
                inputs = self.processor.apply_chat_template(
                    list(messages),
                    add_generation_prompt=True,
                    tokenize=True,
                    return_dict=True,
                    return_tensors="pt",
                )
        except (TemplateError, ValueError, TypeError, KeyError, IndexError, OSError) as error:
            raise refused(f"this conversation cannot be made a prompt: {error}", "messages") from (
                error
            )
        ids = inputs["input_ids"]
        visual = sum(int((ids == token).sum()) for token in self._visual)
        return inputs, int(ids.shape[1]), visual

    def _count(self, texts: Sequence[str]) -> int | None:
        """Tokens at least in texts that are too long (see ``_CHARACTERS``); None for others."""
        limits = [n for n in (self.max_tokens, self.positions) if n is not None]
        characters = sum(map(len, texts))
        if not limits or characters <= max(_PIECE, min(limits)):
            return None
        if characters > _CHARACTERS * max(_PIECE, min(limits)):
            return characters // _CHARACTERS
        tokens = 0
        for text in texts:
            for start in range(0, len(text), _PIECE):
                piece = text[start : start + _PIECE]
                ids = self.processor.tokenizer(piece, add_special_tokens=False)["input_ids"]
                tokens += max(0, len(ids) - _CUT)
                if tokens > min(limits):
                    return tokens
        return None

    def _check_text(self, text: str) -> None:
        for placeholder in self._placeholders:
            if placeholder in text:
                raise refused(
                    f"the text holds {placeholder!r}, which stands for an image here: send images "
                    "as image_url parts",
                    "messages",
                )

    def room(self, tokens: int, max_tokens: int) -> int:
        """``max_tokens``, or fewer where the model has not so many positions left."""
        left = max_tokens if self.positions is None else self.positions - tokens
        return max(1, min(max_tokens, left))

    def check_length(self, tokens: int, max_tokens: int) -> None:
        """Raise ServeError for a prompt, or prompt and answer, that are too long."""
        if self.max_tokens is not None and tokens > self.max_tokens:
            raise refused(
                f"the prompt has {tokens} tokens; this server takes {self.max_tokens}",
                "messages",
                "context_length_exceeded",
            )
        if self.positions is not None and tokens + max_tokens > self.positions:
            raise refused(
                f"{tokens} prompt tokens and max_tokens {max_tokens} are more than the model's "
                f"{self.positions} positions",
                "max_tokens",
                "context_length_exceeded",
            )
