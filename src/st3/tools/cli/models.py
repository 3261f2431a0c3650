"""`st3 models`: the model families that st3 trims."""

from __future__ import annotations

from rich.table import Table

from st3.tools.cli._common import stdout


def models() -> None:
    """List the supported model families.

    [bold]Example[/bold]: st3 models
    """
    from st3.models import families

    table = Table(box=None, pad_edge=False, padding=(0, 2, 0, 0), header_style="bold")
    table.add_column("model_type", no_wrap=True)
    table.add_column("name", no_wrap=True)
    table.add_column("notes")
    for family in families():
        table.add_row(family.model_type, family.name, family.notes)
    console = stdout()
    console.print(table)
    console.print("\nmodel_type is the field of that name in the model's config.json.")
