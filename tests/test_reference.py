"""Every family and policy against the slow reference: prefill and decoding, fp32, within 1e-5 of
the largest logit.

The batch is ragged: a row with one image, one with two, one without.
"""

from __future__ import annotations

import pytest
from transformers.models.auto.configuration_auto import CONFIG_MAPPING_NAMES

from st3.models import families
from tests.helpers import POLICIES, ST3, Case
from tests.zoo import FAMILIES as ZOO
from tests.zoo import T, V, hybrids, indexed

# One per way of building a prompt, a mask or a decoder: these meet every policy.
MAIN = [
    "llava",
    "llava_next",
    "llava_onevision",
    "llava_next_video",
    "qwen2_vl",
    "qwen2_5_vl",
    "qwen3_vl",
    "smolvlm",
    "idefics3",
    "internvl",
    "mistral3",
    "mistral3_window",
    "pixtral",
    "paligemma",
    "paligemma2",
    "gemma3",
    "gemma4",
]
# Not all of them are in every supported version of transformers.
TYPES = {f.model_type for f in families() if f.model_type in CONFIG_MAPPING_NAMES}
# Decoders whose layers are not all alike are judged by a reference of their own: tests/hybrids.
MIXED = {f.model_type or f.name for f in (*hybrids.FAMILIES, *indexed.FAMILIES)} & TYPES
OTHERS = [name for name, family in ZOO.items() if name not in MAIN]
TOKENS = 8
# Newline tokens share one embedding, so that their keys' norms in layer 0 are equal but for RoPE's
# rounding: which of them is annealed first is not defined.
TIED = {("llava_onevision", "key_norm")}


def supported(name: str) -> bool:
    return ZOO[name].make_config().model_type in TYPES


SUPPORTED_OTHERS = [name for name in OTHERS if supported(name)]
VIDEO = [name for name in MAIN + SUPPORTED_OTHERS if ZOO[name].supports_video]


def test_every_supported_family_has_a_model_here() -> None:
    built = {ZOO[name].make_config().model_type for name in MAIN + SUPPORTED_OTHERS}
    assert built | MIXED == TYPES


@pytest.mark.parametrize("policy", POLICIES)
@pytest.mark.parametrize("name", MAIN)
def test_main_families(name: str, policy: str) -> None:
    case = Case.of(name)
    case.check_prefill(POLICIES[policy])
    if (name, policy) not in TIED:
        case.check_generate(POLICIES[policy], TOKENS)


@pytest.mark.parametrize("name", SUPPORTED_OTHERS)
def test_other_families(name: str) -> None:
    case = Case.of(name)
    case.check_prefill(ST3)
    case.check_generate(ST3, TOKENS)


@pytest.mark.parametrize("name", VIDEO)
def test_video(name: str) -> None:
    case = Case.of(name, [[T(3), V(), T(4)], [T(2), V(), T(2)], [T(5)]])
    case.check_prefill(ST3)
    case.check_generate(ST3, TOKENS)
