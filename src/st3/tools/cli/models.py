"""`st3 models`: the model families that st3 trims."""

from __future__ import annotations

from st3.tools.cli._common import print_json, stdout
from st3.tools.cli._options import AsJson


def models(as_json: AsJson = False) -> None:
    """List the supported model families.

    [bold]Example[/bold]: st3 models
    """
    from st3.models import families
    from st3.models.hub import HUB_IDS
    from st3.tools.common import tables

    known = families()
    if as_json:
        print_json(
            {
                "models": [
                    {
                        "model_type": family.model_type,
                        "name": family.name,
                        "hub_id": HUB_IDS.get(family.model_type),
                        "video": family.video,
                        "heatmap": family.layout.placed,
                        "notes": family.notes,
                    }
                    for family in known
                ]
            }
        )
        return
    rows = [
        (
            family.model_type,
            family.name,
            "yes" if family.video else "no",
            "yes" if family.layout.placed else "no",
            family.notes,
        )
        for family in known
    ]
    head = ("model_type", "name", "video", "heat map", "notes")
    console = stdout()
    console.print(tables.console(head, rows, left=(0, 1, 2, 3, 4), fold=(1, 4)))
    console.print(
        "\nmodel_type is the field of that name in the model's config.json. video: whether videos "
        "are trimmed, too. heat map: whether st3 knows where a visual token lies in the image.\n"
    )
    ids = [(f.model_type, HUB_IDS[f.model_type]) for f in known if f.model_type in HUB_IDS]
    console.print(tables.console(("model_type", "a hub id, for -m"), ids, left=(0, 1)))
    console.print(
        "\nThe ids are those that transformers' documentation names. st3 was not run on them: what "
        "is tested is each family's code, on small random models."
    )
