"""Make an lmms-eval task of a local set: python -m st3.tools.lmms.task [--data DIR] --out TASKS

The set is one of ``st3 eval`` (see :mod:`st3.tools.eval.data`); its questions about single and
several images become a task that lmms-eval finds by ``--include_path TASKS``.
Nothing is downloaded.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path

from st3.tools.eval.data import CAPTION, TURNS, Dataset, bundled_scenes, load_folder

YAML = """task: {name}
dataset_path: json
dataset_kwargs:
  data_files:
    test: {data}
test_split: test
output_type: generate_until
doc_to_visual: !function utils.images
doc_to_text: question
doc_to_target: answer
generation_kwargs:
  max_new_tokens: 16
process_results: !function utils.score
metric_list:
  - metric: right
    aggregation: mean
    higher_is_better: true
"""

UTILS = '''"""Functions of the task beside this file."""

from st3.tools.common.images import open_image
from st3.tools.eval.text import is_right


def images(doc):
    return [open_image(path) for path in doc["images"]]


def score(doc, results):
    return {"right": float(is_right(results[0], doc["answers"]))}
'''


def write_task(data: Dataset, folder: Path, name: str, limit: int | None = None) -> int:
    """Write the task's files into ``folder``; the number of questions in it.

    Raises:
        ValueError: a set without single questions.
    """
    rows = [
        {
            "images": [str(image.resolve()) for image in item.images],
            "question": item.turns[0].question,
            "answers": list(item.turns[0].answers),
            "answer": item.turns[0].answers[0],
        }
        for item in data.only(limit=limit).items
        if item.kind not in (CAPTION, TURNS)
    ]
    if not rows:
        raise ValueError(f"{data.path} has no single questions to make a task of")
    folder.mkdir(parents=True, exist_ok=True)
    lines = folder / f"{name}.jsonl"
    lines.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    yaml = YAML.format(name=name, data=lines.resolve())
    (folder / f"{name}.yaml").write_text(yaml, encoding="utf-8")
    (folder / "utils.py").write_text(UTILS, encoding="utf-8")
    return len(rows)


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--data", type=Path, help="a set of st3 eval; default: the bundled scenes")
    parser.add_argument("--out", type=Path, required=True, help="the folder to write")
    parser.add_argument("--name", default="st3_local", help="the task's name")
    parser.add_argument("--limit", type=int, help="the first N items of each of the set's tasks")
    args = parser.parse_args()
    try:
        data = bundled_scenes() if args.data is None else load_folder(args.data)
        count = write_task(data, args.out, args.name, args.limit)
    except (OSError, ValueError) as error:
        parser.exit(1, f"error: {error}\n")
    print(f"{count} questions: lmms-eval --include_path {args.out} --tasks {args.name} --model st3")


if __name__ == "__main__":
    main()
