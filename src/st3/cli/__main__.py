"""`python -m st3.cli` is the same as `st3`."""

from st3.cli import app

app(prog_name="st3")
