"""Sets go to other programs and come back; hostile and wrong files are refused in one line."""

from __future__ import annotations

import os
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image
from torch import Tensor, nn

from tadperf.artifact import DistilledSet, load
from tadperf.config import Config
from tadperf.data.dataset import Dataset
from tadperf.data.normalise import fit_normaliser
from tadperf.data.open import open_config
from tadperf.errors import DataWarning, UserError
from tadperf.pipeline.exchange import CONSTANTS, export_set, import_set

NAMES = ("cat", "../up", "dog")


def make_set(soft: bool = False, kind: str = "meanstd", channels: int = 3, size: int = 8) -> DistilledSet:
    generator = torch.Generator().manual_seed(0)
    pixels = torch.randint(0, 256, (30, channels, size, size), generator=generator, dtype=torch.uint8)
    normaliser, labels = fit_normaliser(pixels, kind), torch.tensor([2, 0, 1, 0, 1, 2])
    logits = torch.randn(6, 3, generator=generator) + 9 * nn.functional.one_hot(labels, 3)
    return DistilledSet.from_tensors(
        normaliser(pixels[:6]), logits if soft else labels, lr=0.03, class_names=NAMES, normaliser=normaliser
    )


@pytest.mark.parametrize("soft", [False, True], ids=["hard", "soft"])
@pytest.mark.parametrize(("kind", "ending"), [("mtt", "_best"), ("ddranking", "")])
def test_tensors_come_back_as_they_went(tmp_path, kind, ending, soft):
    ds = make_set(soft)
    scales = ds.normaliser.mean.tolist(), ds.normaliser.std.tolist()
    facts = export_set(ds, tmp_path / "out", kind, scales)
    assert facts["soft_labels"] == soft
    names = sorted(file.name for file in (tmp_path / "out").iterdir())
    assert names == [f"{name}{ending}.pt" for name in ("images", "labels", "lr")]
    stored = torch.load(tmp_path / "out" / f"images{ending}.pt", weights_only=True)
    assert (stored.dtype, stored.shape) == (torch.float32, ds.images.shape)
    for path in (tmp_path / "out", tmp_path / "out" / f"images{ending}.pt"):
        again = import_set(path, scales=scales)
        order = ds.labels.argsort(stable=True) if kind == "ddranking" and not soft else torch.arange(6)
        assert torch.allclose(again.images, ds.images[order], atol=1e-5)
        assert torch.equal(again.labels, ds.labels[order])
        assert torch.equal(again.pixels(), ds.pixels()[order])
        assert again.lr == pytest.approx(0.03)


@pytest.mark.parametrize(
    ("size", "name", "kind"), [(32, "cifar", "meanstd"), (8, "imagenet", "meanstd"), (8, "imagenet", "zca")]
)
def test_images_get_the_constants_of_the_published_code(tmp_path, size, name, kind):
    ds = make_set(kind=kind, size=size)
    export_set(ds, tmp_path / "out", "ddranking")
    images = torch.load(tmp_path / "out" / "images.pt", weights_only=True)
    mean, std = (torch.tensor(values)[:, None, None] for values in CONSTANTS[name])
    assert torch.equal(
        ((images * std + mean) * 255).round().to(torch.uint8), ds.pixels()[ds.labels.argsort(stable=True)]
    )


def test_grey_images_keep_the_normalisation_of_the_set(tmp_path):
    ds = make_set(channels=1)
    export_set(ds, tmp_path / "out", "mtt")
    assert torch.allclose(torch.load(tmp_path / "out" / "images_best.pt", weights_only=True), ds.images, atol=1e-5)


@pytest.mark.parametrize("channels", [1, 3])
def test_a_folder_holds_the_pixels_of_each_class(tmp_path, channels):
    ds = make_set(soft=True, channels=channels)
    export_set(ds, tmp_path / "out", "folder")
    assert sorted(path.name for path in (tmp_path / "out").iterdir()) == ["_.._up", "cat", "dog"]
    image = Image.open(tmp_path / "out" / "cat" / "00001.png")
    assert image.mode == ("L" if channels == 1 else "RGB")
    again = import_set(tmp_path / "out", scales=([0.5] * channels, [0.2] * channels))
    assert again.class_names == ("_.._up", "cat", "dog")
    cats = again.labels == 1
    assert torch.equal(again.pixels()[cats], ds.pixels()[ds.hard_labels == 0])


def write(folder: Path, **tensors: Any) -> Path:
    folder.mkdir(exist_ok=True)
    for name, value in tensors.items():
        torch.save(value, folder / f"{name}.pt")
    return folder


def digits_data(tmp_path: Path) -> Config:
    """Returns the config of a small image folder with two classes, whose names are not in the order of the labels."""
    for name in ("nine", "one"):
        for split, count in (("train", 4), ("test", 2)):
            folder = tmp_path / "data" / split / name
            folder.mkdir(parents=True)
            for k in range(count):
                Image.fromarray(torch.randint(0, 256, (8, 8, 3), dtype=torch.uint8).numpy()).save(folder / f"{k}.png")
    return Config.model_validate({"data": {"path": str(tmp_path / "data")}, "net": {"width": 8, "depth": 1}})


def test_data_give_names_normaliser_and_test_split(tmp_path):
    config = digits_data(tmp_path)
    folder = write(tmp_path / "set", images=torch.randn(4, 3, 8, 8))
    ds = import_set(folder, config, data=True)
    assert (ds.class_names, ds.labels.tolist(), ds.lr) == (("nine", "one"), [0, 0, 1, 1], 0.01)
    ds.save(tmp_path / "d.safetensors")
    test = load(tmp_path / "d.safetensors").test_split()
    assert isinstance(test, Dataset)
    assert len(test) == 4
    for name, value in (("one", 0), ("nine", 255)):
        (tmp_path / "images" / name).mkdir(parents=True)
        Image.new("RGB", (8, 8), (value,) * 3).save(tmp_path / "images" / name / "a.png")
    ds = import_set(tmp_path / "images", config, data=True)
    assert [int(image.float().mean()) for image in ds.pixels()[ds.labels.argsort()]] == [255, 0]
    (tmp_path / "images" / "one").rename(tmp_path / "images" / "two")
    with pytest.raises(UserError, match="is no class of data; name the folders as its classes"):
        import_set(tmp_path / "images", config, data=True)


class Runs:
    """An object whose pickle calls a function that makes the folder it_ran."""

    def __reduce__(self) -> tuple[Callable[[str], None], tuple[str]]:
        return os.mkdir, ("it_ran",)


IMAGES, LABELS = torch.zeros(4, 3, 8, 8), torch.tensor([0, 1, 0, 1])
WRONG: dict[str, tuple[dict[str, Any], str]] = {
    "code in the images": ({"images": Runs()}, "images: .*refused, it holds more than plain tensors .*mkdir"),
    "code in the labels": ({"images": IMAGES, "labels": Runs()}, "labels: .*refused, it holds more than plain"),
    "a list": ({"images": [IMAGES]}, r"images: .*holds a list; must hold one dense tensor"),
    "a sparse tensor": ({"images": IMAGES.to_sparse()}, "images: .*must hold one dense tensor"),
    "two dimensions": ({"images": torch.zeros(4, 192)}, r"images: float32 \[4, 192\]: must be float \[M, channels"),
    "no image": ({"images": IMAGES[:0]}, r"images: float32 \[0, 3, 8, 8\]: must be float"),
    "pixels": ({"images": IMAGES.byte(), "labels": LABELS}, r"images: uint8 .*must be float"),
    "complex numbers": ({"images": IMAGES.to(torch.complex64), "labels": LABELS}, r"images: complex64 .*must be float"),
    "NaN": ({"images": IMAGES * float("nan"), "labels": LABELS}, "images: 768 of 768 values are NaN"),
    "infinite as float16": ({"images": IMAGES + 1e6, "labels": LABELS, "lr": torch.tensor(float("inf"))}, "lr: inf"),
    "NaN in the labels": (
        {"images": IMAGES, "labels": torch.full((4, 2), float("nan"))},
        "labels: 8 of 8 values are NaN",
    ),
    "too few labels": ({"images": IMAGES, "labels": LABELS[:3]}, "labels: .*one label for each of the 4 images"),
    "labels of three dimensions": ({"images": IMAGES, "labels": torch.zeros(4, 2, 2)}, "labels: .*float32? ?.*must be"),
    "no labels": ({"images": IMAGES}, r"labels\.pt: no such file; with --data, the same number"),
    "two rates": ({"images": IMAGES, "labels": LABELS, "lr": torch.ones(2)}, "lr: .*must be one number; use --lr"),
    "rate 0": ({"images": IMAGES, "labels": LABELS, "lr": torch.zeros(())}, "lr: 0.0: must be a finite number above 0"),
}


@pytest.mark.parametrize("name", WRONG)
def test_files_that_are_no_set_are_refused_in_one_line(tmp_path, monkeypatch, name):
    monkeypatch.chdir(tmp_path)
    tensors, message = WRONG[name]
    folder = write(tmp_path / "set", **tensors)
    with pytest.raises(UserError, match=message) as error:
        import_set(folder, scales=CONSTANTS["imagenet"])
    assert "\n" not in str(error.value)
    assert not (tmp_path / "it_ran").exists()


def truncate(file: Path) -> None:
    file.write_bytes(file.read_bytes()[:-400])


def write_archive(file: Path) -> None:
    """Writes a zip archive with the names of a file of torch.save and other content."""
    with zipfile.ZipFile(file, "w", zipfile.ZIP_DEFLATED) as archive:
        for name in ("images/data.pkl", "images/data/0"):
            archive.writestr(name, b"\0" * 1000)


DAMAGES: dict[str, Callable[[Path], object]] = {
    "truncated": truncate,
    "empty": lambda file: file.write_bytes(b""),
    "text": lambda file: file.write_text("version https://git-lfs.github.com/spec/v1\n"),
    "another archive": write_archive,
    "a pickle of Python 2": lambda file: file.write_bytes(b"c__builtin__\neval\n(Vopen('it_ran', 'w')\ntR."),
}


@pytest.mark.parametrize("name", DAMAGES)
def test_damaged_files_are_refused_in_one_line(tmp_path, monkeypatch, name):
    monkeypatch.chdir(tmp_path)
    folder = write(tmp_path / "set", images=IMAGES, labels=LABELS)
    DAMAGES[name](folder / "images.pt")
    with pytest.raises(UserError, match=r"images: .*images\.pt: (not a valid|refused|a Git LFS pointer)") as error:
        import_set(folder, scales=CONSTANTS["imagenet"])
    assert "\n" not in str(error.value)
    assert not (tmp_path / "it_ran").exists()


def refused(message: str, path: Path, **options: Any) -> None:
    with pytest.raises(UserError, match=message) as error:
        import_set(path, **options)
    assert "\n" not in str(error.value)


def test_wrong_paths_and_options_are_refused_in_one_line(tmp_path):
    folder = write(tmp_path / "set", images=IMAGES, labels=LABELS)
    refused("PATH: .*missing: no such file or folder", tmp_path / "missing")
    refused("PATH: .*labels.pt: must be named images", folder / "labels.pt")
    refused("--mean: missing: give --mean and --std of the images, --constants, or --data", folder)
    refused("--std: 1 numbers: must have a number for each of the 3", folder, scales=([0.5] * 3, [0.2]))
    refused("--std: 0,0,0: all numbers must be finite and above 0", folder, scales=([0.5] * 3, [0.0] * 3))
    refused("--mean: nan,nan,nan: all numbers must be finite", folder, scales=([float("nan")] * 3, [0.2] * 3))
    numbered = write(tmp_path / "numbered", images_0=IMAGES, images_500=IMAGES)
    refused(r"holds images_0\.pt, images_500\.pt; name one of them", numbered)
    (tmp_path / "nothing").mkdir()
    refused("no image found", tmp_path / "nothing", scales=CONSTANTS["cifar"])
    config = digits_data(tmp_path)
    odd = write(tmp_path / "odd", images=torch.zeros(3, 3, 8, 8))
    refused("3 images are not the same number for 2 classes", odd, config=config, data=True)
    large = write(tmp_path / "large", images=torch.zeros(2, 3, 9, 9))
    refused(r"images of data are \[3, 8, 8\]; give the data", large, config=config, data=True)


def test_exports_are_refused_in_one_line(tmp_path):
    ds = make_set()
    for kind, out, message in (
        ("zip", tmp_path / "a", "--to: zip: must be one of folder, mtt, ddranking"),
        ("mtt", tmp_path, "--out: .*exists already"),
        ("mtt", tmp_path / "a" / "b", "--out: .*the folder above it does not exist"),
    ):
        with pytest.raises(UserError, match=message):
            export_set(ds, out, kind)
    with pytest.raises(UserError, match="needs images of 1 or 3 channels, these have 2"):
        export_set(make_set(channels=2), tmp_path / "a", "folder")
    with pytest.raises(UserError, match="--mean: 1 numbers: must have a number for each of the 3 channels"):
        export_set(ds, tmp_path / "a", "mtt", ([0.5], [0.2]))
    with pytest.raises(UserError, match=r"--std: 0\.2,0,0\.2: all numbers must be finite and above 0"):
        export_set(ds, tmp_path / "a", "mtt", ([0.5] * 3, [0.2, 0.0, 0.2]))
    assert list(tmp_path.iterdir()) == []


def test_a_stored_view_writes_its_own_values_only(tmp_path):
    images: Tensor = make_set().images
    export_set(make_set(), tmp_path / "out", "mtt")
    assert (tmp_path / "out" / "images_best.pt").stat().st_size < 4 * images.numel() + 4096


def test_ddranking_gets_the_images_of_each_class_one_after_the_other(tmp_path):
    ds = make_set()  # its labels are 2, 0, 1, 0, 1, 2
    scales = ds.normaliser.mean.tolist(), ds.normaliser.std.tolist()
    export_set(ds, tmp_path / "out", "ddranking", scales)
    again = import_set(tmp_path / "out", scales=scales)
    assert again.labels.tolist() == [0, 0, 1, 1, 2, 2]
    assert torch.equal(again.pixels(), ds.pixels()[[1, 3, 2, 4, 0, 5]])
    uneven = DistilledSet.from_tensors(ds.images[:5], ds.labels[:5], class_names=NAMES, normaliser=ds.normaliser)
    with pytest.warns(DataWarning, match="as many images of each class"):
        export_set(uneven, tmp_path / "uneven", "ddranking")


def test_whitened_images_of_published_code_are_read_and_written(tmp_path):
    config = digits_data(tmp_path)
    train = open_config(config.data).train
    pixels = train.images[:4].double() / 255
    flat = train.images.flatten(1).double() / 255
    values, vectors = torch.linalg.eigh(torch.cov(flat.T) + 0.1 * torch.eye(flat.shape[1], dtype=torch.float64))
    whitening = vectors @ (values**-0.5).diag() @ vectors.T
    images = ((pixels.flatten(1) - flat.mean(0)) @ whitening).view_as(pixels).float()
    folder = write(tmp_path / "set", images_best=images, labels_best=train.labels[:4])
    ds = import_set(folder, config, data=True, zca=True)
    assert torch.equal(ds.images, images)
    assert torch.equal(ds.pixels(), train.images[:4])
    assert torch.allclose(ds.normaliser(train.images[:4]), images, atol=1e-5)  # so are test images
    assert export_set(ds, tmp_path / "out", "mtt")["zca"] is True
    assert torch.equal(torch.load(tmp_path / "out" / "images_best.pt", weights_only=True), images)
    refused("--zca: without --data", folder, zca=True)
    refused("--zca: with --mean", folder, config=config, data=True, zca=True, scales=CONSTANTS["cifar"])
