"""What a release needs: one version, a complete list of licences, pinned actions, and every source in the archive."""

from __future__ import annotations

import fnmatch
import importlib.util
import re
import subprocess
import sys
from pathlib import Path
from types import ModuleType

import pytest

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib  # pyright: ignore[reportMissingImports]

ROOT = Path(__file__).resolve().parent.parent
SETTINGS = tomllib.loads((ROOT / "pyproject.toml").read_text())
PROJECT = SETTINGS["project"]
WORKFLOWS = sorted((ROOT / ".github/workflows").glob("*.yml"))


def licences() -> ModuleType:
    """Returns the module bench/tools/licences.py, which needs no installed tadperf."""
    spec = importlib.util.spec_from_file_location("licences", ROOT / "bench/tools/licences.py")
    assert spec
    assert spec.loader
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_citation_and_changelog_have_the_version_of_pyproject():
    citation = re.findall(r"^version: (.+)$", (ROOT / "CITATION.cff").read_text(), re.MULTILINE)
    dated = re.findall(r"^date-released: (.+)$", (ROOT / "CITATION.cff").read_text(), re.MULTILINE)
    newest = re.search(r"^## \[(\d[^\]]*)\] - (\S+)$", (ROOT / "CHANGELOG.md").read_text(), re.MULTILINE)
    assert newest
    assert citation == [PROJECT["version"]] == [newest[1]]
    assert dated == [newest[2]]


def test_every_direct_dependency_has_a_row_in_the_list_of_licences():
    page = (ROOT / "docs/licences.md").read_text()
    rows = dict(re.findall(r"^\| ([a-z0-9-]+) \|[^|]*\| ([^|]+) \|", page, re.MULTILINE))
    optional = [text for group in PROJECT["optional-dependencies"].values() for text in group]
    names = {re.split(r"[^\w.-]", text)[0].lower().replace("_", "-") for text in [*PROJECT["dependencies"], *optional]}
    names -= {"tomli"}  # for Python 3.10 only; the list is made with 3.12
    assert not names - rows.keys(), "run the commands at the top of bench/tools/licences.py"
    assert all(rows[name] not in ("not given", "not looked up") for name in names)


def test_the_list_of_licences_follows_extras_markers_and_cycles():
    packages = {
        "tadperf": {
            "requires_dist": ["A>=1", "old; python_version < '3'", "c; extra == 'more'", "d; extra == 'test'"],
            "provides_extra": ["more", "test"],
        },
        "a": {"version": "1", "requires_dist": ["b[x]"], "classifier": ["License :: OSI Approved :: MIT License"]},
        "b": {
            "version": "2",
            "requires_dist": ["a", "e; extra == 'x'", "f; extra == 'y'"],
            "license_expression": "ISC",
        },
        "c": {"version": "3", "license": "Some licence\nand its text"},
        "d": {"version": "4"},
        "e": {"version": "5", "license": "BSD"},
    }
    runtime, optional, development = (part.split("\n\n")[1] for part in licences().page(packages).split("\n## ")[2:])
    assert runtime.splitlines()[2:] == [
        "| a | 1 | MIT | tadperf |",
        "| b | 2 | ISC | tadperf |",
        "| e | 5 | BSD (variant not given) | tadperf |",
    ]
    assert optional.splitlines()[2:] == ["| c | 3 | Some licence | more |"]
    assert development.splitlines()[2:] == ["| d | 4 | not given | test |"]


def test_licence_texts_of_compiled_parts_exist():
    for pattern in PROJECT["license-files"]:
        assert list(ROOT.glob(pattern)), pattern
    for name in ("LICENSE", "nanobind.txt", "robin-map.txt"):
        assert name in {path.name for pattern in PROJECT["license-files"] for path in ROOT.glob(pattern)}


def test_the_source_archive_has_every_file_of_the_packages():
    folders = ["tadperf", "kernels", "cli", "bench"]
    listed = subprocess.run(["git", "ls-files", *folders], cwd=ROOT, capture_output=True, text=True, timeout=20)
    if listed.returncode:
        pytest.skip("not a clone of the repository")
    patterns = [
        pattern.lstrip("/").replace("/**/", "/") for pattern in SETTINGS["tool"]["scikit-build"]["sdist"]["include"]
    ]
    files = [name for name in listed.stdout.splitlines() if not name.startswith("bench/results/")]
    assert files
    assert not [name for name in files if not any(fnmatch.fnmatch(name, pattern) for pattern in patterns)]


@pytest.mark.parametrize("path", WORKFLOWS, ids=lambda path: path.stem)
def test_actions_are_pinned_to_a_commit_and_name_its_version(path):
    uses = re.findall(r"uses: (.+)$", path.read_text(), re.MULTILINE)
    assert uses
    for action in uses:
        assert re.fullmatch(r"[\w./-]+@[0-9a-f]{40} # v\d+\.\d+\.\d+", action), action


def test_wheels_and_ci_cover_every_supported_python():
    classifiers = {text.rpartition(" :: ")[2] for text in PROJECT["classifiers"] if "Python :: 3." in text}
    built = {f"3.{minor}" for minor in re.findall(r"cp3(\d+)-", " ".join(SETTINGS["tool"]["cibuildwheel"]["build"]))}
    release, ci = ((ROOT / f".github/workflows/{name}.yml").read_text() for name in ("release", "ci"))
    stable = set(re.findall(r'"(3\.\d+)"', re.search(r"python: \[(.*)\]", release)[1]))  # pyright: ignore
    tested = set(re.findall(r'"(3\.\d+)"', re.search(r"python: \[(.*)\]", ci)[1]))  # pyright: ignore
    assert SETTINGS["tool"]["scikit-build"]["wheel"]["py-api"] == "cp312"
    assert "3.12" in built
    assert built | stable == classifiers == tested
