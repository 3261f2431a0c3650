"""Models larger than one device: heads split over two processes, layers spread and offloaded."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image
from transformers import AutoModelForImageTextToText

import st3
from st3.tools.cli import _loading
from tests.tiny_llava import LAYERS

POLICIES = [
    "none",
    "st3:final_keep=0.1,stride=2",
    "fastv",
    "st3:score=key_norm,stride=2,rerank_every=4",
]
PROMPTS = ["describe the image in detail .", "what is at the top left ?"]


def run_all(loaded: _loading.Loaded, picture: str) -> dict[str, Any]:
    """For each policy: tokens, kept tokens by layer, share of KV bytes. A batch of two rows."""
    image = Image.open(picture)
    turns = [
        [{"role": "user", "content": [{"type": "image", "image": image},
                                      {"type": "text", "text": prompt}]}]
        for prompt in PROMPTS
    ]  # fmt: skip
    loaded.tokenizer.padding_side = "left"
    inputs = loaded.processor.apply_chat_template(
        turns, add_generation_prompt=True, tokenize=True, return_dict=True, return_tensors="pt",
        processor_kwargs={"padding": True},
    )  # fmt: skip
    found = {}
    for policy in POLICIES:
        with torch.no_grad(), st3.trim(loaded.model, policy) as trimmer:
            output = loaded.model.generate(**inputs, max_new_tokens=16, do_sample=False)
        report = trimmer.report
        kept = [
            report.kept_positions(layer, row).tolist() for layer in range(LAYERS) for row in (0, 1)
        ]
        found[policy] = [output.tolist(), kept, report.kv_mean_ratio]
    return found


@pytest.fixture(scope="module")
def alone(tiny_model: Path, picture: Path) -> dict[str, Any]:
    return run_all(_loading.load(str(tiny_model), "cpu", "float32", False), str(picture))


def check(found: dict[str, Any], alone: dict[str, Any]) -> None:
    for policy in POLICIES:
        assert found[policy][0] == alone[policy][0], policy
        assert found[policy][1] == alone[policy][1], policy
        assert found[policy][2] == pytest.approx(alone[policy][2]), policy
    assert len({str(alone[policy][0]) for policy in POLICIES}) == len(POLICIES)


def torchrun(*args: str) -> subprocess.CompletedProcess[str]:
    root = Path(__file__).parent.parent
    paths = os.pathsep.join([str(root), os.environ.get("PYTHONPATH", "")]).strip(os.pathsep)
    return subprocess.run(
        [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", "2", "--standalone",
         *args],
        capture_output=True, text=True, timeout=300, cwd=root,
        env={**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": paths},
    )  # fmt: skip


@pytest.mark.slow
def test_tensor_parallel_gives_the_tokens_of_one_process(
    tiny_model: Path, picture: Path, tmp_path: Path, alone: dict[str, Any]
) -> None:
    result = torchrun(__file__, str(tiny_model), str(picture), str(tmp_path))
    assert result.returncode == 0, result.stderr[-3000:]
    ranks = [json.loads((tmp_path / f"{rank}.json").read_text()) for rank in (0, 1)]
    assert [rank["heads"] for rank in ranks] == [2, 2]  # of 4: they are split
    for rank in ranks:
        check(rank["found"], alone)


@pytest.mark.slow
def test_generate_command_prints_once(tiny_model: Path, picture: Path) -> None:
    args = ["generate", str(picture), "-p", PROMPTS[0], "-m", str(tiny_model), "--json",
            "--max-new-tokens", "4", "--tp", "2"]  # fmt: skip
    result = torchrun("-m", "st3.tools.cli", *args)
    assert result.returncode == 0, result.stderr[-3000:]
    (line,) = [line for line in result.stdout.splitlines() if line.startswith("{")]
    assert json.loads(line)["new_tokens"] == 4


def test_command_without_torchrun_says_how(tiny_model: Path) -> None:
    from st3.tools.cli._common import CliError

    with pytest.raises(CliError, match="torchrun --nproc-per-node 2"):
        _loading.load(str(tiny_model), "auto", "float32", False, tensor_parallel=2)


def test_layers_offloaded_to_disk(
    tiny_model: Path, picture: Path, tmp_path: Path, alone: dict[str, Any]
) -> None:
    pytest.importorskip("accelerate", reason="device_map needs accelerate")
    device_map: dict[str, Any] = {
        "model.vision_tower": "cpu",
        "model.multi_modal_projector": "cpu",
        "model.language_model.embed_tokens": "cpu",
        "model.language_model.norm": "cpu",
        "model.language_model.rotary_emb": "cpu",
        "lm_head": "cpu",
    }
    for layer in range(LAYERS):
        device_map[f"model.language_model.layers.{layer}"] = "cpu" if layer < 5 else "disk"
    model = AutoModelForImageTextToText.from_pretrained(
        tiny_model, dtype=torch.float32, device_map=device_map, offload_folder=tmp_path / "offload"
    )
    weight = model.model.language_model.layers[6].self_attn.q_proj.weight
    assert weight.device.type == "meta"  # it comes from the disk when the layer runs
    one = _loading.load(str(tiny_model), "cpu", "float32", False)
    check(run_all(_loading.Loaded("tiny", model.eval(), one.processor), str(picture)), alone)


def test_device_map_of_the_commands(tiny_model: Path, picture: Path, alone: dict[str, Any]) -> None:
    pytest.importorskip("accelerate", reason="device_map needs accelerate")
    loaded = _loading.load(str(tiny_model), "auto", "float32", False, device_map="auto")
    check(run_all(loaded, str(picture)), alone)


if __name__ == "__main__":  # one of torchrun's processes
    import torch.distributed

    torch.set_num_threads(1)
    folder, image, out = sys.argv[1:]
    split = _loading.load(folder, "auto", "float32", False, tensor_parallel=2)
    attention = split.model.model.language_model.layers[0].self_attn
    heads = attention.q_proj.weight.to_local().shape[0] // attention.head_dim
    rank = torch.distributed.get_rank()
    Path(out, f"{rank}.json").write_text(
        json.dumps({"heads": heads, "found": run_all(split, image)})
    )
    torch.distributed.barrier()
    torch.distributed.destroy_process_group()
    os._exit(0)  # threads of the group abort some interpreters on their way out
