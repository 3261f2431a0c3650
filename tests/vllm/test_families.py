"""Every family gives the tokens that the st3 library gives on transformers."""

from __future__ import annotations

from pathlib import Path

import pytest

pytest.importorskip("vllm")

from tests.vllm.checkpoints import KINDS, LAYERS
from tests.vllm.engine import Job, Result, run
from tests.vllm.library import EQUAL, Library
from tests.vllm.pictures import asks

POLICIES = {
    "off": None,  # the plug-in is installed and not configured
    "fastv": "fastv:layer=2,drop=0.75",  # in Qwen3-VL one layer before DeepStack's last
    "balanced": "balanced:tau=16",
}


@pytest.fixture(scope="module", params=list(KINDS))
def kind(request: pytest.FixtureRequest) -> str:
    return str(request.param)


@pytest.fixture(scope="module")
def folder(kind: str, checkpoint_folder: Path) -> Path:
    return KINDS[kind].save(checkpoint_folder / kind)


@pytest.fixture(scope="module")
def results(kind: str, folder: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Result]:
    jobs = {name: Job(folder, policy, asks(kind)) for name, policy in POLICIES.items()}
    return run(jobs, tmp_path_factory.mktemp(kind))


@pytest.mark.parametrize("name", POLICIES)
def test_tokens_are_the_librarys(
    kind: str, folder: Path, results: dict[str, Result], name: str
) -> None:
    library, result = Library(folder), results[name]
    assert result.error is None
    for i, ask in enumerate(asks(kind)):
        answer = library.answer(ask, POLICIES[name])
        assert result.prompts[i] == library.inputs(ask)["input_ids"][0].tolist()
        assert result.tokens[i] == answer.ids, (kind, name, i)
        assert result.logprobs[i][0] == pytest.approx(answer.logprobs, abs=EQUAL)


def test_nothing_is_left_in_use(results: dict[str, Result]) -> None:
    assert {name: result.in_use for name, result in results.items()} == dict.fromkeys(results, 0)


def test_policies_differ(results: dict[str, Result]) -> None:
    """Else the comparisons above would show nothing."""
    pictures = (0, 2, 3)
    for name in ("fastv", "balanced"):
        pairs = [(results[name].logprobs[i], results["off"].logprobs[i]) for i in pictures]
        assert any(a != pytest.approx(b, abs=1e-2) for (a,), (b,) in pairs)
        assert results[name].counters["requests_trimmed"] == len(pictures)
        assert sum(results[name].groups) == LAYERS
