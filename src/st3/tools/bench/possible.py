"""What a trimmed prefill could gain at most: the model's own layers on as many columns.

A FLOPs ratio is not what a machine can do: a matrix product of fewer rows may be less efficient,
and attention over fewer columns saves memory traffic that no FLOP counts. So the bare model is
timed, in the same run, on as many columns as the policy's schedule gives to each layer: hooks cut
its hidden states, masks and position tables to the first of them. Nothing is scored or chosen.
"""

from __future__ import annotations

import statistics
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager, nullcontext
from dataclasses import dataclass
from typing import Any

from torch import Tensor, nn

import st3
from st3.hf.call import layer_arguments, layer_inputs
from st3.tools.bench.clock import Deadline, in_turn
from st3.tools.bench.measure import forward
from st3.tools.bench.methods import Method
from st3.tools.bench.prompts import Prompt
from st3.tools.common.clock import Marks


@dataclass(frozen=True)
class Pass:
    """One prefill, in seconds.

    Attributes:
        total: from the call to the logits.
        layers: of each decoder layer, behind the hooks that narrow its inputs.
    """

    total: float
    layers: tuple[float, ...]


@dataclass(frozen=True)
class Middle:
    """Quartiles of the ratios within each round: half of the rounds lie from low to high."""

    low: float
    median: float
    high: float


@dataclass(frozen=True)
class Possible:
    """Prefills in turn, one of each kind in a round.

    Attributes:
        columns: of a row, in each layer of the trimmed prefill.
        untouched: of the untouched model.
        bare: of the same model, whose layers see the first ``columns`` alone.
        trimmed: by the policy, on st3's engine.
    """

    columns: tuple[int, ...]
    untouched: tuple[Pass, ...]
    bare: tuple[Pass, ...]
    trimmed: tuple[Pass, ...]

    @property
    def gain(self) -> Middle:
        """The speed-up that is possible: the untouched prefill's time over the bare one's."""
        return _middle(self.untouched, self.bare)

    @property
    def reached(self) -> Middle:
        """What the policy reaches of it: the bare prefill's time over the trimmed one's."""
        return _middle(self.bare, self.trimmed)

    @property
    def outside(self) -> float:
        """Median share of the trimmed prefill outside of the layers, less the bare one's, in units
        of the trimmed prefill: choosing, gathering and the cache. The rest of what is lost is lost
        inside the layers."""
        pairs = zip(self.bare, self.trimmed, strict=True)
        return statistics.median(
            (t.total - sum(t.layers) - b.total + sum(b.layers)) / t.total for b, t in pairs
        )

    def by_columns(self) -> list[tuple[int, int, float, float, float]]:
        """For each number of columns: how many layers have it, and the median seconds of one such
        layer untouched, bare and trimmed."""
        groups: dict[int, list[int]] = {}
        for layer, columns in enumerate(self.columns):
            groups.setdefault(columns, []).append(layer)
        kinds = (self.untouched, self.bare, self.trimmed)
        return [
            (columns, len(layers), *(_layer_time(kind, layers) for kind in kinds))  # type: ignore[misc]
            for columns, layers in groups.items()
        ]


def _middle(reference: Sequence[Pass], other: Sequence[Pass]) -> Middle:
    ratios = [a.total / b.total for a, b in zip(reference, other, strict=True)]
    if len(ratios) == 1:
        return Middle(ratios[0], ratios[0], ratios[0])
    return Middle(*statistics.quantiles(ratios, n=4, method="inclusive"))


def _layer_time(passes: Sequence[Pass], layers: Sequence[int]) -> float:
    return statistics.median(statistics.mean(one.layers[la] for la in layers) for one in passes)


def steps_of(rounds: int) -> int:
    """How often :func:`possible` reports progress for one method, at most."""
    return 3 * (rounds + 1) if rounds else 0


def possible(
    model: Any,
    prompt: Prompt,
    method: Method,
    rounds: int,
    on_run: Callable[[], None] = lambda: None,
    deadline: Deadline | None = None,
) -> Possible:
    """Time the three kinds of prefill in turn, behind an untimed one of each.

    Args:
        prompt: rows of equal length.
        method: a policy on st3's engine.
        rounds: at least 1. Many are better than few: on a shared machine a single round is off by
            several per cent, and their median is not.
        on_run: called after each prefill, :func:`steps_of` times at most.
        deadline: behind it no further round is begun.

    Raises:
        ValueError: rows of different lengths, or a policy that does not fit the model.
    """
    if prompt.mask is not None or len(set(prompt.rows)) > 1:
        raise ValueError("what is possible is measured on rows of equal length")
    if method.policy is None:
        raise ValueError(f"{method.label} drops nothing: give a policy")
    trimmer = st3.trim(model, method.policy, visual_mask=prompt.visual)
    row, layers = prompt.rows[0], trimmer.parts.layers
    columns = tuple(row.text + trimmer.schedule.kept(la, row.visual) for la in range(len(layers)))
    calls: dict[str, Callable[[], Pass]] = {
        "untouched": lambda: _timed(model, prompt, layers, nullcontext()),
        "bare": lambda: _timed(model, prompt, layers, narrowed(layers, columns)),
        "trimmed": lambda: _timed(model, prompt, layers, method.attach(model, prompt)),
    }
    for call in calls.values():
        call()
        on_run()
    found = in_turn(calls, rounds, on_run, deadline)
    return Possible(columns, *(tuple(found[name]) for name in calls))


def _timed(model: Any, prompt: Prompt, layers: Sequence[nn.Module], context: Any) -> Pass:
    """One prefill within a context, with a mark at each layer's begin and end. The context's own
    hooks come first, so that what they do is outside of the layers."""
    marks = Marks(prompt.device)
    with context, ExitStack() as hooks:
        for layer in layers:
            for add in (layer.register_forward_pre_hook, layer.register_forward_hook):
                hooks.callback(add(lambda *call: marks.mark()).remove)
        marks.mark()
        forward(model, prompt)
        marks.mark()
    spans = marks.seconds()
    return Pass(sum(spans), tuple(spans[1:-1:2]))


@contextmanager
def narrowed(layers: Sequence[nn.Module], columns: Sequence[int]) -> Iterator[None]:
    """Let each decoder layer see the first ``columns`` of its inputs alone: no more rows of hidden
    states, of rotary tables and of masks. Left behind: nothing."""
    with ExitStack() as hooks:
        for layer, width in zip(layers, columns, strict=True):
            hook = _cut_to(width)
            hooks.callback(layer.register_forward_pre_hook(hook, with_kwargs=True).remove)
        yield


def _cut_to(width: int) -> Callable[..., Any]:
    def hook(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        inputs, named = layer_inputs(module, args, kwargs)
        length = inputs.hidden.shape[1]
        inputs.changed = True
        if length > width:
            inputs.hidden = inputs.hidden[:, :width].contiguous()
        if isinstance(inputs.mask, Tensor):
            inputs.mask = inputs.mask[..., :width, :width]
        inputs.tables = _cut_tables(inputs.tables, width)
        return layer_arguments(inputs, named)

    return hook


def _cut_tables(tables: Any, width: int) -> Any:
    """Position tables, one or several or None, of the first columns."""
    if tables is None:
        return None
    if isinstance(tables, Tensor):
        return tables[..., :width, :]
    return type(tables)(_cut_tables(table, width) for table in tables)
