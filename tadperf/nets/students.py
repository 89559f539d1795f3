"""What a set of images is worth: fresh networks trained on it, tested on data they never saw."""

from __future__ import annotations

import statistics
from collections.abc import Callable, Sequence
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

__all__ = ["Examples", "Recipe", "Student", "accuracy", "score_students", "summarise", "train_student"]


class Examples(NamedTuple):
    """What a network learns from: normalised images [M, C, H, W], labels [M] or label logits [M, K], weights [M]."""

    images: Images
    labels: Tensor
    weights: Tensor | None = None


def train_student(
    examples: Examples, num_classes: int, net: NetConfig, recipe: Recipe, seed: int, device: torch.device
) -> nn.Module:
    """A fresh network of `net` trained on the examples."""
    images, labels, weights = examples
    channels, height, width = images[torch.zeros(1, dtype=torch.int64)].shape[1:]
    module = build(net, (channels, height, width), num_classes, seeds.derive(seed, "student")).to(device)
    return training.fit(module, images, labels, recipe, seeds.derive(seed, "student"), weights=weights)


class Student(NamedTuple):
    """One network to train and test: the row of the report it counts for, what it is and what it learns from."""

    row: str
    repeat: int
    net: NetConfig
    recipe: Recipe
    data: Callable[[], Examples]  # made where the student is trained: nothing crosses between processes


def student_scorer(
    test_images: Images, test_labels: Tensor, num_classes: int, seed: int, device: torch.device
) -> Callable[[Student], float]:
    """Trains and tests one student: its accuracy, share in [0, 1], which depends on the seed and the student alone."""

    def score(student: Student) -> float:
        where = seeds.derive(seed, student.row, student.repeat)
        module = train_student(student.data(), num_classes, student.net, student.recipe, where, device)
        return accuracy(module, test_images, test_labels)

    return score


def score_students(
    students: Sequence[Student],
    test_images: Images,
    test_labels: Tensor,
    num_classes: int,
    seed: int,
    device: torch.device,
    done: Callable[[Student, float], None],
) -> None:
    """Trains and tests every student and reports each accuracy (share in [0, 1]) by `done` as it comes.

    On a CPU as many at once as there are cores, one thread each.
    """
    score = student_scorer(test_images, test_labels, num_classes, seed, device)
    for position, result in run_parallel(score, students, None if device.type == "cpu" else 1):
        done(students[position], result)


def summarise(runs: Sequence[float]) -> dict[str, Any]:
    """Mean, sample standard deviation (0 for one run) and the runs themselves."""
    return {
        "mean": statistics.fmean(runs),
        "std": statistics.stdev(runs) if len(runs) > 1 else 0.0,
        "runs": list(runs),
    }
