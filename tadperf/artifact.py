"""DistilledSet: the file that a run writes, with everything needed to use it."""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any, get_args

import torch
from numpy.typing import ArrayLike
from pydantic import TypeAdapter, ValidationError
from torch import Tensor, nn

from tadperf.compute.device import resolve_device
from tadperf.compute.versions import tadperf_version, versions
from tadperf.config import Config, NetConfig
from tadperf.config.schema import MAX_FACTOR, Network
from tadperf.data import augment
from tadperf.data.convert import as_tensor, label_logits, number_names
from tadperf.data.dataset import Dataset, describe_tensor
from tadperf.data.enlarge import enlarge
from tadperf.data.layout import ReadOptions
from tadperf.data.normalise import Normaliser, normaliser_from_lists
from tadperf.data.objects import FORMAT
from tadperf.data.open import open_test_split
from tadperf.errors import UserError
from tadperf.files import load_tensors, save_tensors, to_json_value
from tadperf.nets.students import Examples, train_student
from tadperf.nets.training import Recipe, accuracy
from tadperf.progress import Progress, silent

# Version of the metadata, increased when older versions of tadperf would misread a new file: 2 for small images.
SCHEMA, SCHEMA_SMALL = 1, 2
SECTIONS = {  # the sections of the metadata, and their JSON types
    "class_names": list,
    "augment": str,
    "net": dict,
    "recipe": dict,
    "config": dict,
    "seed": int,
    "versions": dict,
    "data": dict,
}
UNNAMED = "unnamed_classes"  # in `data`: the classes are known by their numbers only
CHUNK = 8192  # test images normalised at a time; not tuned


@dataclass(frozen=True, eq=False, repr=False)
class DistilledSet:
    """A distilled set of M images of C classes (tadperf).

    images: float32 [M, channels, H, W], normalised for networks. `pixels()` returns them as uint8.
    labels: int64 [M], or label logits float32 [M, C].
    lr: the learning rate for students, learned with the images.
    normaliser: maps uint8 pixels to normalised images and back; use it for test images too.
    augment: the differentiable augmentations used to learn the images.
    recipe: how to train a student on the images.
    data: name, source and fingerprint of the set that was distilled.
    stored: the images as the file has them, [M, channels, h, w], if they are smaller: `images` are these enlarged.
    """

    images: Tensor
    labels: Tensor
    lr: float
    class_names: tuple[str, ...]
    normaliser: Normaliser
    augment: str
    net: NetConfig
    recipe: Recipe
    config: dict[str, Any]
    seed: int
    versions: dict[str, str]
    data: dict[str, Any]
    stored: Tensor | None = None

    @classmethod
    def from_tensors(
        cls,
        images: Tensor | ArrayLike,
        labels: Tensor | ArrayLike,
        mean: Sequence[float] | None = None,
        std: Sequence[float] | None = None,
        lr: float = 0.01,
        *,
        class_names: Sequence[str] | None = None,
        normaliser: Normaliser | None = None,
        probabilities: bool = False,
        config: Config | None = None,
        data: dict[str, Any] | None = None,
    ) -> DistilledSet:
        """Makes a set from the images and labels of any method, with the recipe of `config` for its students.

        images: float [M, channels, H, W], normalised by mean and std [channels] of pixels in [0, 1], or by
        `normaliser` in their place. labels: classes [M], label logits [M, C], or with `probabilities` their softmax.
        class_names: without them the classes are named by numbers and fit test sets with any names. config: settings
        of networks and students, by default `Config()`. Raises UserError if `validate` refuses the result.
        """
        config, images = config or Config(), as_tensor("images", images)
        if not images.is_floating_point():
            raise UserError("images", describe_tensor(images), "must be normalised float; subtract mean, divide by std")
        labels, known = as_tensor("labels", labels), class_names is not None
        labels = label_logits(labels, probabilities) if labels.is_floating_point() else labels.long()
        evaluate, strategy = config.evaluate, config.data.augment
        made = cls(
            images.float(),
            labels,
            float(lr),
            number_names(labels) if class_names is None else tuple(class_names),
            normaliser or normaliser_from_lists(images, mean, std),
            strategy,
            config.net,
            Recipe(
                evaluate.epochs, evaluate.batch, float(lr), evaluate.momentum, evaluate.weight_decay, strategy
            )._replace(optimizer=evaluate.optimizer),
            config.model_dump(mode="json"),
            config.seed,
            versions(),
            {"name": "imported", **(data or {}), **({} if known else {UNNAMED: True})},
        )
        made.validate()
        return made

    def __repr__(self) -> str:
        size = " x ".join(map(str, self.images.shape[1:]))
        kind = "soft" if self.labels.is_floating_point() else "hard"
        name = self.data.get("name", "unknown data")
        size += "" if self.stored is None else f" (stored {self.stored.shape[2]} x {self.stored.shape[3]})"
        counts = f"{len(self.images)} images of {size}, {self.num_classes} classes, {kind} labels"
        return f"DistilledSet({name}: {counts}, lr {self.lr:.3g}, seed {self.seed})"

    @property
    def num_classes(self) -> int:
        return len(self.class_names)

    @property
    def ipc(self) -> int:
        """Images per class; if they are stored small, the number of full images per class with as much memory."""
        full = len(self.images) if self.stored is None else self.stored.numel() // self.images[0].numel()
        return full // self.num_classes

    @property
    def shape(self) -> tuple[int, int, int]:
        """Channels, height, width."""
        channels, height, width = self.images.shape[1:]
        return channels, height, width

    @property
    def hard_labels(self) -> Tensor:
        """The labels int64 [M]; for soft labels the class of the largest logit."""
        return self.labels.argmax(1) if self.labels.is_floating_point() else self.labels

    def pixels(self) -> Tensor:
        """The images before normalisation, uint8 [M, channels, H, W], rounded and clamped."""
        return self.normaliser.invert(self.images)

    def validate(self) -> None:
        """Raises UserError for wrong shapes, types or ranges, and for NaN: no network could train on the set."""
        images = self.images
        if images.dtype != torch.float32 or images.ndim != 4 or 0 in images.shape:
            raise UserError("images", describe_tensor(images), "must be float32 [M, channels, H, W] with M > 0")
        _refuse_nonfinite("images", images)
        self._check_stored()
        self._check_labels()
        if not (math.isfinite(self.lr) and self.lr > 0):
            raise UserError("lr", self.lr, "must be a finite number above 0")
        self._check_normaliser()
        for strategy in (self.augment, self.recipe.augment):
            augment.parse(strategy)

    def _check_stored(self) -> None:
        stored, (count, channels, height, width) = self.stored, self.images.shape
        if stored is None:
            return
        fits = stored.ndim == 4 and stored.shape[:2] == (count, channels) and stored.shape[2] == stored.shape[3]
        if not (fits and stored.dtype == torch.float32 and 0 < stored.shape[2] <= height == width):
            remedy = f"must be float32 [{count}, {channels}, h, h] with h in 1..{height}, and the images square"
            raise UserError("stored", describe_tensor(stored), remedy)
        _refuse_nonfinite("stored", stored)
        if not torch.allclose(enlarge(stored, height), self.images, rtol=1e-4, atol=1e-4):
            remedy = "must be `images` before they are enlarged; replace it by None for other images"
            raise UserError("stored", describe_tensor(stored), remedy)

    def _check_labels(self) -> None:
        labels, images, classes = self.labels, len(self.images), self.num_classes
        if labels.shape[:1] != (images,):
            raise UserError("labels", describe_tensor(labels), f"must have one label for each of the {images} images")
        if labels.dtype == torch.int64 and labels.ndim == 1:
            wrong = (labels < 0) | (labels >= classes)
            if wrong.any():
                remedy = f"must be in 0..{classes - 1}: the set has {classes} class names"
                raise UserError("labels", int(labels[wrong][0]), remedy)
        elif labels.dtype == torch.float32 and labels.shape == (images, classes):
            _refuse_nonfinite("labels", labels)
        else:
            remedy = f"must be int64 [M], or float32 [M, {classes}] for soft labels"
            raise UserError("labels", describe_tensor(labels), remedy)

    def _check_normaliser(self) -> None:
        shape, tensors = self.images.shape[1:], self.normaliser.tensors()
        for name, tensor in tensors.items():
            _refuse_nonfinite(f"normaliser.{name}", tensor)
        for name, size in {"mean": shape[0], "zca_mean": shape.numel()}.items():
            if name in tensors and len(tensors[name]) != size:
                remedy = f"must have {size} values for images of {list(shape)}"
                raise UserError(f"normaliser.{name}", describe_tensor(tensors[name]), remedy)
        if not (self.normaliser.std > 0).all():
            raise UserError("normaliser.std", self.normaliser.std.tolist(), "must be above 0")

    def save(self, path: Path | str) -> None:
        """Writes one safetensors file, atomically. Equal sets give equal bytes. Raises UserError for an invalid set."""
        self.validate()
        values = {name: getattr(self, name) for name in SECTIONS}
        # SGD has no entry, so the recipe of earlier versions keeps its bytes.
        recipe = {name: v for name, v in self.recipe._asdict().items() if (name, v) != ("optimizer", "sgd")}
        values["net"], values["recipe"] = self.net.model_dump(mode="json"), recipe
        values |= {"schema": SCHEMA, "written_by": self.versions.get("tadperf", "unknown")}
        images = self.images if self.stored is None else self.stored
        values |= {} if self.stored is None else {"schema": SCHEMA_SMALL, "side": self.images.shape[-1]}
        tensors = {"images": images, "labels": self.labels, "lr": torch.tensor(self.lr, dtype=torch.float64)}
        tensors |= {f"normaliser.{name}": tensor for name, tensor in self.normaliser.tensors().items()}
        text = json.dumps(to_json_value(values), sort_keys=True, ensure_ascii=False, allow_nan=False)
        save_tensors(path, tensors, {"tadperf": text})

    def train(
        self, network: NetConfig | str | None = None, seed: int = 0, device: str = "cpu", epochs: int | None = None
    ) -> nn.Module:
        """Trains a fresh network on the set and returns it in eval mode.

        network: an architecture, by name or as a NetConfig; by default the one that the set was distilled with.
        epochs: replaces the number of epochs of the set's recipe. Raises UserError for an unknown network or device.
        """
        if isinstance(network, str):
            try:
                network = NetConfig.model_validate(self.net.model_dump() | {"name": network})
            except ValidationError:
                raise UserError("network", network, f"must be one of {', '.join(get_args(Network))}") from None
        recipe = self.recipe if epochs is None else self.recipe._replace(epochs=epochs)
        examples = Examples(self.images, self.labels)
        return train_student(examples, self.num_classes, network or self.net, recipe, seed, resolve_device(device))

    def accuracy(
        self, net: nn.Module, test: Dataset | Path | str | tuple[Tensor | ArrayLike, Tensor | ArrayLike]
    ) -> float:
        """Returns the share of `test` that `net` classifies correctly, in [0, 1].

        test: a Dataset; a path or name for `open_data`, whose test split is used; or a pair of images uint8
        [N, channels, H, W] and integer labels [N], as tensors or NumPy arrays.
        Raises UserError if its shape, its labels or the order of its classes do not fit the set.
        """
        if isinstance(test, tuple):
            images, labels = self._check_pair(*test)
        else:
            split = self._check_test(test) if isinstance(test, Dataset) else self.test_split(test)
            images, labels = split.images, split.labels
        chunks = zip(images.split(CHUNK), labels.split(CHUNK), strict=True)
        return sum(accuracy(net, self.normaliser(x), y) * len(y) for x, y in chunks) / len(labels)

    def test_split(self, path: Path | str | None = None, progress: Progress = silent) -> Dataset:
        """Opens the test split at `path`, by default that of the distilled data, without reading training images.

        Raises UserError if there is no test split, or if its shape or the order of its classes does not fit the set.
        """
        source = self.data.get("source", {})
        own_data = path is None or str(Path(path).expanduser().absolute()) == source.get("path")
        format = source.get("format") if own_data else None
        path = source.get("path", self.data.get("name")) if path is None else path
        if path is None or (own_data and format == FORMAT):
            raise UserError("test", path, "the set does not name a path of its data; give a test set")
        known = {field.name for field in fields(ReadOptions)} - {"format", "progress"}
        # The labels and the share of a made test split belong to the distilled data only.
        known -= set() if own_data and "test_share" in source else {"labels", "test_share"}
        options = {name: value for name, value in source.items() if name in known}
        test = open_test_split(path, ReadOptions(format=format, progress=progress, **options))
        if test is None:
            remedy = "has no test split, and one is drawn for the data of the set only; choose data with a test split"
            raise UserError("test", path, remedy)
        return self._check_test(test)

    def _check_test(self, test: Dataset) -> Dataset:
        unnamed = self.data.get(UNNAMED) and test.num_classes == self.num_classes
        if (
            test.class_names != self.class_names and not unnamed
        ):  # without this check, another order would look like a low accuracy
            pairs = (f"{a} for {b}" for a, b in zip(test.class_names, self.class_names, strict=False) if a != b)
            difference = next(pairs, f"{test.num_classes} for {self.num_classes}")
            remedy = f"has other classes than the distilled set, or another order: {difference}"
            raise UserError("test", test.name, remedy)
        self._refuse_shape(test.images)
        return test

    def _check_pair(self, images: Tensor | ArrayLike, labels: Tensor | ArrayLike) -> tuple[Tensor, Tensor]:
        """Returns images and labels as tensors; raises UserError if they cannot be a test set."""
        images, labels = as_tensor("test", images), as_tensor("test", labels)
        kinds = f"{describe_tensor(images)}, {describe_tensor(labels)}"
        integers = not labels.is_floating_point() and labels.dtype != torch.bool
        if images.dtype != torch.uint8 or images.ndim != 4 or labels.shape != images.shape[:1] or not integers:
            raise UserError("test", kinds, "must be images uint8 [N, channels, H, W] and integer labels [N]")
        if not len(images):
            raise UserError("test", kinds, "holds no image")
        self._refuse_shape(images)
        labels = labels.long()
        if (wrong := (labels < 0) | (labels >= self.num_classes)).any():
            raise UserError("test", f"label {int(labels[wrong][0])}", f"must be in 0..{self.num_classes - 1}")
        return images, labels

    def _refuse_shape(self, images: Tensor) -> None:
        if tuple(images.shape[1:]) != self.shape:
            raise UserError("test", describe_tensor(images), f"must be {list(self.shape)} like the distilled images")


def load(path: Path | str) -> DistilledSet:
    """Reads and checks a distilled set: the file, or the run folder with its distilled.safetensors.

    Raises UserError if the file is absent, truncated, not a distilled set or of a newer schema, or if
    `DistilledSet.validate` refuses its values. Safe for files from others: the format has no pickle and runs no code.
    """
    path = Path(path)
    if path.is_dir():
        path = path / "distilled.safetensors"
    if path.suffix in (".pt", ".pth") and path.is_file():
        raise UserError("file", path, "is a PyTorch file; make a distilled set of it with: tadperf import")
    tensors, metadata = load_tensors(path)
    values = _metadata(path, metadata)
    try:
        distilled = _assemble(tensors, values)
    except ValidationError as error:
        first = error.errors()[0]
        what = f"{error.title}: {'.'.join(map(str, first['loc']))}: {first['msg']}"
        raise UserError("file", path, f"is damaged ({what}); write it again") from None
    except (KeyError, TypeError, ValueError, RuntimeError) as error:
        what = f"{error} is missing" if isinstance(error, KeyError) else error
        raise UserError("file", path, f"is damaged ({what}); write it again") from None
    try:
        distilled.validate()
    except UserError as error:
        raise UserError(error.field, error.value, f"{error.remedy} (in {path}; distill it again)") from None
    return distilled


def _metadata(path: Path | str, metadata: dict[str, str]) -> dict[str, Any]:
    if "tadperf" not in metadata:
        raise UserError("file", path, "has no tadperf metadata, so it is not a distilled set")
    try:
        values = json.loads(metadata["tadperf"])
        schema = values["schema"]
    except (ValueError, KeyError, TypeError, RecursionError):
        raise UserError("file", path, "its tadperf metadata is damaged; write it again") from None
    if schema not in (SCHEMA, SCHEMA_SMALL):
        writer = values.get("written_by", "unknown")
        remedy = f"upgrade tadperf (this is {tadperf_version()}, which reads schema {SCHEMA} and {SCHEMA_SMALL})"
        raise UserError("file", path, f"has schema {schema}, written by tadperf {writer}; {remedy}")
    return values


def _assemble(tensors: dict[str, Tensor], values: dict[str, Any]) -> DistilledSet:
    for name, kind in SECTIONS.items():
        if not isinstance(values[name], kind):
            raise TypeError(f"{name} is not a {kind.__name__}")
    names = values["class_names"]
    if not names or not all(isinstance(name, str) for name in names):
        raise TypeError("class_names are not a list of names")
    scales = {name.removeprefix("normaliser."): t for name, t in tensors.items() if name.startswith("normaliser.")}
    sections = {name: values[name] for name in SECTIONS} | {
        "class_names": tuple(names),
        "net": NetConfig.model_validate(values["net"]),
        "recipe": TypeAdapter(Recipe).validate_python(values["recipe"]),
    }
    sections["normaliser"], images = Normaliser.from_tensors(scales), tensors["images"]
    if values["schema"] == SCHEMA_SMALL:
        sections["stored"] = images
        images = _enlarged(images, values["side"])
    return DistilledSet(images, tensors["labels"], tensors["lr"].item(), **sections)


def _enlarged(stored: Tensor, side: Any) -> Tensor:
    small = stored.shape[-1]
    if type(side) is not int or stored.ndim != 4 or stored.shape[2] != small or not small <= side <= MAX_FACTOR * small:
        raise ValueError(f"side = {side} does not fit {describe_tensor(stored)}")
    return enlarge(stored, side)


def _refuse_nonfinite(field: str, tensor: Tensor) -> None:
    count = int((~tensor.isfinite()).sum())
    if count:
        raise UserError(field, f"{count} of {tensor.numel()} values are NaN or infinite", "all values must be finite")
