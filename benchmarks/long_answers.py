"""Long conversations on one cache: python -m benchmarks.long_answers [--page]

Annealing hides visual tokens as text grows. Here text grows by questions that say nothing of what
is in the image (is there a <something absent>? no), until 100, 200 or 400 tokens stand behind the
prompt; then the model is asked for a description of about 100 tokens more. Objects named and made
up are counted by their place in it, with and without annealing. Writes
benchmarks/results/long-answers.json, docs/long-answers.md and its picture; a killed run goes on
where it was; ``--page`` only writes the page anew.
"""

from __future__ import annotations

import argparse
import json
import random
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import AutoModelForImageTextToText, AutoProcessor, DynamicCache

import st3
from benchmarks.long_page import write_page
from st3.hf.call import CACHE
from st3.methods.policies import Policy, parse, with_budget
from st3.tools.common.chats import Asker, Chat, ask
from st3.tools.common.conditions import conditions
from st3.tools.common.images import open_image
from st3.tools.eval import Item, bundled_scenes
from st3.tools.eval.stats import metric
from st3.tools.eval.text import mentioned
from train.tasks import EXISTS, article
from train.world import EMOJI

RESULTS = Path("benchmarks/results/long-answers.json")
ITEMS = Path("runs/long-answers.jsonl")  # finished descriptions, not committed
DISTANCES = (0, 100, 200, 400)  # tokens between the prompt and the description
BUDGET, LONGEST, SCENES = 0.35, 160, 40
POLICIES = {
    "untrimmed": "none",
    "annealed alone": "balanced:first_drop=0,final_keep=1",
    "thirds, the default": f"thirds:budget={BUDGET}",
    "thirds, annealed": f"thirds:budget={BUDGET},curve=cosine",
    "thirds, annealed, floor 20 %": f"thirds:budget={BUDGET},floor=0.2",
    "balanced, not annealed": f"balanced:curve=none,budget={BUDGET}",
    "balanced": f"balanced:budget={BUDGET}",
    "evicted after the prefill": f"evict:budget={BUDGET}",
}
PARTS = ("recall", "first", "middle", "last", "made_up")


class Talker(Asker):
    """A model that is asked for descriptions behind a conversation, all images side by side: the
    questions in between are of one length, so that no row needs padding."""

    def describe(
        self, items: Sequence[Item], policy: Policy, distance: int
    ) -> tuple[list[str], int]:
        """The descriptions, and the tokens between the first prompt and their own begin."""
        images = [[open_image(path) for path in item.images] for item in items]
        question = items[0].turns[0].question
        cache = DynamicCache(config=self.model.config)
        with st3.trim(self.model, policy):
            if not distance:
                inputs = self.encode([ask(own, question) for own in images])
                return self.texts(self._answer(inputs, cache, LONGEST)), 0
            turns = [_idle(item) for item in items]
            chats = [ask(own, next(more)) for own, more in zip(images, turns, strict=True)]
            inputs = self.encode(chats)
            prompt = inputs["input_ids"].shape[1]
            self._answer(inputs, cache, 1)  # of which the cache takes nothing but the prompt
            chats = [_said(chat, "no") for chat in chats]
            while self._whole(chats[:1], question).shape[1] < prompt + distance:
                chats = [
                    _said(chat + ask([], next(more)), "no")
                    for chat, more in zip(chats, turns, strict=True)
                ]
            whole = self._whole(chats, question)
            if not torch.equal(whole[:, :prompt], inputs["input_ids"]):
                raise ValueError("the chat template changes the tokens of earlier turns")
            inputs = {"input_ids": whole, "attention_mask": torch.ones_like(whole)}
            return self.texts(self._answer(inputs, cache, LONGEST)), whole.shape[1] - prompt

    def _whole(self, chats: Sequence[Chat], question: str) -> Tensor:
        ids: Tensor = self.encode([chat + ask([], question) for chat in chats])["input_ids"]
        return ids

    def _answer(self, inputs: Any, cache: Any, longest: int) -> Tensor:
        with torch.no_grad():
            ids: Tensor = self.model.generate(
                **inputs, **{CACHE: cache}, max_new_tokens=longest, do_sample=False
            )
        return ids[:, inputs["input_ids"].shape[1] :]


def _idle(item: Item) -> Iterator[str]:
    """Questions about objects that are not there, none twice, of the same words in every image."""
    absent = [name for name in EMOJI if name not in (item.objects or ())]
    random.Random(item.number).shuffle(absent)
    for number, name in enumerate(absent):
        yield EXISTS[number % len(EXISTS)].format(a=article(name))


def _said(chat: Chat, text: str) -> Chat:
    return [*chat, {"role": "assistant", "content": [{"type": "text", "text": text}]}]


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--limit", type=int, default=SCENES, help="scenes to describe")
    parser.add_argument("--items", type=Path, default=ITEMS, help="file of finished descriptions")
    parser.add_argument("--page", action="store_true", help="only write the page from the JSON")
    args = parser.parse_args()
    if not args.page:
        RESULTS.write_text(json.dumps(run(args), indent=1) + "\n", encoding="utf-8")
    for path in write_page(RESULTS):
        print(f"written: {path}")


def run(args: argparse.Namespace) -> dict[str, Any]:
    """Measure what is missing."""
    torch.set_num_threads(1)
    folder = st3.bundled_model()
    model = AutoModelForImageTextToText.from_pretrained(folder, dtype=torch.float32).eval()
    talker = Talker(model, AutoProcessor.from_pretrained(folder))
    layers = model.config.get_text_config().num_hidden_layers
    data = bundled_scenes().half("report")
    items = data.only(["describe"], args.limit).items
    given = conditions(model.device, model.dtype) | {
        "half": "report", "items": len(items), "seeds": {"bootstrap": 0, "questions": "the item's"},
    }  # fmt: skip
    done = _finished(args.items, given["engine"])
    rows = []
    for label, text in POLICIES.items():
        policy = with_budget(parse(text), layers)
        for distance in DISTANCES:
            key = (label, distance)
            if key not in done:
                done[key] = talker.describe(items, policy, distance)
                _keep(args.items, given["engine"], key, done[key])
            found, behind = done[key]
            row = {"policy": label, "string": str(policy), "distance": distance}
            row |= {"tokens": behind, "values": figures(items, found, data)}
            rows.append(row | {"visible": _visible(policy, layers, row["tokens"])})
    return {"conditions": given, "rows": rows}


def _visible(policy: Policy, layers: int, tokens: float) -> float:
    """The share of the visual tokens that a layer still shows half way through the description."""
    schedule = policy.schedule(layers)
    step = round(tokens) + 50
    return sum(schedule.visible(layer, 144, step) for layer in range(layers)) / (144 * layers)


def figures(items: Any, texts: list[str], data: Any) -> dict[str, list[float]]:
    """Objects named, in all and by third of the reference's order, and made up, with intervals."""
    parts: dict[str, list[tuple[int, int]]] = {name: [] for name in PARTS}
    for item, text in zip(items, texts, strict=True):
        there = list(item.objects)
        said = mentioned(text, data.vocabulary)
        parts["recall"].append((sum(name in said for name in there), len(there)))
        for number, third in enumerate(PARTS[1:4]):
            own = [n for i, n in enumerate(there) if 3 * i // len(there) == number]
            parts[third].append((sum(name in said for name in own), len(own)))
        parts["made_up"].append((len(set(said) - set(there)), len(said)))
    clusters = [str(item.images[0]) for item in items]
    return {name: metric(rows, clusters).estimate().to_list() for name, rows in parts.items()}


def _finished(path: Path, engine: str) -> dict[Any, tuple[list[str], int]]:
    if not path.is_file():
        return {}
    lines = [json.loads(line) for line in path.read_text().splitlines() if line.endswith("}")]
    return {tuple(one["key"]): (one["texts"], one["tokens"]) for one in lines
            if one["engine"] == engine}  # fmt: skip


def _keep(path: Path, engine: str, key: Any, found: tuple[list[str], int]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("a") as file:
        row = {"engine": engine, "key": key, "texts": found[0], "tokens": found[1]}
        file.write(json.dumps(row) + "\n")


if __name__ == "__main__":
    main()
