"""Every family gives the tokens that the st3 library gives on transformers."""

from __future__ import annotations

from pathlib import Path

import pytest

pytest.importorskip("vllm")

from tests.vllm.checkpoints import ID, KINDS, LAYERS
from tests.vllm.engine import Ask, Job, Result, run
from tests.vllm.library import EQUAL, Library
from tests.vllm.pictures import asks, asks_with_video

POLICIES = {
    "off": None,  # the plug-in is installed and not configured
    "fastv": "fastv:layer=2,drop=0.75",  # in Qwen3-VL one layer before DeepStack's last
    "balanced": "balanced:tau=16",
}


def of(kind: str) -> list[Ask]:
    return asks(kind) + asks_with_video(kind)


@pytest.fixture(scope="module")
def all_results(
    checkpoint_folder: Path, tmp_path_factory: pytest.TempPathFactory
) -> dict[str, Result]:
    """Of all kinds and policies, from engines one after another in one process."""
    folders = {kind: KINDS[kind].save(checkpoint_folder / kind) for kind in KINDS}
    jobs = {
        f"{kind} {name}": Job(folder, policy, of(kind))
        for kind, folder in folders.items()
        for name, policy in POLICIES.items()
    }
    return run(jobs, tmp_path_factory.mktemp("families"))


@pytest.fixture(scope="module", params=list(KINDS))
def kind(request: pytest.FixtureRequest) -> str:
    return str(request.param)


@pytest.fixture
def results(kind: str, all_results: dict[str, Result]) -> dict[str, Result]:
    return {name: all_results[f"{kind} {name}"] for name in POLICIES}


@pytest.fixture(scope="module")
def library(kind: str, all_results: dict[str, Result], checkpoint_folder: Path) -> Library:
    """Of a checkpoint that ``all_results`` has saved."""
    return Library(checkpoint_folder / kind)


def alike(tokens: list[int]) -> list[int]:
    """InternVL's frames hold the placeholder of videos in vLLM, and that of images in
    transformers."""
    return [ID["<video>"] if token == ID["<IMG_CONTEXT>"] else token for token in tokens]


@pytest.mark.parametrize("name", POLICIES)
def test_tokens_are_the_librarys(
    kind: str, library: Library, results: dict[str, Result], name: str
) -> None:
    result = results[name]
    assert result.error is None
    for i, ask in enumerate(of(kind)):
        answer = library.answer(ask, POLICIES[name])
        assert alike(result.prompts[i]) == alike(library.inputs(ask)["input_ids"][0].tolist())
        assert result.tokens[i] == answer.ids, (kind, name, i)
        assert result.logprobs[i][0] == pytest.approx(answer.logprobs, abs=EQUAL)


def test_nothing_is_left_in_use(results: dict[str, Result]) -> None:
    left = {name: (result.in_use, result.remembered) for name, result in results.items()}
    assert left == dict.fromkeys(results, (0, 0))


def test_policies_differ(kind: str, results: dict[str, Result]) -> None:
    """Else the comparisons above would show nothing."""
    pictures = [i for i, ask in enumerate(of(kind)) if ask.images or ask.videos]
    for name in ("fastv", "balanced"):
        pairs = [(results[name].logprobs[i], results["off"].logprobs[i]) for i in pictures]
        assert any(a != pytest.approx(b, abs=1e-2) for (a,), (b,) in pairs)
        assert results[name].counters["requests_trimmed"] == len(pictures)
        assert sum(results[name].groups) == LAYERS
