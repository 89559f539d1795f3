"""Writes docs/licences.md: every package that tadperf and its extras install, with its licence.

    extras=peers,large,hub,stable-diffusion,encoder,docs,test
    pip install --dry-run --ignore-installed --quiet --report report.json ".[$extras]"
    pip install --dry-run --no-deps --quiet --report tensorrt.json 'torch-tensorrt>=2.11,<2.15'
    python -m tadperf.bench.tools.licences report.json tensorrt.json >docs/licences.md

pip resolves the packages for the Python and the machine that it runs on, and installs nothing. Needs a pip
that reports SPDX expressions (26.3 does, 23.2 does not), and `packaging`.
The second report is apart because only NVIDIA's machines can resolve all that torch-tensorrt needs. These packages are
listed without version and licence.
"""

from __future__ import annotations

import json
import re
import sys
from pathlib import Path
from typing import Any

from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

Packages = dict[str, dict[str, Any]]  # name -> what the package says about itself
DEVELOPMENT = ("docs", "test")  # extras for people who work on tadperf
SPDX = {  # classifiers, and free texts that packages write in place of an SPDX expression
    "Apache Software License": "Apache-2.0",
    "BSD License": "BSD (variant not given)",
    "ISC License (ISCL)": "ISC",
    "MIT License": "MIT",
    "Mozilla Public License 2.0 (MPL 2.0)": "MPL-2.0",
    "Python Software Foundation License": "PSF-2.0",
    "Apache 2.0": "Apache-2.0",
    "Apache 2.0 License": "Apache-2.0",
    "Apache": "Apache-2.0",
    "Apache License": "Apache-2.0",
    "Apache License, Version 2.0": "Apache-2.0",
    "BSD": "BSD (variant not given)",
    "3-Clause BSD License": "BSD-3-Clause",
}
TOP = """\
# Licences

tadperf is under Apache-2.0. A wheel or a source archive of tadperf holds none of the packages in the tables: pip
installs them from their own archives, under their own licences.

## What a wheel holds

| part | licence | text in the wheel |
| --- | --- | --- |
| tadperf: Python, Triton and C++ | Apache-2.0 | `licenses/LICENSE` |
| [nanobind](https://github.com/wjakob/nanobind), compiled into `tadperf.kernels._native` | BSD-3-Clause | \
`licenses/kernels/cpu/licenses/nanobind.txt` |
| [robin-map](https://github.com/Tessil/robin-map), a part of nanobind | MIT | \
`licenses/kernels/cpu/licenses/robin-map.txt` |

Wheels for manylinux also hold code of GCC's C++ library, under GPL-3.0 with the GCC Runtime Library Exception. It
puts no condition on programs that use it.
"""


def licence(metadata: dict[str, Any]) -> str:
    """Returns the licence of a package: its SPDX expression, else its classifiers, else the first line of its text."""
    if expression := metadata.get("license_expression"):
        return expression
    names: list[str] = [
        text.rpartition(" :: ")[2] for text in metadata.get("classifier", []) if text.startswith("License :: ")
    ]
    names = [name for name in names if name not in ("OSI Approved", "Other/Proprietary License")]
    if not names and (text := metadata.get("license", "").strip()):
        names = [text.splitlines()[0][:80]]
    return " AND ".join(SPDX.get(name, name) for name in names) or "not given"


def read_reports(paths: list[str]) -> Packages:
    """Returns the metadata of all packages in pip's reports."""
    items = (item for path in paths for item in json.loads(Path(path).read_text())["install"])
    packages: Packages = {str(canonicalize_name(item["metadata"]["name"])): item["metadata"] for item in items}
    if not any("license_expression" in metadata for metadata in packages.values()):
        sys.exit("the reports hold no SPDX expressions: this pip is too old; install the newest one")
    return packages


def required(metadata: dict[str, Any], extras: set[str]) -> dict[str, set[str]]:
    """Returns the packages that a package needs on this machine, with the extras that it asks of each."""
    needs: dict[str, set[str]] = {}
    for text in metadata.get("requires_dist") or []:
        requirement = Requirement(text)
        marker = requirement.marker
        if marker is None or any(marker.evaluate({"extra": extra}) for extra in extras | {""}):
            needs.setdefault(canonicalize_name(requirement.name), set()).update(requirement.extras)
    return needs


def closure(packages: Packages, start: dict[str, set[str]]) -> dict[str, set[str]]:
    """Returns the packages of `start` and all that they need, with the extras asked of each."""
    reached: dict[str, set[str]] = {}
    waiting = list(start.items())
    while waiting:
        name, extras = waiting.pop()
        if name in reached and extras <= reached[name]:
            continue
        reached.setdefault(name, set()).update(extras)
        waiting.extend(required(packages.get(name, {}), reached[name]).items())
    return reached


def table(packages: Packages, groups: dict[str, set[str]]) -> list[str]:
    """Returns a table of packages in Markdown. groups: name -> the extras that install it, empty for all of tadperf."""
    rows = ["| package | version | licence | installed by |", "| --- | --- | --- | --- |"]
    for name, extras in sorted(groups.items()):
        metadata = packages.get(name)
        version, terms = (metadata["version"], licence(metadata)) if metadata else ("", "not looked up")
        rows.append(f"| {name} | {version} | {terms} | {', '.join(sorted(extras)) or 'tadperf'} |")
    return rows


def page(packages: Packages) -> str:
    """Returns docs/licences.md."""
    project = packages["tadperf"]
    runtime = closure(packages, required(project, set()))
    optional: dict[str, set[str]] = {}
    for extra in project["provides_extra"]:
        for name in closure(packages, required(project, {extra})).keys() - runtime.keys():
            optional.setdefault(name, set()).add(extra)
    for_users = {name: extras for name, extras in optional.items() if not extras <= set(DEVELOPMENT)}
    for_developers = {name: extras for name, extras in optional.items() if extras <= set(DEVELOPMENT)}
    parts = [
        TOP,
        "`bench/tools/licences.py` made these tables for Python 3.12 on Linux x86-64 with torch's CUDA build. "
        "Other versions may have other licences. The licence is the one that a package states in its metadata.\n",
        "## Installed with tadperf\n",
        *table(packages, {name: set() for name in runtime}),
        "\n## Installed with an extra\n",
        *table(packages, for_users),
        "\n## For work on tadperf: tests and documentation\n",
        *table(packages, for_developers),
    ]
    return re.sub(r"\n{3,}", "\n\n", "\n".join(parts))


def main() -> None:
    print(page(read_reports(sys.argv[1:])))


if __name__ == "__main__":
    main()
