"""Messages on stderr: warnings about the data, and names that hold terminal commands."""

from __future__ import annotations

import subprocess
import sys

import numpy as np
from PIL import Image


def audit(path) -> subprocess.CompletedProcess[str]:
    settings = ["trust.rounds=1", "trust.proxies=1", "trust.epochs=1", "net.width=4", "net.depth=1"]
    command = [sys.executable, "-m", "tadperf", "audit", str(path), "--quiet", *(f"--set={s}" for s in settings)]
    return subprocess.run(command, capture_output=True, text=True, timeout=120)


def put(folder, count) -> None:
    folder.mkdir(parents=True)
    for k in range(count):
        Image.fromarray(np.random.default_rng(k).integers(0, 256, (8, 8), np.uint8)).save(folder / f"{k}.png")


def test_a_warning_about_the_data_is_one_line(tmp_path):
    for name in "ab":
        put(tmp_path / "set" / name, 6)
        (tmp_path / "set" / name / "notes.txt").write_text("")
    done = audit(tmp_path / "set")
    assert done.returncode == 0
    lines = [line for line in done.stderr.splitlines() if line]
    assert lines == [f"tadperf: warning: data: {tmp_path / 'set'}: 2 other files are not used: .txt (2)"]


def test_control_characters_of_names_do_not_reach_the_terminal(tmp_path):
    put(tmp_path / "set" / "a", 1)
    bad = tmp_path / "set" / "b\x1b[31m\x07"
    bad.mkdir()
    (bad / "0.png").write_bytes(b"junk")
    done = audit(tmp_path / "set")
    assert done.returncode == 2
    assert len(done.stderr.splitlines()) == 1
    assert "\x1b" not in done.stderr
    assert "b\\x1b[31m\\x07/0.png: cannot be decoded (unknown format)" in done.stderr
