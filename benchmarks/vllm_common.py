"""What the benchmarks of the plug-in for vLLM share: the model, its requests, an engine."""

from __future__ import annotations

import json
import os
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

ENVIRONMENT = {
    "HF_HUB_OFFLINE": "1",
    "TQDM_DISABLE": "1",
    "VLLM_CPU_OMP_THREADS_BIND": "nobind",
    "VLLM_ENABLE_V1_MULTIPROCESSING": "0",  # so that the scheduler can be looked into
    "VLLM_LOGGING_LEVEL": "ERROR",
    "VLLM_NO_USAGE_STATS": "1",
    "VLLM_USE_V2_MODEL_RUNNER": "0",
}
SIDE = 24  # an image has SIDE x SIDE visual tokens, as in LLaVA-1.5
QUESTION = "describe the image in detail."
BLOCK = 32  # tokens of a block: the smallest that vLLM's CPU kernels take


def make_model(folder: Path, layers: int, width: int) -> Path:
    """A random LLaVA in bf16 whose language model dominates, with st3-tiny's processor; made once.

    Its answers never end before they have the asked length.
    """
    import torch
    from safetensors.torch import load_file, save_file
    from transformers import (
        AutoConfig,
        AutoModelForImageTextToText,
        AutoProcessor,
        GenerationConfig,
    )

    import st3

    if (folder / "config.json").exists():
        return folder
    config = AutoConfig.from_pretrained(st3.bundled_model())
    text, vision = config.text_config, config.vision_config
    text.num_hidden_layers, text.hidden_size, text.head_dim = layers, width, 64
    text.intermediate_size = width * 11 // 4 // 64 * 64
    text.num_attention_heads = text.num_key_value_heads = width // 64
    vision.image_size, vision.num_hidden_layers = SIDE * vision.patch_size, 2
    config.image_seq_length = SIDE * SIDE
    torch.manual_seed(0)
    model = AutoModelForImageTextToText.from_config(config, dtype=torch.bfloat16)
    model.generation_config = GenerationConfig(eos_token_id=None, pad_token_id=0)
    model.save_pretrained(folder, max_shard_size="10GB")
    file = folder / "model.safetensors"
    weights = {
        name.replace("vision_tower.", "vision_tower.vision_model.")
        if name.startswith("vision_tower.") and ".vision_model." not in name
        else name: weight
        for name, weight in load_file(file).items()
    }  # the names that vLLM 0.32 and transformers both read
    save_file(weights, file, metadata={"format": "pt"})
    processor = AutoProcessor.from_pretrained(st3.bundled_model())
    pixels = vision.image_size
    processor.image_processor.size = {"height": pixels, "width": pixels}
    processor.save_pretrained(folder)
    return folder


def pictures(count: int) -> list[Any]:
    """Images, all different."""
    import numpy as np
    from PIL import Image

    pixels, rng = SIDE * 8, np.random.default_rng(0)
    made = []
    for _ in range(count):
        noise = rng.integers(0, 255, (SIDE, SIDE, 3)).astype(np.uint8)
        made.append(Image.fromarray(noise).resize((pixels, pixels)))
    return made


def engine(folder: Path, policy: str | None, kv_bytes: int, **options: Any) -> Any:
    """An ``LLM`` in this process, with as many bytes for its KV cache."""
    from vllm import LLM

    given: dict[str, Any] = {
        "model": str(folder),
        "dtype": "bfloat16",
        "block_size": BLOCK,
        "enforce_eager": True,
        "enable_prefix_caching": False,
        "enable_chunked_prefill": False,
        "max_num_seqs": 32,
        "max_model_len": 768,
        "max_num_batched_tokens": 4096,
        "kv_cache_memory_bytes": kv_bytes,
        "mm_processor_cache_gb": 0,
        "skip_mm_profiling": True,
        "seed": 0,
        **options,
    }
    if policy is not None:
        given["additional_config"] = {"st3": {"policy": policy}}
    return LLM(**given)


def prompt(image: Any) -> dict[str, Any]:
    text = f"<user><image>{QUESTION}<assistant>"
    return {"prompt": text, "multi_modal_data": {"image": image}}


def drive(
    llm: Any, images: Sequence[Any], tokens: int, look: Callable[[Any], Any] | None = None
) -> dict[str, Any]:
    """Answer requests sent at once, step by step.

    Args:
        look: called with the scheduler after each step.

    Returns:
        seconds and CPU seconds, steps, token ids by request, what ``look`` gave.
    """
    from vllm import SamplingParams

    front = llm.llm_engine
    params = SamplingParams(temperature=0, max_tokens=tokens, ignore_eos=True)
    scheduler = front.engine_core.engine_core.scheduler
    start, cpu = time.perf_counter(), time.process_time()
    for i, image in enumerate(images):
        front.add_request(str(i), prompt(image), params)
    ids: dict[int, list[int]] = {}
    seen = []
    while front.has_unfinished_requests():
        for out in front.step():
            if out.finished:
                ids[int(out.request_id)] = list(out.outputs[0].token_ids)
        if look is not None:
            seen.append(look(scheduler))
    return {
        "seconds": time.perf_counter() - start,
        "cpu_seconds": time.process_time() - cpu,
        "ids": [ids[i] for i in range(len(images))],
        "seen": seen,
    }


def pool(scheduler: Any) -> tuple[int, int]:
    """Requests that run, and layer-blocks in use: blocks times the layers that they are for."""
    manager = scheduler.kv_cache_manager
    used = manager.block_pool.num_gpu_blocks - 1 - manager.block_pool.get_num_free_blocks()
    layers = len(manager.kv_cache_config.kv_cache_groups[0].layer_names)
    return len(scheduler.running), used * layers


def set_environment(threads: int) -> None:
    """Of this process and its children, before torch is imported."""
    os.environ.update(ENVIRONMENT, OMP_NUM_THREADS=str(threads))


def write(path: Path, found: dict[str, Any], page: str) -> None:
    """A result as JSON and as a page."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.with_suffix(".json").write_text(json.dumps(found, indent=1) + "\n", encoding="utf-8")
    path.with_suffix(".md").write_text(page, encoding="utf-8")
