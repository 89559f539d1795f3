"""The detector: a classifier trained on the trusted samples. It finds images that do not show their class."""

from __future__ import annotations

import math
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor, nn

from tadperf import files, seeds
from tadperf.compute.compile import compile_for_inference
from tadperf.config import DetectorConfig, RefineConfig
from tadperf.data.images import Images
from tadperf.errors import UserError
from tadperf.kernels import per_sample
from tadperf.nets import training
from tadperf.nets.architectures import build
from tadperf.nets.problem import Problem
from tadperf.nets.training import Recipe

BATCH = 1024  # images classified at a time
ERRORS = 3.0  # the accuracy must exceed chance by this many standard errors; not tuned


class DetectorOutput(NamedTuple):
    """The detector's output for M images: logits float32 [M, C] and penultimate features float32 [M, D]."""

    logits: Tensor
    features: Tensor


def compile_detector(detector: nn.Module, config: RefineConfig, batches: int) -> nn.Sequential:
    """Returns the detector in two parts that share its weights; the part up to the features runs on refine.backend.

    batches: the expected number of batches of images.
    """
    assert isinstance(detector, nn.Sequential)
    features = compile_for_inference(
        detector[:-1], config.backend, batch=config.batch, calls=batches + config.rounds + 1
    )
    return nn.Sequential(features, detector[-1])


@torch.no_grad()
def classify_images(detector: nn.Module, images: Images, batch: int = BATCH) -> DetectorOutput:
    """Returns logits and features of normalised images [M, channels, H, W]; features are the last layer's input."""
    assert isinstance(detector, nn.Sequential)
    device = next(detector.parameters()).device
    features = [
        detector[:-1](images[torch.arange(start, min(start + batch, len(images)))].to(device))
        for start in range(0, len(images), batch)
    ]
    joined = torch.cat(features)
    return DetectorOutput(detector[-1](joined), joined)


def train_detector(config: DetectorConfig, problem: Problem) -> nn.Module:
    """Trains a new detector on the images, labels int64 [N] and weights of `problem`. Ignores `problem.net`."""
    seed = seeds.derive(problem.seed, "detector")
    module = build_detector(config, problem.images, problem.num_classes, seed).to(problem.device)
    recipe = Recipe(config.epochs, config.batch, config.lr, config.momentum, config.weight_decay, problem.augment)
    return training.fit(module, problem.images, problem.labels, recipe, seed, weights=problem.weights)


def build_detector(config: DetectorConfig, images: Images, num_classes: int, seed: int) -> nn.Module:
    """Returns the detector's untrained network for these images."""
    channels, height, width = images[torch.zeros(1, dtype=torch.int64)].shape[1:]
    return build(config, (channels, height, width), num_classes, seed)


def load_detector(path: Path | str, module: nn.Module, num_classes: int) -> nn.Module:
    """Returns `module` with the weights of a safetensors file. Raises UserError if they belong to another network."""
    tensors, _ = files.load_tensors(path)
    expected = module.state_dict()
    last = next(name for name in reversed(expected) if name.endswith("bias"))
    if last in tensors and expected[last].shape != tensors[last].shape:
        classes = f"it was trained on {tensors[last].numel()} classes, the data have {num_classes}"
        raise UserError("detector.path", path, f"{classes}; use a detector of these classes")
    for name, value in expected.items():
        if name not in tensors:
            names = ", ".join(sorted(tensors)[:4]) or "nothing"
            remedy = f"tensor {name!r} is missing (the file holds {names}, ...); set detector.name, depth and width"
            raise UserError("detector.path", path, remedy)
        if tensors[name].shape != value.shape:
            sizes = f"{name} is {list(tensors[name].shape)}, expected {list(value.shape)}"
            raise UserError("detector.path", path, f"{sizes}; set detector.name, depth and width to match the file")
    if extra := sorted(tensors.keys() - expected.keys()):
        raise UserError("detector.path", path, f"the network has no tensor {extra[0]!r}; set detector.depth")
    module.load_state_dict(tensors)
    return module.eval()


def check_detector(detector: nn.Module, images: Images, labels: Tensor, class_names: tuple[str, ...]) -> float:
    """Returns the accuracy on held-out normalised images with labels int64 [N]; refuses a useless detector.

    Raises UserError if the accuracy is less than three standard errors above chance, or if the detector's classes are
    in another order (`class_permutation`).
    """
    logits = classify_images(detector, images).logits
    count, classes = logits.shape
    labels = labels.to(logits.device)
    prediction = per_sample(logits, labels).prediction.long()
    confusion = torch.bincount(labels * classes + prediction, minlength=classes**2).view(classes, classes).cpu()
    accuracy = float(confusion.trace()) / count
    order = class_permutation(confusion)
    if moved := [c for c in range(classes) if order[c] != c]:
        swapped = ", ".join(f"{class_names[c]!r} as {class_names[order[c]]!r}" for c in moved[:4])
        remedy = (
            f"predicts {swapped} (accuracy {accuracy:.3f}): its classes are in another order; reorder its last layer"
        )
        raise UserError("detector", f"{len(moved)} of {classes} classes", remedy)
    chance = 1 / classes
    least = chance + ERRORS * math.sqrt(chance * (1 - chance) / count)
    if accuracy <= least:
        remedy = f"is near chance: it must be above {least:.3f} on {count} held-out samples; train it longer"
        raise UserError("detector", f"accuracy {accuracy:.3f}", remedy)
    return accuracy


def class_permutation(confusion: Tensor) -> list[int]:
    """Returns the detector's class for each class; without clear evidence, the class itself (tadperf).

    confusion: int64 [C, C], one row per label. A class is moved if more than half of its samples are predicted as one
    other class, and if following these predictions from class to class leads back to it.
    """
    total = confusion.sum(1)
    count, prediction = confusion.max(1)
    majority = {c: int(prediction[c]) for c in range(len(total)) if 2 * int(count[c]) > int(total[c])}
    order = list(range(len(total)))
    for start in majority:
        cycle, current = [start], majority[start]
        while current in majority and current not in cycle:
            cycle.append(current)
            current = majority[current]
        if current == start and len(cycle) > 1:
            for c in cycle:
                order[c] = majority[c]
    return order
