"""A file of labels on its own: names or numbers, the order of the rows, ids, and wrong content."""

from __future__ import annotations

import json

import numpy as np
import pytest
import torch

from tadperf.data.label_file import open_label_file
from tadperf.errors import DataWarning, UserError


def table(tmp_path, text: str, name: str = "y.csv") -> str:
    (tmp_path / name).write_text(text)
    return str(tmp_path / name)


def test_names_numbers_and_ids(tmp_path):
    labels = open_label_file(table(tmp_path, "id,text,label\nd1,a text,cat\nd2,b,ant\nd3,c,cat\n"), 3)
    assert labels.class_names == ("ant", "cat")
    assert labels.labels.tolist() == [1, 0, 1]
    assert labels.file_names == ("d1", "d2", "d3")
    assert (labels.images, labels.rows, labels.name, len(labels)) == (None, None, "y", 3)
    numbers = open_label_file(table(tmp_path, "path;y\na.txt;2\nb.txt;0\nc.txt;1\n"), 3, 5)
    assert numbers.class_names == ("0", "1", "2", "3", "4")
    assert numbers.labels.tolist() == [2, 0, 1]


def test_arrays(tmp_path):
    np.save(tmp_path / "y.npy", np.array([1, 0, 1], np.uint8))
    torch.save({"noisy": torch.tensor([1, 0, 1]), "clean_label": torch.tensor([1, 1, 1])}, tmp_path / "y.pt")
    (tmp_path / "y.json").write_text(json.dumps(["b", "a", "b"]))
    for name in ("y.npy", "y.pt:noisy", "y.json"):
        assert open_label_file(str(tmp_path / name), 3).labels.tolist() == [1, 0, 1], name
    clean = open_label_file(str(tmp_path / "y.pt:noisy")).clean_labels
    assert clean is not None
    assert clean.tolist() == [1, 1, 1]


@pytest.mark.parametrize("column", ["index", "id", ""])
def test_an_index_orders_the_rows(tmp_path, column):
    labels = open_label_file(table(tmp_path, f"{column},label,file\n2,c,C\n0,a,A\n1,b,B\n"), 3)
    assert labels.labels.tolist() == [0, 1, 2]
    assert labels.file_names == ("A", "B", "C")


def test_one_column_with_and_without_header(tmp_path):
    plain = open_label_file(table(tmp_path, "cat\nant\ncat\n"), 3)
    titled = open_label_file(table(tmp_path, "species\ncat\nant\ncat\n"), 3)
    assert plain.labels.tolist() == titled.labels.tolist() == [1, 0, 1]


def test_samples_without_a_label_are_left_out_with_their_ids(tmp_path):
    with pytest.warns(DataWarning, match="1 of 4 samples have an empty label"):
        labels = open_label_file(table(tmp_path, "id,label,clean_label\na,x,x\nb,,y\nc,y,x\nd,x,x\n"), 4)
    assert labels.rows is not None
    assert labels.rows.tolist() == [0, 2, 3]
    assert labels.file_names == ("a", "c", "d")
    assert labels.opened == 4
    assert labels.clean_labels is not None
    assert labels.clean_labels.tolist() == [0, 0, 0]


@pytest.mark.parametrize(
    ("text", "classes", "words"),
    [
        ("label\na\nb\n", None, "has 2 labels for 3 rows; must have one label for each row"),
        ("label\na\na\na\n", None, "has only one class, 'a'"),
        ("label\n0\n1\n7\n", 3, "holds 7 in row 2; labels must be class numbers 0..2, or class names"),
        ("label\n0\n-1\n1\n", None, "holds -1 in row 1"),
        ("label\na\nb\nb\n", 3, "names 2 classes, the probabilities have 3 columns; use class numbers"),
        ("a,b\n1,2\n3,4\n", None, "has several columns and no header that names one 'label'"),
        ("id,text\n1,2\n3,4\n", None, "has no column of labels, only id, text"),
        ("index,label\n0,a\n0,b\n2,b\n", None, "column index must hold all of 0..2 once"),
        ("id,label\n0,a\n1\n", None, "line 3 has 1 columns; the first line has 2"),
        ("label\n", None, "has a header and no labels"),
        ("id,label\n1,\n2,\n3,\n", None, "all labels are empty"),
        ("", None, "is empty"),
    ],
    ids=str,
)
def test_wrong_tables(tmp_path, text, classes, words):
    spec = table(tmp_path, text)
    with pytest.raises(UserError) as error:
        open_label_file(spec, 3, classes)
    assert str(error.value).startswith(f"--labels: {spec}: {words}")


def test_wrong_arrays(tmp_path):
    np.save(tmp_path / "y.npy", np.array([0.5, 1.0]))
    for name, words in (("y.npy", "holds float64 [2]"), ("none.csv", "no such file"), ("y.xls", "no such file")):
        with pytest.raises(UserError, match=words.replace("[", r"\[")):
            open_label_file(str(tmp_path / name))
