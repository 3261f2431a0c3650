"""`st3 models`: the model families that st3 trims."""

from __future__ import annotations

from st3.tools.cli._common import stdout


def models() -> None:
    """List the supported model families.

    [bold]Example[/bold]: st3 models
    """
    from st3.models import families
    from st3.tools.common import tables

    rows = [(family.model_type, family.name, family.notes) for family in families()]
    table = tables.console(("model_type", "name", "notes"), rows, left=(0, 1, 2), fold=(2,))
    console = stdout()
    console.print(table)
    console.print("\nmodel_type is the field of that name in the model's config.json.")
