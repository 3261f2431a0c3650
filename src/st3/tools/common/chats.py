"""Conversations with images, as the processors of transformers take them."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from PIL import Image

Chat = list[dict[str, Any]]


def ask(images: Sequence[Image.Image], text: str) -> Chat:
    """A user's turn: all images, then the text."""
    shown = [{"type": "image", "image": image} for image in images]
    return [{"role": "user", "content": [*shown, {"type": "text", "text": text}]}]


def encode(model: Any, processor: Any, chats: Sequence[Chat], **padding: Any) -> Any:
    """Inputs of generate() for conversations, one a row, on the model's device and in its dtype.

    A processor without a chat template belongs to a base model: it gets the placeholders of a
    conversation's images, then its text.

    Args:
        padding: the tokenizer's arguments for rows of different lengths.

    Raises:
        ValueError: a text with a placeholder for which there is no image; and what else the
            processor refuses.
    """
    try:
        inputs = _inputs(processor, chats, padding)
    except StopIteration as error:  # transformers 5.17; 5.23 raises ValueError
        raise ValueError("the text holds an image's placeholder without an image") from error
    return inputs.to(model.device, dtype=model.dtype)


def _inputs(processor: Any, chats: Sequence[Chat], padding: dict[str, Any]) -> Any:
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
