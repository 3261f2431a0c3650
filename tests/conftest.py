"""Settings of every test: one torch thread, no network, deprecations are errors, a tiny model."""

from __future__ import annotations

import logging
import os
from collections.abc import Iterator
from pathlib import Path

# Before transformers is imported: nothing here may wait for, or depend on, a model hub.
os.environ["HF_HUB_OFFLINE"] = "1"
os.environ["TOKENIZERS_PARALLELISM"] = "false"

import pytest
import torch

torch.set_num_threads(1)  # the tests run in two processes, on machines of two cores


class _Deprecations(logging.Handler):
    def __init__(self) -> None:
        super().__init__()
        self.messages: list[str] = []

    def emit(self, record: logging.LogRecord) -> None:
        message = record.getMessage()
        if "deprecat" in message.lower():
            self.messages.append(message)


@pytest.fixture(autouse=True)
def no_logged_deprecations() -> Iterator[None]:
    """Fail on a deprecation that transformers logs; those that it warns of are errors already.

    It logs most of them once in a process, so the test that fails is the first to meet one.
    """
    handler = _Deprecations()
    logger = logging.getLogger("transformers")
    logger.addHandler(handler)
    yield
    logger.removeHandler(handler)
    assert not handler.messages, f"transformers calls this deprecated: {handler.messages}"


@pytest.fixture(scope="session")
def tiny_model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a random LLaVA and its processor: 8 layers, 16 visual tokens, CPU-fast."""
    from tests.tiny_llava import save_tiny_llava

    return save_tiny_llava(tmp_path_factory.mktemp("models") / "tiny-llava")


@pytest.fixture(scope="session")
def picture(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An image file, wider than high, with something to see in each corner."""
    from tests.tiny_llava import save_picture

    return save_picture(tmp_path_factory.mktemp("images") / "picture.png")
