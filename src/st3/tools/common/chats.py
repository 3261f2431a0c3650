"""Conversations with images, as the processors of transformers take them."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from jinja2 import TemplateError
from PIL import Image
from torch import Tensor

from st3.tools.common.load import end_tokens, pad_left

Chat = list[dict[str, Any]]


def ask(images: Sequence[Image.Image], text: str, system: str | None = None) -> Chat:
    """A user's turn: all images, then the text; behind a system prompt, if there is one."""
    shown = [{"type": "image", "image": image} for image in images]
    turn = {"role": "user", "content": [*shown, {"type": "text", "text": text}]}
    if not system:
        return [turn]
    return [{"role": "system", "content": [{"type": "text", "text": system}]}, turn]


def encode(model: Any, processor: Any, chats: Sequence[Chat], **padding: Any) -> Any:
    """Inputs of generate() for conversations, one a row, on the model's device and in its dtype.

    A processor without a chat template belongs to a base model: it gets the placeholders of a
    conversation's images, then its text.

    Args:
        padding: the tokenizer's arguments for rows of different lengths.

    Raises:
        ValueError: a text with a placeholder for which there is no image, a conversation that the
            chat template refuses (a system prompt, with some); and what else the processor refuses.
    """
    return _inputs(processor, chats, padding).to(model.device, dtype=model.dtype)


def tokens(processor: Any, chat: Chat) -> list[int]:
    """The tokens of a prompt, without a model.

    Raises:
        ValueError: as :func:`encode` does.
    """
    ids: list[int] = _inputs(processor, [chat], {})["input_ids"][0].tolist()
    return ids


class Asker:
    """A model and its processor, asked in left-padded batches.

    Attributes:
        ends: the tokens that end an answer, [n].
    """

    def __init__(self, model: Any, processor: Any) -> None:
        self.model, self.processor = model, processor
        pad_left(processor.tokenizer)
        ends = sorted(end_tokens(model, processor.tokenizer))
        self.ends = torch.tensor(ends, dtype=torch.long, device=model.device)

    def encode(self, chats: Sequence[Chat]) -> Any:
        """Inputs of generate() for conversations, padded on the left."""
        return encode(self.model, self.processor, chats, padding=True)

    def texts(self, tokens: Tensor) -> list[str]:
        """Rows of new tokens [B, n] as text, without special tokens."""
        decoded = self.processor.batch_decode(tokens, skip_special_tokens=True)
        return [text.strip() for text in decoded]

    def cut(self, row: Tensor) -> list[int]:
        """A row of new tokens up to and with its end token."""
        ends = torch.isin(row, self.ends).nonzero().flatten().tolist()
        cut: list[int] = row[: ends[0] + 1 if ends else len(row)].tolist()
        return cut


def _inputs(processor: Any, chats: Sequence[Chat], padding: dict[str, Any]) -> Any:
    try:
        return _written(processor, chats, padding)
    except StopIteration as error:  # transformers 5.17; 5.23 raises ValueError
        raise ValueError("the text holds an image's placeholder without an image") from error
    except TemplateError as error:
        raise ValueError(f"the model's chat template refuses this: {error}") from error


def _written(processor: Any, chats: Sequence[Chat], padding: dict[str, Any]) -> Any:
    if getattr(processor, "chat_template", None):
        return processor.apply_chat_template(
            list(chats),
            add_generation_prompt=True,
            tokenize=True,
            return_dict=True,
            return_tensors="pt",
            processor_kwargs=padding,
        )
    placeholder = str(getattr(processor, "image_token", "<image>"))
    images = [_of(chat, "image") for chat in chats]
    texts = [
        placeholder * len(group) + "\n".join(_of(chat, "text"))
        for group, chat in zip(images, chats, strict=True)
    ]
    return processor(images=images, text=texts, return_tensors="pt", **padding)


def _of(chat: Chat, kind: str) -> list[Any]:
    return [part[kind] for turn in chat for part in turn["content"] if part["type"] == kind]
