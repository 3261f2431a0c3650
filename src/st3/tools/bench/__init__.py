"""Measure trimming against the untouched model and against other methods, in one process.

>>> from st3.tools.bench import Workload, compare, from_shape, run
>>> import torch
>>> subject = from_shape("tiny", torch.device("cpu"), torch.float32)
>>> work = Workload(visual=16, text=8, new_tokens=4, repeats=1)
>>> result = run(subject, work, compare(["balanced"]))
>>> [row.label for row in result.rows][:3]
['untouched', "untrimmed, st3's cache", 'balanced']
"""

from st3.tools.bench.clock import Deadline
from st3.tools.bench.methods import Method, attached, compare, own_cache, untouched
from st3.tools.bench.models import GROUPED, SHAPES, Subject, from_folder, from_shape
from st3.tools.bench.suite import Result, Row, Workload, run, steps_of

__all__ = [
    "GROUPED",
    "SHAPES",
    "Deadline",
    "Method",
    "Result",
    "Row",
    "Subject",
    "Workload",
    "attached",
    "compare",
    "from_folder",
    "from_shape",
    "own_cache",
    "run",
    "steps_of",
    "untouched",
]
