"""Print what st3 and its extra ``dev`` ask for, without upper bounds and without torch.

``make test-latest`` installs this: the newest of everything, above the caps of pyproject.toml, too.
It runs in an empty environment, so that it needs nothing but the standard library.
"""

from __future__ import annotations

import re
import tomllib
from pathlib import Path

PYPROJECT = Path(__file__).resolve().parent.parent / "pyproject.toml"


def uncapped(requirement: str) -> str:
    """'a[b]>=1,<2; marker' becomes 'a[b]>=1; marker'; 'a~=1.0' and 'a==1.0' become 'a'."""
    asked, _, marker = requirement.partition(";")
    name, bounds = re.fullmatch(r"\s*([\w.-]+(?:\[[^]]*\])?)\s*(.*?)\s*", asked).groups()
    kept = ",".join(b.strip() for b in bounds.split(",") if b.strip().startswith(">"))
    return name + kept + (f" ; {marker.strip()}" if marker else "")


def requirements(extra: str | None, project: dict) -> list[str]:
    """Those of st3, or of one of its extras, with the extras that it names in turn."""
    listed = project["optional-dependencies"][extra] if extra else project["dependencies"]
    found = []
    for requirement in listed:
        of_itself = re.fullmatch(r"st3\[(.*)\]", requirement)
        if of_itself:
            for other in of_itself[1].split(","):
                found += requirements(other.strip(), project)
        else:
            found.append(requirement)
    return found


def main() -> None:
    project = tomllib.loads(PYPROJECT.read_text(encoding="utf-8"))["project"]
    for requirement in requirements(None, project) + requirements("dev", project):
        if not re.match(r"torch\b(?!-)", requirement):
            print(uncapped(requirement))


if __name__ == "__main__":
    main()
