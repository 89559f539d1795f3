"""The notebook in examples/: its stored outputs, and that it runs. Running it takes about 30 s of CPU time."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest

NOTEBOOK = Path(__file__).parents[2] / "examples/first_look.ipynb"
NUMBER = r"([\d.]+)"


def test_the_notebook(tmp_path):
    nbclient = pytest.importorskip("nbclient")
    pytest.importorskip("ipykernel")
    nbformat = pytest.importorskip("nbformat")
    notebook = nbformat.read(NOTEBOOK, as_version=4)
    nbclient.NotebookClient(notebook, timeout=240, kernel_name="python3", resources=at(tmp_path)).execute()
    out = printed(notebook)
    suspected, right = map(int, re.findall(r"(\d+) suspected, (\d+) of them", out)[0])
    assert 450 < right <= suspected < 650  # 567 labels are wrong
    random, distilled = map(float, re.findall(rf": {NUMBER}% of the test digits", out))
    assert distilled > random + 20
    assert list(tmp_path.iterdir()) == []  # it leaves no files


def at(folder: Path) -> dict[str, dict[str, str]]:
    return {"metadata": {"path": str(folder)}}


def printed(notebook: dict) -> str:
    outputs = [output for cell in notebook["cells"] for output in cell.get("outputs", [])]
    return "".join("".join(output.get("text", "")) for output in outputs)


def test_the_stored_notebook_has_its_outputs_and_is_small():
    notebook = json.loads(NOTEBOOK.read_text())
    assert NOTEBOOK.stat().st_size < 300_000
    assert len(re.findall(rf": {NUMBER}% of the test digits", printed(notebook))) == 2
    cells = [cell for cell in notebook["cells"] if cell["cell_type"] == "code"]
    assert [cell["execution_count"] for cell in cells] == list(range(1, len(cells) + 1))
    pictures = [o for cell in cells for o in cell["outputs"] if "image/png" in o.get("data", {})]
    assert len(pictures) == 2
    assert "/home/" not in NOTEBOOK.read_text()
