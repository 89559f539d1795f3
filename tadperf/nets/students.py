"""Measures a set of images by students: fresh networks trained on it and tested on other data."""

from __future__ import annotations

import statistics
from collections.abc import Callable, Generator, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from tadperf import seeds
from tadperf.compute.streams import run_in_parts, run_to_end
from tadperf.config import NetConfig
from tadperf.data.images import Images, first_image
from tadperf.nets import training
from tadperf.nets.architectures import build
from tadperf.nets.training import Recipe, count_correct, to_device


class Examples(NamedTuple):
    """Training data: normalised images [N, C, H, W], labels int64 [N] or label logits [N, K], weights [N] or None."""

    images: Images
    labels: Tensor
    weights: Tensor | None = None


def train_student(
    examples: Examples, num_classes: int, net: NetConfig, recipe: Recipe, seed: int, device: torch.device
) -> nn.Module:
    """Builds a fresh network of `net`, trains it on the examples and returns it in eval mode."""
    return run_to_end(student_parts(examples, num_classes, net, recipe, seed, device))


def student_parts(
    examples: Examples, num_classes: int, net: NetConfig, recipe: Recipe, seed: int, device: torch.device
) -> Generator[object, None, nn.Module]:
    """Does the same in parts, one or more epochs each, for `run_in_parts`."""
    images, labels, weights = examples
    channels, height, width = first_image(images).shape[1:]
    module = to_device(build(net, (channels, height, width), num_classes, seeds.derive(seed, "student")), device)
    seed = seeds.derive(seed, "student")
    yield from training.fit_epochs(module, images, labels, recipe, seed, weights, every_epoch=False)
    return module.eval()


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
        return self.share(run_to_end(self.parts(student)))

    def parts(self, student: Student) -> Generator[object, None, Tensor]:
        """Trains a student part by part. Returns how many test images it classifies correctly, on the device."""
        seed, examples = seeds.derive(self.seed, student.row, student.repeat), student.make_examples()
        module = yield from student_parts(examples, self.num_classes, student.net, student.recipe, seed, self.device)
        return count_correct(module, self.test_images, self.test_labels)

    def share(self, correct: Tensor) -> float:
        """Returns the accuracy. Waits for the device."""
        return int(correct) / len(self.test_images)


def score_students(
    scorer: StudentScorer, students: Sequence[Student], report: Callable[[Student, float], None]
) -> None:
    """Trains and tests every student and calls `report(student, accuracy)` as each one finishes.

    On a CPU as many students run at a time as there are cores, one thread each. On CUDA small ones train side by side.
    """
    pixels = first_image(scorer.test_images)[0, 0].numel() if len(scorer.test_images) else 0
    activations = max((student.recipe.batch * student.net.width * pixels for student in students), default=0)
    for position, result in run_in_parts(scorer.parts, students, scorer.device, activations, scorer.share):
        report(students[position], result)


def summarise(runs: Sequence[float]) -> dict[str, Any]:
    """Returns the mean, the sample standard deviation (0 for one run) and the runs themselves."""
    return {
        "mean": statistics.fmean(runs),
        "std": statistics.stdev(runs) if len(runs) > 1 else 0.0,
        "runs": list(runs),
    }
