from __future__ import annotations

import json
import pickle

import numpy as np
import pytest
import torch

from tadperf.data.dataset import Dataset
from tadperf.data.labels import replace_labels
from tadperf.errors import UserError

NAMES = ("ant", "bee", "cat")
OWN = torch.arange(12) % 3
NOISY = OWN.roll(1)


@pytest.fixture
def dataset():
    return Dataset(
        torch.zeros(12, 1, 2, 2, dtype=torch.uint8), OWN, NAMES, "made-up", source={"path": "x", "labels": None}
    )


def table(header, *columns):
    return "\n".join([header, *(",".join(map(str, row)) for row in zip(*columns, strict=True))]) + "\n"


WORDS = [NAMES[c] for c in NOISY]
BACK = list(reversed(range(12)))


@pytest.mark.parametrize(
    "text",
    [
        table("label", NOISY.tolist()),
        "\n".join(map(str, NOISY.tolist())),
        "\n".join(WORDS),
        "\ufeff" + table("Given_Label", WORDS),
        table("index,label", BACK, NOISY[BACK].tolist()),
        table("given_label,label,index", OWN.tolist(), NOISY.tolist(), range(12)),
    ],
)
def test_csv(tmp_path, dataset, text):
    (tmp_path / "noisy.csv").write_text(text, encoding="utf-8")
    replaced = replace_labels(dataset, str(tmp_path / "noisy.csv"))
    assert torch.equal(replaced.labels, NOISY)
    assert replaced.clean_labels is None  # the old labels do not count as clean
    assert torch.equal(dataset.labels, OWN)
    assert replaced.source == {"path": "x", "labels": str(tmp_path / "noisy.csv")}


@pytest.mark.parametrize(
    ("name", "text"),
    [
        ("a.csv", table("index;label", BACK, NOISY[BACK].tolist()).replace(",", ";")),
        ("a.tsv", table("label\tindex", NOISY[BACK].tolist(), BACK).replace(",", "\t")),
        ("a.csv", table("class", WORDS)),
        ("a.csv", table(",label", range(12), WORDS)),
        ("a.csv", table("id,target", BACK, NOISY[BACK].tolist())),
        ("a.csv", table("index,verdict,given_label,label,score", BACK, WORDS, WORDS, NOISY[BACK].tolist(), WORDS)),
        ("a.csv", table("species", WORDS)),
        ("a.json", json.dumps(NOISY.tolist())),
        ("a.json", json.dumps(WORDS)),
    ],
)
def test_other_tables_and_lists(tmp_path, dataset, name, text):
    (tmp_path / name).write_text(text)
    assert torch.equal(replace_labels(dataset, str(tmp_path / name)).labels, NOISY)


@pytest.mark.parametrize(
    ("name", "text", "words"),
    [
        ("a.csv", table("file,label", WORDS, WORDS), "column 'file' names files, but made-up has no file names"),
        ("a.csv", table("index,id,label", range(12), BACK, WORDS), "columns 'index' and 'id' name different samples"),
        ("a.csv", table("label,label", WORDS, WORDS), "two columns named 'label'"),
        ("a.csv", table("label,comment", WORDS, WORDS), "column 'comment' is unknown; remove it"),
        ("a.csv", table(",label", BACK[:6] * 2, WORDS), "the column without a name must hold all of 0..11"),
        ("a.csv", 'label\n"ant', "not a CSV file"),
        ("a.csv", "version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 1\n", "git lfs pull"),
        ("a.json", "{}", "must be one JSON list"),
        ("a.json", "[1.5]", "must be one JSON list"),
        ("a.json", "[", "not a valid JSON file"),
        ("a.json", "[" * 100000, "not a valid JSON file"),
    ],
)
def test_errors_of_other_tables_and_lists(tmp_path, dataset, name, text, words):
    (tmp_path / name).write_text(text)
    with pytest.raises(UserError) as caught:
        replace_labels(dataset, str(tmp_path / name))
    assert words in str(caught.value)


def test_csv_with_clean_labels_in_the_order_of_its_index(tmp_path, dataset):
    text = table("index,clean_label,label", BACK, OWN[BACK].tolist(), NOISY[BACK].tolist())
    (tmp_path / "noisy.csv").write_text(text)
    replaced = replace_labels(dataset, str(tmp_path / "noisy.csv"))
    assert replaced.clean_labels is not None
    assert torch.equal(replaced.clean_labels, OWN)
    assert torch.equal(replaced.labels, NOISY)


@pytest.mark.parametrize("dtype", [np.int64, np.uint8, ">i4"])
def test_npy(tmp_path, dataset, dtype):
    np.save(tmp_path / "noisy.npy", NOISY.numpy().astype(dtype))
    replaced = replace_labels(dataset, str(tmp_path / "noisy.npy"))
    assert torch.equal(replaced.labels, NOISY)


def test_known_clean_labels_of_the_set_are_kept(tmp_path, dataset):
    np.save(tmp_path / "noisy.npy", NOISY.numpy())
    known = dataset.with_labels(OWN.roll(2), OWN)
    replaced = replace_labels(known, str(tmp_path / "noisy.npy"))
    assert replaced.clean_labels is not None
    assert torch.equal(replaced.clean_labels, OWN)


@pytest.mark.parametrize(
    "make", [lambda x: x.numpy(), lambda x: x, lambda x: x.tolist(), lambda x: x.numpy().astype("u1")]
)
def test_pt_as_cifar_n_publishes(tmp_path, dataset, make):
    torch.save({"clean_label": make(OWN), "worse_label": make(NOISY), "aggre_label": make(OWN)}, tmp_path / "human.pt")
    replaced = replace_labels(dataset, f"{tmp_path / 'human.pt'}:worse_label")
    assert torch.equal(replaced.labels, NOISY)
    assert replaced.clean_labels is not None
    assert torch.equal(replaced.clean_labels, OWN)
    assert replaced.source["labels"] == f"{tmp_path / 'human.pt'}:worse_label"
    with pytest.raises(UserError, match=r"human\.pt:KEY, with KEY one of worse_label, aggre_label"):
        replace_labels(dataset, str(tmp_path / "human.pt"))
    with pytest.raises(UserError, match="has no 'random'; it holds clean_label, worse_label, aggre_label"):
        replace_labels(dataset, f"{tmp_path / 'human.pt'}:random")


def test_pt_with_one_candidate_needs_no_key(tmp_path, dataset):
    torch.save({"clean_label": OWN.numpy(), "noisy_label": NOISY.numpy()}, tmp_path / "human.pt")
    assert torch.equal(replace_labels(dataset, str(tmp_path / "human.pt")).labels, NOISY)


def test_pt_written_by_an_older_numpy(tmp_path, dataset):
    """CIFAR-N's file names numpy.core and stores array bytes as _codecs.encode (Python 3, protocol 2)."""
    import zipfile

    torch.save({"clean_label": OWN.numpy(), "worse_label": NOISY.numpy()}, tmp_path / "new.pt")
    with zipfile.ZipFile(tmp_path / "new.pt") as new, zipfile.ZipFile(tmp_path / "old.pt", "w") as old:
        for entry in new.namelist():
            old.writestr(entry, new.read(entry).replace(b"numpy._core.multiarray", b"numpy.core.multiarray"))
        assert any(b"numpy.core" in old.read(entry) for entry in old.namelist())
    assert torch.equal(replace_labels(dataset, f"{tmp_path / 'old.pt'}:worse_label").labels, NOISY)


class Runs:
    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return (exec, (f"open({self.path!r}, 'w')",))


def test_pt_that_runs_code_is_refused_and_does_not_run(tmp_path, dataset):
    torch.save({"worse_label": Runs(str(tmp_path / "it_ran"))}, tmp_path / "bad.pt")
    with pytest.raises(UserError, match="refused, not a file of plain arrays") as caught:
        replace_labels(dataset, f"{tmp_path / 'bad.pt'}:worse_label")
    assert not (tmp_path / "it_ran").exists()
    assert "\n" not in str(caught.value)


def test_another_order_is_refused(tmp_path, dataset):
    torch.save({"clean_label": OWN.flip(0), "worse_label": NOISY}, tmp_path / "human.pt")
    differ = (OWN.flip(0) != OWN).nonzero()
    known = dataset.with_labels(NOISY, OWN)
    with pytest.raises(UserError, match=f"in {len(differ)} of 12 samples, first at index {int(differ[0])}"):
        replace_labels(known, f"{tmp_path / 'human.pt'}:worse_label")
    words = "clean labels agree with 33% of the set's labels, 33% do by chance: the rows are in another order"
    with pytest.raises(UserError, match=words):
        replace_labels(dataset, f"{tmp_path / 'human.pt'}:worse_label")


CORRECTED = torch.where(torch.arange(12) < 3, (OWN + 1) % 3, OWN)  # differs from OWN in three samples


@pytest.mark.parametrize("columns", ["label,clean_label", "index,label,clean_label"])
def test_clean_labels_may_differ_from_old_labels_that_are_not_known_to_be_clean(tmp_path, dataset, columns):
    values = {"index": range(12), "label": NOISY.tolist(), "clean_label": CORRECTED.tolist()}
    (tmp_path / "corrected.csv").write_text(table(columns, *(values[name] for name in columns.split(","))))
    replaced = replace_labels(dataset, str(tmp_path / "corrected.csv"))
    assert replaced.clean_labels is not None
    assert torch.equal(replaced.clean_labels, CORRECTED)
    with pytest.raises(UserError, match="differ from those of the set in 3 of 12 samples, first at index 0"):
        replace_labels(dataset.with_labels(NOISY, OWN), str(tmp_path / "corrected.csv"))


def test_rows_with_an_index_may_have_any_clean_labels(tmp_path, dataset):
    clean = OWN.flip(0).tolist()
    (tmp_path / "a.csv").write_text(table("index,label,clean_label", range(12), NOISY.tolist(), clean))
    replaced = replace_labels(dataset, str(tmp_path / "a.csv"))
    assert replaced.clean_labels is not None
    assert replaced.clean_labels.tolist() == clean
    (tmp_path / "a.csv").write_text(table(",label,clean_label", range(12), NOISY.tolist(), clean))
    with pytest.raises(UserError, match="another order; add a column file or index"):
        replace_labels(dataset, str(tmp_path / "a.csv"))


@pytest.mark.parametrize(
    ("name", "text", "words"),
    [
        ("a.csv", "label\n1\n2\n", "holds 2 labels; made-up has 12 training samples"),
        ("a.csv", table("label", [*NOISY[:11].tolist(), 3]), r"labels hold 3 at index 11; must be in 0\.\.2"),
        ("a.csv", table("label", [*NOISY[:11].tolist(), -1]), "labels hold -1 at index 11"),
        (
            "a.csv",
            table("label", [*WORDS[:11], "dog"]),
            "label 'dog' at index 11 is not a class; the classes are ant, bee, cat",
        ),
        ("a.csv", table("label", [*NOISY[:11].tolist(), 10**30]), "must be integers"),
        ("a.csv", table("index,label", [0, *range(11)], NOISY.tolist()), "index must hold all of 0..11; 11 is missing"),
        ("a.csv", table("index,label", ["x"] * 12, NOISY.tolist()), "index must hold integers"),
        ("a.csv", table("index,other", range(12), NOISY.tolist()), "no column of labels, only index, other"),
        ("a.csv", "1,2\n3,4\n", "no header"),
        ("a.csv", "label,index\n1\n", "line 2 has 1 columns; the header has 2"),
        ("a.csv", "ant\nbee\ncat,ant\n", "line 3 has 2 columns; the first line has 1"),
        ("a.csv", "index,label\n\n0,ant\n\n1\n", "line 5 has 1 columns; the header has 2"),
        ("a.csv", 'index,label\n0,"a\nnt"\n1\n', "line 4 has 1 columns; the header has 2"),
        ("a.csv", "", "is empty"),
        ("a.txt", "1", r"must end in \.csv, "),
        ("a.npy", "junk", "not a valid .npy"),
        ("a.pt", "junk", "a.pt: (refused|not a valid .pt file)"),
    ],
)
def test_errors(tmp_path, dataset, name, text, words):
    (tmp_path / name).write_text(text)
    with pytest.raises(UserError, match=words) as caught:
        replace_labels(dataset, str(tmp_path / name))
    assert caught.value.field == "--labels"
    assert "\n" not in str(caught.value)


def test_errors_of_arrays(tmp_path, dataset):
    for values, words in (
        (NOISY.numpy() / 2, "float64; must be integers"),
        (np.zeros((12, 3), int), r"shape \[12, 3\]"),
    ):
        np.save(tmp_path / "a.npy", values)
        with pytest.raises(UserError, match=words):
            replace_labels(dataset, str(tmp_path / "a.npy"))
    np.save(tmp_path / "a.npy", np.array([None] * 12), allow_pickle=True)
    with pytest.raises(UserError, match=r"holds a pickled object"):
        replace_labels(dataset, str(tmp_path / "a.npy"))
    with pytest.raises(UserError, match="no such file"):
        replace_labels(dataset, "nowhere.pt:key")
    torch.save({"clean_label": OWN, "worse_label": NOISY}, tmp_path / "cut.pt")
    data = (tmp_path / "cut.pt").read_bytes()
    for keep in (0, 10, len(data) // 2, len(data) - 10):
        (tmp_path / "cut.pt").write_bytes(data[:keep])
        with pytest.raises(UserError, match=r"not a valid \.pt file|refused") as caught:
            replace_labels(dataset, f"{tmp_path / 'cut.pt'}:worse_label")
        assert "\n" not in str(caught.value)
    (tmp_path / "old.pt").write_bytes(pickle.dumps([1], 2))
    with pytest.raises(UserError, match=r"not a valid \.pt file|refused"):
        replace_labels(dataset, str(tmp_path / "old.pt"))
