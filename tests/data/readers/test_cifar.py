from __future__ import annotations

import io
import pickle
import sys
import tarfile
from collections import OrderedDict
from fractions import Fraction

import numpy as np
import pytest
import torch

from tadperf.data.open import open_data
from tadperf.data.readers.cifar import restricted_load
from tadperf.errors import UserError

TEN = ["airplane", "automobile", "bird", "cat", "deer", "dog", "frog", "horse", "ship", "truck"]


def write10(folder, protocol=2, keys=str):
    folder.mkdir()
    rng = np.random.default_rng(0)
    for name in (*(f"data_batch_{k}" for k in range(1, 6)), "test_batch"):
        data = rng.integers(0, 256, (4, 3072), dtype=np.uint8)
        start = 2 * int(name[-1]) - 2 if name[-1].isdigit() else 0
        batch = {
            "data": data,
            "labels": [start, start + 1, start, start + 1],
            "batch_label": name,
            "filenames": ["x"] * 4,
        }
        batch = {keys(key) if keys is str else key.encode(): value for key, value in batch.items()}
        (folder / name).write_bytes(pickle.dumps(batch, protocol))
    (folder / "batches.meta").write_bytes(pickle.dumps({"label_names": TEN, "num_vis": 3072}, protocol))
    return folder


@pytest.mark.parametrize(("protocol", "keys"), [(2, str), (2, bytes), (3, bytes), (4, str)])
def test_cifar10_folder(tmp_path, protocol, keys):
    folder = write10(tmp_path / "cifar-10-batches-py", protocol, keys)
    train, test = open_data(folder)
    assert test is not None
    assert (len(train), len(test), train.shape) == (20, 4, (3, 32, 32))
    assert train.class_names == tuple(TEN)
    first = np.random.default_rng(0).integers(0, 256, (4, 3072), dtype=np.uint8)
    assert torch.equal(train.images[:4].flatten(1), torch.from_numpy(first))
    assert train.labels[:8].tolist() == [0, 1, 0, 1, 2, 3, 2, 3]
    assert train.source["format"] == "cifar"


def test_tar_gz_equals_the_folder(tmp_path):
    folder = write10(tmp_path / "cifar-10-batches-py")
    with tarfile.open(tmp_path / "cifar.tar.gz", "w:gz") as archive:
        archive.add(folder, folder.name)
    assert open_data(tmp_path / "cifar.tar.gz").train.fingerprint == open_data(folder).train.fingerprint
    data = (tmp_path / "cifar.tar.gz").read_bytes()
    (tmp_path / "cut.tar.gz").write_bytes(data[: len(data) // 2])
    with pytest.raises(UserError, match="not a valid tar archive"):
        open_data(tmp_path / "cut.tar.gz")


def test_cifar100_fine_labels(tmp_path):
    names = [f"class {c}" for c in range(100)]
    data = np.zeros((100, 3072), np.uint8)
    batch = {b"data": data, b"fine_labels": list(range(100)), b"coarse_labels": [0] * 100}
    for name in ("train", "test"):
        (tmp_path / name).write_bytes(pickle.dumps(batch, 2))
    assert open_data(tmp_path, format="cifar").train.class_names == tuple(map(str, range(100)))  # no meta
    meta = {b"fine_label_names": [name.encode() for name in names], b"coarse_label_names": [b"x"]}
    (tmp_path / "meta").write_bytes(pickle.dumps(meta, 2))
    train = open_data(tmp_path).train
    assert train.class_names == tuple(names)
    assert train.labels.tolist() == list(range(100))


@pytest.mark.parametrize("protocol", range(5))
def test_restricted_load_accepts_arrays_and_containers(protocol):
    arrays = {
        "bytes": np.arange(6, dtype=np.uint8).reshape(2, 3),
        "big-endian": np.array([1.5, -2], ">f4"),
        "Fortran": np.asfortranarray(np.arange(6).reshape(2, 3)),
        "wide": np.arange(6)[::2],
        "bools": np.array([True, False]),
    }
    values = {"b": b"\xff\x00", "c": [1, (2.5, None, "x")], "d": {"e": [1, 2]}}
    loaded = restricted_load(pickle.dumps(arrays | values, protocol))
    for name, array in arrays.items():
        assert loaded[name].dtype == array.dtype
        np.testing.assert_array_equal(loaded[name], array)
    assert {name: loaded[name] for name in values} == values


def test_both_spellings_of_numpy_and_python_2():
    data = pickle.dumps(np.arange(4, dtype=np.uint8), 2)
    core, old = b"numpy._core.multiarray", b"numpy.core.multiarray"
    for spelling in (core, old):
        spelled = data.replace(core if core in data else old, spelling)
        assert restricted_load(spelled).tolist() == [0, 1, 2, 3]
    # Python 2, which wrote CIFAR's files, stores the array's bytes as a str.
    make = b"\x80\x02cnumpy.core.multiarray\n_reconstruct\ncnumpy\nndarray\nK\x00\x85U\x01b\x87R"
    dtype = b"cnumpy\ndtype\nU\x02u1K\x00K\x01\x87R(K\x03U\x01|NNNJ\xff\xff\xff\xffJ\xff\xff\xff\xffK\x00tb"
    python2 = make + b"(K\x01K\x03\x85" + dtype + b"\x89U\x03\x01\xfe\xfftb."
    assert restricted_load(python2).tolist() == [1, 254, 255]


class Runs:
    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return (exec, (f"open({str(self.path)!r}, 'w')",))


class Imports:
    def __reduce__(self):
        import os

        return (os.system, ("true",))


@pytest.mark.parametrize("protocol", range(5))
def test_a_pickle_that_runs_code_is_refused_and_does_not_run(tmp_path, protocol):
    folder = write10(tmp_path / "set")
    trap = tmp_path / "it_ran"
    (folder / "data_batch_3").write_bytes(pickle.dumps({"data": Runs(trap), "labels": [0]}, protocol))
    with pytest.raises(UserError, match=r"data_batch_3: refused as unsafe .*exec.*; use the original file"):
        open_data(folder)
    assert not trap.exists()


@pytest.mark.parametrize(
    "value", [Imports(), OrderedDict(a=1), Fraction(1, 2), sys.exit, np.array([None]), np.float32, 1j]
)
def test_everything_else_is_refused(value):
    with pytest.raises(pickle.UnpicklingError):
        restricted_load(pickle.dumps(value, 2))


@pytest.mark.parametrize("codec", ["rot13", "zlib_codec", "utf-16"])
def test_codecs_other_than_latin1_are_refused(codec):
    text = b"c_codecs\nencode\n(X\x01\x00\x00\x00aX" + len(codec).to_bytes(4, "little") + codec.encode() + b"tR."
    with pytest.raises(pickle.UnpicklingError, match=codec):
        restricted_load(text)


def test_damaged_files(tmp_path):
    folder = write10(tmp_path / "set")
    whole = (folder / "data_batch_2").read_bytes()

    def refuse(data, words):
        (folder / "data_batch_2").write_bytes(data)
        with pytest.raises(UserError, match=words):
            open_data(folder)

    for keep in (0, 1, 100, len(whole) // 2, len(whole) - 1):
        refuse(whole[:keep], "data_batch_2: (damaged pickle|refused)")
    refuse(pickle.dumps([1]), "holds a list")
    refuse(pickle.dumps({"labels": [1]}), "has no data")
    refuse(pickle.dumps({"data": np.zeros((2, 5), np.uint8), "labels": [0, 1]}), r"must be uint8 \[N, 3072\]")
    refuse(pickle.dumps({"data": np.zeros((2, 3072), np.uint8), "labels": [0]}), "2 images but 1 labels")
    refuse(pickle.dumps({"data": np.zeros((2, 3072), np.uint8), "labels": [0, 10]}), r"label 10; must be in 0\.\.9")
    (folder / "data_batch_2").unlink()
    with pytest.raises(UserError, match="data_batch_2: is missing"):
        open_data(folder)


def test_random_damage_raises_no_other_error():
    whole = pickle.dumps({"data": np.arange(8, dtype=np.uint8), "labels": [0] * 8}, 2)
    from pathlib import Path

    from tadperf.data.readers.cifar import _load

    rng, refused = np.random.default_rng(0), 0
    for _ in range(300):
        data = bytearray(whole)
        data[rng.integers(len(data))] = rng.integers(256)
        try:
            _load(bytes(data), Path("batch"))
        except UserError:
            refused += 1
    assert refused > 50


def test_an_archive_without_cifar_files_is_refused(tmp_path):
    with tarfile.open(tmp_path / "x.tar", "w") as archive:
        archive.addfile(tarfile.TarInfo("readme"), io.BytesIO())
    with pytest.raises(UserError, match="holds neither data_batch"):
        open_data(tmp_path / "x.tar")


@pytest.fixture
def cifar100(tmp_path):
    """Returns CIFAR-100 with 100 images a split: image k has the fine label k and the coarse label k % 20."""
    for name in ("train", "test"):
        batch = {b"data": np.zeros((100, 3072), np.uint8), b"fine_labels": list(range(100))}
        batch[b"coarse_labels"] = [k % 20 for k in range(100)]
        (tmp_path / name).write_bytes(pickle.dumps(batch, 2))
    names = {
        "fine_label_names": [f"fine {k}" for k in range(100)],
        "coarse_label_names": [f"coarse {k}" for k in range(20)],
    }
    (tmp_path / "meta").write_bytes(pickle.dumps(names, 2))
    return tmp_path


@pytest.mark.parametrize("column", ["coarse_label", "coarse_labels"])
def test_coarse_labels(cifar100, column):
    train, test = open_data(cifar100, label_column=column)
    assert test is not None
    assert train.class_names == tuple(f"coarse {k}" for k in range(20))
    assert train.labels.tolist() == test.labels.tolist() == [k % 20 for k in range(100)]
    assert train.source["label_column"] == column
    (cifar100 / "meta").unlink()
    assert open_data(cifar100, label_column=column).train.num_classes == 20


def test_fine_labels_by_name_and_unknown_labels(cifar100, tmp_path):
    assert open_data(cifar100, label_column="fine_label").train.fingerprint == open_data(cifar100).train.fingerprint
    with pytest.raises(UserError, match="CIFAR-100 has fine_label and coarse_label"):
        open_data(cifar100, label_column="medium")
    (tmp_path / "ten").mkdir()
    batch = {"data": np.zeros((10, 3072), np.uint8), "labels": list(range(10))}
    (tmp_path / "ten" / "data_batch_1").write_bytes(pickle.dumps(batch, 2))
    with pytest.raises(UserError, match="CIFAR-10 has one kind of label"):
        open_data(tmp_path / "ten", label_column="coarse_label")


def test_labels_of_cifar_100n(cifar100, tmp_path):
    """CIFAR-100_human.pt of CIFAR-N has fine and coarse labels, each with the clean ones."""
    fine, coarse = np.arange(100), np.arange(100) % 20
    content = {
        "clean_label": fine,
        "noisy_label": (fine + 1) % 100,
        "noisy_coarse_label": (coarse + 1) % 20,
        "clean_coarse_label": coarse,
    }
    path = tmp_path / "CIFAR-100_human.pt"
    torch.save(content, path)
    train = open_data(cifar100, labels=f"{path}:noisy_label").train
    assert (train.labels[:3].tolist(), train.clean_labels is not None) == ([1, 2, 3], True)
    train = open_data(cifar100, labels=f"{path}:noisy_coarse_label", label_column="coarse_label").train
    assert train.labels[18:22].tolist() == [19, 0, 1, 2]
    assert train.clean_labels is not None
    assert train.clean_labels.tolist() == coarse.tolist()
    with pytest.raises(UserError, match="KEY one of noisy_label, noisy_coarse_label"):
        open_data(cifar100, labels=str(path))
    with pytest.raises(UserError, match=r"must be in 0\.\.19"):
        open_data(cifar100, labels=f"{path}:noisy_label", label_column="coarse_label")
