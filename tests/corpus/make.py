"""Makes small unusual data sets, as users have them, and prints how each must be read: python make.py FOLDER.

Most sets have the three classes cross, disc and square. All pixels of an image have the value 40 * class + number, so
that the right answer is known.
"""

from __future__ import annotations

import io
import json
import sys
import unicodedata
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

CLASSES = ("cross", "disc", "square")
TRAIN, TEST = 3, 2  # images per class


@dataclass(frozen=True)
class Odd:
    """A set: the function that writes it, the options that open it, and the expected answer.

    train, test: the values of the first pixel of each image, in order; test is None if there is no test split.
    refused: words of the message if the set must be refused. warns: words of the warning, if there must be one.
    """

    write: Callable[[Path], Path]
    options: dict[str, Any] = field(default_factory=dict)
    train: tuple[int, ...] = tuple(40 * c + k for c in range(3) for k in range(TRAIN))
    test: tuple[int, ...] | None = tuple(40 * c + 20 + k for c in range(3) for k in range(TEST))
    labels: tuple[int, ...] | None = None
    names: tuple[str, ...] = CLASSES
    refused: str = ""
    warns: str = ""


def image(value: int) -> np.ndarray:
    """Returns a grey image of 4 x 6 pixels of one value."""
    return np.full((4, 6), value, np.uint8)


def save(path: Path, array: np.ndarray, **options: Any) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(array).save(path, **options)


def put(folder: Path, start: int, count: int, suffix: str = ".png", classes: tuple[str, ...] = CLASSES) -> None:
    """Writes the images start ... start + count - 1 of each class."""
    for c, name in enumerate(classes):
        for k in range(start, start + count):
            save(folder / name / f"{k:02}{suffix}", image(40 * c + k))


def splits(train: str, test: str, suffix: str = ".png") -> Callable[[Path], Path]:
    """Returns a function that writes two split folders."""

    def write(folder: Path) -> Path:
        put(folder / train, 0, TRAIN, suffix)
        put(folder / test, 20, TEST, suffix)
        return folder

    return write


def suffixes(folder: Path) -> Path:
    """Images in three formats: TIFF, PGM and TGA."""
    for c, name in enumerate(CLASSES):
        for k, suffix in enumerate((".tif", ".pgm", ".tga")):
            save(folder / name / f"{k}{suffix}", image(40 * c + k))
    return folder


def alpha(folder: Path) -> Path:
    """Images with an alpha channel: the upper half is transparent, the lower half opaque."""
    for c, name in enumerate(CLASSES):
        for k in range(TRAIN):
            pixels = np.zeros((4, 6, 4), np.uint8)
            pixels[2:, :, 3] = 255
            pixels[2:, :, :3] = 40 * c + k
            save(folder / name / f"{k}.png", pixels)
    return folder


def twelve_bits(folder: Path) -> Path:
    """12-bit pixels in 16-bit files; the brightest pixel of the set is in another split and another class."""
    for c, name in enumerate(CLASSES):
        for k in range(TRAIN):
            save(folder / "train" / name / f"{k}.png", image(40 * c + k).astype(np.uint16) * 16)
        for k in range(20, 20 + TEST):
            save(folder / "test" / name / f"{k}.tif", image(40 * c + k).astype(np.uint16) * 16)
    save(folder / "test" / "square" / "22.tif", np.full((4, 6), 4095, np.uint16))
    return folder


def floats(folder: Path) -> Path:
    """TIFF images of floats in 0..1."""
    for c, name in enumerate(CLASSES):
        for k in range(TRAIN):
            save(folder / name / f"{k}.tif", (image(40 * c + k) / 256).astype(np.float32))
    return folder


def windows_names(folder: Path) -> Path:
    """File names that are not UTF-8, as an old zip program writes them."""
    put(folder, 0, TRAIN)
    for name in CLASSES:
        (folder / name / "02.png").rename(folder / name / b"02\xe9.png".decode("utf-8", "surrogateescape"))
    return folder


def mac_names(folder: Path) -> Path:
    """One class in Unicode form NFC for train and NFD for test."""
    put(folder / "train", 0, TRAIN, classes=("cross", "disque\u0301".replace("e\u0301", "\u00e9"), "square"))
    put(folder / "test", 20, TEST, classes=("cross", unicodedata.normalize("NFD", "disqu\u00e9"), "square"))
    return folder


def mixed(folder: Path) -> Path:
    """Other files next to the images. The warning counts them."""
    put(folder, 0, TRAIN)
    (folder / "disc" / "notes.txt").write_text("x")
    (folder / "disc" / "photo.heic").write_bytes(b"x")
    (folder / "disc" / ".hidden.png").write_bytes(b"x")
    save(folder / "stray.png", image(0))
    return folder


def linked(folder: Path) -> Path:
    """A class folder with a link to a folder of images, and a link back to itself."""
    put(folder / "set", 0, TRAIN - 1)
    for c, name in enumerate(CLASSES):
        save(folder / "more" / name / "02.png", image(40 * c + 2))
        (folder / "set" / name / "more").symlink_to(folder / "more" / name)
        (folder / "set" / name / "loop").symlink_to(folder / "set" / name)
    return folder / "set"


def around(folder: Path) -> Path:
    """Splits inside an extra folder."""
    splits("train", "test")(folder / "dataset")
    return folder


def class_called_train(folder: Path) -> Path:
    """A class whose name is a split word."""
    put(folder, 0, TRAIN, classes=("bus", "car", "train"))
    return folder


def unclear_splits(folder: Path) -> Path:
    return splits("my_train_v2x", "my_test_v2x")(folder)


def two_train_folders(folder: Path) -> Path:
    put(folder / "training", 0, TRAIN)
    return splits("train", "test")(folder)


def one_class(folder: Path) -> Path:
    put(folder, 0, TRAIN, classes=("disc",))
    return folder


def broken(folder: Path) -> Path:
    put(folder, 0, TRAIN)
    (folder / "cross" / "00.png").write_bytes(b"junk")
    (folder / "square" / "01.png").write_bytes(b"")
    return folder


def encoded(value: int) -> dict[str, Any]:
    stream = io.BytesIO()
    Image.fromarray(image(value)).save(stream, "png")
    return {"bytes": stream.getvalue(), "path": None}


def parquet(path: Path, values: list[int], **columns: Any) -> None:
    import pyarrow as pa
    import pyarrow.parquet as pq

    path.parent.mkdir(parents=True, exist_ok=True)
    table = {"image": [encoded(v) for v in values], "label": [CLASSES[v // 40] for v in values]}
    pq.write_table(pa.table({**columns, **table}), path)


def manifest(
    split: bool = True, header: str = "path,label,split", separator: str = ",", suffix: str = ".png", folder: str = "i/"
) -> Callable[[Path], Path]:
    """Returns a function that writes images into one folder, and a table of them in another order."""

    def write(place: Path) -> Path:
        rows = []
        for c, name in enumerate(CLASSES):
            for k in [*range(TRAIN), *(range(20, 20 + TEST) if split else ())]:
                save(place / "i" / f"{40 * c + k}.png", image(40 * c + k))
                cells = [f"{folder}{40 * c + k}{suffix}", name, "test" if k >= 20 else "train"]
                rows.append(separator.join(cells[: len(header.split(","))]))
        text = "\n".join([separator.join(header.split(",")), *reversed(rows)])
        (place / "set.csv").write_text(text)
        return place / "set.csv"

    return write


ROWS = [40 * c + k for c in range(3) for k in range(TRAIN)]
TEST_ROWS = [40 * c + 20 + k for c in range(3) for k in range(TEST)]


def parquet_words(folder: Path) -> Path:
    parquet(folder / "training.parquet", ROWS)
    parquet(folder / "testing.parquet", TEST_ROWS)
    return folder


def parquet_columns(folder: Path) -> Path:
    """Other columns of bytes and integers before the right ones."""
    others = {
        "embedding": [b"x"] * 9,
        "mask": [encoded(7 + k) for k in range(9)],
        "id": list(range(9)),
        "width": [6] * 9,
    }
    parquet(folder / "train.parquet", ROWS, **others)
    return folder / "train.parquet"


def parquet_configs(folder: Path) -> Path:
    for name in ("cropped", "full"):
        parquet(folder / name / "train-00000-of-00001.parquet", ROWS)
    return folder


def parquet_unknown_split(folder: Path) -> Path:
    parquet(folder / "train.parquet", ROWS)
    parquet(folder / "extra.parquet", TEST_ROWS)
    return folder


def lfs(folder: Path) -> Path:
    (folder / "train.parquet").write_text("version https://git-lfs.github.com/spec/v1\noid sha256:00\nsize 1\n")
    return folder


def table(text: Callable[[list[str]], str]) -> Callable[[Path], Path]:
    """Returns a function that writes a set and its labels table, which `text` makes from the paths of the images."""

    def write(folder: Path) -> Path:
        put(folder / "train", 0, TRAIN)
        paths = sorted(path.relative_to(folder / "train").as_posix() for path in (folder / "train").rglob("*.png"))
        (folder / "labels.csv").write_text(text(paths), encoding="utf-8")
        return folder

    return write


def shifted(path: str) -> str:
    """Returns the next class of an image: the new label in all tables."""
    return CLASSES[(CLASSES.index(path.partition("/")[0]) + 1) % 3]


def unique_names(folder: Path) -> Path:
    """Unique file names. The table lists them in reverse order, without suffixes, with semicolons."""
    rows = []
    for c, name in enumerate(CLASSES):
        for k in range(TRAIN):
            save(folder / "train" / name / f"{name}{k}.png", image(40 * c + k))
            rows.append(f"{name}{k};{CLASSES[(c + 1) % 3]}")
    (folder / "labels.csv").write_text("\n".join(["id;label", *reversed(rows)]))
    return folder


SHIFTED = (1,) * TRAIN + (2,) * TRAIN + (0,) * TRAIN
CSV = {"labels": "labels.csv"}


def absolute(path: str) -> str:
    """Returns the absolute path that a table from Windows holds."""
    return f"C:\\x\\train\\{path}".replace("/", "\\")


def numbered(paths: list[str]) -> list[str]:
    """Returns table rows that begin with the index that pandas writes."""
    return [f"{k},{path},{shifted(path)}" for k, path in enumerate(reversed(paths))]


CORPUS: dict[str, Odd] = {
    **{
        f"{train}, {test}": Odd(splits(train, test))
        for train, test in [
            ("Training", "Testing"),
            ("training_set", "test_set"),
            ("seg_train/seg_train", "seg_test/seg_test"),
            ("train_images", "test_images"),
            ("Train Data", "Val Data"),
            ("TrainSet", "TestSet"),
            ("train", "dev"),
            ("train", "eval"),
            ("train", "hold-out"),
        ]
    },
    "tiff": Odd(splits("train", "test", ".tiff")),
    "suffixes": Odd(suffixes, test=None),
    "alpha": Odd(alpha, {}, (128,) * 9, None),
    "12 bits": Odd(twelve_bits, test=(20, 21, 60, 61, 100, 101, 255)),
    "floats": Odd(floats, test=None),
    "names that are not UTF-8": Odd(windows_names, test=None),
    "names of a Mac": Odd(mac_names, names=("cross", "disqu\u00e9", "square")),
    "other files": Odd(mixed, test=None, warns="3 other files are not used: .heic (1), .txt (1), images outside of"),
    "links": Odd(linked, test=None),
    "a folder around": Odd(around),
    "a class called train": Odd(class_called_train, test=None, names=("bus", "car", "train")),
    "unclear splits": Odd(unclear_splits, refused="my_test_v2x, my_train_v2x look like splits"),
    "two train folders": Odd(two_train_folders, refused="train and training are both train splits"),
    "one class": Odd(one_class, refused="only one class, 'disc'"),
    "broken images": Odd(broken, refused="2 images: cannot be decoded: "),
    "parquet: training, testing": Odd(parquet_words),
    "parquet: other columns": Odd(parquet_columns, test=None),
    "parquet: a column by name": Odd(parquet_columns, {"image_column": "mask"}, tuple(range(7, 16)), None),
    "parquet: no such column": Odd(parquet_columns, {"label_column": "species"}, refused="has no such column"),
    "parquet: two configs": Odd(parquet_configs, refused="holds several data sets: cropped, full"),
    "parquet: unknown split": Odd(parquet_unknown_split, refused="names no split, but other files do"),
    "parquet: Git LFS": Odd(lfs, refused="git lfs pull"),
    **{
        f"table: {title}": Odd(
            write,
            train=tuple(reversed(ROWS)),
            test=tuple(reversed(TEST_ROWS)) if split else None,
            labels=(2,) * TRAIN + (1,) * TRAIN + (0,) * TRAIN,
        )
        for title, split, write in [
            ("path, label, split", True, manifest()),
            ("semicolons", True, manifest(separator=";")),
            ("tabs, no split", False, manifest(split=False, header="file,class", separator="\t")),
            ("ids of Kaggle", False, manifest(split=False, header="id,label", suffix="", folder="")),
            ("paths of Windows", True, manifest(header="image,category,set", folder="D:\\x\\i\\")),
            ("paths of another machine", True, manifest(folder="/home/me/i/")),
        ]
    },
    "table: no header": Odd(manifest(header="0.png,cross"), refused="has no header; begin it with a line"),
    "table: no such image": Odd(manifest(suffix=".jpg"), refused="line 2: 'i/101.jpg': no such image"),
    "table: outside": Odd(manifest(folder="../i/"), refused="must be the path of a file inside"),
    "labels by path": Odd(
        table(lambda paths: "\n".join(["filename,label", *(f"{p},{shifted(p)}" for p in reversed(paths))])),
        CSV,
        test=None,
        labels=SHIFTED,
    ),
    "labels by absolute path": Odd(
        table(lambda paths: "\n".join(["path\tclass", *(f"{absolute(p)}\t{shifted(p)}" for p in paths)])),
        CSV,
        test=None,
        labels=SHIFTED,
    ),
    "labels by unique name": Odd(unique_names, CSV, test=None, labels=SHIFTED),
    "labels with pandas' index": Odd(
        table(lambda paths: "\n".join([",file,label", *numbered(paths)])), CSV, test=None, labels=SHIFTED
    ),
    "labels: header class": Odd(
        table(lambda paths: "\n".join(["class", *map(shifted, paths)])), CSV, test=None, labels=SHIFTED
    ),
    "labels: unknown column": Odd(
        table(lambda paths: "\n".join(["label,colour", *(f"{shifted(p)},red" for p in paths)])),
        CSV,
        refused="column 'colour' is unknown",
    ),
    "labels: a name of several images": Odd(
        table(lambda paths: "\n".join(["file,label", *(f"{p.partition('/')[2]},{shifted(p)}" for p in paths)])),
        CSV,
        refused="could be train/cross/00.png or train/disc/00.png",
    ),
    "labels: a missing row": Odd(
        table(lambda paths: "\n".join(["file,label", *(f"{p},{shifted(p)}" for p in paths[1:])])),
        CSV,
        refused="1 of 9 training images have no row, first 'train/cross/00.png'; add them, with an empty label",
    ),
    "labels: a row too many": Odd(
        table(lambda paths: "\n".join(["file,label", *(f"{p},{shifted(p)}" for p in [*paths, "disc/99.png"])])),
        CSV,
        refused="file 'disc/99.png' is no training image",
    ),
    "labels: a row twice": Odd(
        table(lambda paths: "\n".join(["file,label", *(f"{p},{shifted(p)}" for p in [*paths, paths[0]])])),
        CSV,
        refused="lines 2 and 11 name the same file",
    ),
}


if __name__ == "__main__":
    for number, (title, odd) in enumerate(CORPUS.items()):
        place = Path(sys.argv[1]) / f"{number:02}"
        place.mkdir(parents=True)
        answer = {"train": odd.train, "test": odd.test, "labels": odd.labels, "refused": odd.refused}
        print(json.dumps({"title": title, "path": str(odd.write(place)), "options": odd.options, **answer}))
