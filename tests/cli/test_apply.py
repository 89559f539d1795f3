"""`tadperf audit --apply` and `tadperf apply`: a cleaned copy that opens again, and wrong use in one line."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

FAST = ["--device=cpu", "--quiet", *(f"--set=trust.{s}" for s in ("rounds=1", "proxies=2", "epochs=4"))]


@pytest.fixture
def folder(tmp_path) -> Path:
    """A set of two classes; 6.png lies in the wrong folder."""
    rng = np.random.default_rng(0)
    for k in range(40):
        place = tmp_path / "set" / "ab"[k % 2 if k != 6 else 1]
        place.mkdir(parents=True, exist_ok=True)
        pixels = rng.integers(0, 60, (8, 8)) + 150 * (k % 2)
        Image.fromarray(pixels.astype(np.uint8)).save(place / f"{k}.png")
    return tmp_path / "set"


def test_an_audit_writes_a_cleaned_copy_and_a_corrected_list_is_applied(tadperf, tmp_path, folder):
    code, out, err = tadperf("audit", "set", *FAST, "--out", "list.csv", "--apply", "clean", "--json")
    assert code == 0, err
    done = json.loads(out)["applied"]
    assert done["kept"] + done["relabelled"] + done["left_out"] == 40
    copied = sorted((tmp_path / "clean" / "train").rglob("*.png"))
    assert len(copied) == 40 - done["left_out"]
    assert tmp_path / "clean" / "train" / "b" / "6.png" not in copied
    assert all(path.is_symlink() and path.resolve().is_relative_to(folder) for path in copied)
    assert tadperf("audit", "clean", *FAST).code == 0

    text = (tmp_path / "list.csv").read_text()
    (tmp_path / "list.csv").write_text(text.replace(",relabelled,", ",untrusted,"))  # only the column label counts
    applied = tadperf("apply", "set", "again", "--labels", "list.csv", "--json")
    assert applied.code == 0, applied.err
    assert json.loads(applied.out)["left_out"] == done["left_out"]
    again = sorted(path.relative_to(tmp_path / "again") for path in (tmp_path / "again" / "train").rglob("*.png"))
    assert again == [path.relative_to(tmp_path / "clean") for path in copied]
    refused = tadperf("apply", "set", "again", "--labels", "list.csv")
    assert (refused.code, refused.out) == (2, "")
    assert refused.err == "tadperf: OUT: again: exists already; choose another folder\n"


def test_the_text_says_what_was_done(tadperf, tmp_path, folder):
    code, out, err = tadperf("audit", "set", *FAST, "--apply", "clean")
    assert code == 0, err
    line = out.splitlines()[-1]
    assert line.startswith("clean: ")
    assert line.endswith("left out (symbolic links)")


@pytest.mark.parametrize(
    ("arguments", "line"),
    [
        (
            "audit set --apply nowhere/clean",
            "--apply: nowhere/clean: the folder above it does not exist; make it first",
        ),
        ("audit set --apply set/clean", "--apply: set/clean: lies inside the data, which must not change"),
        (
            "audit set --apply clean --noise symmetric:0.2",
            "these have simulated noise (symmetric:0.2); use --noise none",
        ),
        ("apply set clean", "is not a run folder; add --labels FILE"),
        ("apply set clean --quiet --labels none.csv", "--labels: "),
        ("apply digits clean --labels none.csv", "--labels: none.csv: no such file"),
        ("apply nowhere clean --labels none.csv", "nowhere: no such file or folder"),
    ],
)
def test_wrong_use(tadperf, tmp_path, folder, arguments, line):
    code, out, err = tadperf(*arguments.split())
    assert (code, out) == (2, "")
    assert line in err
    assert err.count("\n") == 1
    assert sorted(path.name for path in tmp_path.iterdir()) == ["set"]
