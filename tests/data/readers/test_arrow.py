"""Arrow files: folders as `save_to_disk` of the library `datasets` writes them, and single files."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.feather
import pytest
import torch
from PIL import Image

from tadperf.data.open import open_data
from tadperf.errors import UserError

NAMES = ["ant", "bee", "cat"]
FEATURES = {"image": {"_type": "Image"}, "label": {"_type": "ClassLabel", "names": NAMES}}


def table(images: list[bytes] | list[str], labels: list[int]) -> pa.Table:
    """Returns a table as `datasets` stores it. An image is its bytes or a path."""
    values = [{"bytes": image} if isinstance(image, bytes) else {"path": image} for image in images]
    kind = pa.struct([("bytes", pa.binary()), ("path", pa.string())])
    columns = pa.table({"image": pa.array(values, kind), "label": pa.array(labels, pa.int64())})
    return columns.replace_schema_metadata({b"huggingface": json.dumps({"info": {"features": FEATURES}}).encode()})


def write_stream(path: Path, rows: pa.Table) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    with pa.OSFile(str(path), "wb") as file, pa.ipc.new_stream(file, rows.schema) as writer:
        writer.write_table(rows, max_chunksize=5)
    return path


def save(folder: Path, rows: pa.Table, shards: int = 1) -> Path:
    """Writes one split as `Dataset.save_to_disk` does."""
    names = [f"data-{k:05}-of-{shards:05}.arrow" for k in range(shards)]
    size = -(-len(rows) // shards)
    for k, name in enumerate(names):
        write_stream(folder / name, rows.slice(k * size, size))
    state = {"_data_files": [{"filename": name} for name in names], "_split": None, "_fingerprint": "0"}
    (folder / "state.json").write_text(json.dumps(state))
    (folder / "dataset_info.json").write_text(json.dumps({"features": FEATURES}))
    return folder


@pytest.fixture
def encoded(pixels, png):
    return [png(image) for image in pixels]


@pytest.fixture
def saved(tmp_path, encoded, classes):
    """Returns a folder as `DatasetDict.save_to_disk` writes it, with two training shards."""
    rows = table(encoded, classes.tolist())
    save(tmp_path / "set" / "train", rows, shards=2)
    save(tmp_path / "set" / "test", rows.slice(0, 3))
    (tmp_path / "set" / "dataset_dict.json").write_text('{"splits": ["train", "test"]}')
    return tmp_path / "set"


def test_a_saved_dict_of_splits(saved, pixels, classes):
    train, test = open_data(saved)
    assert train.class_names == tuple(NAMES)
    assert torch.equal(train.images, torch.from_numpy(pixels).permute(0, 3, 1, 2))
    assert train.labels.tolist() == classes.tolist()
    assert test is not None
    assert test.labels.tolist() == [0, 1, 2]
    assert train.source["format"] == "arrow"


def test_a_saved_split(saved):
    train, test = open_data(saved / "train")
    assert (len(train), test) == (12, None)


def test_a_split_of_another_name_is_for_training_if_it_is_the_only_one(saved):
    (saved / "train").rename(saved / "all")
    (saved / "dataset_dict.json").write_text('{"splits": ["all"]}')
    assert len(open_data(saved).train) == 12
    (saved / "dataset_dict.json").write_text('{"splits": ["all", "some"]}')
    (saved / "test").rename(saved / "some")
    with pytest.raises(UserError, match="which split is for training, all, some"):
        open_data(saved)


def test_single_files_and_files_by_split(tmp_path, encoded, classes):
    rows = table(encoded, classes.tolist())
    assert len(open_data(write_stream(tmp_path / "one.arrow", rows)).train) == 12
    pyarrow.feather.write_feather(rows, tmp_path / "two.arrow")
    assert len(open_data(tmp_path / "two.arrow").train) == 12
    write_stream(tmp_path / "cache" / "imagefolder-train.arrow", rows)
    write_stream(tmp_path / "cache" / "imagefolder-test.arrow", rows.slice(0, 4))
    train, test = open_data(tmp_path / "cache")
    assert test is not None
    assert (len(train), len(test)) == (12, 4)


def test_rows_with_a_path_are_read_below_the_folder_of_the_file(tmp_path, pixels, classes):
    import pyarrow.parquet as pq

    paths = []
    for k, image in enumerate(pixels):
        (tmp_path / "images").mkdir(exist_ok=True)
        paths.append(str(tmp_path / "images" / f"{k}.png"))
        Image.fromarray(image).save(paths[-1])
    rows = table([*paths[:6], *(f"images/{k}.png" for k in range(6, 12))], classes.tolist())
    expected = torch.from_numpy(pixels).permute(0, 3, 1, 2)
    pq.write_table(rows, tmp_path / "set.parquet")
    assert torch.equal(open_data(tmp_path / "set.parquet").train.images, expected)
    assert torch.equal(open_data(write_stream(tmp_path / "set.arrow", rows)).train.images, expected)
    elsewhere = write_stream(tmp_path / "tables" / "set.arrow", table(paths, classes.tolist()))
    remedy = rf"row 0: '.*/0\.png' lies outside of .*; allow it with image_root={tmp_path}/images"
    with pytest.raises(UserError, match=remedy):
        open_data(elsewhere)
    assert torch.equal(open_data(elsewhere, image_root=str(tmp_path)).train.images, expected)


@pytest.mark.parametrize(
    ("file", "change", "words"),
    [
        ("dataset_dict.json", '{"splits": ["../secret"]}', r"splits holds '\.\./secret'; must be the name of a file"),
        ("dataset_dict.json", '{"splits": []}', "splits lists nothing"),
        ("dataset_dict.json", '["train"]', "not a valid JSON file"),
        ("dataset_dict.json", '{"splits": ["train", "validation"]}', r"validation/state\.json: is missing"),
        ("train/state.json", '{"_data_files": [{"filename": "/etc/passwd"}]}', "must be the name of a file next to it"),
        ("train/state.json", '{"_data_files": [{"filename": 3}]}', "must be the name of a file next to it"),
        ("train/state.json", '{"_data_files": "data"}', "_data_files is no list"),
        ("train/state.json", '{"_data_files": [{"filename": "other.arrow"}]}', r"other\.arrow: is missing"),
        ("train/state.json", '{"_indices_data_files": [{"filename": "i"}]}', "save it again with a newer one"),
        ("train/state.json", "[" * 100_000, "not a valid JSON file"),
        ("train/data-00001-of-00002.arrow", "junk", "not a valid Arrow file"),
    ],
)
def test_a_damaged_folder_is_refused(saved, file, change, words):
    (saved / file).write_text(change)
    with pytest.raises(UserError, match=words):
        open_data(saved)


def test_a_truncated_file_is_refused(saved):
    file = saved / "train" / "data-00001-of-00002.arrow"
    data = file.read_bytes()
    for size in range(0, len(data) - 8, 97):
        file.write_bytes(data[:size])
        with pytest.raises(UserError, match=r"00001-of-00002\.arrow"):
            open_data(saved)


def test_wrong_offsets_are_refused(tmp_path, encoded, classes):
    """The offsets of the images point far outside of the file."""
    rows = table(encoded, classes.tolist()).combine_chunks()
    image = rows.column("image").chunk(0).field("bytes")
    offsets = np.frombuffer(image.buffers()[1], np.int32)[:13].tobytes()
    file = tmp_path / "set.arrow"
    with pa.OSFile(str(file), "wb") as sink, pa.ipc.new_stream(sink, rows.schema) as writer:
        writer.write_table(rows)
    data = file.read_bytes()
    assert data.count(offsets) == 1
    wrong = np.frombuffer(offsets, np.int32).copy()
    wrong[3:] = 2**31 - 1
    file.write_bytes(data.replace(offsets, wrong.tobytes()))
    with pytest.raises(UserError, match="not a valid Arrow file"):
        open_data(file)
