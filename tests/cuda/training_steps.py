"""What one training step asks of a CUDA device, and whether its weights are those of a CPU.

The first steps of a training record its graphs, so the counts are the difference of a longer and a shorter training.
"""

from __future__ import annotations

from typing import Any

import torch
from counters import RECORD, counters

from tadperf.config import NetConfig
from tadperf.data import images as images_module
from tadperf.data.images import ImageSubset, normalise_images
from tadperf.data.normalise import fit_normaliser
from tadperf.experts.train import train_expert
from tadperf.kernels.dispatch import call_counts
from tadperf.nets import device_batches, training
from tadperf.nets.architectures import build
from tadperf.nets.flat import FlatNet
from tadperf.nets.problem import Problem
from tadperf.nets.training import Recipe

NET = NetConfig.model_validate({"width": 4, "depth": 1})
RECIPE = Recipe(2, 10, 0.05, 0.9, 5e-4, "color_crop_cutout_flip_scale_rotate", decay=False)
COUNT = 20  # 2 batches of 10
PIXELS = torch.randint(0, 256, (COUNT + 1, 3, 8, 8), generator=torch.Generator().manual_seed(0), dtype=torch.uint8)
LABELS, WEIGHTS = torch.arange(COUNT) % 3, torch.arange(1.0, COUNT + 1)


def case(name: str, device: str) -> dict[str, Any]:
    """Returns the images, labels and weights of a case."""
    normaliser, rows = fit_normaliser(PIXELS), torch.arange(COUNT) + 1
    images = normaliser(PIXELS).to(device)
    values: dict[str, Any] = {"images": images[1:], "labels": LABELS, "weights": None}
    if name == "weights":
        values |= {"weights": WEIGHTS}
    if name in ("soft", "bfloat16 soft"):
        values |= {"labels": torch.randn(COUNT, 3, generator=torch.Generator().manual_seed(1))}
    if name == "subset":
        values |= {"images": ImageSubset(images, rows)}
    if name in ("pixels on the device", "pixels on the CPU"):  # as if the set were too large for float32 images
        images_module.MAX_NORMALISED_BYTES = 0
        images_module.RESIDENT_SHARE = float(name == "pixels on the device")
        values |= {"images": normalise_images(normaliser, PIXELS[1:], device)}
    return values


def train(name: str, device: str, epochs: int) -> tuple[torch.Tensor, dict[str, int]]:
    """Returns the weights after some epochs, and the counts of the training."""
    recipe, values = RECIPE._replace(epochs=epochs, rho=0.1 if name == "gsam" else 0.0, alpha=0.3), case(name, device)
    recipe = recipe._replace(decay=name == "decay")
    precision = torch.bfloat16 if name.startswith("bfloat16") else torch.float32
    module = build(NET, (3, 8, 8), 3, 0).to(device)
    counters.reset()
    training.fit(module, values["images"], values["labels"], recipe, 0, None, values["weights"], precision)
    counts = dict(counters.counts)
    return FlatNet(module).flatten().cpu(), counts


def steps(name: str) -> dict[str, Any]:
    """Returns the counts of the last 8 steps of 16 (4 epochs of 2), and the error of the weights."""
    training.DEVICE_DRAWS = 2 * COUNT  # an upload for every second epoch
    (_, short), (weights, counts), (expected, _) = train(name, "cuda", 4), train(name, "cuda", 8), train(name, "cpu", 8)
    return {"counts": difference(counts, short), "error": relative_error(weights, expected)}


def decay() -> dict[str, Any]:
    """Returns the number of graphs of 6 epochs, of which the last two have a smaller learning rate, and the error."""
    (weights, counts), (expected, _) = train("decay", "cuda", 6), train("decay", "cpu", 6)
    return {"graphs": counts[RECORD], "error": relative_error(weights, expected)}


def relative_error(weights: torch.Tensor, expected: torch.Tensor) -> float:
    return float((weights - expected).norm() / expected.norm())


def difference(counts: dict[str, int], others: dict[str, int]) -> dict[str, int]:
    return {kind: counts[kind] - others.get(kind, 0) for kind in counts}


def expert() -> dict[str, Any]:
    """Returns the counts of 4 epochs of an expert, whose snapshots go to the CPU, and the error of the snapshots."""
    found = {}
    for device, epochs in (("cuda", 4), ("cuda", 8), ("cpu", 8)):
        images = case("plain", device)["images"]
        problem = Problem(images, LABELS, ("a", "b", "c"), NET, RECIPE.augment, 0, torch.device(device))
        counters.reset()
        snapshots, accuracy = train_expert(problem, RECIPE._replace(epochs=epochs), 0)
        found[device, epochs] = snapshots, accuracy, dict(counters.counts)
    (ours, score, counts), (exact, expected, _) = found["cuda", 8], found["cpu", 8]
    assert score == expected
    return {"counts": difference(counts, found["cuda", 4][2]), "error": relative_error(ours, exact)}


CASES = (
    "plain",
    "weights",
    "soft",
    "gsam",
    "subset",
    "pixels on the device",
    "pixels on the CPU",
    "bfloat16",
    "bfloat16 soft",
)


def wide_head() -> dict[str, Any]:
    """Returns the accuracy of a network of many classes on the device and on the CPU, and its Triton operators."""
    images = fit_normaliser(PIXELS)(PIXELS)
    on_cpu, on_device = (build(NET, (3, 8, 8), training.WIDE_HEAD, 0).to(device) for device in ("cpu", "cuda"))
    labels = on_cpu(images).argmax(1)
    labels[::3] = 0
    before = call_counts()
    scores = [training.accuracy(on_device, images.to("cuda"), labels), training.accuracy(on_cpu, images, labels)]
    return {"scores": scores, "kernels": [name for name, form in call_counts() - before if form == "triton"]}


def measure() -> dict[str, Any]:
    """Returns the counts and the error of every case, of the images on the device and on the CPU."""
    device_batches.STEPS_PER_GRAPH = 4  # of two epochs
    return {name: steps(name) for name in CASES} | {"decay": decay(), "expert": expert(), "wide head": wide_head()}
