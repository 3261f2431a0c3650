"""What a model looks at: the paper's analyses, streamed while it runs.

>>> from st3.tools.see import analyse, suggest
>>> analysis = analyse(model, [(inputs, None)])  # doctest: +SKIP
>>> print(suggest(analysis).policy)  # doctest: +SKIP
"""

from st3.tools.see.collect import GROUPS, Collector
from st3.tools.see.result import Analysis
from st3.tools.see.run import analyse
from st3.tools.see.suggest import Suggestion, lazy_layers, suggest
from st3.tools.see.watch import Listener, Prompt, Watch

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
