from __future__ import annotations

import json

import pytest
import torch

from tadperf.kernels.gpu import launch_configs


@pytest.fixture
def files(tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    monkeypatch.setattr(launch_configs, "SHIPPED", tmp_path / "shipped.json")
    entries = [{"up_to": 64, "rows": 8, "num_warps": 1}, {"up_to": None, "rows": 1, "num_warps": 4}]
    launch_configs.SHIPPED.write_text(
        json.dumps({"default": {"sum": entries}, "H": {"sum": [{"up_to": None, "rows": 2}]}})
    )
    launch_configs._tables.cache_clear()
    launch_configs.lookup.cache_clear()
    yield
    launch_configs._tables.cache_clear()
    launch_configs.lookup.cache_clear()


def test_uses_the_first_entry_that_is_large_enough(files):
    assert launch_configs.lookup("sum", "other", 64) == {"rows": 8, "num_warps": 1}
    assert launch_configs.lookup("sum", "other", 65) == {"rows": 1, "num_warps": 4}
    assert launch_configs.lookup("sum", "H", 1) == {"rows": 2}
    assert launch_configs.launch_config("sum", torch.device("cpu"), 1) == {"rows": 8, "num_warps": 1}
    with pytest.raises(KeyError, match="no default for mean of size 3"):
        launch_configs.lookup("mean", "H", 3)


def test_entries_of_the_user_take_precedence(files):
    assert launch_configs.save("sum", "H", [{"up_to": 10, "rows": 5}]) == launch_configs.user_file()
    assert launch_configs.lookup("sum", "H", 10) == {"rows": 5}
    assert launch_configs.lookup("sum", "H", 11) == {"rows": 2}  # larger sizes use the shipped entries
    launch_configs.save("mean", "H", [{"up_to": None, "rows": 1}])
    assert set(json.loads(launch_configs.user_file().read_text())["H"]) == {"sum", "mean"}


def test_an_override_ends_with_its_block(files):
    asked = []

    def choose(operator, size, entry):
        asked.append((operator, size, entry))
        return {"rows": 3}

    cpu = torch.device("cpu")
    with launch_configs.override(choose):
        assert launch_configs.launch_config("sum", cpu, 65) == {"rows": 3}
    assert asked == [("sum", 65, {"rows": 1, "num_warps": 4})]
    with pytest.raises(RuntimeError), launch_configs.override(choose):
        raise RuntimeError
    assert launch_configs.launch_config("sum", cpu, 65) == {"rows": 1, "num_warps": 4}
