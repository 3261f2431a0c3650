"""Answer the rows of a file, or a folder of images: in this process, or by actors on Ray.

A killed run is continued by starting it again: see :mod:`st3.tools.batch.store`.
"""

from __future__ import annotations

from st3.tools.batch.inputs import BadRow, Ref, Row, Source, open_source
from st3.tools.batch.run import BatchError, Options, run
from st3.tools.batch.store import Store
from st3.tools.batch.worker import Done, Worker

__all__ = [
    "BadRow",
    "BatchError",
    "Done",
    "Options",
    "Ref",
    "Row",
    "Source",
    "Store",
    "Worker",
    "open_source",
    "run",
]
