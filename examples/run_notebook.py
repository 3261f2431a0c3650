"""Run examples/seeing.ipynb and save it with what it shows: python examples/run_notebook.py

Needs nbclient and ipykernel besides st3[plot]. The test of the notebook compares the hash that is
saved with its code.
"""

from __future__ import annotations

import hashlib
import json
import os
import tempfile
from pathlib import Path
from typing import Any

NOTEBOOK = Path(__file__).resolve().with_name("seeing.ipynb")


def code_hash(notebook: dict[str, Any]) -> str:
    """Of all code cells, in order."""
    code = ["".join(cell["source"]) for cell in notebook["cells"] if cell["cell_type"] == "code"]
    return hashlib.sha256("\n\0".join(code).encode()).hexdigest()


def main() -> None:
    import nbclient
    import nbformat

    notebook = nbformat.read(NOTEBOOK, as_version=4)
    with tempfile.TemporaryDirectory() as scratch:  # what the cells write stays there
        os.environ["PYTHONPATH"] = os.pathsep.join(
            [str(NOTEBOOK.parents[1] / "src"), os.environ.get("PYTHONPATH", "")]
        )
        nbclient.NotebookClient(
            notebook, timeout=600, resources={"metadata": {"path": scratch}}
        ).execute()
    for cell in notebook.cells:
        cell["metadata"] = {}  # times of this run
        if cell.cell_type == "code":
            cell["outputs"] = [one for one in cell["outputs"] if one.get("name") != "stderr"]
    notebook["metadata"] = {
        "kernelspec": {"display_name": "Python 3", "language": "python", "name": "python3"},
        "language_info": {"name": "python"},
        "st3_code": code_hash(json.loads(nbformat.writes(notebook))),
    }
    nbformat.write(notebook, NOTEBOOK)


if __name__ == "__main__":
    main()
