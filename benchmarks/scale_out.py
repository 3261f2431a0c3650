"""Throughput of `st3 batch` on the bundled model: policies, batch sizes, one process and Ray.

    .venv/bin/python benchmarks/scale_out.py [--images 24] [--ray]

Prints the table of docs/scale-out.md, in its order, and whether the answers of each policy are the
same in every way of running it; writes both to benchmarks/results. One torch thread in each
process.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

import torch

from st3.tools.common.bundled import ASSETS
from st3.tools.common.conditions import conditions, in_words
from st3.tools.common.tables import markdown

RESULTS = Path(__file__).with_name("results")
HEAD = ("policy", "rows in a batch", "processes", "images/s", "tokens/s", "KV saved")
PROMPT = "describe the image in detail."
WAYS = [("none", 1, 0), ("none", 8, 0), ("balanced", 1, 0), ("balanced", 8, 0)]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--images", type=int, default=24)
    parser.add_argument("--tokens", type=int, default=60)
    parser.add_argument("--ray", action="store_true", help="also two actors on Ray")
    parser.add_argument("--out", type=Path, default=RESULTS)
    given = parser.parse_args()
    torch.set_num_threads(1)
    where = conditions(torch.device("cpu"), torch.float32)
    scenes = sorted((ASSETS / "scenes").glob("*.webp"))[: given.images]
    ways = [*WAYS, ("balanced", 8, 2)] if given.ray else WAYS
    rows: list[list[object]] = []
    answers: dict[str, list[dict[str, str]]] = {}
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        (folder / "in").mkdir()
        for scene in scenes:
            shutil.copy(scene, folder / "in")
        for policy, batch, actors in ways:
            out = folder / f"{policy}-{batch}-{actors}"
            args = [str(folder / "in"), "-o", str(out), "-p", PROMPT, "--policy", policy,
                    "--batch", str(batch), "--max-new-tokens", str(given.tokens)]  # fmt: skip
            if actors:
                args += ["--ray", "local", "--replicas", str(actors), "--window", str(batch)]
            subprocess.run(
                [sys.executable, "-m", "st3.tools.cli", "batch", *args],
                check=True, capture_output=True, env={**os.environ, "OMP_NUM_THREADS": "1"},
            )  # fmt: skip
            summary = json.loads((out / "summary.json").read_text())
            this = summary["this_run"]
            rows.append(
                [f"`{policy}`", batch, f"{actors or 1}{' (Ray)' if actors else ''}",
                 f"{this['images_per_s']:.2f}", f"{this['tokens_per_s']:.0f}",
                 f"{summary['mean_kv_saved']:.1%}".replace("%", " %")]
            )  # fmt: skip
            print(*rows[-1], file=sys.stderr)
            lines = [line for f in out.glob("answers-*") for line in f.read_text().splitlines()]
            found = {row["id"]: row["answer"] for row in map(json.loads, lines)}
            answers.setdefault(policy, []).append(found)
    table = markdown(HEAD, rows)
    print(table)
    same = {
        policy: all(found == found_in[0] for found in found_in)
        for policy, found_in in answers.items()
    }
    for policy, equal in same.items():
        print(f"answers of {policy}: {'the same in all of these' if equal else 'NOT the same'}")
    data = {"conditions": where, "images": given.images, "tokens": given.tokens, "same": same}
    data["rows"] = [dict(zip(HEAD, row, strict=True)) for row in rows]
    (given.out / "scale-out.json").write_text(json.dumps(data, indent=1) + "\n")
    about = f"`{where['command']}`: {given.images} images, {given.tokens} new tokens"
    text = f"# st3 batch\n\n{about}. {in_words(where)}.\n\n{table}\n"
    (given.out / "scale-out.md").write_text(text)


if __name__ == "__main__":
    main()
