"""Files of features and probabilities: every format, mapped where it can be, and wrong content in one line."""

from __future__ import annotations

import pickle
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import save_file

from tadperf.data import matrix
from tadperf.data.matrix import open_features, open_probabilities
from tadperf.errors import UserError

VALUES = np.random.default_rng(0).normal(size=(7, 5)).astype(np.float32)


def write(path: Path, array: np.ndarray) -> Path:
    """Writes the array in the format of the path's ending."""
    if path.suffix == ".npz":
        np.savez(path, z=array)
    elif path.suffix == ".pt":
        torch.save(torch.from_numpy(array.copy()), path)
    elif path.suffix == ".safetensors":
        save_file({"z": torch.from_numpy(array.copy())}, path)
    else:
        np.save(path, array)
    return path


@pytest.mark.parametrize("suffix", [".npy", ".npz", ".pt", ".safetensors"])
@pytest.mark.parametrize("dtype", [np.float16, np.float32, np.float64])
def test_every_format_and_type(tmp_path, suffix, dtype):
    z = open_features(write(tmp_path / f"z{suffix}", VALUES.astype(dtype)), count=7)
    assert np.array_equal(z.numpy(), VALUES.astype(dtype))


@pytest.mark.parametrize(
    "array", [np.asfortranarray(VALUES), VALUES.astype(">f4")], ids=["column by column", "foreign byte order"]
)
def test_other_layouts_of_npy(tmp_path, array):
    assert np.array_equal(open_features(write(tmp_path / "z.npy", array)).numpy(), VALUES)


def test_npy_is_mapped_and_writes_do_not_reach_the_file(tmp_path):
    file = write(tmp_path / "z.npy", VALUES)
    z = open_features(file)
    assert any(str(file) in line for line in Path("/proc/self/maps").read_text().splitlines())
    z[0, 0] = 9
    assert np.array_equal(np.load(file), VALUES)


def test_a_dict_of_one_tensor_is_its_tensor(tmp_path):
    torch.save({"embeddings": torch.from_numpy(VALUES).bfloat16()}, tmp_path / "z.pt")
    assert open_features(tmp_path / "z.pt").dtype == torch.bfloat16


def bad(array: np.ndarray, row: int, value: float) -> np.ndarray:
    array = array.copy()
    array[row] = value
    return array


@pytest.mark.parametrize(
    ("array", "words"),
    [
        (bad(VALUES, 6, np.nan), "NaN or infinite value in row 6; must be finite"),
        (VALUES[:6], "has 6 rows for 7 labels; must have one row for each label"),
        (VALUES[0], "holds float32 [5]; must be a matrix of floats"),
        (VALUES.astype(np.int64), "holds int64 [7, 5]; must be a matrix of floats"),
        (VALUES[:, :0], "holds float32 [7, 0]; must be a matrix of floats"),
    ],
    ids=str,
)
def test_wrong_features(tmp_path, monkeypatch, array, words):
    monkeypatch.setattr(matrix, "BLOCK", 10)  # blocks of two rows
    with pytest.raises(UserError) as error:
        open_features(write(tmp_path / "z.npy", array), "--features", 7)
    assert str(error.value).startswith(f"--features: {tmp_path / 'z.npy'}: {words}")


SOFT = np.full((7, 4), 0.25)


@pytest.mark.parametrize(
    ("array", "words"),
    [
        (bad(SOFT, 5, -2.0), "holds -2 in row 5; probabilities are in [0, 1]: apply softmax to logits"),
        (np.log(SOFT), "holds -1.38629 in row 0; probabilities are in [0, 1]"),
        (bad(SOFT, 3, 0.5), "row 3 sums to 2; every row must sum to 1"),
        (SOFT[:, :1], "has 1 columns; must have 4 columns, one for each class"),
        (bad(SOFT, 2, np.inf), "NaN or infinite value in row 2"),
    ],
    ids=str,
)
def test_wrong_probabilities(tmp_path, monkeypatch, array, words):
    monkeypatch.setattr(matrix, "BLOCK", 8)
    with pytest.raises(UserError) as error:
        open_probabilities(write(tmp_path / "p.npy", array), "--probs", 7, 4)
    assert str(error.value).startswith(f"--probs: {tmp_path / 'p.npy'}: {words}")


def test_half_precision_probabilities_pass(tmp_path):
    p = torch.randn(50, 200).softmax(1).numpy().astype(np.float16)
    assert open_probabilities(write(tmp_path / "p.npy", p), count=50, classes=200).dtype == torch.float16


class Runs:
    def __reduce__(self):
        return Path.touch, (Path("it_ran"),)


def test_damaged_and_hostile_files_are_refused_in_one_line(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    good = write(Path("good.npy"), VALUES).read_bytes()
    files = {
        "truncated.npy": good[:-4],
        "longer.npy": good.replace(b"(7, 5)", b"(9, 5)"),
        "huge.npy": good.replace(b"(7, 5)", b"(99,5)"),
        "empty.npy": b"",
        "text.npy": b"1 2 3",
        "pickle.pt": pickle.dumps(Runs(), 2),
        "text.safetensors": b"hello",
        "text.npz": b"PK",
    }
    np.save("objects.npy", np.array([[Runs()]], dtype=object), allow_pickle=True)
    np.savez("two.npz", a=VALUES, b=VALUES)
    torch.save({"a": torch.zeros(2), "b": torch.zeros(2)}, "two.pt")
    save_file({"a": torch.zeros(2, 2), "b": torch.zeros(2, 2)}, "two.safetensors")
    for name, content in files.items():
        Path(name).write_bytes(content)
    names = [*files, "objects.npy", "two.npz", "two.pt", "two.safetensors", "missing.npy", "table.csv"]
    Path("table.csv").write_text("1,2\n")
    for name in names:
        with pytest.raises(UserError) as error:
            open_features(name, "--features")
        assert str(error.value).startswith(f"--features: {name}: "), name
        assert "\n" not in str(error.value)
    assert not Path("it_ran").exists()
