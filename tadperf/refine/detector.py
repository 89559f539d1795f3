"""The detector: a classifier of the trusted samples that says which generated images do not show their class."""

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
from tadperf.nets.training import Recipe

BATCH = 1024  # images judged at a time
ERRORS = 3.0  # standard errors that the accuracy has to lie above chance


class DetectorOutput(NamedTuple):
    """What the detector says of M images: logits float32 [M, C] and penultimate features float32 [M, D]."""

    logits: Tensor
    features: Tensor


def compile_detector(detector: nn.Module, config: RefineConfig, batches: int) -> nn.Sequential:
    """The detector in two parts, of which the first, to the features, runs by refine.backend; the weights are shared.

    batches: how many batches of images it is likely to judge.
    """
    assert isinstance(detector, nn.Sequential)
    features = compile_for_inference(
        detector[:-1], config.backend, batch=config.batch, calls=batches + config.rounds + 1
    )
    return nn.Sequential(features, detector[-1])


@torch.no_grad()
def classify_images(detector: nn.Module, images: Images, batch: int = BATCH) -> DetectorOutput:
    """Logits and features of normalised images [M, channels, H, W]; the features are what the last layer reads."""
    assert isinstance(detector, nn.Sequential)
    device = next(detector.parameters()).device
    features = [
        detector[:-1](images[torch.arange(start, min(start + batch, len(images)))].to(device))
        for start in range(0, len(images), batch)
    ]
    whole = torch.cat(features)
    return DetectorOutput(detector[-1](whole), whole)


def train_detector(
    config: DetectorConfig,
    images: Images,
    labels: Tensor,
    weights: Tensor | None,
    num_classes: int,
    augment: str,
    seed: int,
    device: torch.device,
) -> nn.Module:
    """A fresh detector trained on normalised images [N, channels, H, W] with labels int64 [N] and weights float [N]."""
    module = build_detector(config, images, num_classes, seeds.derive(seed, "detector")).to(device)
    recipe = Recipe(config.epochs, config.batch, config.lr, config.momentum, config.weight_decay, augment)
    return training.fit(module, images, labels, recipe, seeds.derive(seed, "detector"), weights=weights)


def build_detector(config: DetectorConfig, images: Images, num_classes: int, seed: int) -> nn.Module:
    """The detector's network for these images, untrained."""
    channels, height, width = images[torch.zeros(1, dtype=torch.int64)].shape[1:]
    return build(config, (channels, height, width), num_classes, seed)


def load_detector(path: Path | str, module: nn.Module, num_classes: int) -> nn.Module:
    """`module` with the weights of a safetensors file; raises UserError where they are another network's."""
    tensors, _ = files.load_tensors(path)
    wanted = module.state_dict()
    last = next(name for name in reversed(wanted) if name.endswith("bias"))
    if last in tensors and wanted[last].shape != tensors[last].shape:
        classes = f"tells {tensors[last].numel()} classes apart, the data have {num_classes}"
        raise UserError("detector.path", path, f"{classes}; give one trained on these classes")
    for name, value in wanted.items():
        if name not in tensors:
            held = ", ".join(sorted(tensors)[:4])
            raise UserError("detector.path", path, f"has no {name!r}, only {held}...; set detector.name, depth, width")
        if tensors[name].shape != value.shape:
            sizes = f"{name} is {list(tensors[name].shape)}, not {list(value.shape)}"
            raise UserError("detector.path", path, f"{sizes}; set detector.name, depth and width to its network")
    if extra := sorted(tensors.keys() - wanted.keys()):
        raise UserError("detector.path", path, f"holds {extra[0]!r}, which the network has not; set detector.depth")
    module.load_state_dict(tensors)
    return module.eval()


def check_detector(detector: nn.Module, images: Images, labels: Tensor, class_names: tuple[str, ...]) -> float:
    """Accuracy on held-out normalised images with labels int64 [N]; a detector that cannot be believed is refused.

    Raises UserError where its accuracy is not three standard errors above chance, and where a permutation of its
    classes explains its answers: several classes of which each is mostly taken for another one, each for its own.
    """
    logits = classify_images(detector, images).logits
    count, classes = logits.shape
    labels = labels.to(logits.device)
    prediction = per_sample(logits, labels).prediction.long()
    confusion = torch.bincount(labels * classes + prediction, minlength=classes**2).view(classes, classes).cpu()
    accuracy = float(confusion.trace()) / count
    order = permutation(confusion)
    if moved := [c for c in range(classes) if order[c] != c]:
        swapped = ", ".join(f"{class_names[c]!r} for its {class_names[order[c]]!r}" for c in moved[:4])
        remedy = f"takes {swapped}: its classes are in another order (accuracy {accuracy:.3f}); reorder its last layer"
        raise UserError("detector", f"{len(moved)} of {classes} classes", remedy)
    chance = 1 / classes
    least = chance + ERRORS * math.sqrt(chance * (1 - chance) / count)
    if accuracy <= least:
        remedy = f"is near chance: it must be above {least:.3f} on {count} held-out samples; train it longer"
        raise UserError("detector", f"accuracy {accuracy:.3f}", remedy)
    return accuracy


def permutation(confusion: Tensor) -> list[int]:
    """Which of the detector's classes answers for each class; the identity unless cycles of clear majorities say more.

    confusion: int64 [C, C], rows the labels. A class is moved where another answer has more than half of its samples,
    no other class has that answer too, and following the answers leads back to it.
    """
    total = confusion.sum(1)
    share, answer = confusion.max(1)
    clear = {c: int(answer[c]) for c in range(len(total)) if 2 * int(share[c]) > int(total[c])}
    order = list(range(len(total)))
    for start in clear:
        cycle, at = [start], clear[start]
        while at in clear and at not in cycle:
            cycle.append(at)
            at = clear[at]
        if at == start and len(cycle) > 1:
            for c in cycle:
                order[c] = clear[c]
    return order
