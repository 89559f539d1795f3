"""WebDataset's tar shards: samples, labels, splits, patterns, and archives that are damaged or hostile."""

from __future__ import annotations

import gzip
import io
import json
import tarfile
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from tadperf.data.layout import ReadOptions
from tadperf.data.open import open_data, open_test_split
from tadperf.data.readers.webdataset import MAX_SHARDS, expand_braces
from tadperf.errors import UserError


def png(value: int) -> bytes:
    stream = io.BytesIO()
    Image.fromarray(np.full((4, 4), value, np.uint8)).save(stream, "png")
    return stream.getvalue()


def write(path: Path, files: dict[str, bytes]) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    with tarfile.open(path, "w:gz" if path.suffix == ".gz" else "w") as archive:
        for name, content in files.items():
            member = tarfile.TarInfo(name)
            member.size = len(content)
            archive.addfile(member, io.BytesIO(content))
    return path


def samples(*values: int, label=lambda k: k % 2) -> dict[str, bytes]:
    """Returns an image and its .cls file for each value."""
    files = {}
    for value in values:
        files |= {f"{value:03}.png": png(value), f"{value:03}.cls": str(label(value)).encode()}
    return files


def values(split) -> list[int]:
    return split.images[:, 0, 0, 0].tolist()


@pytest.fixture
def shards(tmp_path):
    """Returns a folder of two training shards and one test shard."""
    write(tmp_path / "set" / "train-0000.tar", samples(0, 1, 2))
    write(tmp_path / "set" / "train-0001.tar", samples(3, 4))
    write(tmp_path / "set" / "val-0000.tar", samples(10, 11))
    return tmp_path / "set"


def test_a_folder_of_shards(shards):
    train, test = open_data(shards)
    assert (values(train), train.labels.tolist(), train.class_names) == ([0, 1, 2, 3, 4], [0, 1, 0, 1, 0], ("0", "1"))
    assert test is not None
    assert (values(test), test.labels.tolist()) == ([10, 11], [0, 1])
    assert train.file_names is not None
    assert train.file_names[3] == "train-0001/003.png"
    assert train.source["format"] == "webdataset"
    alone = open_test_split(shards, ReadOptions())
    assert alone is not None
    assert alone.fingerprint == test.fingerprint


def test_patterns(shards, monkeypatch):
    whole = open_data(shards)
    assert whole.test is not None
    for pattern in ("{train,val}-*.tar", "{train-0000,train-0001,val-0000}.tar"):
        train, test = open_data(f"{shards}/{pattern}")
        assert test is not None
        assert (train.fingerprint, test.fingerprint) == (whole.train.fingerprint, whole.test.fingerprint)
    monkeypatch.chdir(shards)
    train, test = open_data("train-{0000..0001}.tar")
    assert (values(train), test) == ([0, 1, 2, 3, 4], None)
    monkeypatch.chdir("/")
    assert open_data(train.source["path"]).train.fingerprint == train.fingerprint
    with pytest.raises(UserError, match=r"train-0002\.tar: no such file; correct the pattern"):
        open_data(f"{shards}/train-{{0000..0002}}.tar")
    with pytest.raises(UserError, match=r"no \.tar file is there"):
        open_data(f"{shards}/other-*.tar")


def test_braces():
    assert expand_braces("a-{08..11}.tar") == ["a-08.tar", "a-09.tar", "a-10.tar", "a-11.tar"]
    assert expand_braces("{a,b}{1..2}") == ["a1", "a2", "b1", "b2"]
    assert expand_braces("plain.tar") == ["plain.tar"]
    for pattern in ("{0..999999999}.tar", "{0..9999}{0..9999}.tar"):
        with pytest.raises(UserError, match=f"must be at most {MAX_SHARDS}"):
            expand_braces(pattern)


@pytest.mark.parametrize("suffix", [".tar", ".tar.gz"])
def test_labels_in_json_and_as_names(tmp_path, suffix):
    files = {}
    for k in range(4):
        files |= {f"a/{k}.json": json.dumps({"id": k, "class_name": "ab"[k % 2]}).encode(), f"a/{k}.png": png(k)}
    train = open_data(write(tmp_path / f"set{suffix}", {"./README": b"x", **files})).train
    assert (train.class_names, train.labels.tolist(), values(train)) == (("a", "b"), [0, 1, 0, 1], [0, 1, 2, 3])
    other = {**files, **{f"a/{k}.txt": f"{k // 2 + 1}\n".encode() for k in range(4)}}
    by_id = open_data(write(tmp_path / f"other{suffix}", other), label_column="txt").train
    assert (by_id.class_names, by_id.labels.tolist()) == (("1", "2"), [0, 0, 1, 1])


def test_two_images_of_a_sample(tmp_path):
    files = {}
    for k in range(2):
        files |= {f"{k}.png": png(k), f"{k}.mask.png": png(100 + k), f"{k}.cls": str(k).encode()}
    path = write(tmp_path / "set.tar", files)
    with pytest.raises(UserError, match=r"0\.mask\.png: is a second image of its sample; choose an extension"):
        open_data(path)
    assert values(open_data(path, image_column="png").train) == [0, 1]
    assert values(open_data(path, image_column="mask.png").train) == [100, 101]


def test_broken_images_and_other_labels(shards, tmp_path):
    write(shards / "train-0001.tar", {**samples(3, 4), "003.png": b"junk"})
    with pytest.raises(UserError, match=r"train-0001\.tar: 003\.png: cannot be decoded .*skip_broken"):
        open_data(shards)
    (tmp_path / "labels.csv").write_text("file,label\n" + "".join(f"{k:03}.png,{k // 2 % 2}\n" for k in range(5)))
    train = open_data(shards, skip_broken=True, labels=str(tmp_path / "labels.csv")).train
    assert (values(train), train.labels.tolist()) == ([0, 1, 2, 4], [0, 0, 1, 0])
    assert [image.name for image in train.broken] == ["train-0001/003.png"]


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"000.cls": b""}, r"000\.cls: not a valid text in UTF-8 \(empty\)"),
        ({"000.cls": b"\xff"}, "not a valid text in UTF-8"),
        ({"000.cls": b"x" * (1 << 20) + b"x"}, "has 1048577 bytes; must have at most 1048576"),
        ({"007.png": png(7)}, r"007\.png: has no label; add a \.cls file"),
        ({"007.cls": b"1"}, "007: has a label and no image"),
        ({"007.png": png(7), "007.json": b"[1]"}, r"007\.json: not a valid JSON object \(a JSON list\)"),
        ({"007.png": png(7), "007.json": b'{"label": [1]}'}, "its label is '\\[1\\]'; must be an integer"),
        ({"007.png": png(7), "007.json": b'{"colour": 1}'}, "has no label"),
        ({"007.png": png(7), "007.json": b"[" * 100_000}, "not a valid JSON object"),
    ],
)
def test_wrong_samples_are_refused(tmp_path, change, words):
    with pytest.raises(UserError, match=words):
        open_data(write(tmp_path / "train.tar", {**samples(0, 1), **change}))


def test_shards_without_a_split_beside_others_are_refused(shards):
    write(shards / "more.tar", samples(5, 6))
    with pytest.raises(UserError, match=r"more\.tar: names no split, but other files do"):
        open_data(shards)


def test_an_archive_of_an_image_folder_is_refused_with_the_remedy(tmp_path):
    path = write(tmp_path / "set.tar", {"a/0.png": png(0), "b/1.png": png(1)})
    with pytest.raises(UserError, match=r"holds no images with labels .*extract an archive of an image folder"):
        open_data(path)


def test_links_and_other_members_are_passed_over(tmp_path):
    path = write(tmp_path / "set.tar", samples(0, 1))
    with tarfile.open(path, "a") as archive:
        for kind, name in ((tarfile.SYMTYPE, "002.png"), (tarfile.LNKTYPE, "003.cls"), (tarfile.FIFOTYPE, "004.png")):
            member = tarfile.TarInfo(name)
            member.type, member.linkname = kind, "/etc/passwd"
            archive.addfile(member)
    assert values(open_data(path).train) == [0, 1]


def test_damaged_archives_are_refused(tmp_path):
    data = write(tmp_path / "good.tar", samples(0, 1)).read_bytes()
    bad = tmp_path / "bad.tar"
    for size in (1, 511, 513, 600, 1100):
        bad.write_bytes(data[:size])
        with pytest.raises(UserError, match=r"bad\.tar"):
            open_data(bad, format="webdataset")
    huge = tarfile.TarInfo("000.png")
    huge.size = 2**40
    bad.write_bytes(huge.tobuf() + bytes(1024))
    with pytest.raises(UserError, match=r"bad\.tar"):
        open_data(bad)


def test_a_long_name_of_a_gigabyte_is_not_read(tmp_path):
    header = tarfile.TarInfo("././@LongLink")
    header.type, header.size = tarfile.GNUTYPE_LONGNAME, 2**30
    path = tmp_path / "set.tar.gz"
    path.write_bytes(gzip.compress(header.tobuf(tarfile.GNU_FORMAT) + bytes(1 << 20)))
    with pytest.raises(UserError, match="a header of 1073741824 bytes"):
        open_data(path)
