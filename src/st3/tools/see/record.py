"""Record a generate run: what every layer saw of the image at every step, and what it looked at."""

from __future__ import annotations

import base64
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from PIL import Image
from torch import Tensor

from st3.models.places import Place
from st3.tools.common.images import open_image
from st3.tools.see.watch import Prompt, Watch
from st3.trimmer import Trimmer

FILE = "run.json"
VERSION = 1


@dataclass
class Run:
    """A recorded run; token t of the answer was chosen by pass t, the prefill being pass 0.

    Attributes:
        about: model, policy, prompt, answer and conditions, for the head of a page.
        tokens: the answer's tokens as text; joined they are the answer.
        n_visual: visual tokens V of the prompt.
        places: where they lie in the pictures; None if that is not known, then ``unplaced`` says
            why.
        order: for each layer the visual tokens that it kept at prefill, the most important first.
        visible: [tokens][layers] how many of these, from the first, the pass saw.
        attention: [tokens] bytes of length V: the pass's attention on each visual token, mean over
            the layers, 255 the largest of the pass.
        shares: [tokens] attention on all visual tokens, mean over the layers, 0..1.
        kv: after each pass ``step``, and bytes ``live``, ``allocated``, ``untrimmed``.
        costs: rows of ``name``, ``unit``, ``untrimmed`` and ``trimmed`` (None: not known).
        pictures: the images, or frames, that ``places`` counts.
    """

    about: dict[str, str]
    tokens: list[str]
    n_visual: int
    places: list[Place] | None
    unplaced: str
    order: list[list[int]]
    visible: list[list[int]]
    attention: list[bytes]
    shares: list[float]
    kv: list[dict[str, int]]
    costs: list[dict[str, Any]]
    pictures: list[Image.Image] = field(default_factory=list)

    @property
    def layers(self) -> int:
        return len(self.order)

    def to_dict(self) -> dict[str, Any]:
        """Plain values for JSON, without the pictures."""
        places = None
        if self.places is not None:
            places = [
                [place.picture, *([round(v, 5) for v in place.box] if place.box else [])]
                for place in self.places
            ]
        return {
            "version": VERSION,
            "about": self.about,
            "tokens": self.tokens,
            "n_visual": self.n_visual,
            "places": places,
            "unplaced": self.unplaced,
            "order": self.order,
            "visible": self.visible,
            "attention": base64.b64encode(b"".join(self.attention)).decode(),
            "shares": [round(share, 5) for share in self.shares],
            "kv": self.kv,
            "costs": self.costs,
        }

    def save(self, folder: Path) -> None:
        """Write ``run.json`` and the pictures into a folder, which is made if need be."""
        folder.mkdir(parents=True, exist_ok=True)
        names = [f"picture-{number}.png" for number in range(len(self.pictures))]
        for name, picture in zip(names, self.pictures, strict=True):
            picture.save(folder / name)
        text = json.dumps({**self.to_dict(), "pictures": names}, ensure_ascii=False)
        (folder / FILE).write_text(text, encoding="utf-8")

    @classmethod
    def load(cls, folder: Path) -> Run:
        """Read what :meth:`save` wrote.

        Raises:
            ValueError: if the folder holds no run, or one that cannot be read.
        """
        path = folder / FILE
        if not path.is_file():
            raise ValueError(
                f"{str(folder)!r} holds no run (no {FILE}): make one with "
                "`st3 generate IMAGE -p PROMPT --save FOLDER`"
            )
        try:
            data = json.loads(path.read_text(encoding="utf-8"))
            if data.pop("version") != VERSION:
                raise ValueError("it was written by another version of st3")
            size = data["n_visual"]
            whole = base64.b64decode(data.pop("attention"))
            attention = [whole[i : i + size] for i in range(0, len(whole), size)]
            places = data.pop("places")
            if places is not None:
                places = [Place(p[0], (p[1], p[2], p[3], p[4]) if p[1:] else None) for p in places]
            pictures = []
            for name in data.pop("pictures"):
                pictures.append(open_image(folder / Path(name).name))
            return cls(places=places, attention=attention, pictures=pictures, **data)
        except (OSError, ValueError, KeyError, TypeError, IndexError) as error:
            raise ValueError(f"{str(path)!r} cannot be read: {error}") from error


class Recorder:
    """A :class:`~st3.tools.see.watch.Listener` that notes counts and mean attention of passes."""

    def __init__(self, num_layers: int) -> None:
        self.layers = num_layers
        self.n_visual = 0
        self.visible: list[list[int]] = []
        self.attention: list[bytes] = []
        self.shares: list[float] = []

    def prompt(self, prompt: Prompt) -> None:
        self.visible, self.attention, self.shares = [], [], []
        self.columns = prompt.visual
        self.n_visual = len(prompt.visual)
        self._slot = torch.full((prompt.length + 1,), self.n_visual, device=prompt.device)
        self._slot[prompt.visual] = torch.arange(self.n_visual, device=prompt.device)
        self._row = torch.zeros(self.n_visual + 1, device=prompt.device)
        self._seen = torch.zeros(self.layers, dtype=torch.long, device=prompt.device)

    def layer(self, layer: int, attention: Tensor, columns: Tensor) -> None:
        slot = self._slot[columns.to(self._slot.device).clamp_max(len(self._slot) - 1)]
        self._row.index_add_(0, slot, attention.to(slot.device))
        self._seen[layer] = (slot < self.n_visual).sum()

    def done(self, step: int) -> None:
        row = self._row[:-1] / self.layers
        self.shares.append(float(row.sum()))
        scaled = row * (255 / row.max().clamp_min(1e-12))
        self.attention.append(bytes(scaled.round().to(torch.uint8).cpu().tolist()))
        self.visible.append(self._seen.tolist())
        self._row.zero_()

    def order(self, stored: Tensor | None) -> list[int]:
        """The visual tokens of a layer, the most important first. ``stored``: its cache's columns,
        or None for a layer that keeps everything."""
        if stored is None:
            return list(range(self.n_visual))
        slot = self._slot[stored.to(self._slot.device)]
        return slot[slot < self.n_visual].flip(0).tolist()


@torch.no_grad()
def record(
    trimmer: Trimmer,
    inputs: Mapping[str, Any],
    tokenizer: Any,
    max_new_tokens: int,
    places: list[Place] | None = None,
    unplaced: str = "",
    pictures: Sequence[Image.Image] = (),
    about: Mapping[str, str] | None = None,
) -> Run:
    """Answer one prompt greedily, trimmed, and note what was seen.

    Args:
        trimmer: of the model that answers, not attached.
        places: of the visual tokens (:func:`st3.models.places.places`), and the ``pictures`` they
            count; or None, then ``unplaced`` says why.
        about: what else the head of a page shall tell (``model``, ``prompt`` ...).

    Raises:
        TrimStateError: a policy that ranks tokens anew while decoding, or a prompt of several rows.
        ValueError: as many places as there are visual tokens are needed.
    """
    model: Any = trimmer.model
    recorder = Recorder(len(trimmer.parts.layers))
    with trimmer, Watch(model, recorder) as watch:
        output = model.generate(
            **inputs, max_new_tokens=max_new_tokens, do_sample=False, num_beams=1
        )
        order = [recorder.order(watch.stored(layer)) for layer in range(watch.count)]
    if places is not None and len(places) != recorder.n_visual:
        raise ValueError(f"{len(places)} places for {recorder.n_visual} visual tokens")
    new = output[0, output.shape[1] - len(recorder.visible) :].tolist()
    tokens = _pieces(tokenizer, new)
    report = trimmer.report
    told = {"policy": report.policy, "answer": "".join(tokens).strip(), **(about or {})}
    return Run(
        about=told,
        tokens=tokens,
        n_visual=recorder.n_visual,
        places=places,
        unplaced=unplaced,
        order=order,
        visible=recorder.visible,
        attention=recorder.attention,
        shares=recorder.shares,
        kv=[
            {
                "step": sample.step,
                "live": sample.live,
                "allocated": sample.allocated,
                "untrimmed": report.untrimmed_bytes(sample.step),
            }
            for sample in report.samples
        ],
        costs=_costs(report, recorder.n_visual),
        pictures=list(pictures),
    )


def _pieces(tokenizer: Any, ids: Sequence[int]) -> list[str]:
    """The text that each token adds."""
    pieces, before = [], ""
    for end in range(1, len(ids) + 1):
        text = tokenizer.decode(ids[:end], skip_special_tokens=True)
        if text.endswith("\N{REPLACEMENT CHARACTER}"):  # half a character: wait for the rest
            text = before
        pieces.append(text[len(before) :])
        before = text
    return pieces


def _costs(report: Any, n_visual: int) -> list[dict[str, Any]]:
    def row(name: str, unit: str, untrimmed: float | None, trimmed: float | None) -> dict[str, Any]:
        return {"name": name, "unit": unit, "untrimmed": untrimmed, "trimmed": trimmed}

    mean = n_visual * report.mean_share
    return [
        row("visual tokens, mean over the layers", "tokens", n_visual, mean),
        row(
            "prefill FLOPs of the decoder", "FLOPs",
            report.untrimmed_prefill_flops, report.prefill_flops,
        ),
        row("KV in use at the end", "B", report.kv_untrimmed_bytes, report.kv_live_bytes),
        row("KV allocated at the end", "B", report.kv_untrimmed_bytes, report.kv_allocated_bytes),
    ]  # fmt: skip
