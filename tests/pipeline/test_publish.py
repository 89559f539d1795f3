"""Published sets: files, card, and the way back, from a folder and from a hub that the test imitates."""

from __future__ import annotations

import json
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import huggingface_hub
import pytest
import torch
import yaml
from huggingface_hub.errors import EntryNotFoundError

from tadperf.artifact import DistilledSet, load
from tadperf.config.merge import merge
from tadperf.errors import UserError
from tadperf.nets.students import summarise
from tadperf.pipeline.publish import card, pull, push
from tadperf.pipeline.verify import stored_accuracy

FILES = ["README.md", "config.toml", "distilled.safetensors", "result.json"]


def run_folder(tmp_path: Path, figures: bool = True) -> Path:
    """Returns the file of a run whose data lie in /home/someone."""
    config = merge("quick", options={"data.path": "/home/someone/photos", "seed": 3})
    ds = DistilledSet.from_tensors(
        torch.zeros(4, 3, 8, 8),
        torch.tensor([0, 1, 0, 1]),
        [0.5] * 3,
        [0.2] * 3,
        lr=0.02,
        class_names=("a|b", "<script>"),
        config=config,
        data={"name": "photos", "source": {"path": "/home/someone/photos", "format": "folder"}},
    )
    (tmp_path / "run").mkdir()
    ds.save(tmp_path / "run" / "distilled.safetensors")
    if figures:
        result = {
            "accuracy": {"convnet": summarise([0.9, 0.92])},
            "baselines": {"random_real": summarise([0.8])},
            "paths": {"run": "/home/someone/run"},
            "data": {"source": {"path": "/home/someone/photos"}},
        }
        (tmp_path / "run" / "result.json").write_text(json.dumps(result))
    return tmp_path / "run" / "distilled.safetensors"


def test_a_set_goes_to_a_folder_and_back(tmp_path):
    file, mirror = run_folder(tmp_path), tmp_path / "mirrors" / "mine"
    for _ in range(2):  # the second time the files are replaced
        assert push(file, str(mirror), "cc-by-4.0") == {"target": str(mirror)}
    assert sorted(path.name for path in mirror.iterdir()) == FILES
    for path in mirror.iterdir():
        assert b"someone" not in path.read_bytes(), path
    facts = pull(str(mirror), tmp_path / "copy")
    assert facts["set"].startswith("DistilledSet(photos: 4 images")
    again = load(tmp_path / "copy")
    assert torch.equal(again.images, load(file).images)
    assert again.data["source"] == {"path": "photos", "format": "folder"}
    assert stored_accuracy(tmp_path / "copy" / "distilled.safetensors") == {"convnet": [0.9, 0.92]}


def test_the_card_has_facts_for_the_hub_figures_and_the_command(tmp_path):
    push(run_folder(tmp_path), str(tmp_path / "mirror"), "cc-by-4.0")
    text = (tmp_path / "mirror" / "README.md").read_text()
    front, body = text.split("---\n")[1:]
    assert yaml.safe_load(front) == {
        "license": "cc-by-4.0",
        "pretty_name": "mirror",
        "task_categories": ["image-classification"],
        "tags": ["dataset-distillation", "tadperf"],
    }
    assert "4 distilled images of photos: 3 x 8 x 8, 2 classes, hard labels." in body
    assert "| convnet | 91.0 ± 1.4 % | 2 |\n| random_real | 80.0 ± 0.0 % | 1 |\n" in body
    assert "\n    tadperf distill photos --config config.toml\n" in body
    assert "Classes: a/b, (script)." in body
    settings = merge(None, tmp_path / "mirror" / "config.toml")
    assert settings == merge("quick", options={"data.path": "photos", "seed": 3})


def test_a_set_without_figures_has_a_card_too(tmp_path):
    file = run_folder(tmp_path, figures=False)
    push(file, str(tmp_path / "mirror"))
    text = (tmp_path / "mirror" / "README.md").read_text()
    assert 'license: "unknown"' in text
    assert "test accuracy" not in text
    imported = replace(load(file), data={"name": "x", "imported": "y"}, class_names=tuple(map(str, range(30))))
    text = card(imported, {}, "mit", "na\nme")
    assert "Imported from the files of another program" in text
    assert "tadperf distill" not in text
    assert "18, 19, ...." in text
    assert "# na\\nme\n" in text
    assert "published accuracy" not in text
    known = replace(imported, data={**imported.data, "published": {"mean": 0.283, "std": 0.002}})
    assert "Its published accuracy is 28.3 ± 0.2 %." in card(known, {}, "mit", "x")


class Hub:
    """Imitates the hub: data sets are folders below `root`."""

    def __init__(self, root: Path) -> None:
        self.root = root

    def create_repo(self, name: str, repo_type: str, exist_ok: bool) -> str:
        assert (repo_type, exist_ok) == ("dataset", True)
        (self.root / name).mkdir(parents=True, exist_ok=True)
        return f"https://hub/{name}"

    def upload_folder(self, repo_id: str, folder_path: Path, **options: Any) -> None:
        assert options["repo_type"] == "dataset"
        shutil.copytree(folder_path, self.root / repo_id, dirs_exist_ok=True)

    def download(self, name: str, file: str, repo_type: str) -> str:
        assert repo_type == "dataset"
        if not (self.root / name).is_dir():
            raise ConnectionError("no route\nto host")
        if not (self.root / name / file).is_file():
            raise EntryNotFoundError(file)
        return str(self.root / name / file)


def test_a_set_goes_to_the_hub_and_back(tmp_path, monkeypatch):
    hub = Hub(tmp_path / "hub")
    monkeypatch.setattr(huggingface_hub, "HfApi", lambda: hub)
    monkeypatch.setattr(huggingface_hub, "hf_hub_download", hub.download)
    file = run_folder(tmp_path, figures=False)
    pushed = push(file, "hf://user/tiny")
    assert pushed == {"target": "hf://user/tiny", "url": "https://hub/user/tiny"}
    pull("hf://user/tiny", tmp_path / "copy")
    assert sorted(path.name for path in (tmp_path / "copy").iterdir()) == FILES[:-1]
    (hub.root / "user" / "other").mkdir()
    for source, message in (
        ("hf://user/other", r"SOURCE: hf://user/other: holds no distilled\.safetensors, so it is no distilled set"),
        ("hf://user/none", r"SOURCE: hf://user/none: cannot be read \(no route to host\); check the name"),
        ("hf://none", "SOURCE: hf://none: must be hf://user/name"),
    ):
        with pytest.raises(UserError, match=message) as error:
            pull(source, tmp_path / "another")
        assert "\n" not in str(error.value)
    monkeypatch.setattr(hub, "upload_folder", lambda **options: 1 / 0)
    with pytest.raises(UserError, match=r"TARGET: hf://user/tiny: cannot be written \(division by zero\)"):
        push(file, "hf://user/tiny")
    assert not (tmp_path / "another").exists()


def test_damaged_sets_and_wrong_places_are_refused_in_one_line(tmp_path):
    file = run_folder(tmp_path)
    (tmp_path / "text").write_text("")
    with pytest.raises(UserError, match=r"TARGET: .*text: cannot be written: .*; choose another folder"):
        push(file, str(tmp_path / "text"))
    with pytest.raises(UserError, match=r"SOURCE: .*holds no distilled\.safetensors; give the folder of a pushed set"):
        pull(str(tmp_path), tmp_path / "copy")
    (tmp_path / "bad").mkdir()
    (tmp_path / "bad" / "distilled.safetensors").write_bytes(file.read_bytes()[:-9])
    with pytest.raises(UserError, match="truncated, or not a safetensors file"):
        pull(str(tmp_path / "bad"), tmp_path / "copy")
    assert not (tmp_path / "copy").exists()
    for content in ("", "[]", '{"accuracy": {"convnet": {"mean": "high"}}}', "[" * 100000):
        (tmp_path / "run" / "result.json").write_text(content)
        with pytest.raises(UserError, match=r"FILE: .*result\.json: is damaged; delete it to publish"):
            push(file, str(tmp_path / "mirror"))
    replace(load(file), config={"net": 3}).save(file)
    with pytest.raises(UserError, match=r"FILE: .*its config is damaged, or of another version"):
        push(file, str(tmp_path / "mirror"))
    assert not (tmp_path / "mirror").exists()


def test_a_missing_library_is_named(tmp_path, monkeypatch):
    import sys

    monkeypatch.setitem(sys.modules, "huggingface_hub", None)
    with pytest.raises(UserError, match="huggingface_hub is missing: install it: pip install huggingface_hub"):
        pull("hf://user/tiny", tmp_path / "copy")
