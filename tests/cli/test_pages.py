"""The page of the documentation that an error names."""

from __future__ import annotations

import json
import os
import pty
import re
import subprocess
import sys
from pathlib import Path

import pytest

from tadperf.cli import pages
from tadperf.errors import UserError

ROOT = Path(__file__).parents[2]


def headings(page: Path) -> set[str]:
    """Returns the anchors that GitHub and mkdocs give the headings of a page."""
    titles = re.findall(r"^#+ (.+)$", page.read_text(), re.MULTILINE)
    return {re.sub(r"[^\w -]", "", title).strip().lower().replace(" ", "-") for title in titles}


@pytest.mark.parametrize("page", sorted({*pages.PAGES.values(), pages.SETTINGS}))
def test_every_page_and_heading_exists(page):
    name, _, anchor = page.partition("#")
    assert (ROOT / "docs" / name).is_file()
    assert not anchor or anchor in headings(ROOT / "docs" / name)


def test_the_address_is_that_of_the_project():
    homepage = re.findall(r'^Homepage = "(.+)"$', (ROOT / "pyproject.toml").read_text(), re.MULTILINE)[0]
    assert f"{homepage}/blob/main/docs/" == pages.DOCS


@pytest.mark.parametrize(
    ("field", "topic", "page"),
    [
        ("data", None, "data-and-labels.md#what-tadperf-opens"),
        ("data.label_column", None, "data-and-labels.md#what-tadperf-opens"),
        ("data.noise", None, "data-and-labels.md#noise-for-studies"),
        ("evaluate.repeats", None, "configuration.md"),
        ("match.ipc", "resume", "runs.md#stop-and-resume"),
        ("--encoder", "extras", "index.md#install"),
        ("images", None, None),
    ],
)
def test_the_page_of_a_field_or_topic(field, topic, page):
    assert pages.help_url(UserError(field, "x", "mend it", topic)) == (page and pages.DOCS + page)


@pytest.mark.parametrize(
    ("arguments", "page"),
    [
        ("distill nowhere", "data-and-labels.md"),
        ("distill --labels none.csv", "data-and-labels.md#labels"),
        ("distill --encoder none", "wrong-labels.md#"),
        ("distill --device cuda:99", "troubleshooting.md#cuda"),
        ("distill --resume", "runs.md#stop-and-resume"),
        ("distill --set match.setps=3", "configuration.md"),
    ],
)
def test_with_json_the_page_is_a_field(tadperf, arguments, page):
    code, out, err = tadperf(*arguments.split(), "--json")
    assert code == 2
    error = json.loads(out)["error"]
    assert error["see"].startswith(pages.DOCS + page)
    assert err == f"tadperf: {error['field']}: {error['value']}: {error['remedy']}\n"


def test_a_terminal_shows_the_page_below_the_error(tmp_path):
    reader, writer = pty.openpty()
    command = [sys.executable, "-m", "tadperf", "distill", "--ipc=0"]
    done = subprocess.run(command, cwd=tmp_path, stdout=subprocess.DEVNULL, stderr=writer, timeout=60)
    os.close(writer)
    lines = os.read(reader, 10_000).decode().splitlines()
    os.close(reader)
    assert done.returncode == 2
    assert lines[0].startswith("tadperf: --ipc: 0: must be at least 1")
    assert re.fullmatch(rf"see {re.escape(pages.DOCS)}\S+\.md\S*", lines[1])
    assert len(lines) == 2
