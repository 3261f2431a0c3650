"""st3: trim the visual tokens of transformers vision-language models, in space and in time.

>>> import st3
>>> with st3.trim(model, st3.ST3(final_keep=0.01, stride=4)) as trimmer:  # doctest: +SKIP
...     out = model.generate(**inputs, max_new_tokens=200)
>>> print(trimmer.report)  # doctest: +SKIP
"""

from st3 import policies
from st3.bundled import bundled_model, sample_images
from st3.engine import Trimmer, TrimStateError, UnsupportedModelError, trim
from st3.policies import ST3, VTW, FastV, NoTrim, Policy, PyramidDrop, Random
from st3.report import Report
from st3.schedule import Anneal, Schedule

__version__ = "0.1.0"

__all__ = [
    "ST3",
    "VTW",
    "Anneal",
    "FastV",
    "NoTrim",
    "Policy",
    "PyramidDrop",
    "Random",
    "Report",
    "Schedule",
    "TrimStateError",
    "Trimmer",
    "UnsupportedModelError",
    "bundled_model",
    "policies",
    "sample_images",
    "trim",
]
