"""The locks in requirements/ fit pyproject.toml; when they do not, `make lock` writes them anew."""

from __future__ import annotations

import re
import tomllib
from pathlib import Path

import pytest
from packaging.requirements import Requirement

ROOT = Path(__file__).resolve().parent.parent
LOCKS = ["dev", "docs", "oldest"]
OF_TORCH = re.compile(r"torch|triton|nvidia-.*|cuda-.*")


def locked(name: str) -> dict[str, Requirement]:
    lines = (ROOT / "requirements" / f"{name}.lock").read_text(encoding="utf-8").splitlines()
    found = [Requirement(line) for line in lines if line and not line.lstrip().startswith("#")]
    # One version on every Python and system, but for the oldest: those are tested on one of each.
    assert name == "oldest" or len({r.name for r in found}) == len(found)
    return {r.name: r for r in found}


def asked(extra: str | None) -> list[Requirement]:
    """What pyproject.toml asks for, with the extras that an extra names."""
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    found = []
    for line in project["optional-dependencies"][extra] if extra else project["dependencies"]:
        requirement = Requirement(line)
        if requirement.name == project["name"]:
            found += [r for other in requirement.extras for r in asked(other)]
        elif requirement.name != "torch":
            found.append(requirement)
    return found


def version(requirement: Requirement) -> str:
    (pin,) = requirement.specifier
    assert pin.operator == "=="
    return pin.version


@pytest.mark.parametrize("name", LOCKS)
def test_a_lock_has_what_pyproject_asks_for(name: str) -> None:
    lock = locked(name)
    for requirement in asked(None) + asked("docs" if name == "docs" else "dev"):
        assert requirement.specifier.contains(version(lock[requirement.name])), requirement


@pytest.mark.parametrize("name", LOCKS)
def test_no_lock_chooses_a_torch(name: str) -> None:
    """The Makefile's TORCH does: only the machine's owner knows which build it needs."""
    assert not [package for package in locked(name) if OF_TORCH.fullmatch(package)]


def test_the_pages_are_built_beside_the_tests() -> None:
    dev, docs = locked("dev"), locked("docs")
    both = set(dev) & set(docs)
    assert "transformers" in both
    assert all(version(dev[package]) == version(docs[package]) for package in both)


def test_the_lock_holds_the_newest_transformers_that_is_allowed() -> None:
    """A cap that moved without a new lock would be a promise that no test has kept."""
    (transformers,) = [r for r in asked(None) if r.name == "transformers"]
    major, minor, *_ = version(locked("dev")["transformers"]).split(".")
    assert not transformers.specifier.contains(f"{major}.{int(minor) + 1}.0")
