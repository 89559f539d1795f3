"""Every finding of an audit names its file or row: in the table, the list, the JSON object and the page."""

from __future__ import annotations

import csv
import json

import numpy as np
import pytest
from PIL import Image

from tadperf.report.words import COLUMNS
from tadperf.trust.state import as_given

FAST = ["--device=cpu", "--quiet", *(f"--set=trust.{s}" for s in ("rounds=1", "proxies=2", "epochs=4"))]
HOSTILE = "<b onclick=alert(1)>"


@pytest.fixture
def folder(tmp_path):
    """A set of two classes with one wrong label; one class has a name with markup."""
    rng = np.random.default_rng(0)
    for k in range(40):
        place = tmp_path / "set" / (HOSTILE, "b & c")[k % 2 if k != 6 else 1]
        place.mkdir(parents=True, exist_ok=True)
        pixels = rng.integers(0, 60, (8, 8)) + 150 * (k % 2)
        Image.fromarray(pixels.astype(np.uint8)).save(place / f"{k}.png")
    return tmp_path / "set"


def test_each_output_names_the_file_of_a_finding(tadperf, tmp_path, folder):
    code, out, err = tadperf("audit", "set", *FAST, "--out", "list.csv")
    assert code == 0, err
    assert "b & c/6.png" in out
    assert "report     list.html" in out
    page = (tmp_path / "list.html").read_text(encoding="utf-8")
    assert "b &amp; c/6.png" in page
    assert HOSTILE not in page
    assert "&lt;b onclick=alert(1)&gt;" in page
    with (tmp_path / "list.csv").open(newline="", encoding="utf-8") as file:
        first = next(csv.DictReader(file))
    assert list(first) == list(COLUMNS)
    assert first["file"] == "b & c/6.png"
    assert (first["given_label"], first["given_number"]) == ("b & c", "1")
    assert (first["suggested_label"], first["suggested_number"]) == (HOSTILE, "0")
    given_back = tadperf("audit", "set", *FAST, "--labels", "list.csv", "--json")
    assert given_back.code == 0, given_back.err
    assert all("file" in sample and "index" in sample for sample in json.loads(given_back.out)["worst"])
    again = tadperf("audit", "set", *FAST, "--out", "list.csv")
    assert again.code == 2


def test_an_existing_page_is_not_replaced(tadperf, tmp_path):
    (tmp_path / "kept.html").write_text("mine")
    refused = tadperf("audit", "digits", *FAST, "--out", "kept.csv")
    assert (refused.code, refused.out) == (2, "")
    assert refused.err == "tadperf: --out: kept.html: exists already; choose another name\n"


def test_the_help_explains_the_columns(tadperf):
    text = tadperf("audit", "--help").out
    assert [column for column in COLUMNS if column not in text] == []


def test_show_names_the_page_of_a_run(tadperf, tmp_path, tiny):
    assert tadperf("distill", "digits", *tiny, "--trust=off", "--quiet", "--out", "run").code == 0
    shown = tadperf("show", "run")
    assert (shown.code, shown.out) == (0, "run/grid.png\n")
    assert "run/report.html" in shown.err
    assert json.loads(tadperf("show", "run", "--json").out)["report"] == "run/report.html"
    (tmp_path / "run" / "report.html").unlink()
    assert "report" not in json.loads(tadperf("show", "run", "--json").out)


def test_the_columns_are_those_of_the_table():
    import torch

    state = as_given(torch.tensor([0, 1]), ("a", "b"))
    assert list(state.table(["x", "y"])) == list(COLUMNS)
    assert list(state.table()) == list(COLUMNS)[1:]
