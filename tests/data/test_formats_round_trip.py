"""The list of labels of every format of images can be given back as `--labels`: by file name or by row."""

from __future__ import annotations

import io
import json
import tarfile
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from PIL import Image

from tadperf.data.dataset import Dataset
from tadperf.data.open import open_data
from tadperf.trust.state import UNTRUSTED, TrustState, as_given

COUNT = 6  # images; image k has the value k and the class k % 2


def encode(value: int) -> bytes:
    stream = io.BytesIO()
    Image.fromarray(np.full((4, 4), value, np.uint8)).save(stream, "png")
    return stream.getvalue()


def put(folder: Path, *names: str) -> None:
    for k, name in enumerate(names):
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_bytes(encode(k))


def classes(folder: Path) -> object:
    put(folder, *(f"{'ab'[k % 2]}/{k}.png" for k in range(COUNT)))
    return folder


def table(folder: Path) -> object:
    put(folder, *(f"images/{k}.png" for k in range(COUNT)))
    rows = [f"images/{k}.png,{'ab'[k % 2]}" for k in reversed(range(COUNT))]
    (folder / "set.csv").write_text("\n".join(["path,label", *rows]))
    return folder / "set.csv"


def tiny_imagenet(folder: Path) -> object:
    put(folder, *(f"train/n{k % 2}/images/n{k % 2}_{k}.png" for k in range(COUNT)))
    put(folder, "val/images/0.png")
    (folder / "val" / "val_annotations.txt").write_text("0.png\tn0\n")
    return folder


def webdataset(folder: Path) -> object:
    for shard in range(2):
        with tarfile.open(folder / f"train-{shard}.tar", "w") as archive:
            for k in range(3 * shard, 3 * shard + 3):
                for name, data in ((f"{k}.png", encode(k)), (f"{k}.cls", "ab"[k % 2].encode())):
                    member = tarfile.TarInfo(name)
                    member.size = len(data)
                    archive.addfile(member, io.BytesIO(data))
    return folder


def rows() -> pa.Table:
    return pa.table({"image": [encode(k) for k in range(COUNT)], "label": ["ab"[k % 2] for k in range(COUNT)]})


def parquet(folder: Path) -> object:
    pq.write_table(rows(), folder / "set.parquet")
    return folder / "set.parquet"


def arrow(folder: Path) -> object:
    with pa.OSFile(str(folder / "data.arrow"), "wb") as file, pa.ipc.new_stream(file, rows().schema) as writer:
        writer.write_table(rows())
    (folder / "state.json").write_text(json.dumps({"_data_files": [{"filename": "data.arrow"}]}))
    return folder


def objects(folder: Path) -> object:
    return [(np.full((4, 4), k, np.uint8), "ab"[k % 2]) for k in range(COUNT)]


def datasets(folder: Path) -> object:
    library = pytest.importorskip("datasets", reason="needs the library datasets (the extra hub)")
    features = library.Features({"image": library.Image(), "label": library.ClassLabel(names=["a", "b"])})
    images = [{"bytes": encode(k), "path": None} for k in range(COUNT)]
    return library.Dataset.from_dict({"image": images, "label": [k % 2 for k in range(COUNT)]}, features=features)


def change(train: Dataset) -> TrustState:
    """Returns labels with the opposite class for the last sample, and none for the first."""
    state = as_given(train.labels.clone(), train.class_names)
    state.working[-1] = 1 - state.working[-1]
    state.verdict[0] = UNTRUSTED
    return state


@pytest.mark.filterwarnings("ignore::tadperf.errors.DataWarning")
@pytest.mark.parametrize(
    ("write", "named"),
    [
        *((write, True) for write in (classes, table, tiny_imagenet, webdataset)),
        *((write, False) for write in (parquet, arrow, objects, datasets)),
    ],
)
def test_corrected_labels_come_back(tmp_path: Path, write: Callable[[Path], object], named: bool) -> None:
    (tmp_path / "set").mkdir()
    data = write(tmp_path / "set")
    train = open_data(data).train
    assert sorted(train.images[:, 0, 0, 0].tolist()) == list(range(COUNT))
    assert (train.file_names is not None) == named
    change(train).export(tmp_path / "labels.csv", train.file_names)
    again = open_data(data, labels=str(tmp_path / "labels.csv")).train
    assert torch.equal(again.images, train.images[1:])
    assert again.labels.tolist() == [*train.labels[1:-1].tolist(), 1 - int(train.labels[-1])]
