"""Settings of every test: one torch thread, no network, --upstream and --quick, a tiny model."""

from __future__ import annotations

import logging
import os
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING

# Before transformers is imported: nothing here may wait for, or depend on, a model hub.
os.environ["HF_HUB_OFFLINE"] = "1"
os.environ["TOKENIZERS_PARALLELISM"] = "false"

import pytest
import torch

if TYPE_CHECKING:
    from st3.tools.bench import Subject

torch.set_num_threads(1)  # the tests run in two processes, on machines of two cores


CASES = 3  # of each test with --quick


def pytest_addoption(parser: pytest.Parser) -> None:
    group = parser.getgroup("st3")
    group.addoption(
        "--upstream",
        action="store_true",
        help="run the tests that watch other projects' releases, too; deprecations are errors",
    )
    group.addoption(
        "--quick", action="store_true", help=f"no slow tests, and the first {CASES} cases of others"
    )
    group.addoption(
        "--device", default="cuda", help="where tests/test_gpu.py runs; skipped if it is not there"
    )


def pytest_configure(config: pytest.Config) -> None:
    if config.getoption("--upstream"):
        # Announcements of removals. transformers logs others: see no_logged_deprecations.
        config.addinivalue_line("filterwarnings", "error::FutureWarning")
        config.addinivalue_line("filterwarnings", "error::DeprecationWarning:transformers.*")


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    upstream, quick = config.getoption("--upstream"), config.getoption("--quick")
    cases: Counter[str] = Counter()
    kept, left_out = [], []
    for item in items:
        test = item.nodeid.partition("[")[0]
        cases[test] += 1
        wanted = upstream or item.get_closest_marker("upstream") is None
        if quick:
            wanted = wanted and item.get_closest_marker("slow") is None and cases[test] <= CASES
        (kept if wanted else left_out).append(item)
    if left_out:
        config.hook.pytest_deselected(items=left_out)
        items[:] = kept


class _Deprecations(logging.Handler):
    def __init__(self) -> None:
        super().__init__()
        self.messages: list[str] = []

    def emit(self, record: logging.LogRecord) -> None:
        message = record.getMessage()
        if "deprecat" in message.lower():
            self.messages.append(message)


@pytest.fixture(autouse=True)
def no_logged_deprecations(request: pytest.FixtureRequest) -> Iterator[None]:
    """With --upstream: fail on a deprecation that transformers logs, as on those that it warns of.

    It logs most of them once in a process, so the test that fails is the first to meet one.
    """
    if not request.config.getoption("--upstream"):
        yield
        return
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


@pytest.fixture(scope="module")
def subject() -> Subject:
    """The benchmark's smallest model."""
    from st3.tools.bench import from_shape

    return from_shape("tiny", torch.device("cpu"), torch.float32)
