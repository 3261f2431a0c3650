"""Every family gives the tokens that the st3 library gives on transformers."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

pytest.importorskip("vllm")

from PIL import Image

from tests.vllm.checkpoints import KINDS, LAYERS
from tests.vllm.engine import Ask, Job, Result, run
from tests.vllm.library import Library

POLICIES = {
    "off": None,  # the plug-in is installed and not configured
    "fastv": "fastv:layer=2,drop=0.75",  # in Qwen3-VL one layer before DeepStack's last
    "st3": "st3:tau=16",
}


def picture(seed: int, width: int = 120, height: int = 96) -> Image.Image:
    noise = np.random.default_rng(seed).integers(0, 255, (height // 8, width // 8, 3))
    small = Image.fromarray(noise.astype(np.uint8))
    return small.resize((width, height), Image.Resampling.BICUBIC)


def asks(kind: str) -> list[Ask]:
    """Requests with one image, none, and two of other sizes."""
    image = KINDS[kind].image
    return [
        Ask(f"w40 w41 {image} w50 w51 w52", [picture(1)]),
        Ask("w30 w31 w32 w33"),
        Ask(f"w44 {image} w70 w71 {image} w72", [picture(2, 96, 160), picture(3)]),
        Ask(f"{image} w90 w91 w92 w93 w94", [picture(4, 160, 96)]),
    ]


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
        assert result.logprobs[i][0] == pytest.approx(answer.logprobs, abs=2e-3)


def test_nothing_is_left_in_use(results: dict[str, Result]) -> None:
    assert {name: result.in_use for name, result in results.items()} == dict.fromkeys(results, 0)


def test_policies_differ(results: dict[str, Result]) -> None:
    """Else the comparisons above would show nothing."""
    pictures = (0, 2, 3)
    for name in ("fastv", "st3"):
        pairs = [(results[name].logprobs[i], results["off"].logprobs[i]) for i in pictures]
        assert any(a != pytest.approx(b, abs=1e-2) for (a,), (b,) in pairs)
        assert results[name].counters["requests_trimmed"] == len(pictures)
        assert sum(results[name].groups) == LAYERS
