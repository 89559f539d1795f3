"""JSON and safetensors files, and the cache folder."""

from __future__ import annotations

import json

import pytest
import torch

from tadperf.errors import UserError
from tadperf.files import cache_folder, load_tensors, save_tensors, write_json


def test_a_path_that_is_not_utf8_survives_json_and_metadata(tmp_path):
    path = b"/data/caf\xe9".decode("utf-8", "surrogateescape")
    write_json(tmp_path / "a.json", {"path": path, "name": "caf\u00e9"})
    assert json.loads((tmp_path / "a.json").read_text("utf-8")) == {"path": path, "name": "caf\u00e9"}
    text = json.dumps({"path": path, "name": "caf\u00e9"}, ensure_ascii=False)
    save_tensors(tmp_path / "a.safetensors", {"x": torch.zeros(1)}, {"config": text})
    assert json.loads(load_tensors(tmp_path / "a.safetensors")[1]["config"]) == {"path": path, "name": "caf\u00e9"}


def test_the_cache_folder_is_made_on_demand_for_its_owner_alone(tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    assert not cache_folder("images", create=False).exists()
    assert cache_folder("images") == tmp_path / "cache" / "tadperf" / "images"
    assert cache_folder("images").stat().st_mode & 0o777 == 0o700
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "file"))
    with pytest.raises(UserError, match=r"cannot be created \(.*\); set XDG_CACHE_HOME"):
        cache_folder("images")
