"""pyproject.toml's lower bounds and .ci/lowest.txt, the versions that .ci/matrix installs to test those bounds."""

from __future__ import annotations

import re
import sys
from pathlib import Path

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib  # pyright: ignore[reportMissingImports]

ROOT = Path(__file__).resolve().parent.parent


def lower_bounds(requirements: list[str]) -> dict[str, str]:
    """The version after >= of each requirement that has one."""
    found = (re.match(r"([A-Za-z0-9_.-]+)(?:\[\w+\])?>=([0-9][0-9.]*)", text) for text in requirements)
    return {match[1]: match[2] for match in found if match}


def padded(version: str) -> str:
    """ "2.11" as "2.11.0"."""
    return ".".join([*version.split("."), "0", "0"][: max(3, version.count(".") + 1)])


def test_lowest_txt_pins_the_lower_bounds_of_pyproject() -> None:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())
    lines = (line.partition("#")[0].strip() for line in (ROOT / ".ci/lowest.txt").read_text().splitlines())
    pins = {name: padded(version) for name, _, version in (line.partition("==") for line in lines if line)}
    runtime = lower_bounds(project["project"]["dependencies"])
    optional = [text for group in project["project"]["optional-dependencies"].values() for text in group]
    bounds = lower_bounds([*project["build-system"]["requires"], *optional]) | runtime
    assert len(runtime) == len(project["project"]["dependencies"]), "a dependency has no lower bound"
    assert not set(runtime) - set(pins), "missing in .ci/lowest.txt"
    assert pins == {name: padded(bounds[name]) for name in pins}
