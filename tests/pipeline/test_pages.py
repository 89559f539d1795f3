"""Runs of every kind write the page report.html, and a page that cannot be made ends no run."""

from __future__ import annotations

import json
import logging
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pytest

import tadperf
from tadperf.pipeline import distill
from tadperf.trust.state import TrustState

pytestmark = pytest.mark.usefixtures("one_thread")


class Headings(HTMLParser):
    """The ids of the second-level headings, which name the sections, and the number of images."""

    def __init__(self, page: str) -> None:
        super().__init__()
        self.ids: list[str | None] = []
        self.images = 0
        self.feed(page)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        if tag == "h2":
            self.ids.append(dict(attrs)["id"])
        self.images += tag == "img"


def headings(folder: Path) -> Headings:
    return Headings((folder / "report.html").read_text(encoding="utf-8"))


@pytest.mark.parametrize(
    ("values", "sections"),
    [
        ({}, ["summary", "accuracy", "ladder", "distilled", "stages", "use"]),
        ({"trust__mode": "on"}, ["summary", "accuracy", "ladder", "suspects", "trust", "distilled", "stages", "use"]),
        ({"synthesis": "generative"}, ["summary", "accuracy", "ladder", "distilled", "refinement", "stages", "use"]),
        ({"synthesis": "hybrid"}, ["summary", "accuracy", "ladder", "distilled", "refinement", "stages", "use"]),
        (
            {"data__noise": "none", "trust__mode": "on"},
            ["summary", "accuracy", "ladder", "suspects", "trust", "distilled"],
        ),
    ],
)
def test_every_kind_of_run_has_a_page(tmp_path, tiny_config, values, sections):
    tadperf.distill(tiny_config(**values), tmp_path / "run")
    page = headings(tmp_path / "run")
    assert page.ids[: len(sections)] == sections
    result = json.loads((tmp_path / "run" / "result.json").read_text())
    assert result["paths"]["report"] == str(tmp_path / "run" / "report.html")
    if "suspects" in sections:
        issues = int(TrustState.load(tmp_path / "run" / "trust.safetensors").issues.sum())
        assert page.images >= 10 + min(issues, 10)
    else:
        assert page.images == 10


def test_a_page_that_fails_is_a_warning(tmp_path, tiny_config, monkeypatch, caplog):
    def fail(*values: Any) -> None:
        raise ZeroDivisionError("no page")

    monkeypatch.setattr(distill, "save_run_page", fail)
    with caplog.at_level(logging.WARNING, "tadperf"):
        tadperf.distill(tiny_config(), tmp_path / "run")
    assert "report.html was not written: ZeroDivisionError: no page" in [r.getMessage() for r in caplog.records]
    assert (tmp_path / "run" / "DONE").exists()
