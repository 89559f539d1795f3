"""An installation without compiled operators says so: once in a command, and in `tadperf info`."""

from __future__ import annotations

import importlib
from collections.abc import Callable, Iterator
from typing import Any

import pytest

from tadperf.cli import common, progress
from tadperf.kernels import native

NOTE = "the operators run plain PyTorch, which is slower: not built: the C++ build failed when tadperf was installed"


@pytest.fixture
def not_built(monkeypatch) -> Iterator[Callable[[Exception], None]]:
    """Returns a function that makes the import of the compiled part raise an exception."""
    original = importlib.import_module

    def fail(error: Exception) -> None:
        def import_module(name: str, package: str | None = None) -> Any:
            if name == "tadperf.kernels._native":
                raise error
            return original(name, package)

        monkeypatch.delenv("TADPERF_KERNELS", raising=False)
        monkeypatch.setattr(native.importlib, "import_module", import_module)
        native._load.cache_clear()
        common.note_missing_operators.cache_clear()

    yield fail
    monkeypatch.undo()
    native._load.cache_clear()
    common.note_missing_operators.cache_clear()


def test_a_command_says_it_once(tadperf, tmp_path, not_built):
    not_built(ModuleNotFoundError("No module named 'tadperf.kernels._native'"))
    (tmp_path / "empty").mkdir()
    code, _, err = tadperf("audit", "empty")
    assert code == 2
    assert err.splitlines()[0].startswith(NOTE)
    assert tadperf("audit", "empty").err.count("plain PyTorch") == 0  # the same process
    common.note_missing_operators.cache_clear()
    assert "plain PyTorch" not in tadperf("audit", "empty", "--quiet").err
    _, out, _ = tadperf("info")
    assert "not built: the C++ build failed" in " ".join(out.split())


def test_a_part_that_cannot_be_loaded_says_why(capsys, not_built):
    not_built(ImportError("libgomp.so.1: cannot open shared object file"))
    with progress.display(quiet=False):
        pass
    assert "slower: not loadable: libgomp.so.1: cannot open" in capsys.readouterr().err


def test_operators_that_the_user_switched_off_are_not_reported(capsys, monkeypatch, not_built):
    not_built(ModuleNotFoundError("gone"))
    monkeypatch.setenv("TADPERF_KERNELS", "reference")
    with progress.display(quiet=False):
        pass
    assert capsys.readouterr().err == ""
    monkeypatch.delenv("TADPERF_KERNELS")
