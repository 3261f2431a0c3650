"""What the tests of the engine share: policies, batches, and the comparison with the reference."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import PreTrainedModel

import st3
from tests.reference import ReferenceResult, reference_generate, reference_prefill
from tests.reference_scores import reference_score
from tests.zoo import Family, I, T, V, build

ANNEAL = st3.Anneal(tau=12, floor=0.1)
TEXT_ONLY = [[T(6)], [T(3)]]
DEEP = {"first_layer": 3, "first_drop": 0.5, "final_keep": 0.05, "stride": 2}  # drops at 3, 5, 7

# A new method is one row here or in METHODS. The models have 8 decoder layers.
POLICIES: dict[str, st3.Policy] = {
    "st3": st3.ST3(
        first_layer=3, first_drop=0.4, final_keep=0.1, stride=2, anneal=ANNEAL, score="attention"
    ),
    "default": st3.Balanced(stride=2, anneal=ANNEAL),
    # From layer 1 on: before the last of DeepStack's injections.
    "st3_early": st3.ST3(
        first_layer=1,
        first_drop=0.3,
        final_keep=0.05,
        stride=2,
        anneal=st3.Anneal("linear", tau=6, floor=0),
        score="attention",
    ),
    "st3_static": st3.ST3(**DEEP | {"stride": 1}, anneal=st3.Anneal("none"), score="attention"),
    "anneal_only": st3.ST3(first_drop=0, final_keep=1, anneal=ANNEAL, score="attention"),
    "fastv": st3.FastV(),
    "vtw": st3.VTW(),
    "pyramiddrop": st3.PyramidDrop(),
    # Not annealed: the newline tokens of some families have keys of the same norm in layer 0.
    "key_norm": st3.ST3(**DEEP, score="key_norm", anneal=st3.Anneal("none")),
    "uniform": st3.ST3(**DEEP, score="uniform", anneal=ANNEAL),
    "random": st3.Random(like=st3.ST3(**DEEP | {"first_layer": 2}, anneal=ANNEAL), seed=3),
    "none": st3.NoTrim(),
}
# Those of other papers, which meet a few families.
METHODS: dict[str, st3.Policy] = {
    "sparsevlm": st3.SparseVLM(layers=(1, 3, 5), keep=(0.6, 0.4, 0.2)),
    "dart": st3.DART(layers=(2,), keep=(0.4,)),
    "v2drop": st3.V2Drop(layers=(2, 4, 6), keep=(0.6, 0.3, 0.0)),
    "feather": st3.FEATHER(layers=(2, 4), keep=(0.6, 0.2)),
    "keynorm": st3.KeyNormPruning(layers=(2, 4), keep=(0.5, 0.2)),
    "divprune": st3.DivPrune(keep=0.4),
    "cdpruner": st3.CDPruner(keep=0.4),
    "visionzip": st3.VisionZip(keep=0.4),
    "grid": st3.UniformGrid(keep=0.4),
    "scope": st3.SCOPE(keep=0.4),
    "hiprune": st3.HiPrune(keep=0.4, alpha=0.5),
    "vispruner": st3.VisPruner(keep=0.4),
    "vscan": st3.VScan(keep=0.5, later=0.4),
    "covered": st3.Covered(keep=0.6, taper=0.4, tower=0.4),
    "thirds": st3.Thirds(keep=0.7, later=0.6, window=2),
    "transprune": st3.TransPrune(layers=(2, 3, 5), keep=(0.8, 0.6, 0.2)),
    "mmr": st3.MMR(keep=0.4),
    "evs": st3.EVS(keep=0.4),
    "vidcom2": st3.VidCom2(keep=0.4),
    "prunesid": st3.PruneSID(keep=0.4),
    "pixelprune": st3.PixelPrune(threshold=3.7),  # of pixels that are random
    "evict": st3.Evict(layer=1, keep=0.3, score="mmr-attention"),
    "dycoke": st3.DyCoke(layer=2, keep=0.3, every=3),
}
# Scores on ST3's schedule, annealed, so that the whole order counts.
SCORED: dict[str, st3.Policy] = {
    f"by-{score}": st3.ST3(**DEEP, score=score, anneal=ANNEAL)
    for score in (
        "text-rows",
        "text-rows-max",
        "attention-visual-heads",
        "attention-no-rope",
        "attention-debiased",
        "attention-detrended-max",
        "attention-lazy2",
        "text-raters",
        "hidden-change",
        "dart",
        "feather",
        "divprune",
        "visionzip",
        "hiprune",
        "vispruner",
        "vscan",
        "salient",
        "standout",
        "transprune",
        "grid",
        "mixed2",
        "mmr-attention",
        "relevance",
    )
}
ST3 = POLICIES["st3"]


def assert_same(actual: Tensor, expected: Tensor) -> None:
    """Equal in fp32 within 1e-5 of the largest logit. Rounding alone moves the logits of these
    models by a fifth of that: bare sdpa and bare eager attention differ by as much."""
    largest = float(expected.abs().max().clamp_min(1))
    torch.testing.assert_close(actual, expected, rtol=0, atol=1e-5 * largest)


def rows_for(family: Family) -> list[list[T | I | V]]:
    """A ragged batch: one image, two images, no image, as far as the family allows."""
    rows: list[list[T | I | V]] = [[T(5), I(), T(4)], [T(3), I(), T(2), I(), T(6)], [T(7)]]
    if not family.multi_image:
        rows[1] = [T(3), I(), T(9)]
    if not family.text_rows:
        del rows[2]
    return rows


@dataclass
class Case:
    """A model and a batch for it."""

    family: Family
    model: PreTrainedModel
    batch: dict[str, Any]
    visual: Tensor

    @classmethod
    def of(
        cls, name: str, rows: list[list[T | I | V]] | None = None, seed: int = 0, **inputs: Any
    ) -> Case:
        family, model = build(name, seed)
        batch = family.inputs(model, rows if rows is not None else rows_for(family), **inputs)
        return cls(family, model, batch, family.visual_mask(model, batch))

    @property
    def width(self) -> int:
        return int(self.batch["input_ids"].shape[1])

    @property
    def valid(self) -> Tensor:
        return self.batch["attention_mask"].bool()  # type: ignore[no-any-return]

    @property
    def layers(self) -> int:
        return int(self.model.config.get_text_config(decoder=True).num_hidden_layers)

    def schedule(self, policy: st3.Policy) -> st3.Schedule:
        return policy.schedule(self.layers)

    @torch.no_grad()
    def prefill(self, policy: st3.Policy, **options: Any) -> tuple[Tensor, st3.Report]:
        """Logits [B, T, V] of one forward pass of the trimmed model."""
        with st3.trim(self.model, policy, **options) as trimmer:
            return self.model(**self.batch).logits, trimmer.report

    def generate(self, policy: st3.Policy | None, tokens: int = 8, **options: Any) -> Any:
        """generate() on the trimmed (None: bare) model, with logits; greedy by default."""
        own = {k: options.pop(k) for k in ("per_image", "own_cache") if k in options}
        given = {"do_sample": False, **options}

        def run() -> Any:
            return self.model.generate(
                **self.batch,
                max_new_tokens=tokens,
                output_logits=True,
                return_dict_in_generate=True,
                **given,
            )

        with torch.no_grad():
            if policy is None:
                return run()
            with st3.trim(self.model, policy, **own):
                return run()

    def reference_prefill(self, policy: st3.Policy, **options: Any) -> ReferenceResult:
        return reference_prefill(
            self.model,
            self.batch,
            self.schedule(policy),
            self.visual,
            score=reference_score(policy.scorer(), self.family, self.model, self.batch),
            **options,
        )

    def reference_generate(
        self, policy: st3.Policy, tokens: int = 8, **options: Any
    ) -> tuple[Tensor, Tensor]:
        return reference_generate(
            self.model,
            self.batch,
            self.schedule(policy),
            self.visual,
            tokens,
            score=reference_score(policy.scorer(), self.family, self.model, self.batch),
            recall=policy.rerank if policy.recalls else None,
            heads=policy.per_head,
            **options,
        )

    # The comparisons ----------------------------------------------------------------------

    def check_prefill(self, policy: st3.Policy, *, spans: Any = None, **options: Any) -> None:
        """The trimmed model's logits and kept tokens are the reference's."""
        logits, report = self.prefill(policy, **options)
        wanted = self.reference_prefill(policy, per_image_spans=spans)
        there = self.valid & wanted.kept[-1]
        assert torch.isfinite(logits).all()
        assert_same(logits[there], wanted.logits[there])
        self.check_kept(report, wanted.kept)

    def check_kept(self, report: st3.Report, kept: list[Tensor]) -> None:
        """The report names the reference's tokens in every layer and row."""
        for layer, here in enumerate(kept):
            for row in range(len(self.visual)):
                places = here[row][self.visual[row]].nonzero().flatten()
                assert torch.equal(report.kept_positions(layer, row), places), (layer, row)

    def _beams_agree(self, beams: int) -> bool:
        """Whether the bare model's beams of each prompt start alike: 5.17's do not where a row has
        several images."""
        if beams == 1:
            return True
        with torch.no_grad():
            out = self.model.generate(
                **self.batch, max_new_tokens=1, num_beams=beams, do_sample=False,
                output_logits=True, return_dict_in_generate=True,
            )  # fmt: skip
        first = out.logits[0].unflatten(0, (-1, beams))
        return bool(torch.allclose(first, first[:, :1].expand_as(first), atol=1e-3))

    def check_generate(self, policy: st3.Policy, tokens: int = 8, **options: Any) -> None:
        """The trimmed model's answer and its logits are the reference's."""
        spans = options.pop("spans", None)
        seed = options.pop("seed", None)
        own = {"per_image": True} if spans is not None else {}
        if not self._beams_agree(options.get("num_beams", 1)):
            pytest.skip("this transformers gives the beams of a prompt with images other images")
        if seed is not None:
            torch.manual_seed(seed)
        out = self.generate(policy, tokens, **options, **own)
        if seed is not None:
            torch.manual_seed(seed)
        ids, logits = self.reference_generate(policy, tokens, per_image_spans=spans, **options)
        assert_same(torch.stack(out.logits, 1), logits)
        assert torch.equal(out.sequences[:, self.width :], ids)


def images(case: Case) -> list[list[tuple[int, int]]]:
    """(start, end) of what the engine calls an image, per row: a run of visual tokens, cut where
    two images touch."""
    found = []
    for visual, spans in zip(
        case.visual, case.family.visual_spans(case.model, case.batch), strict=True
    ):  # type: ignore[arg-type]
        starts = {start for start, _ in spans}
        row: list[tuple[int, int]] = []
        for place in visual.nonzero().flatten().tolist():
            if row and row[-1][1] == place and place not in starts:
                row[-1] = (row[-1][0], place + 1)
            else:
                row.append((place, place + 1))
        found.append(row)
    return found


def parts(model: PreTrainedModel) -> tuple[Any, Any]:
    """The text model and its decoder layers."""
    inner = model.model
    text = getattr(inner, "language_model", None) or inner.text_model
    return text, text.layers


def answer(out: Any, width: int) -> Tensor:
    """The generated tokens [B, new]."""
    return out.sequences[:, width:]  # type: ignore[no-any-return]
