from __future__ import annotations

import json

import pytest
import torch

from tadperf.kernels import launch


@pytest.fixture
def files(tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    monkeypatch.setattr(launch, "SHIPPED", tmp_path / "shipped.json")
    entries = [{"up_to": 64, "rows": 8, "num_warps": 1}, {"up_to": None, "rows": 1, "num_warps": 4}]
    launch.SHIPPED.write_text(json.dumps({"default": {"sum": entries}, "H": {"sum": [{"up_to": None, "rows": 2}]}}))
    launch._tables.cache_clear()
    launch.lookup.cache_clear()
    yield
    launch._tables.cache_clear()
    launch.lookup.cache_clear()


def test_first_entry_that_is_large_enough(files):
    assert launch.lookup("sum", "other", 64) == {"rows": 8, "num_warps": 1}
    assert launch.lookup("sum", "other", 65) == {"rows": 1, "num_warps": 4}
    assert launch.lookup("sum", "H", 1) == {"rows": 2}
    assert launch.launch("sum", torch.device("cpu"), 1) == {"rows": 8, "num_warps": 1}
    with pytest.raises(KeyError, match="no default for mean of size 3"):
        launch.lookup("mean", "H", 3)


def test_tuned_entries_of_the_user_go_first(files):
    assert launch.write("sum", "H", [{"up_to": 10, "rows": 5}]) == launch.user_file()
    assert launch.lookup("sum", "H", 10) == {"rows": 5}
    assert launch.lookup("sum", "H", 11) == {"rows": 2}  # beyond them the shipped ones hold
    launch.write("mean", "H", [{"up_to": None, "rows": 1}])
    assert set(json.loads(launch.user_file().read_text())["H"]) == {"sum", "mean"}


def test_replaced_launches_hold_within_the_block_alone(files):
    asked = []

    def choose(operator, size, entry):
        asked.append((operator, size, entry))
        return {"rows": 3}

    cpu = torch.device("cpu")
    with launch.replaced(choose):
        assert launch.launch("sum", cpu, 65) == {"rows": 3}
    assert asked == [("sum", 65, {"rows": 1, "num_warps": 4})]
    with pytest.raises(RuntimeError), launch.replaced(choose):
        raise RuntimeError
    assert launch.launch("sum", cpu, 65) == {"rows": 1, "num_warps": 4}
