"""Compares the training of experts with the published loop, one expert after another.

Both train the same networks on the same images and keep a snapshot of every epoch. "published": the loop of
published_training.py, one thread per core. tadperf: `nets.training.fit`, on a CPU one expert on each core.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor

from tadperf.bench.operators import engine
from tadperf.bench.operators.engine import Row
from tadperf.bench.stages import published_training, runner
from tadperf.compute.workers import available_cores, run_parallel
from tadperf.config import NetConfig
from tadperf.nets import training
from tadperf.nets.architectures import Shape, build
from tadperf.nets.flat import FlatNet
from tadperf.nets.training import Recipe


class Case(NamedTuple):
    """A network, the numbers of images and experts, and a recipe without momentum and decay, as in MTT."""

    net: NetConfig
    shape: Shape
    images: int
    experts: int
    recipe: Recipe


SIZES = {
    "digits": Case(
        NetConfig.model_validate({"width": 32, "depth": 2}),
        (1, 8, 8),
        1260,
        4,
        Recipe(3, 64, 0.1, 0.0, 0.0, "crop_scale_rotate", decay=False),
    ),
    "cifar10": Case(
        NetConfig.model_validate({"width": 128, "depth": 3}),
        (3, 32, 32),
        512,
        2,
        Recipe(1, 256, 0.01, 0.0, 0.0, "color_crop_cutout_flip_scale_rotate", decay=False),
    ),
}
# Two steps do not keep a GPU busy. The three experts together see as many images as 1.5 epochs of CIFAR-10.
CUDA = {"cifar10": SIZES["cifar10"]._replace(images=25600, experts=3)}
PROVIDERS = {"tadperf": "tadperf", "published": "published"}


def data(case: Case, device: torch.device) -> tuple[Tensor, Tensor]:
    """Returns random bytes as normalised images, and labels."""
    generator = torch.Generator().manual_seed(0)
    pixels = torch.randint(256, (case.images, *case.shape), dtype=torch.uint8, generator=generator)
    return ((pixels.float() / 255 - 0.5) / 0.29).to(device), (torch.arange(case.images) % 10).to(device)


def single_call(size: str, provider: str, device: torch.device) -> Callable[[], None]:
    """Returns a function that trains every expert of a case."""
    case = case_for(size, device)
    images, labels = data(case, device)

    def train(seed: int) -> None:
        module = build(case.net, case.shape, 10, seed).to(device)
        flat, snapshots = FlatNet(module), list[Tensor]()
        loop = published_training.fit if provider == "published" else training.fit
        loop(module, images, labels, case.recipe, seed, lambda _: snapshots.append(flat.flatten().cpu()))

    def train_all() -> None:
        if provider == "published":
            for seed in range(case.experts):
                train(seed)
        else:
            list(run_parallel(train, range(case.experts), None if device.type == "cpu" else 1))

    return train_all


def case_for(size: str, device: torch.device) -> Case:
    """Returns the case of a size for this type of device."""
    return CUDA.get(size, SIZES[size]) if device.type == "cuda" else SIZES[size]


def measure(size: str, device: torch.device, repeats: int) -> list[Row]:
    """Returns a row for each provider, tadperf's first. samples_s: images per second of all experts together."""
    case = case_for(size, device)
    samples = case.experts * case.recipe.epochs * case.images
    with engine.threads(available_cores() if device.type == "cpu" else None):
        functions = {name: single_call(size, name, device) for name in PROVIDERS}
        times = engine.interleaved(functions, repeats)
        peaks = {name: runner.peak_memory("experts", size, name, device) for name in PROVIDERS}
    rows = [
        runner.make_row(
            "experts",
            size,
            name,
            family,
            times[name],
            peak_mb=peaks[name],
            samples_s=samples / float(sorted(times[name])[len(times[name]) // 2]) * 1e3,
        )
        for name, family in PROVIDERS.items()
    ]
    runner.ratios(rows)
    return rows
