"""Families: found by themselves, added in one file, overridable, and what stands in one place."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest

import st3
from st3.models import (
    REFUSED,
    Family,
    Parts,
    config_family,
    families,
    family_of,
    find_parts,
    register,
    registry,
)
from st3.models.decoders import DESCRIBED
from st3.models.parts import decoder_parts
from st3.models.towers import TOWERS
from tests.helpers import ST3, Case
from tests.zoo import FAMILIES, build

SOURCE = Path(st3.__file__).parent


def test_every_family_is_known_once_and_none_is_refused() -> None:
    kinds = [family.model_type for family in families()]
    assert len(kinds) == len(set(kinds)) >= 55
    assert not set(kinds) & set(REFUSED)
    assert all(family.name for family in families())


def test_a_family_is_one_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A file in the folder is found, and what it says is asked."""
    (tmp_path / "house.py").write_text(
        "from st3.models import Family\n"
        "class House(Family):\n"
        "    def lookahead(self, text, window):\n"
        "        return 'prompt'\n"
        "FAMILIES = (House('llava', 'House'), House('house_vl', 'House VL'))\n"
    )
    before = dict(registry._families)
    monkeypatch.setattr(registry.package, "__path__", [*registry.package.__path__, str(tmp_path)])
    try:
        registry.find()
        assert {family.name for family in families()} >= {"House", "House VL"}
        model = build("llava")[1]
        assert family_of(model).name == "House"
        dims = st3.cost.TextDims.from_config(model.config)
        assert {layer.lookahead for layer in dims.layers} == {"prompt"}
    finally:
        registry._families.clear()
        registry._families.update(before)


def test_a_subclass_decides_where_the_parts_are() -> None:
    """The engine asks the family: here for a model whose inner model has another name."""
    case = Case.of("llava")
    case.model.body, case.model.model = case.model.model, None

    class Renamed(Family):
        def parts(self, model: Any) -> Parts:
            text = model.body.language_model
            return decoder_parts(text, model.body, self.model_type)

    old = family_of(case.model)
    with pytest.raises(st3.UnsupportedModelError, match=r"model\.language_model\.layers"):
        st3.trim(case.model, ST3)
    register(Renamed("llava", "renamed"))
    try:
        trimmer = st3.trim(case.model, ST3)
        assert trimmer.parts.inner is case.model.body
        assert len(trimmer.parts.layers) == 8
    finally:
        register(old)


def test_untested_models_get_a_family_of_which_nothing_is_known() -> None:
    _, model = build("llava")
    model.config.model_type = "nobodys_vl"
    with pytest.raises(st3.UnsupportedModelError, match="untested=True"):
        family_of(model)
    family = family_of(model, untested=True)
    assert family == Family("nobodys_vl", "nobodys_vl", "untested")
    assert family.image_grids(model, (), [[16]]) == ((None,),)
    assert family.bench_inputs(model, 16, 1) is None
    with pytest.raises(ValueError, match="no cost model for the way from the vision tower"):
        family.tower_dims(model.config)


def test_parts_carry_kinds_and_sources() -> None:
    _, model = build("gemma3")
    parts = find_parts(model)
    assert parts.kinds == tuple(model.config.text_config.layer_types)
    assert parts.sources == tuple(range(8))
    assert [kind == "sliding_attention" for kind in parts.kinds] == [
        window is not None for window in parts.windows
    ]
    _, model = build("mistral3_window")  # whose config has no layer_types
    assert set(find_parts(model).kinds) == {"sliding_attention"}


def test_tables_hold_no_family() -> None:
    """What is left beside the families goes by decoder or tower, which families share."""
    kinds = {family.model_type for family in families()}
    assert not kinds & set(DESCRIBED)
    assert not kinds & set(TOWERS) - {"pixtral"}


@pytest.mark.parametrize("folder", ["models", "cost", "engine", "tools", "methods", "hf"])
def test_no_family_is_named_outside_of_its_file(folder: str) -> None:
    """A model type in quotes, other than the shapes of the cost model, the refusals and the ids of
    checkpoints on the hub."""
    kinds = {family.model_type for family in families()} & set(FAMILIES)
    quoted = re.compile("[\"'](" + "|".join(kinds) + ")[\"']")
    found: list[Any] = []
    for path in (SOURCE / folder).rglob("*.py"):
        if path.parent.name == "families" or path.name == "hub.py":
            continue
        for number, line in enumerate(path.read_text(encoding="utf-8").splitlines(), 1):
            if quoted.search(line):
                found.append(f"{path.relative_to(SOURCE)}:{number}: {line.strip()}")
    assert found == []


def test_a_config_of_no_family() -> None:
    config: Any = build("llava")[1].config.text_config
    assert config_family(config) == Family("llama", "llama")
