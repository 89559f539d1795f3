"""Hostile files are refused quickly, with one line and in little memory, and no code in them runs."""

from __future__ import annotations

import resource
import runpy
import time
from pathlib import Path

import pytest

from tadperf.data.open import open_data
from tadperf.errors import UserError, printable

SCRIPTS = sorted(Path(__file__).parent.glob("[!t]*.py"))
MAX_SECONDS, MAX_MEMORY_MB = 10, 512


def memory_mb() -> int:
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss // 1024


@pytest.mark.parametrize("script", SCRIPTS, ids=lambda script: script.stem)
def test_every_attack_is_refused(script, tmp_path, monkeypatch, capfd):
    monkeypatch.chdir(tmp_path)
    files = runpy.run_path(str(script))["make"](tmp_path)
    assert len(files) > 5
    for name, path in files.items():
        before, start = memory_mb(), time.monotonic()
        with pytest.raises(UserError) as caught:
            open_data(path)
        assert printable(str(caught.value)) == str(caught.value), name
        assert time.monotonic() - start < MAX_SECONDS, name
        assert memory_mb() - before < MAX_MEMORY_MB, name
    assert not list(tmp_path.rglob("it_ran"))
    assert not list(tmp_path.parent.glob("it_ran"))
    assert capfd.readouterr().err == ""
