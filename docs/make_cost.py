"""Write the tables of docs/cost.md: python docs/make_cost.py

Everything here is computed from configs; nothing is measured and no model is built.
"""

from __future__ import annotations

import re
from dataclasses import replace
from pathlib import Path

from st3 import VTW, Anneal, FastV, Schedule
from st3.cost import COLUMNS, cost_table
from st3.cost.shapes import SHAPES, shape
from st3.methods import DEFAULT_POLICY
from st3.methods.policies import parse
from st3.tools.common.tables import markdown

PAGE = Path(__file__).with_name("cost.md")
NEW_TOKENS = 128
N_TEXT = 64


def pyramid_drop(num_layers: int) -> Schedule:
    """PyramidDrop (arXiv 2410.17247): after each quarter of the layers half of what is left."""
    quarter = num_layers // 4
    return Schedule.from_shares([0.5 ** (layer // quarter) for layer in range(num_layers)])


def rivals(num_layers: int, preset: str) -> dict[str, Schedule]:
    """The paper's settings and the methods that it compares with."""
    paper = parse(preset)
    st3 = {
        f"ST3, S = {stride}": replace(paper, stride=stride).schedule(num_layers)
        for stride in range(2, 11)
    }
    plain = replace(paper, anneal=Anneal("none"))
    return {
        **st3,
        "ST3, S = 4, no annealing": plain.schedule(num_layers),
        "FastV, K = 2": FastV(layer=2).schedule(num_layers),
        "FastV, K = 3": FastV(layer=3).schedule(num_layers),
        f"VTW, K = {num_layers // 2}": VTW().schedule(num_layers),
        "PyramidDrop": pyramid_drop(num_layers),
    }


def paper_table(name: str, preset: str) -> str:
    model = shape(name)
    config = model.config
    schedules = rivals(config.get_text_config().num_hidden_layers, preset)
    rows = cost_table(
        config, N_TEXT, model.visual_tokens, schedules, NEW_TOKENS, images=model.images
    )
    return markdown(COLUMNS, [row.cells() for row in rows])


def shapes_table() -> str:
    """Every shape under the default policy."""
    head = (
        "shape", "visual tokens", "tower TFLOPs", "decoder TFLOPs", "left", "left with tower",
        "KV after prefill, MiB", "left", "left, mean",
    )  # fmt: skip
    lines = []
    for model in SHAPES.values():
        config = model.config
        schedule = parse(DEFAULT_POLICY).schedule(config.get_text_config().num_hidden_layers)
        plain, trimmed = cost_table(
            config,
            N_TEXT,
            model.visual_tokens,
            {DEFAULT_POLICY: schedule},
            NEW_TOKENS,
            images=model.images,
        )
        tower = plain.vision_tflops
        if tower is None:
            raise ValueError(f"the vision tower of {model.name} has no cost model")
        whole = (tower + trimmed.prefill_tflops) / (tower + plain.prefill_tflops)
        lines.append(
            [
                model.name,
                f"{model.visual_tokens} ({model.note})",
                f"{tower:.3g}",
                f"{plain.prefill_tflops:.3g}",
                f"{trimmed.prefill_ratio:.1%}",
                f"{whole:.1%}",
                f"{plain.kv_prefill_mib:.1f}",
                f"{trimmed.kv_prefill_ratio:.1%}",
                f"{trimmed.kv_mean_ratio:.1%}",
            ]
        )
    return markdown(head, lines)


def render(page: str) -> str:
    """The page with its generated tables made anew."""
    tables = {
        "llava-1.5-7b": paper_table("llava-1.5-7b", "st3-7b"),
        "llava-1.5-13b": paper_table("llava-1.5-13b", "st3-13b"),
        "llava-next-7b": paper_table("llava-next-7b", "st3-7b"),
        "shapes": shapes_table(),
    }

    def fill(match: re.Match[str]) -> str:
        return f"{match[1]}\n\n{tables[match[2]]}\n\n{match[3]}"

    return re.sub(r"(<!-- table: (\S+) -->).*?(<!-- end -->)", fill, page, flags=re.S)


if __name__ == "__main__":
    old = PAGE.read_text(encoding="utf-8")
    new = render(old)
    PAGE.write_text(new, encoding="utf-8")
    print(f"{PAGE}: {'unchanged' if new == old else 'rewritten'}")
