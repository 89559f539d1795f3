"""Writes distilled sets in the layouts of other programs, and reads sets from them."""

from __future__ import annotations

import io
import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from tadperf.artifact import DistilledSet
from tadperf.config import Config
from tadperf.data.dataset import Dataset, describe_tensor
from tadperf.data.normalise import Normaliser, fit_normaliser, fit_pixel_zca
from tadperf.data.open import open_config
from tadperf.data.torch_file import load_tensor
from tadperf.errors import UserError, warn_user
from tadperf.pipeline.repair import Placer, new_folder, safe_name
from tadperf.progress import Progress, silent

# Mean and deviation of the images in the published code of MTT, FTD, TESLA and DATM, and in DD-Ranking: for CIFAR, and
# for Tiny ImageNet and ImageNet.
CONSTANTS: dict[str, tuple[tuple[float, ...], tuple[float, ...]]] = {
    "cifar": ((0.4914, 0.4822, 0.4465), (0.2023, 0.1994, 0.2010)),
    "imagenet": ((0.485, 0.456, 0.406), (0.229, 0.224, 0.225)),
}
LAYOUTS = {"mtt": "_best", "ddranking": ""}  # the ending of their file names: images_best.pt, images.pt
KINDS = ("folder", *LAYOUTS)
ZCA = "pixel_zca"  # the kind of normaliser that import_set(zca=True) fits
SCALES = tuple[Sequence[float], Sequence[float]]  # mean and deviation of each channel, of pixels in [0, 1]


def export_set(distilled: DistilledSet, out: Path, kind: str, scales: SCALES | None = None) -> dict[str, Any]:
    """Writes a set into the new folder `out` and returns what was written.

    kind: "mtt" (images_best.pt, labels_best.pt, lr_best.pt), "ddranking" (images.pt, labels.pt, lr.pt), or "folder":
    PNG images in a folder for each class, rounded to 8 bits, with hard labels.
    scales: the mean and deviation that the program normalises test images by. The default are the constants of the
    published code: those of CIFAR for 32 x 32 colour images, of ImageNet for other colour images. Grey images keep the
    set's own. A set that was imported with `zca` stays whitened. DD-Ranking assumes the images of each class one after
    the other and the same number of each, so hard labels are sorted by class for it, with a warning for other numbers.
    Raises UserError for an unknown kind, and if the folder exists or cannot be written.
    """
    if kind not in KINDS:
        raise UserError("--to", kind, f"must be one of {', '.join(KINDS)}")
    check_new_folder(out)
    facts: dict[str, Any] = {"folder": str(out), "layout": kind, "images": len(distilled.images)}
    with new_folder(out, "--out") as folder:
        if kind == "folder":
            _write_images(folder, distilled)
            return facts | {"soft_labels": False}
        mean, std = scales or _published_scales(distilled)
        _check_scales((mean, std), distilled.shape[0])
        whitened = scales is None and _is_pixel_zca(distilled.normaliser)
        images = distilled.images
        if not whitened:
            images = (distilled.normaliser.denormalise(images) - _column(mean)) / _column(std)
        order = _class_order(distilled) if kind == "ddranking" else slice(None)
        tensors = {"images": images[order], "labels": distilled.labels[order], "lr": torch.tensor(distilled.lr)}
        for name, tensor in tensors.items():
            _save_tensor(folder / f"{name}{LAYOUTS[kind]}.pt", tensor)
    soft = distilled.labels.is_floating_point()
    facts |= {"soft_labels": soft}
    return facts | ({"zca": True} if whitened else {"mean": list(map(float, mean)), "std": list(map(float, std))})


def import_set(
    path: Path,
    config: Config | None = None,
    data: bool = False,
    scales: SCALES | None = None,
    lr: float | None = None,
    probabilities: bool = False,
    progress: Progress = silent,
    zca: bool = False,
    accuracy: tuple[float, float] | None = None,
) -> DistilledSet:
    """Reads a set of another program.

    path: a folder with images.pt and labels.pt (DD-Ranking) or images_best.pt and labels_best.pt (MTT, FTD, DATM), one
    file of images beside its labels, or a folder with a folder of images for each class.
    config: the settings of networks and students. data: opens the data of the config, which gives class names, the
    test split for `evaluate`, and mean and deviation if `scales` are None. lr: by default that of the file lr.pt, or
    0.01. probabilities: soft labels are probabilities, not logits. zca: the images are whitened by ZCA of the pixels of
    the data, as with --zca in the published code of MTT, FTD and DATM. accuracy: published mean and standard deviation
    as shares in [0, 1], stored for `evaluate --verify`.
    Without a file of labels and with `data`, each class has the same number of images, in the order of the classes.
    Raises UserError in one line for anything that is missing, damaged or does not fit.
    """
    config = config or Config()
    train = open_config(config.data, progress, config.data.test_share).train if data else None
    file, kind = _images_file(path), ZCA if zca else config.data.normalise
    if file is None:
        images, labels, names = _read_images(path, train, config)
        normaliser = _normaliser(scales, train, images.shape[1], kind)
        images = normaliser(images)
    else:
        images, labels = _read_tensors(file, train)
        names = None if train is None else train.class_names
        normaliser = _normaliser(scales, train, images.shape[1], kind)
        lr_file = _sibling(file, "lr")
        if lr is None and lr_file.is_file():
            lr = _number(lr_file)
    if train is not None and images.shape[1:] != train.images.shape[1:]:
        remedy = f"the images of {train.name} are {list(train.shape)}; give the data that the set was distilled from"
        raise UserError("images", describe_tensor(images), remedy)
    return DistilledSet.from_tensors(
        images,
        labels,
        lr=0.01 if lr is None else lr,
        class_names=names,
        normaliser=normaliser,
        probabilities=probabilities,
        config=config,
        data=_facts(path, train, accuracy),
    )


def _facts(path: Path, train: Dataset | None, accuracy: tuple[float, float] | None) -> dict[str, Any]:
    """Returns the description of an imported set: its data, and its published accuracy."""
    facts: dict[str, Any] = {"name": path.resolve().name, "imported": str(path)}
    if train is not None:
        facts |= {"name": train.name, "source": train.source, "fingerprint": train.fingerprint}
    if accuracy is not None:
        facts["published"] = dict(zip(("mean", "std"), map(float, accuracy), strict=True))
    return facts


def check_new_folder(out: Path, field: str = "--out") -> None:
    """Raises UserError if a folder of this name exists, or if the one above it does not."""
    if out.exists():
        raise UserError(field, out, "exists already; choose another folder")
    if not out.absolute().parent.is_dir():
        raise UserError(field, out, "the folder above it does not exist; make it first")


def _published_scales(distilled: DistilledSet) -> SCALES:
    channels, height, width = distilled.shape
    if channels == 3:
        return CONSTANTS["cifar" if (height, width) == (32, 32) else "imagenet"]
    return distilled.normaliser.mean.tolist(), distilled.normaliser.std.tolist()


def _is_pixel_zca(normaliser: Normaliser) -> bool:
    """Returns whether `fit_pixel_zca` made the normaliser."""
    return normaliser.zca is not None and bool((normaliser.mean == 0).all() and (normaliser.std == 1).all())


def _class_order(distilled: DistilledSet) -> Tensor:
    """Returns the order of the images by class. Soft labels keep their order: the classes of their blocks are lost."""
    if distilled.labels.is_floating_point():
        return torch.arange(len(distilled.labels))
    counts = distilled.labels.bincount(minlength=distilled.num_classes)
    if len(counts.unique()) > 1:
        warn_user("DD-Ranking needs as many images of each class; pass labels.pt to it as hard_labels")
    return distilled.labels.argsort(stable=True)


def _column(values: Sequence[float]) -> Tensor:
    return torch.tensor(values, dtype=torch.float32)[:, None, None]


def _save_tensor(path: Path, tensor: Tensor) -> None:
    buffer = io.BytesIO()
    torch.save(tensor.clone(), buffer)  # a clone: a view would store the memory of the whole tensor
    path.write_bytes(buffer.getvalue())


def _write_images(folder: Path, distilled: DistilledSet) -> None:
    """Writes 00000.png, 00001.png, ... into a folder for each class, in the order of the set."""
    from PIL import Image

    if distilled.shape[0] not in (1, 3):
        raise UserError("--to", "folder", f"needs images of 1 or 3 channels, these have {distilled.shape[0]}")
    folders = Placer(folder).class_folders(".", distilled.class_names)
    pixels, counts = distilled.pixels(), [0] * distilled.num_classes
    for image, label in zip(pixels, distilled.hard_labels.tolist(), strict=True):
        picture = Image.fromarray((image[0] if len(image) == 1 else image.permute(1, 2, 0)).contiguous().numpy())
        picture.save(folder / folders[label] / f"{counts[label]:05d}.png")
        counts[label] += 1


def _images_file(path: Path) -> Path | None:
    """Returns the file of images that a path names or holds, or None for a folder without one."""
    if path.is_file():
        if not path.name.startswith("images") or path.suffix != ".pt":
            raise UserError("PATH", path, "must be named images*.pt, with labels*.pt in the same folder")
        return path
    if not path.is_dir():
        raise UserError("PATH", path, "no such file or folder; check the path")
    for name in ("images_best.pt", "images.pt"):
        if (path / name).is_file():
            return path / name
    others = sorted(file.name for file in path.glob("images*.pt"))
    if others:
        raise UserError("PATH", path, f"holds {', '.join(others)[:200]}; name one of them")
    return None


def _sibling(file: Path, name: str) -> Path:
    """Returns labels_best.pt beside images_best.pt."""
    return file.with_name(name + file.name.removeprefix("images"))


def _read_tensors(file: Path, train: Dataset | None) -> tuple[Tensor, Tensor]:
    """Returns the images and the labels of a file and its sibling."""
    images, labels_file = load_tensor(file, "images"), _sibling(file, "labels")
    if images.ndim != 4 or not images.is_floating_point() or 0 in images.shape:
        raise UserError("images", describe_tensor(images), f"must be float [M, channels, H, W] (in {file})")
    if labels_file.is_file():
        return images, load_tensor(labels_file, "labels")
    if train is None:
        remedy = "no such file; with --data, the same number of images for each class is assumed"
        raise UserError("labels", labels_file, remedy)
    if len(images) % train.num_classes:
        remedy = f"is missing, and {len(images)} images are not the same number for {train.num_classes} classes"
        raise UserError("labels", labels_file, remedy)
    return images, torch.arange(train.num_classes).repeat_interleave(len(images) // train.num_classes)


def _number(file: Path) -> float:
    value = load_tensor(file, "lr")
    if value.numel() != 1:
        raise UserError("lr", describe_tensor(value), f"must be one number; use --lr (in {file})")
    return float(value)


def _read_images(path: Path, train: Dataset | None, config: Config) -> tuple[Tensor, Tensor, tuple[str, ...]]:
    """Returns uint8 images, labels and class names of a folder with a folder for each class."""
    settings: dict[str, Any] = {"path": str(path), "format": "folder", "image_size": config.data.image_size}
    found = open_config(type(config.data)(**settings)).train
    if train is None:
        return found.images, found.labels, found.class_names
    numbers = {safe_name(name): c for c, name in enumerate(train.class_names)}
    missing = next((name for name in found.class_names if name not in numbers), None)
    if missing is not None:
        raise UserError("PATH", path / missing, f"is no class of {train.name}; name the folders as its classes")
    order = torch.tensor([numbers[name] for name in found.class_names])
    return found.images, order[found.labels], train.class_names


def _normaliser(scales: SCALES | None, train: Dataset | None, channels: int, kind: str) -> Normaliser:
    """Returns the normaliser of the given mean and deviation, or that of this kind for the training data."""
    if kind == ZCA:
        if scales is not None or train is None:
            value, remedy = ("with --mean", "leave out") if scales else ("without --data", "give --data, not")
            raise UserError("--zca", value, f"the data of the set determine the whitening; {remedy} mean and deviation")
        return fit_pixel_zca(train.images)
    if scales is None:
        if train is None:
            remedy = "give --mean and --std of the images, --constants, or --data, the data of the set"
            raise UserError("--mean", "missing", remedy)
        return fit_normaliser(train.images, kind)
    _check_scales(scales, channels)
    return Normaliser(*(torch.tensor(values, dtype=torch.float32) for values in scales))


def _check_scales(scales: SCALES, channels: int) -> None:
    for name, values in zip(("--mean", "--std"), scales, strict=True):
        if len(values) != channels:
            raise UserError(name, f"{len(values)} numbers", f"must have a number for each of the {channels} channels")
        if not all(map(math.isfinite, values)) or (name == "--std" and min(values) <= 0):
            text = "finite" if name == "--mean" else "finite and above 0"
            raise UserError(name, ",".join(f"{value:g}" for value in values), f"all numbers must be {text}")
