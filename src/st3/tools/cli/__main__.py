"""`python -m st3.tools.cli` is the same as `st3`."""

from st3.tools.cli import app

app(prog_name="st3")
