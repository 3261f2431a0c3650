"""What a model looks at: the paper's analyses, streamed while it runs.

>>> from st3.analysis import analyse, suggest
>>> analysis = analyse(model, [(inputs, None)])  # doctest: +SKIP
>>> print(suggest(analysis).policy)  # doctest: +SKIP
"""

from st3.analysis.collect import GROUPS, Collector
from st3.analysis.result import Analysis
from st3.analysis.run import analyse
from st3.analysis.suggest import Suggestion, lazy_layers, suggest
from st3.analysis.watch import Listener, Prompt, Watch

__all__ = [
    "GROUPS",
    "Analysis",
    "Collector",
    "Listener",
    "Prompt",
    "Suggestion",
    "Watch",
    "analyse",
    "lazy_layers",
    "suggest",
]
