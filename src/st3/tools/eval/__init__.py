"""Quality: how much of the untrimmed answers each policy keeps, at equal budget.

    from st3.tools.eval import Evaluation, Store, bundled_scenes, entries, label_policies, summarise

``st3 eval`` is the command line of it.
"""

from st3.tools.eval.budget import Entry, entries, usable
from st3.tools.eval.data import Dataset, Item, bundled_scenes, load_folder
from st3.tools.eval.evaluate import SEEDS, Evaluation, label_policies
from st3.tools.eval.report import as_markdown
from st3.tools.eval.store import Record, Store, fingerprint
from st3.tools.eval.summary import Row, Summary, summarise, to_dict

__all__ = [
    "SEEDS",
    "Dataset",
    "Entry",
    "Evaluation",
    "Item",
    "Record",
    "Row",
    "Store",
    "Summary",
    "as_markdown",
    "bundled_scenes",
    "entries",
    "fingerprint",
    "label_policies",
    "load_folder",
    "summarise",
    "to_dict",
    "usable",
]
