"""Expert trajectories: tadperf's way of training many against one expert after another by the plain loop.

Both train the same networks on the same images and keep a snapshot of every epoch. "published": the plain loop of
bench/plain.py, with all cores as threads. tadperf: `training.fit`, on a CPU one expert to a core.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor

from tadperf.bench.operators import engine
from tadperf.bench.operators.engine import Row
from tadperf.bench.stages import plain, runner
from tadperf.compute.workers import available_cores, run_parallel
from tadperf.config import NetConfig
from tadperf.nets import training
from tadperf.nets.architectures import Shape, build
from tadperf.nets.flat import FlatNet
from tadperf.nets.training import Recipe


class Case(NamedTuple):
    """So many experts on so many images; a recipe without momentum or decay, as MTT's."""

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
# A GPU is not busy with two steps: an epoch and a half of CIFAR-10.
CUDA = {"cifar10": SIZES["cifar10"]._replace(images=25600, experts=3)}
PROVIDERS = {"tadperf": "tadperf", "published": "published"}


def data(case: Case, device: torch.device) -> tuple[Tensor, Tensor]:
    """Random bytes as normalised images, and labels."""
    generator = torch.Generator().manual_seed(0)
    pixels = torch.randint(256, (case.images, *case.shape), dtype=torch.uint8, generator=generator)
    return ((pixels.float() / 255 - 0.5) / 0.29).to(device), (torch.arange(case.images) % 10).to(device)


def once(size: str, provider: str, device: torch.device) -> Callable[[], None]:
    """Trains every expert of a case."""
    case = chosen(size, device)
    images, labels = data(case, device)

    def train(seed: int) -> None:
        module = build(case.net, case.shape, 10, seed).to(device)
        flat, kept = FlatNet(module), list[Tensor]()
        loop = plain.fit if provider == "published" else training.fit
        loop(module, images, labels, case.recipe, seed, lambda _: kept.append(flat.flatten().cpu()))

    def every() -> None:
        if provider == "published":
            for seed in range(case.experts):
                train(seed)
        else:
            list(run_parallel(train, range(case.experts), None if device.type == "cpu" else 1))

    return every


def chosen(size: str, device: torch.device) -> Case:
    return CUDA.get(size, SIZES[size]) if device.type == "cuda" else SIZES[size]


def measure(size: str, device: torch.device, repeats: int) -> list[Row]:
    """A row per provider, tadperf's first; samples_s: images a second of all experts together."""
    case = chosen(size, device)
    seen = case.experts * case.recipe.epochs * case.images
    with engine.threads(available_cores() if device.type == "cpu" else None):
        functions = {name: once(size, name, device) for name in PROVIDERS}
        times = engine.interleaved(functions, repeats)
        peaks = {name: runner.peak("experts", size, name, device) for name in PROVIDERS}
    rows = [
        runner.row(
            "experts",
            size,
            name,
            family,
            times[name],
            peak_mb=peaks[name],
            samples_s=seen / float(sorted(times[name])[len(times[name]) // 2]) * 1e3,
        )
        for name, family in PROVIDERS.items()
    ]
    runner.ratios(rows)
    return rows
