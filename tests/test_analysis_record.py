"""Recorded runs on models that cut images into tiles, merge patches, or read videos."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image

import st3
from st3.models.places import Place, places
from st3.tools.see.record import Run, record
from tests.zoo import I, T, V, build


class Letters:
    """A tokenizer whose tokens are letters."""

    def decode(self, ids: Any, **options: Any) -> str:
        return "".join(chr(97 + int(i) % 26) for i in ids)


@pytest.mark.parametrize(
    ("name", "segment"),
    [("llava_next", I()), ("qwen2_5_vl", I(3, 4)), ("qwen2_vl", V(4)), ("llava_onevision", V(4))],
)
def test_a_run_says_for_every_step_which_tokens_each_layer_saw(
    name: str, segment: I | V, tmp_path: Path
) -> None:
    family, model = build(name)
    batch = family.inputs(model, [[T(4), segment, T(5)]])
    count = int(family.visual_mask(model, batch).sum())
    if isinstance(segment, V):
        found = places(model, batch, [], lambda images: {})
    else:
        found = [Place(0, None)] * count
    pictures = [Image.new("RGB", (40, 30)) for _ in range(1 + max(p.picture for p in found))]
    policy = st3.ST3(stride=2, anneal=st3.Anneal("linear", tau=5, floor=0))
    trimmer = st3.trim(model, policy)
    run = record(trimmer, batch, Letters(), 7, found, pictures=pictures, about={"model": name})
    assert not trimmer.attached
    with trimmer, torch.no_grad():
        answer = model.generate(**batch, max_new_tokens=7, do_sample=False)
    report = trimmer.report
    assert "".join(run.tokens) == Letters().decode(answer[0, -7:])
    assert run.n_visual == count == report.n_visual[0]
    schedule = trimmer.schedule
    for layer, order in enumerate(run.order):
        assert sorted(order) == report.kept_positions(layer).tolist()
        wanted = [schedule.visible(layer, count, step) for step in range(7)]
        assert [visible[layer] for visible in run.visible] == wanted
    assert all(len(row) == count for row in run.attention)
    for row, visible in zip(run.attention, run.visible, strict=True):
        seen = {t for order, n in zip(run.order, visible, strict=True) for t in order[:n]}
        assert all(value == 0 for token, value in enumerate(row) if token not in seen)
        assert not seen or max(row) == 255
    assert [sample["live"] for sample in run.kv] == [sample.live for sample in report.samples]
    run.save(tmp_path)
    again = Run.load(tmp_path)
    assert again.to_dict() == run.to_dict()
    assert len(again.pictures) == len(pictures)


def test_an_untrimmed_run_sees_everything() -> None:
    family, model = build("llava")
    batch = family.inputs(model, [[T(4), I(), T(5)]])
    run = record(st3.trim(model, "none"), batch, Letters(), 3)
    assert run.visible == [[16] * 8] * 3
    assert run.order == [list(range(16))] * 8
    assert run.kv == []
    assert run.places is None


def test_what_cannot_be_recorded_is_refused() -> None:
    family, model = build("llava")
    batch = family.inputs(model, [[T(4), I(), T(5)]])
    with pytest.raises(st3.TrimStateError, match="rerank_every"):
        record(st3.trim(model, "st3", rerank_every=2), batch, Letters(), 3)
    with pytest.raises(ValueError, match="2 places for 16"):
        record(st3.trim(model, "st3"), batch, Letters(), 3, [Place(0, None)] * 2)
