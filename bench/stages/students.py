"""Measures the evaluation, which trains five new networks on one distilled set and tests them.

"published": MTT's evaluation by the loop of published_training.py, one network after another, one thread per core.
tadperf: `nets.students.score_students`, on a CPU one network on each core. A few epochs replace the protocol's 1000,
because every epoch takes the same time.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor

from tadperf.bench.operators import engine
from tadperf.bench.operators.engine import Row
from tadperf.bench.stages import published_training, runner
from tadperf.compute.workers import available_cores
from tadperf.config import NetConfig
from tadperf.nets.architectures import Shape, build
from tadperf.nets.students import Examples, Student, StudentScorer, score_students
from tadperf.nets.training import Recipe

REPEATS = 5


class Case(NamedTuple):
    """A network, the images and the recipe, for 10 classes, IPC 10 and soft labels."""

    net: NetConfig
    shape: Shape
    test_images: int
    recipe: Recipe


SIZES = {
    "digits": Case(
        NetConfig.model_validate({"width": 32, "depth": 2}),
        (1, 8, 8),
        397,
        Recipe(60, 256, 0.03, 0.9, 5e-4, "crop_scale_rotate"),
    ),
    "cifar10": Case(
        NetConfig.model_validate({"width": 128, "depth": 3}),
        (3, 32, 32),
        100,
        Recipe(3, 256, 0.01, 0.9, 5e-4, "color_crop_cutout_flip_scale_rotate"),
    ),
}
PROVIDERS = {"tadperf": "tadperf", "published": "published"}


def data(case: Case, count: int, device: torch.device) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(count)
    return torch.randn(count, *case.shape, generator=generator).to(device), torch.arange(count, device=device) % 10


def single_call(size: str, provider: str, device: torch.device) -> Callable[[], None]:
    """Returns a function that trains and tests every network of a case."""
    case = SIZES[size]
    images, classes = data(case, 100, device)
    soft = 10.0 * torch.nn.functional.one_hot(classes, 10).float()
    test, labels = data(case, case.test_images, device)
    examples = Examples(images, soft)
    students = [Student("convnet", repeat, case.net, case.recipe, lambda: examples) for repeat in range(REPEATS)]

    def ours() -> None:
        score_students(StudentScorer(test, labels, 10, 0, device), students, lambda *_: None)

    def published() -> None:
        for repeat in range(REPEATS):
            module = build(case.net, case.shape, 10, repeat).to(device)
            published_training.accuracy(published_training.fit(module, images, soft, case.recipe, repeat), test, labels)

    return published if provider == "published" else ours


def measure(size: str, device: torch.device, repeats: int) -> list[Row]:
    """Returns a row for each provider, tadperf's first."""
    with engine.threads(available_cores() if device.type == "cpu" else None):
        times = engine.interleaved({name: single_call(size, name, device) for name in PROVIDERS}, repeats)
        peaks = {name: runner.peak_memory("students", size, name, device) for name in PROVIDERS}
    rows = [
        runner.make_row("students", size, name, family, times[name], peak_mb=peaks[name])
        for name, family in PROVIDERS.items()
    ]
    runner.ratios(rows)
    return rows
