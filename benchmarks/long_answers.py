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
from pathlib import Path
from typing import Any

import torch
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
BUDGET, LONGEST, SCENES = 0.35, 160, 6
POLICIES = {
    "untrimmed": "none",
    "annealed alone": "balanced:first_drop=0,final_keep=1",
    "trimmed, not annealed": f"balanced:curve=none,budget={BUDGET}",
    "balanced": f"balanced:budget={BUDGET}",
    "balanced, floor 20 %": f"balanced:budget={BUDGET},floor=0.2",
}
PARTS = ("recall", "first", "middle", "last", "made_up")


class Talker(Asker):
    """A model that is asked for a description behind a conversation."""

    def describe(self, item: Item, policy: Policy, distance: int) -> tuple[str, int]:
        """The description, and the tokens between the first prompt and its own begin."""
        images = [open_image(path) for path in item.images]
        question = item.turns[0].question
        if not distance:
            with st3.trim(self.model, policy):
                inputs = self.encode([ask(images, question)])
                new, _ = self._answer(inputs, DynamicCache(config=self.model.config), LONGEST)
            return self.texts(new)[0], 0
        turns = self._idle(item)
        first = next(turns)
        with st3.trim(self.model, policy):
            cache = DynamicCache(config=self.model.config)
            chat = ask(images, first)
            inputs = self.encode([chat])
            prompt = inputs["input_ids"].shape[1]
            new, ids = self._answer(inputs, cache, 4)
            chat = _said(chat, self.texts(new)[0])
            while self.encode([chat + ask([], question)])["input_ids"].shape[1] < prompt + distance:
                chat = _said(chat + ask([], next(turns)), "no")
            whole = self.encode([chat + ask([], question)])["input_ids"]
            seen = cache.get_seq_length()
            if not torch.equal(whole[:, :seen], ids[:, :seen]):
                raise ValueError("the chat template changes the tokens of earlier turns")
            more = {"input_ids": whole, "attention_mask": torch.ones_like(whole)}
            new, _ = self._answer(more, cache, LONGEST)
        return self.texts(new)[0], whole.shape[1] - prompt

    def _answer(self, inputs: Any, cache: Any, longest: int) -> tuple[Any, Any]:
        with torch.no_grad():
            ids = self.model.generate(
                **inputs, **{CACHE: cache}, max_new_tokens=longest, do_sample=False
            )
        return ids[:, inputs["input_ids"].shape[1] :], ids

    def _idle(self, item: Item) -> Any:
        """Questions about objects that are not there, none twice."""
        rng = random.Random(item.number)
        absent = [name for name in EMOJI if name not in (item.objects or ())]
        rng.shuffle(absent)
        for name in absent:
            yield rng.choice(EXISTS).format(a=article(name))


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
            found, behind = [], []
            for item in items:
                key = (label, distance, item.number)
                if key not in done:
                    done[key] = talker.describe(item, policy, distance)
                    _keep(args.items, given["engine"], key, done[key])
                found.append(done[key][0])
                behind.append(done[key][1])
            row = {"policy": label, "string": str(policy), "distance": distance}
            row |= {"tokens": sum(behind) / len(behind), "values": figures(items, found, data)}
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


def _finished(path: Path, engine: str) -> dict[Any, tuple[str, int]]:
    if not path.is_file():
        return {}
    lines = [json.loads(line) for line in path.read_text().splitlines() if line.endswith("}")]
    return {tuple(one["key"]): (one["text"], one["tokens"]) for one in lines
            if one["engine"] == engine}  # fmt: skip


def _keep(path: Path, engine: str, key: Any, found: tuple[str, int]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("a") as file:
        row = {"engine": engine, "key": key, "text": found[0], "tokens": found[1]}
        file.write(json.dumps(row) + "\n")


if __name__ == "__main__":
    main()
