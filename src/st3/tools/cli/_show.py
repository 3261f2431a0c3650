"""How `st3 generate` shows what it measured: a summary line, and the table of --compare."""

from __future__ import annotations

from typing import Any

from rich.console import Group
from rich.markup import escape
from rich.table import Table

from st3.tools.cli._measure import Answer


def summary(answer: Answer, report: Any) -> str:
    """Two lines for below a streamed answer. report: st3.Report."""
    tpot = "" if answer.tpot is None else f", TPOT {_ms(answer.tpot)}"
    ratio = report.prefill_flops_ratio
    flops = "" if ratio is None else f"prefill FLOPs {ratio:.0%} of untrimmed, "
    return (
        f"{answer.tokens} tokens, TTFT {_ms(answer.ttft)}{tpot} (one cold run; measure with "
        f"--compare)\n{sum(report.n_visual)} visual tokens, {report.mean_share:.0%} of them kept "
        f"on average over the layers; {flops}"
        f"KV in use {report.kv_mean_ratio:.0%} of untrimmed (mean over the answer)"
    )


def comparison(untrimmed: Answer, trimmed: Answer, report: Any, policy: str) -> Group:
    """Both answers side by side, then their costs, with trimmed / untrimmed in the last column."""
    policy = escape(policy)
    same = "same answer" if untrimmed.text == trimmed.text else "the answer differs"
    answers = Table(header_style="bold", expand=True)
    answers.add_column("untrimmed", ratio=1, overflow="fold")
    answers.add_column(f"{policy}: {same}", ratio=1, overflow="fold")
    answers.add_row(escape(untrimmed.text), escape(trimmed.text))

    table = Table(header_style="bold")
    table.add_column("", no_wrap=True)
    table.add_column("untrimmed", justify="right", no_wrap=True)
    table.add_column(policy, justify="right", overflow="fold")
    table.add_column("ratio", justify="right", no_wrap=True)

    def row(name: str, before: float | None, after: float | None, show: Any) -> None:
        ratio = f"{after / before:.0%}" if before and after is not None else ""
        cells = ("-" if value is None else show(value) for value in (before, after))
        table.add_row(name, *cells, ratio)

    visual = sum(report.n_visual)
    row("new tokens", untrimmed.tokens, trimmed.tokens, str)
    row("visual tokens (mean)", visual, visual * report.mean_share, "{:.0f}".format)
    row("TTFT", untrimmed.ttft, trimmed.ttft, _ms)
    row("TPOT", untrimmed.tpot, trimmed.tpot, _ms)
    row("whole answer", untrimmed.total, trimmed.total, _ms)
    row("prefill FLOPs", report.untrimmed_prefill_flops, report.prefill_flops, _flops)
    row("KV in use, at the end", report.kv_untrimmed_bytes, report.kv_live_bytes, _bytes)
    row("KV allocated, at the end", report.kv_untrimmed_bytes, report.kv_allocated_bytes, _bytes)
    table.add_row("KV in use, mean over steps", "", "", f"{report.kv_mean_ratio:.0%}")
    return Group(answers, table)


def conditions(runs: int, where: str) -> str:
    """The small print below the table."""
    return (
        f"Greedy; {where}; medians of {runs} alternating runs after a warm-up of each. TTFT: "
        "from the call of generate(), image encoder included, to the first token. TPOT: mean time "
        "of each further token. visual tokens: mean over the layers. FLOPs: of the decoder layers, "
        "counted. untrimmed: the untouched model with the cache of transformers."
    )


def why_no_faster(untrimmed: Answer, trimmed: Answer, report: Any, weights: int) -> str | None:
    """A line for who sees no gain, or None: what a decode step reads, of which trimming saves but a
    part. ``weights``: bytes of the language model."""
    if untrimmed.total > 1.05 * trimmed.total:
        return None
    return (
        f"Hardly faster here: a decode step reads {_bytes(weights)} of weights and at most "
        f"{_bytes(report.kv_untrimmed_bytes)} of KV entries, and only of the latter can trimming "
        "save. It pays for longer prompts, larger models and batches: see `st3 bench`."
    )


def _ms(seconds: float) -> str:
    return f"{1e3 * seconds:.1f} ms"


def _flops(value: float) -> str:
    return _scaled(value, 1e3, ("", "K", "M", "G", "T", "P"), "FLOPs")


def _bytes(value: float) -> str:
    return _scaled(value, 1024, ("", "Ki", "Mi", "Gi", "Ti"), "B")


def _scaled(value: float, step: float, prefixes: tuple[str, ...], unit: str) -> str:
    power = 0
    while abs(value) >= step and power < len(prefixes) - 1:
        value /= step
        power += 1
    return f"{value:.3g} {prefixes[power]}{unit}"
