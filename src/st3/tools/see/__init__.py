"""What a model looks at: the paper's analyses, streamed while it runs.

>>> from st3.tools.see import analyse, lazy_layers
>>> analysis = analyse(model, [(inputs, None)])  # doctest: +SKIP
>>> print(lazy_layers(analysis))  # doctest: +SKIP
"""

from st3.tools.see.collect import GROUPS, Collector
from st3.tools.see.result import Analysis, lazy_layers
from st3.tools.see.run import analyse
from st3.tools.see.watch import Listener, Prompt, Watch

__all__ = [
    "GROUPS",
    "Analysis",
    "Collector",
    "Listener",
    "Prompt",
    "Watch",
    "analyse",
    "lazy_layers",
]
