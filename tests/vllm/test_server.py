"""vLLM's API server with the bundled model, and the command that says what fits."""

from __future__ import annotations

import base64
import json
import os
import re
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.request
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("vllm")

from PIL import Image

import st3
from tests.vllm.checkpoints import KINDS
from tests.vllm.engine import ENVIRONMENT, ROOT, Ask
from tests.vllm.library import Library

POLICY = "balanced:tau=64"
QUESTIONS = ["describe the image in detail.", "what is at the centre?"]
ENV = {**os.environ, **ENVIRONMENT, "VLLM_ENABLE_V1_MULTIPROCESSING": "1"}


@pytest.fixture(scope="module")
def log(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("server") / "log"


@pytest.fixture(scope="module")
def server(log: Path) -> Iterator[str]:
    """Its address. Prefix caching and chunked prefill stay as vLLM has them: on."""
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = free.getsockname()[1]
    command = [sys.executable, "-m", "vllm.entrypoints.openai.api_server"]
    command += ["--model", str(st3.bundled_model()), "--served-model-name", "tiny"]
    command += ["--host", "127.0.0.1", "--port", str(port), "--dtype", "float32"]
    command += ["--block-size", "32", "--enforce-eager", "--max-model-len", "1024"]
    command += ["--max-num-batched-tokens", "2048", "--max-num-seqs", "4"]
    command += ["--kv-cache-memory-bytes", str(1 << 28), "--skip-mm-profiling"]
    command += ["--additional-config", json.dumps({"st3": {"policy": POLICY}})]
    environment = {**ENV, "VLLM_LOGGING_LEVEL": "INFO", "VLLM_LOG_STATS_INTERVAL": "1"}
    url = f"http://127.0.0.1:{port}"
    with log.open("w") as out:
        process = subprocess.Popen(command, cwd=ROOT, env=environment, stdout=out, stderr=out)
        try:
            _wait(process, url, log)
            yield url
        finally:
            process.terminate()
            process.wait(60)


def _wait(process: subprocess.Popen[bytes], url: str, log: Path) -> None:
    for _ in range(240):
        if process.poll() is not None:
            break
        try:
            urllib.request.urlopen(f"{url}/health", timeout=5)
            return
        except (urllib.error.URLError, OSError):
            time.sleep(1)
    raise RuntimeError(log.read_text()[-4000:])


def ask(url: str, question: str, image: Path | None) -> str:
    parts: list[dict[str, Any]] = [{"type": "text", "text": question}]
    if image is not None:
        data = "data:image/png;base64," + base64.b64encode(image.read_bytes()).decode()
        parts.insert(0, {"type": "image_url", "image_url": {"url": data}})
    body = {
        "model": "tiny",
        "messages": [{"role": "user", "content": parts}],
        "max_tokens": 100,
        "temperature": 0,
    }
    sent = urllib.request.Request(
        f"{url}/v1/chat/completions",
        json.dumps(body).encode(),
        {"Content-Type": "application/json"},
    )
    answer = json.load(urllib.request.urlopen(sent, timeout=300))
    return str(answer["choices"][0]["message"]["content"])


def metric(url: str, name: str) -> float:
    page = urllib.request.urlopen(f"{url}/metrics", timeout=30).read().decode()
    found = re.search(rf"^{name}{{.*}} (.*)$", page, re.MULTILINE)
    assert found, name
    return float(found[1])


def test_the_bundled_model_answers_as_in_the_library(server: str, log: Path) -> None:
    library = Library(st3.bundled_model())
    tokenizer = library.processor.tokenizer
    images = st3.sample_images()[:2]
    for path in images:
        for question in QUESTIONS:
            turn = {
                "role": "user",
                "content": [{"type": "image"}, {"type": "text", "text": question}],
            }
            text = library.processor.apply_chat_template([turn], add_generation_prompt=True)
            image = Image.open(path).convert("RGB")
            answer = library.answer(Ask(text, [image], params={"max_tokens": 100}), POLICY)
            wanted = tokenizer.decode(answer.ids, skip_special_tokens=True)
            assert ask(server, question, Path(path)).strip() == wanted.strip()
    ask(server, QUESTIONS[0], None)
    visual = len(images) * len(QUESTIONS) * 144
    assert metric(server, "st3:requests_trimmed_total") == 4
    assert metric(server, "st3:requests_passed_text_total") == 1
    assert metric(server, "st3:visual_tokens_total") == visual
    assert 0 < metric(server, "st3:visual_tokens_kept_total") < visual
    assert metric(server, "st3:blocks_spared_total") > 0
    assert metric(server, "vllm:kv_cache_usage_perc") == 0
    for _ in range(20):
        if "st3: 4 requests trimmed, passed {'text': 1}; visual tokens kept" in log.read_text():
            break
        time.sleep(0.5)
    else:
        raise AssertionError(log.read_text()[-2000:])
    assert "KV fetch" not in log.read_text()


def check(*arguments: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "st3.tools.cli", "vllm", "check", *arguments]
    return subprocess.run(
        command, cwd=ROOT, env={**ENV, "COLUMNS": "200"}, capture_output=True, text=True
    )


def test_check_says_what_fits_and_what_to_type(checkpoint_folder: Path) -> None:
    folder = KINDS["llava"].save(checkpoint_folder / "llava-check")
    done = check(str(folder), "--policy", "fastv", "--engine-args", '{"block_size": 32}')
    assert done.returncode == 0, done.stderr
    assert "LlavaForConditionalGeneration" in done.stdout
    assert "in 4 KV cache groups of 2" in done.stdout
    assert '--additional-config \'{"st3": {"policy": "fastv"}}\'' in done.stdout
    assert "--no-enable-chunked-prefill" in done.stdout


def test_check_says_why_not(checkpoint_folder: Path) -> None:
    folder = KINDS["llava"].save(checkpoint_folder / "llava-check")
    options = '{"enable_lora": true, "pipeline_parallel_size": 2}'
    done = check(str(folder), "--engine-args", options)
    assert done.returncode == 1
    assert "--enable-lora" in done.stdout
    assert "--pipeline-parallel-size 1" in done.stdout
