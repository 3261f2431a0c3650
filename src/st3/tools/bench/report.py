"""Results as plain values (JSON) and as Markdown tables."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence
from typing import Any

from st3.tools.bench.clock import Ratio, median
from st3.tools.bench.suite import Result, Row
from st3.tools.common.conditions import in_words
from st3.tools.common.tables import markdown

MIB = 1 << 20


def to_dict(results: Sequence[Result], conditions: dict[str, Any]) -> dict[str, Any]:
    """Everything that was measured, with what is derived from it under "summary"."""
    return {"conditions": conditions, "workloads": [_result(result) for result in results]}


def _result(result: Result) -> dict[str, Any]:
    return {
        "model": result.subject,
        "workload": dataclasses.asdict(result.workload),
        "tower_s": result.tower,
        "weights_only_step_s": result.weights_only,
        "read_bandwidth_bytes_per_s": result.bandwidth,
        "rows": [_row(result, row) for row in result.rows],
    }


def _row(result: Result, row: Row) -> dict[str, Any]:
    overhead = row.overhead
    return {
        "label": row.label,
        "policy": row.policy,
        "summary": summary(result, row),
        "prefill_s": row.prefill,
        "generations": [dataclasses.asdict(g) for g in row.generations],
        "footprint": dataclasses.asdict(row.footprint) if row.footprint else None,
        "overhead_s": {**overhead.ranges, "prefill": overhead.prefill} if overhead else None,
    }


def summary(result: Result, row: Row) -> dict[str, Any]:
    """The figures of one row. Times are medians in seconds; a speed-up has "paired" (median of the
    ratios within each round), "minima" and "spread"; None where something was not measured."""
    work, held, base = result.workload, row.footprint, result.reference.footprint
    total = median(result.with_tower(row.total)) if row.total else None
    speed = {name: result.ratio(row, name) for name in ("prefill", "ttft", "tpot", "total")}
    prefill = speed["prefill"]
    return {
        "prefill_s": median(row.prefill),
        "ttft_s": median(result.with_tower(row.first)),
        "tpot_s": median(row.tpot),
        "end_to_end_s": total,
        "tokens_per_s": work.batch * work.new_tokens / total if total else None,
        "peak_bytes": held.peak if held else None,
        "kv_live_ratio": sum(held.kv_live) / sum(base.kv_live) if held and base else None,
        "kv_allocated_ratio": (
            sum(held.kv_allocated) / sum(base.kv_allocated) if held and base else None
        ),
        "flops_ratio": row.flops_ratio,
        "speed_up": {name: _ratio(ratio) for name, ratio in speed.items()},
        "prefill_speed_up_over_flops_ratio": (
            prefill.paired / row.flops_ratio if prefill and row.flops_ratio else None
        ),
        "step_over_bound": result.over_bound(row),
        "selection_share": row.overhead.share if row.overhead else None,
    }


def _ratio(ratio: Ratio | None) -> dict[str, float] | None:
    return dataclasses.asdict(ratio) if ratio else None


# -- Markdown -----------------------------------------------------------------------------------

Column = tuple[str, Callable[[dict[str, Any]], str]]


def _ms(key: str) -> Callable[[dict[str, Any]], str]:
    return lambda s: "-" if s[key] is None else f"{1e3 * s[key]:.1f}"


def _percent(key: str, digits: int = 0) -> Callable[[dict[str, Any]], str]:
    return lambda s: "-" if s[key] is None else f"{s[key]:.{digits}%}"


def _times(key: str, digits: int = 2) -> Callable[[dict[str, Any]], str]:
    return lambda s: "-" if s[key] is None else f"{s[key]:.{digits}f}"


def _gain(key: str) -> Callable[[dict[str, Any]], str]:
    def show(s: dict[str, Any]) -> str:
        ratio = s["speed_up"][key]
        if ratio is None:
            return "-"
        return f"{ratio['paired']:.3f} / {ratio['minima']:.3f} (spread {ratio['spread']:.1%})"

    return show


def _brief_gain(key: str) -> Callable[[dict[str, Any]], str]:
    return lambda s: "-" if s["speed_up"][key] is None else f"{s['speed_up'][key]['paired']:.3f}"


def _gains(show: Callable[[str], Callable[[dict[str, Any]], str]]) -> tuple[Column, ...]:
    return (
        ("FLOPs ratio", _times("flops_ratio")),
        ("prefill", show("prefill")),
        ("/ FLOPs", _times("prefill_speed_up_over_flops_ratio", 3)),
        ("TTFT", show("ttft")),
        ("TPOT", show("tpot")),
        ("end to end", show("total")),
        ("step / bound", _times("step_over_bound")),
    )


TIMES: tuple[Column, ...] = (
    ("prefill, ms", _ms("prefill_s")),
    ("TTFT, ms", _ms("ttft_s")),
    ("TPOT, ms", _ms("tpot_s")),
    ("end to end, ms", _ms("end_to_end_s")),
    ("tokens/s", _times("tokens_per_s", 1)),
)
MEMORY: tuple[Column, ...] = (
    ("peak, MiB", lambda s: _mib(s["peak_bytes"])),
    ("KV live", _percent("kv_live_ratio", 1)),
    ("KV allocated", _percent("kv_allocated_ratio", 1)),
    ("selection", _percent("selection_share", 2)),
)
GAINS = _gains(_gain)
BRIEF_GAINS = _gains(_brief_gain)  # the paired ratios alone, for narrow terminals
NOTES = """\
Times are medians over the rounds; methods take turns within a round. prefill: the text decoder
alone, on a prompt without pixels. TTFT and end to end: generate() with the vision tower's time
added, which is measured apart and the same in all rows. TPOT: median time of a further token. peak:
memory above that before the call. KV: bytes over the untouched model's, both averaged over the
prefill and the steps. selection: st3's own part of the trimmed prefill (choosing, gathering,
scoring, writing keys and values), timed in runs of its own. The last table gives speed-ups over the
first row, the untouched model on transformers' DynamicCache: the median of the ratios within each
round (in files also the ratio of the smallest times, and the largest minus the smallest ratio over
the median). FLOPs ratio: untrimmed over trimmed, of the decoder's prefill, counted. / FLOPs: the
prefill's speed-up over that ratio. step / bound: time of a decode step over (weights-only step +
live KV bytes / read bandwidth), median over the steps of a generation of its own, in which each
comes right behind a weights-only step."""


def _mib(size: int | None) -> str:
    return "-" if size is None else f"{size / MIB:.0f}"


def as_markdown(results: Sequence[Result], conditions: dict[str, Any], title: str) -> str:
    """A page: conditions, two tables for each workload, and what the columns mean."""
    lines = [f"# {title}", "", f"`{conditions['command']}`", "", in_words(conditions) + ".", ""]
    for result in results:
        lines += [f"## {result.subject}: {result.workload.title}", ""]
        for columns in (TIMES + MEMORY, GAINS):
            lines += [markdown(*cells(result, columns)), ""]
        lines += [footnote(result), ""]
    return "\n".join([*lines, NOTES]) + "\n"


def cells(result: Result, columns: Sequence[Column]) -> tuple[list[str], list[list[str]]]:
    """Column names and, for each method, its cells. Columns with nothing in them are left out."""
    figures = [summary(result, row) for row in result.rows]
    shown = {name: [show(figure) for figure in figures] for name, show in columns}
    shown = {name: column for name, column in shown.items() if set(column) != {"-"}}
    labels = [row.label for row in result.rows]
    return ["method", *shown], [list(line) for line in zip(labels, *shown.values(), strict=True)]


def footnote(result: Result) -> str:
    """What stands beside the tables: rounds, tower, and the parts of the decode bound."""
    first = result.reference
    done = {"prefill": len(first.prefill), "generation": len(first.generations)}
    counts = [f"{count} of {name}" for name, count in done.items() if count]
    notes = ["Rounds: " + ", ".join(counts)]
    if not result.reference.generations:
        return notes[0] + "."
    if result.tower:
        notes.append(f"vision tower {1e3 * (median(result.tower) or 0):.1f} ms")
    else:
        notes.append("vision tower not measured, TTFT is without it")
    if result.weights_only is not None and result.bandwidth is not None:
        notes.append(f"weights-only step {1e3 * result.weights_only:.1f} ms")
        notes.append(f"read bandwidth {result.bandwidth / 1e9:.1f} GB/s")
    return "; ".join(notes) + "."
