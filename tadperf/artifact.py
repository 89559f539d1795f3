"""DistilledSet: the one file that comes out of a run, with all that is needed to use it."""

from __future__ import annotations

import json
import math
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from pydantic import TypeAdapter, ValidationError
from torch import Tensor, nn

from tadperf.compute.device import resolve_device
from tadperf.compute.versions import tadperf_version
from tadperf.config import NetConfig
from tadperf.data import augment
from tadperf.data.normalise import Normaliser
from tadperf.data.open import open_data
from tadperf.errors import UserError
from tadperf.files import load_tensors, save_tensors, to_json_value
from tadperf.nets.students import Examples, train_student
from tadperf.nets.training import Recipe, accuracy

if TYPE_CHECKING:
    from tadperf.data.dataset import Dataset
    from tadperf.data.normalise import Normaliser

SCHEMA = 1  # of the metadata; raised when a reader of this version could misread the file
SECTIONS = {  # of the metadata, and what JSON has for them
    "class_names": list,
    "augment": str,
    "net": dict,
    "recipe": dict,
    "config": dict,
    "seed": int,
    "versions": dict,
    "data": dict,
}
CHUNK = 8192  # test images normalised at a time


@dataclass(frozen=True, eq=False)
class DistilledSet:
    """A distilled set of M images of C classes (tadperf).

    images: float32 [M, channels, H, W] as networks take them: normalised. `pixels()` gives them as uint8.
    labels: int64 [M], or label logits float32 [M, C].
    lr: the learning rate that was learned with the images.
    normaliser: maps uint8 pixels to the images' space and back; test images go through it too.
    augment: differentiable augmentations that the images were learned under. recipe: how to train a student on them.
    data: name, source and fingerprint of the set that was distilled.
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

    @property
    def num_classes(self) -> int:
        return len(self.class_names)

    @property
    def ipc(self) -> int:
        """Images per class."""
        return len(self.images) // self.num_classes

    @property
    def shape(self) -> tuple[int, int, int]:
        """Channels, height, width."""
        channels, height, width = self.images.shape[1:]
        return channels, height, width

    @property
    def hard_labels(self) -> Tensor:
        """int64 [M]: the labels, or the likeliest class of each soft label."""
        return self.labels.argmax(1) if self.labels.is_floating_point() else self.labels

    def pixels(self) -> Tensor:
        """The images as uint8 [M, channels, H, W]: normalisation undone, rounded and clamped."""
        return self.normaliser.invert(self.images)

    def validate(self) -> None:
        """Raises UserError where a value could not train a network: shapes, types, ranges, NaN."""
        images, labels, count = self.images, self.labels, self.num_classes
        if images.dtype != torch.float32 or images.ndim != 4 or 0 in images.shape:
            raise UserError("images", _kind(images), "must be float32 [M, channels, H, W] with M > 0")
        _refuse_nonfinite("images", images)
        if labels.shape[:1] != images.shape[:1]:
            raise UserError("labels", _kind(labels), f"must be one for each of the {len(images)} images")
        if labels.dtype == torch.int64 and labels.ndim == 1:
            if bad := [label for label in labels.tolist() if not 0 <= label < count]:
                raise UserError("labels", bad[0], f"must be in 0..{count - 1}: there are {count} class names")
        elif labels.dtype == torch.float32 and labels.shape == (len(images), count):
            _refuse_nonfinite("labels", labels)
        else:
            raise UserError("labels", _kind(labels), f"must be int64 [M], or float32 [M, {count}] for soft labels")
        if not (math.isfinite(self.lr) and self.lr > 0):
            raise UserError("lr", self.lr, "must be a finite number above 0")
        scales = self.normaliser.tensors()
        for name, tensor in scales.items():
            _refuse_nonfinite(f"normaliser.{name}", tensor)
        inputs = {"mean": images.shape[1], "zca_mean": images[0].numel()}
        for name in inputs.keys() & scales.keys():
            if len(scales[name]) != inputs[name]:
                raise UserError(f"normaliser.{name}", _kind(scales[name]), f"the images ask for {inputs[name]} values")
        if not (self.normaliser.std > 0).all():
            raise UserError("normaliser.std", self.normaliser.std.tolist(), "must be above 0")
        for strategy in (self.augment, self.recipe.augment):
            augment.parse(strategy)

    def save(self, path: Path | str) -> None:
        """Writes one safetensors file, atomically; equal sets give equal bytes. Raises UserError on an invalid set."""
        self.validate()
        values = {name: getattr(self, name) for name in SECTIONS}
        values["net"], values["recipe"] = self.net.model_dump(mode="json"), self.recipe._asdict()
        values |= {"schema": SCHEMA, "written_by": self.versions.get("tadperf", "unknown")}
        tensors = {"images": self.images, "labels": self.labels, "lr": torch.tensor(self.lr, dtype=torch.float64)}
        tensors |= {f"normaliser.{name}": tensor for name, tensor in self.normaliser.tensors().items()}
        text = json.dumps(to_json_value(values), sort_keys=True, ensure_ascii=False, allow_nan=False)
        save_tensors(path, tensors, {"tadperf": text})

    def train(
        self, network: NetConfig | str | None = None, seed: int = 0, device: str = "cpu", epochs: int | None = None
    ) -> nn.Module:
        """A fresh network trained on the set by its own recipe.

        network: another architecture, by name or as a NetConfig; by default the one the set was distilled with.
        """
        if isinstance(network, str):
            try:
                network = NetConfig(**{**self.net.model_dump(), "name": network})  # pyright: ignore[reportArgumentType]
            except ValidationError:
                raise UserError("network", network, "must be convnet, resnet18, alexnet or vgg11") from None
        recipe = self.recipe if epochs is None else self.recipe._replace(epochs=epochs)
        where = resolve_device(device)
        examples = Examples(self.images, self.labels)
        return train_student(examples, self.num_classes, network or self.net, recipe, seed, where)

    def accuracy(self, net: nn.Module, test: Dataset | str | tuple[Tensor, Tensor]) -> float:
        """The share of `test` that `net` classifies rightly, in [0, 1].

        test: a Dataset, what `open_data` opens (its test split is taken), or uint8 images [N, channels, H, W] and int64
        labels [N]. Raises UserError where its shape, or the order of its classes, is not that of the set.
        """
        if isinstance(test, tuple):
            images, labels = test
            if images.dtype != torch.uint8 or images.ndim != 4 or labels.shape != images.shape[:1]:
                kinds = f"{_kind(images)}, {_kind(labels)}"
                raise UserError("test", kinds, "must be uint8 [N, channels, H, W] and int64 [N]")
            self._refuse_shape(images)
        else:
            split = self.test_split(test) if isinstance(test, str) else self._fitting(test)
            images, labels = split.images, split.labels
        chunks = zip(images.split(CHUNK), labels.split(CHUNK), strict=True)
        return sum(accuracy(net, self.normaliser(x), y) * len(y) for x, y in chunks) / len(labels)

    def test_split(self, path: str | None = None) -> Dataset:
        """The test split at `path`, by default of the data that was distilled; opened without its training images.

        Raises UserError where there is none, or where its shape or the order of its classes is not that of the set.
        """
        source = self.data.get("source", {})
        where, kind = (
            (path, None) if path is not None else (source.get("path", self.data.get("name")), source.get("format"))
        )
        test = open_data(where, format=kind, image_size=source.get("image_size"), need_train=False).test
        if test is None:
            raise UserError("test", where, "has no test split; name a set that has one")
        return self._fitting(test)

    def _fitting(self, test: Dataset) -> Dataset:
        if test.class_names != self.class_names:  # a silent mismatch of order would only show as a bad accuracy
            pairs = (f"{a} for {b}" for a, b in zip(test.class_names, self.class_names, strict=False) if a != b)
            other = next(pairs, f"{test.num_classes} for {self.num_classes}")
            raise UserError(
                "test", test.name, f"has other classes than the distilled set, or in another order: {other}"
            )
        self._refuse_shape(test.images)
        return test

    def _refuse_shape(self, images: Tensor) -> None:
        if tuple(images.shape[1:]) != self.shape:
            raise UserError("test", _kind(images), f"the distilled images are {list(self.shape)}")


def load(path: Path | str) -> DistilledSet:
    """Reads and checks a distilled set.

    Raises UserError where the file is absent, truncated, no distilled set, of a newer schema, or holds values that
    `DistilledSet.validate` refuses. No code in a file can run: there is no pickle in it.
    """
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
        raise UserError(error.field, error.value, f"{error.remedy} (in {path}; distil it again)") from None
    return distilled


def _metadata(path: Path | str, metadata: dict[str, str]) -> dict[str, Any]:
    if "tadperf" not in metadata:
        raise UserError("file", path, "holds no tadperf metadata: it is not a distilled set")
    try:
        values = json.loads(metadata["tadperf"])
        schema = values["schema"]
    except (ValueError, KeyError, TypeError):
        raise UserError("file", path, "its tadperf metadata is damaged; write it again") from None
    if schema != SCHEMA:
        writer = values.get("written_by", "unknown")
        remedy = f"upgrade tadperf (this is {tadperf_version()}, which reads schema {SCHEMA})"
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
    rest = {name: values[name] for name in SECTIONS} | {
        "class_names": tuple(names),
        "net": NetConfig.model_validate(values["net"]),
        "recipe": TypeAdapter(Recipe).validate_python(values["recipe"]),
    }
    normaliser = Normaliser.from_tensors(scales)
    return DistilledSet(tensors["images"], tensors["labels"], tensors["lr"].item(), normaliser=normaliser, **rest)


def _kind(tensor: Tensor) -> str:
    return f"{str(tensor.dtype).removeprefix('torch.')} {list(tensor.shape)}"


def _refuse_nonfinite(field: str, tensor: Tensor) -> None:
    bad = int((~tensor.isfinite()).sum())
    if bad:
        raise UserError(field, f"{bad} of {tensor.numel()} values are NaN or infinite", "every value must be finite")
