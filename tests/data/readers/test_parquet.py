from __future__ import annotations

import json

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch

from tadperf.data.open import open_data, open_test_split
from tadperf.errors import UserError

NAMES = ["ant", "bee", "cat"]


def hub_schema(label: str = "label", image: str = "img") -> bytes:
    features = {image: {"_type": "Image"}, label: {"_type": "ClassLabel", "names": NAMES}}
    return json.dumps({"info": {"features": features}}).encode()


def write(path, images, labels, *, metadata=None, label="label", struct=True, label_type=None):
    path.parent.mkdir(parents=True, exist_ok=True)
    values = [{"bytes": image, "path": None} for image in images] if struct else images
    kind = pa.struct([("bytes", pa.binary()), ("path", pa.string())]) if struct else pa.binary()
    table = pa.table({"img": pa.array(values, kind), label: pa.array(labels, label_type)})
    pq.write_table(table.replace_schema_metadata({b"huggingface": metadata} if metadata else None), path)
    return path


@pytest.fixture
def encoded(pixels, png):
    return [png(image) for image in pixels]


def test_shards_and_splits_of_the_hub(tmp_path, pixels, classes, encoded):
    for k in range(2):
        rows = slice(6 * k, 6 * k + 6)
        file = tmp_path / f"data/train-{k:05}-of-00002.parquet"
        write(file, encoded[rows], classes[rows].tolist(), metadata=hub_schema())
    write(tmp_path / "data/validation-00000-of-00001.parquet", encoded[:2], [2, 0], metadata=hub_schema())
    (tmp_path / "labels.pt").write_bytes(b"not an image set")
    train, test = open_data(tmp_path)
    assert test is not None
    assert train.class_names == test.class_names == ("ant", "bee", "cat")
    assert torch.equal(train.images, torch.from_numpy(pixels).permute(0, 3, 1, 2))
    assert train.labels.tolist() == classes.tolist()
    assert test.labels.tolist() == [2, 0]
    assert (train.source["format"], test.source["split"]) == ("parquet", "test")


@pytest.mark.parametrize("dictionary", [False, True])
def test_plain_bytes_and_text_labels_under_split_folders(tmp_path, classes, encoded, dictionary):
    kind = pa.dictionary(pa.int8(), pa.string()) if dictionary else pa.string()
    text = [NAMES[c] for c in reversed(classes.tolist())]
    write(tmp_path / "train/0.parquet", encoded, text, struct=False, label="species", label_type=kind)
    write(tmp_path / "test/0.parquet", encoded[:1], ["cat"], struct=False, label="species", label_type=kind)
    train, test = open_data(tmp_path)
    assert test is not None
    assert train.class_names == ("ant", "bee", "cat")
    assert train.labels.tolist() == classes[::-1].tolist()
    assert test.labels.tolist() == [2]


def test_without_metadata_classes_are_numbered_over_both_splits(tmp_path, classes, encoded):
    write(tmp_path / "train.parquet", encoded, classes.tolist())
    write(tmp_path / "test.parquet", encoded[:2], [0, 1])
    test = open_test_split(tmp_path)
    assert test is not None
    assert test.class_names == ("0", "1", "2")


def test_one_file_is_a_train_split_and_fine_labels_are_preferred(tmp_path, classes, encoded):
    features = {"img": {"_type": "Image"}, "coarse_label": {"_type": "ClassLabel", "names": ["x"]}}
    features["fine_label"] = {"_type": "ClassLabel", "names": NAMES}
    table = pa.table({"img": encoded, "coarse_label": [0] * 12, "fine_label": classes})
    metadata = {b"huggingface": json.dumps({"info": {"features": features}}).encode()}
    pq.write_table(table.replace_schema_metadata(metadata), tmp_path / "set.parquet")
    train, test = open_data(tmp_path / "set.parquet")
    assert test is None
    assert train.labels.tolist() == classes.tolist()


def test_validation_replaces_a_test_split_with_secret_labels(tmp_path, classes, encoded):
    write(tmp_path / "train.parquet", encoded, classes.tolist())
    write(tmp_path / "test.parquet", encoded, [-1] * 12)
    write(tmp_path / "validation.parquet", encoded[:3], [1, 1, 0])
    test = open_data(tmp_path).test
    assert test is not None
    assert test.labels.tolist() == [1, 1, 0]


def test_mixed_sizes_are_named_and_accepted_with_image_size(tmp_path, pixels, encoded, png):
    path = write(tmp_path / "set.parquet", [*encoded[:2], png(pixels[2, :5])], [0, 1, 0])
    with pytest.raises(UserError, match=r"8 x 8 .* and 5 x 8; give image_size"):
        open_data(path)
    assert open_data(path, image_size=4).train.shape == (3, 4, 4)


@pytest.mark.parametrize("keep", [0, 10, 0.5, 0.98])
def test_a_truncated_file_is_refused(tmp_path, classes, encoded, keep):
    path = write(tmp_path / "set.parquet", encoded, classes.tolist())
    data = path.read_bytes()
    path.write_bytes(data[: keep if isinstance(keep, int) else int(len(data) * keep)])
    with pytest.raises(UserError, match="not a valid parquet file") as caught:
        open_data(path)
    assert caught.value.value == path


def test_a_file_damaged_in_the_middle_is_refused(tmp_path, classes):
    noise = np.random.default_rng(0).bytes(40000)
    path = write(tmp_path / "set.parquet", [noise] * 12, classes.tolist())
    data = bytearray(path.read_bytes())
    data[200:30000] = bytes(29800)
    path.write_bytes(bytes(data))
    with pytest.raises(UserError, match=r"set\.parquet"):
        open_data(path)


def test_errors_name_the_row_the_shard_and_the_columns(tmp_path, classes, encoded):
    path = write(tmp_path / "a/set.parquet", [*encoded[:2], b"no image"], [0, 1, 0])
    with pytest.raises(UserError, match="row 2: cannot be decoded"):
        open_data(path)
    path = write(tmp_path / "b/set.parquet", [*encoded[:2], None], [0, 1, 0])
    with pytest.raises(UserError, match="row 2: has no image bytes"):
        open_data(path)
    path = write(tmp_path / "c/set.parquet", encoded[:3], [0, None, 1])
    with pytest.raises(UserError, match="1 rows of column 'label' have no label"):
        open_data(path)
    write(tmp_path / "d/train-00000-of-00002.parquet", encoded, classes.tolist())
    with pytest.raises(UserError, match="only 1 of 2 shards"):
        open_data(tmp_path / "d")
    path = write(tmp_path / "e/set.parquet", encoded[:2], [0, 7], metadata=hub_schema())
    with pytest.raises(UserError, match=r"label 7; must be in 0\.\.2"):
        open_data(path)
    path = write(tmp_path / "none/set.parquet", [], [], label_type=pa.int64())
    with pytest.raises(UserError, match="the train split is empty"):
        open_data(path)
    path = write(tmp_path / "kept/set.parquet", encoded[:2], [-1, -1])
    with pytest.raises(UserError, match="every label in column 'label' is -1"):
        open_data(path)
    pq.write_table(pa.table({"a": [1, 2], "b": [1, 2]}), tmp_path / "f.parquet")
    with pytest.raises(UserError, match=r"no column of encoded images.*a \(int64\), b \(int64\)"):
        open_data(tmp_path / "f.parquet")
    pq.write_table(pa.table({"i": encoded[:2], "a": [1, 2], "b": [1, 2]}), tmp_path / "g.parquet")
    with pytest.raises(UserError, match=r"which column holds the labels, a or b\? Use label_column=NAME"):
        open_data(tmp_path / "g.parquet")


@pytest.mark.parametrize(
    ("columns", "words"),
    [
        ({"label": [0.0, 1.0, 2.0]}, "column 'label' holds double; labels must be integers or class names"),
        ({"label": [True, False, True]}, "column 'label' holds bool"),
        ({"label": [[0], [1], [2]]}, "column 'label' holds list"),
        ({"id": [0, 1, 2]}, "has no column of labels"),
        ({"caption": ["a cat", "a dog", "a cow"]}, "column 'caption' has too many different values"),
        ({"mask": [b"x"] * 3, "photo2": [b"x"] * 3, "label": [0, 1, 0]}, None),
    ],
)
def test_columns_that_hold_no_labels_are_refused(tmp_path, encoded, columns, words):
    image = "img" if words else "rendering"
    pq.write_table(pa.table({**columns, image: encoded[:3]}), tmp_path / "a.parquet")
    with pytest.raises(UserError) as caught:
        open_data(tmp_path / "a.parquet")
    assert (words or "which column holds the images, mask or photo2 or rendering?") in str(caught.value)


def test_columns_can_be_chosen(tmp_path, encoded, classes):
    table = pa.table({"a": encoded, "b": encoded[::-1], "x": classes, "y2": [0] * 12})
    pq.write_table(table, tmp_path / "a.parquet")
    train = open_data(tmp_path / "a.parquet", image_column="b", label_column="x").train
    assert train.labels.tolist() == classes.tolist()
    other = open_data(tmp_path / "a.parquet", image_column="a", label_column="x").train
    assert torch.equal(train.images, other.images.flip(0))
    assert (train.source["image_column"], train.source["label_column"]) == ("b", "x")
    with pytest.raises(UserError, match=r"data.label_column: b: holds binary; must hold integers or class names"):
        open_data(tmp_path / "a.parquet", image_column="b", label_column="b")


def test_the_coarse_labels_of_cifar_100_by_column(tmp_path, encoded):
    features = {"img": {"_type": "Image"}}
    features |= {
        name: {"_type": "ClassLabel", "names": [f"{name} {k}" for k in range(12)]}
        for name in ("fine_label", "coarse_label")
    }
    table = pa.table({"img": encoded, "fine_label": list(range(12)), "coarse_label": [k % 12 for k in range(5, 17)]})
    metadata = {b"huggingface": json.dumps({"info": {"features": features}}).encode()}
    pq.write_table(table.replace_schema_metadata(metadata), tmp_path / "train.parquet")
    assert open_data(tmp_path).train.class_names[0] == "fine_label 0"
    train = open_data(tmp_path, label_column="coarse_label").train
    assert (train.class_names[0], train.labels[0]) == ("coarse_label 0", 5)
