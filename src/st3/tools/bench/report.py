"""Results as plain values (JSON) and as Markdown tables."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence
from typing import Any

from st3.tools.bench.clock import Ratio, median
from st3.tools.bench.possible import Possible
from st3.tools.bench.suite import Result, Row
from st3.tools.common.conditions import in_words
from st3.tools.common.tables import markdown

MIB = 1 << 20
LAYERS = ("columns", "layers", "untouched_s", "bare_s", "trimmed_s")


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
        "possible_s": _samples(row.possible),
    }


def _samples(found: Possible | None) -> dict[str, list[float]] | None:
    """Seconds of whole prefills, by round."""
    if found is None:
        return None
    kinds = ("untouched", "bare", "trimmed")
    return {kind: [one.total for one in getattr(found, kind)] for kind in kinds}


def summary(result: Result, row: Row) -> dict[str, Any]:
    """The figures of one row. Times are medians in seconds; a speed-up has "paired" (median of the
    ratios within each round), "minima" and "spread"; None where something was not measured."""
    work, held, base = result.workload, row.footprint, result.reference.footprint
    total = median(result.with_tower(row.total)) if row.total else None
    kinds, cache = ("prefill", "ttft", "tpot", "total"), result.own_cache
    speed = {name: result.ratio(row, name) for name in kinds}
    trims = cache is not None and row.policy != "none"
    alone = {name: result.ratio(row, name, cache) if trims else None for name in kinds}
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
        "by_trimming": {name: _ratio(ratio) for name, ratio in alone.items()},
        "prefill_speed_up_over_flops_ratio": (
            prefill.paired / row.flops_ratio if prefill and row.flops_ratio else None
        ),
        "step_over_bound": result.over_bound(row),
        "selection_share": row.overhead.share if row.overhead else None,
        "possible": _possible(row.possible),
    }


def _possible(found: Possible | None) -> dict[str, Any] | None:
    if found is None:
        return None
    return {
        "rounds": len(found.bare),
        "gain": dataclasses.asdict(found.gain),
        "reached": dataclasses.asdict(found.reached),
        "outside": found.outside,
        "layers": [dict(zip(LAYERS, line, strict=True)) for line in found.by_columns()],
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


def _gain(key: str, over: str = "speed_up") -> Callable[[dict[str, Any]], str]:
    def show(s: dict[str, Any]) -> str:
        ratio = s[over][key]
        if ratio is None:
            return "-"
        return f"{ratio['paired']:.3f} / {ratio['minima']:.3f} (spread {ratio['spread']:.1%})"

    return show


def _brief_gain(key: str, over: str = "speed_up") -> Callable[[dict[str, Any]], str]:
    return lambda s: "-" if s[over][key] is None else f"{s[over][key]['paired']:.3f}"


def _alone(show: Callable[[str, str], Callable[[dict[str, Any]], str]]) -> tuple[Column, ...]:
    names = {"prefill": "prefill", "ttft": "TTFT", "tpot": "TPOT", "total": "end to end"}
    return tuple(
        (f"{name}, trimming alone", show(key, "by_trimming")) for key, name in names.items()
    )


def _layers(key: str) -> Callable[[dict[str, Any]], str]:
    def show(s: dict[str, Any]) -> str:
        if s["possible"] is None:
            return "-"
        found = s["possible"][key]
        return f"{found['median']:.3f} ({found['low']:.3f} to {found['high']:.3f})"

    return show


def _brief_layers(key: str) -> Callable[[dict[str, Any]], str]:
    return lambda s: "-" if s["possible"] is None else f"{s['possible'][key]['median']:.3f}"


def _gains(
    show: Callable[[str], Callable[[dict[str, Any]], str]],
    layers: Callable[[str], Callable[[dict[str, Any]], str]],
) -> tuple[Column, ...]:
    return (
        ("FLOPs ratio", _times("flops_ratio")),
        ("prefill", show("prefill")),
        ("/ FLOPs", _times("prefill_speed_up_over_flops_ratio", 3)),
        ("possible", layers("gain")),
        ("of possible", layers("reached")),
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
GAINS = _gains(_gain, _layers)
ALONE = _alone(_gain)
BRIEF_ALONE = _alone(_brief_gain)
BRIEF_GAINS = _gains(_brief_gain, _brief_layers)  # the paired ratios alone, for narrow terminals
NOTES = """\
Times are medians over the rounds; methods take turns within a round. prefill: the text decoder
alone, on a prompt without pixels. TTFT and end to end: generate() with the vision tower's time
added, which is measured apart and the same in all rows. downsample: the untouched model on as many
visual tokens as the first policy keeps on average, as an image made smaller gives where a model
makes fewer tokens of it. TPOT: median time of a further token. peak:
memory above that before the call. KV: bytes over the untouched model's, both averaged over the
prefill and the steps. selection: st3's own part of the trimmed prefill (choosing, gathering,
scoring, writing keys and values), timed in runs of its own. Speed-ups are over the first row, the
untouched model on transformers' DynamicCache: the median of the ratios within each round (in files
also the ratio of the smallest times, and the largest minus the smallest ratio over the median).
Part of them is due to st3's cache: "trimming alone" is the speed-up over the untrimmed model on the
same cache. FLOPs ratio: untrimmed over trimmed, of the decoder's prefill, counted. / FLOPs: the
prefill's speed-up over that ratio. possible: the speed-up of the bare model whose layers see as
many columns as the policy leaves them, with nothing scored or chosen. of possible: that bare
prefill's time over the trimmed one's; 1.0 is all that the machine can give. Both are medians over
rounds of their own, with the quartiles in files. step / bound: time of a decode step over
(weights-only step + live KV bytes / read bandwidth), median over the steps of a generation of its
own, in which each comes right behind a weights-only step."""


def _layer_table(label: str, found: Possible) -> list[str]:
    head = ("columns", "layers", "untouched, ms", "bare, ms", "trimmed, ms")
    rows = [
        (columns, layers, *(f"{1e3 * seconds:.1f}" for seconds in times))
        for columns, layers, *times in found.by_columns()
    ]
    return [
        f"`{label}`: time of one layer, by the columns that it sees; median of {len(found.bare)} "
        f"rounds. Outside of the layers st3 takes {found.outside:.1%} of the trimmed prefill.",
        "",
        markdown(head, rows, left=()),
    ]


def _mib(size: int | None) -> str:
    return "-" if size is None else f"{size / MIB:.0f}"


def as_markdown(results: Sequence[Result], conditions: dict[str, Any], title: str) -> str:
    """A page: conditions, the tables of each workload, and what the columns mean."""
    lines = [f"# {title}", "", f"`{conditions['command']}`", "", in_words(conditions) + ".", ""]
    for result in results:
        lines += [f"## {result.subject}: {result.workload.title}", ""]
        for columns in (TIMES + MEMORY, GAINS, ALONE):
            names, rows = cells(result, columns)
            if len(names) > 1:
                lines += [markdown(names, rows), ""]
        lines += [footnote(result), ""]
        for row in result.rows:
            if row.possible is not None:
                lines += [*_layer_table(row.label, row.possible), ""]
    return "\n".join([*lines, NOTES]) + "\n"


def cells(result: Result, columns: Sequence[Column]) -> tuple[list[str], list[list[str]]]:
    """Column names and, for each method, its cells. Columns and rows with nothing in them are left
    out."""
    figures = [summary(result, row) for row in result.rows]
    shown = {name: [show(figure) for figure in figures] for name, show in columns}
    shown = {name: column for name, column in shown.items() if set(column) != {"-"}}
    labels = [row.label for row in result.rows]
    lines = [list(line) for line in zip(labels, *shown.values(), strict=True)]
    return ["method", *shown], [line for line in lines if set(line[1:]) != {"-"}]


def footnote(result: Result) -> str:
    """What stands beside the tables: rounds, tower, and the parts of the decode bound."""
    first = result.reference
    done = {"prefill": len(first.prefill), "generation": len(first.generations)}
    done["layers alone"] = max(len(r.possible.bare) if r.possible else 0 for r in result.rows)
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
