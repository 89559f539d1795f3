"""A test split is made where a set has none: its draw, labels for the whole set or a part, and opening it again."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from PIL import Image

from tadperf.data import mapped
from tadperf.data.layout import ReadOptions
from tadperf.data.open import open_data, open_test_split
from tadperf.data.test_split import draw_test_rows
from tadperf.errors import DataWarning, UserError
from tadperf.trust.state import as_given


@pytest.fixture
def folder(tmp_path):
    """Returns a folder per class without splits: 10 images of class a (values 0 to 9) and 5 of class b (50 to 54)."""
    for name, start, count in (("a", 0, 10), ("b", 50, 5)):
        (tmp_path / "set" / name).mkdir(parents=True)
        for k in range(count):
            image = Image.fromarray(np.full((4, 4), start + k, np.uint8))
            image.save(tmp_path / "set" / name / f"{start + k:02}.png")
    return tmp_path / "set"


def values(split) -> list[int]:
    return split.images[:, 0, 0, 0].tolist()


def test_the_share_of_every_class_is_drawn():
    labels = torch.tensor([0] * 100 + [1] * 10 + [2] * 2 + [3])
    drawn = draw_test_rows(labels, 0.2)
    assert labels[drawn].bincount(minlength=4).tolist() == [20, 2, 1, 0]
    assert torch.equal(drawn, draw_test_rows(labels, 0.2))
    assert not draw_test_rows(torch.tensor([0, 1, 2]), 0.5).any()


def test_the_split_is_said_and_divides_the_set(folder):
    assert open_data(folder).test is None
    words = r"no test split; 3 of 15 images \(20 % of each class, data\.test_share\).*may be wrong"
    with pytest.warns(DataWarning, match=words):
        train, test = open_data(folder, test_share=0.2)
    assert test is not None
    assert sorted(values(train) + values(test)) == [*range(10), *range(50, 55)]
    assert test.labels.tolist() == [0, 0, 1]
    assert test.file_names == tuple(f"{'ab'[v >= 50]}/{v:02}.png" for v in values(test))
    assert (train.source["test_share"], train.source["split"], test.source["split"]) == (0.2, "train", "test")


def test_a_set_with_a_test_split_keeps_it():
    train, test = open_data("digits", test_share=0.5)
    assert test is not None
    assert (len(train), len(test)) == (1400, 397)
    assert "test_share" not in train.source


@pytest.mark.filterwarnings("ignore::tadperf.errors.DataWarning")
def test_the_test_split_opens_again(folder):
    both = open_data(folder, test_share=0.3)
    alone = open_test_split(folder, ReadOptions(test_share=0.3))
    assert both.test is not None
    assert alone is not None
    assert alone.fingerprint == both.test.fingerprint


@pytest.mark.filterwarnings("ignore::tadperf.errors.DataWarning")
def test_labels_of_the_whole_set(folder, tmp_path):
    names = [f"a/{k:02}.png" for k in range(10)] + [f"b/{k}.png" for k in range(50, 55)]
    given = {name: "ab"[k % 2] for k, name in enumerate(names)} | {"a/00.png": "", "b/54.png": ""}
    (tmp_path / "labels.csv").write_text("\n".join(["file,label", *(f"{n},{c}" for n, c in given.items())]))
    train, test = open_data(folder, test_share=0.2, labels=str(tmp_path / "labels.csv"))
    plain = open_data(folder, test_share=0.2)
    assert test is not None
    assert plain.test is not None
    for split, before in ((train, plain.train), (test, plain.test)):
        assert before.file_names is not None
        assert split.file_names == tuple(name for name in before.file_names if given[name])
        assert [split.class_names[c] for c in split.labels] == [given[name] for name in split.file_names or ()]


@pytest.mark.filterwarnings("ignore::tadperf.errors.DataWarning")
def test_a_test_sample_has_its_clean_label(folder, tmp_path):
    clean = [0] * 10 + [1] * 5
    rows = [f"{1 - c},{c}" for c in clean]
    lines = ["index,label,clean_label", *(f"{k},{row}" for k, row in enumerate(rows))]
    (tmp_path / "labels.csv").write_text("\n".join(lines))
    train, test = open_data(folder, test_share=0.2, labels=str(tmp_path / "labels.csv"))
    assert test is not None
    assert test.labels.tolist() == [0, 0, 1]
    assert train.labels.tolist() == [1] * 8 + [0] * 4
    assert train.clean_labels is not None
    assert train.clean_labels.tolist() == [0] * 8 + [1] * 4


@pytest.mark.filterwarnings("ignore::tadperf.errors.DataWarning")
@pytest.mark.parametrize("named", [True, False])
def test_the_list_of_a_run_can_be_given_back(folder, tmp_path, named):
    """The list of a run has the training samples alone."""
    train, test = open_data(folder, test_share=0.2)
    as_given(train.labels, train.class_names).export(tmp_path / "labels.csv", train.file_names if named else None)
    again = open_data(folder, test_share=0.2, labels=str(tmp_path / "labels.csv"))
    assert again.train.fingerprint == train.fingerprint
    assert again.test is not None
    assert test is not None
    assert again.test.fingerprint == test.fingerprint


@pytest.mark.filterwarnings("ignore::tadperf.errors.DataWarning")
def test_broken_images_and_labels_of_the_whole_set(folder, tmp_path):
    (folder / "a" / "03.png").write_bytes(b"junk")
    names = [f"a/{k:02}.png" for k in range(10)] + [f"b/{k}.png" for k in range(50, 55)]
    given = {name: "" if k == 7 else "ab"[k % 2] for k, name in enumerate(names)}
    (tmp_path / "labels.csv").write_text("\n".join(["file,label", *(f"{n},{c}" for n, c in given.items())]))
    train, test = open_data(folder, test_share=0.3, labels=str(tmp_path / "labels.csv"), skip_broken=True)
    plain = open_data(folder, test_share=0.3, skip_broken=True)
    assert test is not None
    assert plain.test is not None
    assert train.file_names is not None
    assert test.file_names is not None
    assert set(plain.test.file_names or ()) - {"a/07.png"} == set(test.file_names)
    assert len(train) + len(test) == 13
    assert ([image.name for image in train.broken], test.broken) == (["a/03.png"], ())
    for split in (train, test):
        assert [split.class_names[c] for c in split.labels] == [given[name] for name in split.file_names or ()]


@pytest.mark.filterwarnings("ignore::tadperf.errors.DataWarning")
def test_a_large_set_is_divided_in_the_cache(folder, tmp_path, monkeypatch):
    expected = open_data(folder, test_share=0.2)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.setattr(mapped, "is_large", lambda shape: True)
    for _ in range(2):
        train, test = open_data(folder, test_share=0.2)
        assert expected.test is not None
        assert test is not None
        assert (train.fingerprint, test.fingerprint) == (expected.train.fingerprint, expected.test.fingerprint)
        assert (train.file_names, test.file_names) == (expected.train.file_names, expected.test.file_names)


def test_a_set_of_one_image_per_class_is_refused(folder):
    for name in ("a", "b"):
        for file in sorted((folder / name).iterdir())[1:]:
            file.unlink()
    with pytest.raises(UserError, match="has too few images for a test split; add some"):
        open_data(folder, test_share=0.5)
