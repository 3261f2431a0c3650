"""The calibration of VTW."""

from __future__ import annotations

import pytest
import torch

import st3
from tests.helpers import Case


def test_calibration_takes_the_first_layer_below_the_threshold() -> None:
    case = Case.of("llava")
    steps: list[tuple[int, int]] = []
    loose = st3.calibrate_vtw(
        case.model, [case.batch], threshold=100.0, progress=lambda *done: steps.append(done)
    )
    assert loose.policy == st3.VTW(1)
    assert loose.samples == 3
    assert steps == [(i, 7) for i in range(1, 8)]
    with torch.no_grad():
        full = case.model(**case.batch).logits[:, -1].log_softmax(-1)
        for layer, value in enumerate(loose.divergence, 1):
            with st3.trim(case.model, st3.VTW(layer)):
                gone = case.model(**case.batch).logits[:, -1].log_softmax(-1)
            kl = (full.exp() * (full - gone)).sum(-1).mean()
            assert value == pytest.approx(float(kl), abs=1e-5)
    wanted = sorted(loose.divergence)[2]
    found = st3.calibrate_vtw(case.model, [case.batch, case.batch], threshold=wanted * 1.0001)
    assert found.policy.layer == 1 + next(
        i for i, value in enumerate(loose.divergence) if value <= wanted * 1.0001
    )
    with pytest.raises(ValueError, match="use a larger threshold"):
        st3.calibrate_vtw(case.model, [case.batch], threshold=min(loose.divergence) / 2)


def test_calibration_of_nothing() -> None:
    model = Case.of("llava").model
    with pytest.raises(ValueError, match="no prompts"):
        st3.calibrate_vtw(model, [])
    with pytest.raises(ValueError, match="positive"):
        st3.calibrate_vtw(model, [{}], threshold=0)
