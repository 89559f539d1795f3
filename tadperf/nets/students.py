"""Measures a set of images by students: fresh networks trained on it and tested on other data."""

from __future__ import annotations

import statistics
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from tadperf import seeds
from tadperf.compute.workers import run_parallel
from tadperf.config import NetConfig
from tadperf.data.images import Images
from tadperf.nets import training
from tadperf.nets.architectures import build
from tadperf.nets.training import Recipe, accuracy


class Examples(NamedTuple):
    """Training data: normalised images [N, C, H, W], labels int64 [N] or label logits [N, K], weights [N] or None."""

    images: Images
    labels: Tensor
    weights: Tensor | None = None


def train_student(
    examples: Examples, num_classes: int, net: NetConfig, recipe: Recipe, seed: int, device: torch.device
) -> nn.Module:
    """Builds a fresh network of `net`, trains it on the examples and returns it in eval mode."""
    images, labels, weights = examples
    channels, height, width = images[torch.zeros(1, dtype=torch.int64)].shape[1:]
    module = build(net, (channels, height, width), num_classes, seeds.derive(seed, "student")).to(device)
    return training.fit(module, images, labels, recipe, seeds.derive(seed, "student"), weights=weights)


class Student(NamedTuple):
    """One network to train and test.

    row, repeat: the row of the report, and the number of the student in this row. make_examples: called in the process
    that trains the student, so no data is sent between processes.
    """

    row: str
    repeat: int
    net: NetConfig
    recipe: Recipe
    make_examples: Callable[[], Examples]


@dataclass(frozen=True)
class StudentScorer:
    """Trains a student and returns its test accuracy, a share in [0, 1], which depends on seed and student alone."""

    test_images: Images
    test_labels: Tensor
    num_classes: int
    seed: int
    device: torch.device

    def __call__(self, student: Student) -> float:
        seed = seeds.derive(self.seed, student.row, student.repeat)
        examples = student.make_examples()
        module = train_student(examples, self.num_classes, student.net, student.recipe, seed, self.device)
        return accuracy(module, self.test_images, self.test_labels)


def score_students(
    scorer: StudentScorer, students: Sequence[Student], report: Callable[[Student, float], None]
) -> None:
    """Trains and tests every student and calls `report(student, accuracy)` as each one finishes.

    On a CPU as many students run at a time as there are cores, one thread each.
    """
    workers = None if scorer.device.type == "cpu" else 1
    for position, result in run_parallel(scorer, students, workers):
        report(students[position], result)


def summarise(runs: Sequence[float]) -> dict[str, Any]:
    """Returns the mean, the sample standard deviation (0 for one run) and the runs themselves."""
    return {
        "mean": statistics.fmean(runs),
        "std": statistics.stdev(runs) if len(runs) > 1 else 0.0,
        "runs": list(runs),
    }
