"""Images that cannot be decoded are left out, listed, and their labels with them."""

from __future__ import annotations

import io

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from PIL import Image

from tadperf.data import mapped
from tadperf.data.broken import save_broken
from tadperf.data.dataset import BrokenImage
from tadperf.data.open import open_data, open_test_split
from tadperf.errors import DataWarning, UserError


@pytest.fixture
def folder(tmp_path):
    """Returns a folder of two classes with five images each. Two training images and one test image are broken."""
    for split in ("train", "test"):
        for c, name in enumerate("ab"):
            (tmp_path / split / name).mkdir(parents=True)
            for k in range(5):
                Image.fromarray(np.full((4, 4), 50 * c + k, np.uint8)).save(tmp_path / split / name / f"{k}.png")
    for name in ("train/a/1.png", "train/b/0.png", "test/b/4.png"):
        (tmp_path / name).write_bytes(b"junk")
    return tmp_path


def test_without_the_option_all_broken_images_are_counted(folder):
    with pytest.raises(UserError, match=r"2 images: cannot be decoded: .*1\.png \(unknown format\).*skip_broken"):
        open_data(folder)


def test_broken_images_are_left_out_with_their_labels_and_names(folder):
    with pytest.warns(DataWarning, match="2 of 10 images of the train split cannot be decoded and are left out"):
        train, test = open_data(folder, skip_broken=True)
    assert train.images[:, 0, 0, 0].tolist() == [0, 2, 3, 4, 51, 52, 53, 54]
    assert train.labels.tolist() == [0] * 4 + [1] * 4
    assert train.file_names is not None
    assert train.file_names[:2] == ("train/a/0.png", "train/a/2.png")
    assert train.broken == (
        BrokenImage(1, "train/a/1.png", "unknown format"),
        BrokenImage(5, "train/b/0.png", "unknown format"),
    )
    assert test is not None
    assert len(test) == 9
    assert train.source["skip_broken"] is True
    assert save_broken(folder / "broken.csv", train, test)
    assert (folder / "broken.csv").read_text().splitlines() == [
        "split,row,file,reason",
        "train,1,train/a/1.png,unknown format",
        "train,5,train/b/0.png,unknown format",
        "test,9,test/b/4.png,unknown format",
    ]


def test_no_list_is_written_if_no_image_is_broken(folder):
    assert not save_broken(folder / "broken.csv", open_data("digits").train)
    assert not (folder / "broken.csv").exists()


@pytest.mark.parametrize("rows", ["all", "left"])
def test_labels_may_or_may_not_have_rows_for_broken_images(folder, rows):
    names = [f"{name}/{k}.png" for name in "ab" for k in range(5)]
    if rows == "left":
        names = [name for name in names if name not in ("a/1.png", "b/0.png")]
    (folder / "labels.csv").write_text(
        "\n".join(["file,label", *(f"{name},{'ba'[k % 2]}" for k, name in enumerate(names))])
    )
    np.save(folder / "labels.npy", [1 - k % 2 for k in range(len(names))])
    expected = [1 - k % 2 for k, name in enumerate(names) if name not in ("a/1.png", "b/0.png")]
    for suffix in ("csv", "npy"):
        train = open_data(folder, skip_broken=True, labels=str(folder / f"labels.{suffix}")).train
        assert train.labels.tolist() == expected


def test_a_split_of_broken_images_is_refused(folder):
    for file in (folder / "test").rglob("*.png"):
        file.write_bytes(b"")
    with pytest.raises(UserError, match=r"10 images: cannot be decoded: .*0\.png \(empty\)"):
        open_data(folder, skip_broken=True)


def test_a_class_of_broken_images_is_refused(folder):
    for file in (folder / "train" / "b").rglob("*.png"):
        file.write_bytes(b"")
    with pytest.raises(UserError, match="class 'b' has no training sample"):
        open_data(folder, skip_broken=True)


def test_broken_rows_of_parquet_files_are_left_out(tmp_path):
    def encode(k: int) -> bytes:
        stream = io.BytesIO()
        Image.fromarray(np.full((4, 4), k, np.uint8)).save(stream, "png")
        return b"junk" if k == 3 else stream.getvalue()

    table = {"image": [encode(k) for k in range(6)], "label": [k % 2 for k in range(6)]}
    pq.write_table(pa.table(table), tmp_path / "train.parquet")
    train = open_data(tmp_path / "train.parquet", skip_broken=True).train
    assert train.images[:, 0, 0, 0].tolist() == [0, 1, 2, 4, 5]
    assert train.labels.tolist() == [0, 1, 0, 0, 1]
    assert [(image.row, image.reason) for image in train.broken] == [(3, "unknown format")]


def test_the_list_of_a_large_set_is_kept_in_the_cache(folder, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(folder / "cache"))
    monkeypatch.setattr(mapped, "is_large", lambda shape: True)
    decoded = []
    monkeypatch.setattr("tadperf.data.decode.Encoded.__new__", spy(decoded), raising=False)
    first = open_data(folder, skip_broken=True)
    count = len(decoded)
    second = open_data(folder, skip_broken=True)
    assert first.train.fingerprint == second.train.fingerprint
    assert first.train.broken == second.train.broken
    assert count > len(decoded) - count  # the second time, no image is decoded to find the broken ones
    assert not list((folder / "cache").rglob("*.part"))


def spy(calls: list) -> object:
    from tadperf.data.decode import Encoded

    make = Encoded.__new__

    def record(kind, *values):
        calls.append(values)
        return make(kind, *values)

    return record


def test_the_test_split_alone_leaves_out_the_same_images(folder):
    from tadperf.data.layout import ReadOptions

    both = open_data(folder, skip_broken=True)
    alone = open_test_split(folder, ReadOptions(skip_broken=True))
    assert both.test is not None
    assert alone is not None
    assert alone.fingerprint == both.test.fingerprint


def test_other_ranks_use_the_list_of_rank_0(folder, monkeypatch):
    """Rank 0 reports that image 3 is broken too, perhaps because its disk failed for a moment."""
    from tadperf.compute import ranks

    calls = []

    def from_rank_0(make):
        calls.append(make)
        return (BrokenImage(1, "", "x"), BrokenImage(3, "", "x"), BrokenImage(5, "", "x"), BrokenImage(9, "", "x"))

    monkeypatch.setattr(ranks, "once", from_rank_0)
    train = open_data(folder, skip_broken=True).train
    assert train.images[:, 0, 0, 0].tolist() == [0, 2, 4, 51, 52, 53]
    assert len(calls) == 2  # one for each split
