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
        case.model, [case.batch], 100.0, first_layer=1, progress=lambda *done: steps.append(done)
    )
    assert loose.policy == st3.VTW(1)
    assert loose.first_layer == 1
    assert loose.samples == 3
    assert steps == [(i, 7) for i in range(1, 8)]
    with torch.no_grad():
        full = case.model(**case.batch).logits[:, -1].log_softmax(-1)
        for layer, value in enumerate(loose.divergence, 1):
            with st3.trim(case.model, st3.VTW(layer)):
                gone = case.model(**case.batch).logits[:, -1].log_softmax(-1)
            kl = (gone.exp() * (gone - full)).sum(-1).mean()  # as the authors' code has it
            assert value == pytest.approx(float(kl), abs=1e-5)
    wanted = sorted(loose.divergence)[2]
    found = st3.calibrate_vtw(
        case.model, [case.batch, case.batch], threshold=wanted * 1.0001, first_layer=1
    )
    assert found.policy.layer == 1 + next(
        i for i, value in enumerate(loose.divergence) if value <= wanted * 1.0001
    )
    with pytest.raises(ValueError, match="use a larger threshold"):
        st3.calibrate_vtw(case.model, [case.batch], threshold=min(loose.divergence) / 2)


def test_calibration_begins_where_the_authors_do() -> None:
    case = Case.of("llava")
    found = st3.calibrate_vtw(case.model, [case.batch], threshold=100.0)
    assert found.policy == st3.VTW(5)
    assert (found.first_layer, len(found.divergence)) == (5, case.layers - 5)
    last = st3.calibrate_vtw(case.model, [case.batch], 100.0, first_layer=50)
    assert last.policy == st3.VTW(case.layers - 1)


def test_calibration_of_nothing() -> None:
    model = Case.of("llava").model
    with pytest.raises(ValueError, match="no prompts"):
        st3.calibrate_vtw(model, [])
    with pytest.raises(ValueError, match="first_layer must be at least 1"):
        st3.calibrate_vtw(model, [{}], first_layer=0)
    with pytest.raises(ValueError, match="positive"):
        st3.calibrate_vtw(model, [{}], threshold=0)
