"""Tables of image files: columns, labels, splits, and where the images may lie."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from tadperf.data.layout import ReadOptions
from tadperf.data.open import open_data, open_test_split
from tadperf.data.readers.table import class_names_of
from tadperf.errors import DataWarning, UserError


@pytest.fixture
def write(tmp_path):
    """Returns a function that writes a table next to a folder i of six images: image k has the pixel value k."""
    for k in range(6):
        (tmp_path / "i").mkdir(exist_ok=True)
        Image.fromarray(np.full((4, 4), k, np.uint8)).save(tmp_path / "i" / f"{k}.png")

    def table(*lines: str, name: str = "set.csv") -> Path:
        (tmp_path / name).write_text("\n".join(lines), encoding="utf-8")
        return tmp_path / name

    return table


def rows(labels: str, start: str = "i/") -> list[str]:
    return [f"{start}{k}.png,{label}" for k, label in enumerate(labels.split())]


@pytest.mark.parametrize(
    ("labels", "names", "expected"),
    [
        ("b a b a b a", ("a", "b"), [1, 0, 1, 0, 1, 0]),
        ("0 1 2 0 1 2", ("0", "1", "2"), [0, 1, 2, 0, 1, 2]),
        ("1 2 10 1 2 10", ("1", "2", "10"), [0, 1, 2, 0, 1, 2]),
        ("01 02 01 02 01 02", ("01", "02"), [0, 1, 0, 1, 0, 1]),
        ("1.5 2 1.5 2 2 2", ("1.5", "2"), [0, 1, 0, 1, 1, 1]),
    ],
)
def test_labels_are_names_or_class_numbers(write, labels, names, expected):
    train, test = open_data(write("path,label", *rows(labels)))
    assert test is None
    assert (train.class_names, train.labels.tolist()) == (names, expected)
    assert train.images[:, 0, 0, 0].tolist() == list(range(6))
    assert train.file_names == tuple(f"i/{k}.png" for k in range(6))


def test_a_gap_in_the_class_numbers_is_refused(write):
    with pytest.raises(UserError, match="class '1' has no training sample"):
        open_data(write("path,label", *rows("0 2 0 2 0 2")))
    assert class_names_of(["0", "7"]) == ("0", "7")  # 7 is too large for a number of a class of two samples


def test_rows_without_a_label_are_left_out(write):
    path = write("path,label", *rows("a b a b"), "i/4.png,")
    with pytest.warns(DataWarning, match="1 of 5 rows have no label and are left out"):
        train = open_data(path).train
    assert len(train) == 4
    with pytest.raises(UserError, match="column 'label' is empty"):
        open_data(write("path,label", "i/0.png,", "i/1.png,"))


def test_clean_labels_are_read(write):
    lines = [f"{row},{clean}" for row, clean in zip(rows("a b a b a b"), "aabbab", strict=True)]
    train = open_data(write("path,label,clean_label", *lines)).train
    assert train.clean_labels is not None
    assert train.clean_labels.tolist() == [0, 0, 1, 1, 0, 1]


def test_the_test_split_alone(write):
    splits = ["train"] * 4 + ["val"] * 2
    lines = [f"{row},{split}" for row, split in zip(rows("a b a b a b"), splits, strict=True)]
    test = open_test_split(write("path,label,split", *lines))
    assert test is not None
    assert test.images[:, 0, 0, 0].tolist() == [4, 5]


def test_columns_can_be_named(write):
    path = write("path,label,species,shot", *(f"x,{k},{'ab'[k % 2]},i/{k}.png" for k in range(6)))
    train = open_data(path, image_column="Shot", label_column="species").train
    assert train.class_names == ("a", "b")
    with pytest.raises(UserError, match="has no such column, only path, label, species, shot"):
        open_data(path, label_column="colour")


@pytest.mark.parametrize(
    ("lines", "words"),
    [
        (["path,label", "i/0.png,a", "i/0.png,b"], "lines 2 and 3 name the same image; remove one"),
        (["path,label", "i/0.png,a", "i/1.png,b,c"], "line 3 has 3 columns; the header has 2"),
        (["path,label"], "has a header and no rows"),
        (["path,label,label", "i/0.png,a,b"], "two columns named 'label'"),
        (["i/0.png,a", "i/1.png,b"], "has no header; begin it with a line such as path,label"),
        (["path,label,split", "i/0.png,a,fold1"], "line 2: split 'fold1' is unknown; write train, test or validation"),
        (["path,label", "i/0.png,a", "i/9.png,b"], "line 3: 'i/9.png': no such image in .*image_root=FOLDER"),
        (["path,label", "i/0.png,a", f"{'x' * 5000},b"], "line 3: 'x{40}...' has 5000 characters"),
        (["path,label", "i/0.png,a", "http://x/1.png,b"], "line 3: 'http://x/1.png' is a URL; download"),
    ],
)
def test_a_wrong_table_is_refused(write, lines, words):
    with pytest.raises(UserError, match=words):
        open_data(write(*lines))


def test_a_name_without_its_folder_must_be_unique(write, tmp_path):
    assert len(open_data(write("id,label", *(f"{k},{'ab'[k % 2]}" for k in range(6)))).train) == 6
    (tmp_path / "j").mkdir()
    Image.new("L", (4, 4)).save(tmp_path / "j" / "3.png")
    with pytest.raises(UserError, match=r"line 5: '3' could be i/3.png or j/3.png; write the folder too"):
        open_data(write("id,label", *(f"{k},{'ab'[k % 2]}" for k in range(6))))


def test_a_wrong_folder_is_never_replaced_by_another_one(write):
    with pytest.raises(UserError, match=r"'j/0\.png': no such image"):
        open_data(write("path,label", *rows("a b a b", start="j/")))


def test_images_elsewhere_need_image_root(write, tmp_path, monkeypatch):
    (tmp_path / "tables").mkdir()
    path = write("path,label", *rows("a b a b a b", start=f"{tmp_path}/i/"), name="tables/set.csv")
    with pytest.raises(UserError, match=rf"lies outside of .*; allow it with image_root={tmp_path}/i"):
        open_data(path)
    monkeypatch.chdir(tmp_path)
    train = open_data(path, image_root="i").train
    assert train.file_names is not None
    assert train.file_names[0] == "0.png"
    assert train.source["image_root"] == str(tmp_path / "i")
    assert len(open_data(path, image_root="/").train) == 6
    with pytest.raises(UserError, match=r"data\.image_root: .*nowhere: is no folder"):
        open_data(path, image_root="nowhere")


def test_broken_images_of_a_table_are_left_out(write, tmp_path):
    (tmp_path / "i" / "2.png").write_bytes(b"junk")
    path = write("path,label", *rows("a b a b a b"))
    train = open_data(path, skip_broken=True).train
    assert [image.name for image in train.broken] == ["i/2.png"]
    assert open_test_split(path, ReadOptions(skip_broken=True)) is None


def test_the_labels_of_a_table_can_be_replaced_by_file(write):
    path = write("path,label", *rows("a b a b a b"))
    labels = write("file,label", *reversed(rows("b b b a a a", start="")), name="labels.csv")
    assert open_data(path, labels=str(labels)).train.labels.tolist() == [1, 1, 1, 0, 0, 0]
