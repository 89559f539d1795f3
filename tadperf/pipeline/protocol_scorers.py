"""Scorers that give all rows the same initial weights, and the teachers that label their images."""

from __future__ import annotations

from collections.abc import Generator
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from tadperf import seeds
from tadperf.config import NetConfig
from tadperf.data.images import first_image
from tadperf.nets.architectures import build
from tadperf.nets.rd3 import fit_rd3, smoothing
from tadperf.nets.students import Examples, Student, StudentScorer, train_student
from tadperf.nets.training import Recipe, count_correct, to_device

TEACHERS = 3  # networks whose mean logits are the soft labels; not tuned
CHUNK = 1024  # images that a teacher labels at a time


class PairedScorer(StudentScorer):
    """Gives the students of one repeat the same initial weights, order of images and augmentation in every row."""

    def parts(self, student: Student) -> Generator[object, None, Tensor]:
        """Trains a student as `StudentScorer` does, with a seed that does not depend on its row."""
        return super().parts(student._replace(row="paired"))


@dataclass(frozen=True)
class Teacher:
    """Labels images by the mean logits of networks in eval mode."""

    networks: tuple[nn.Module, ...]

    @torch.no_grad()
    def __call__(self, images: Tensor) -> Tensor:
        """Returns label logits float32 [M, K] of normalised images [M, C, H, W]."""
        parts = images.split(CHUNK)
        return torch.stack([torch.cat([network(x) for x in parts]) for network in self.networks]).mean(0)


def train_teacher(
    samples: Examples, num_classes: int, net: NetConfig, recipe: Recipe, count: int, seed: int, device: torch.device
) -> Teacher:
    """Trains `count` networks on the trusted samples."""
    seed_list = [seeds.derive(seed, "teacher", number) for number in range(count)]
    return Teacher(tuple(train_student(samples, num_classes, net, recipe, s, device) for s in seed_list))


@dataclass(frozen=True)
class RD3Scorer(PairedScorer):
    """Trains by RD3's protocol (`nets.rd3`): the teacher labels each batch.

    Rows whose name ends with _hard use their classes instead; the row "full" trains as `StudentScorer` does.
    """

    teacher: Teacher

    def parts(self, student: Student) -> Generator[object, None, Tensor]:
        """Trains a student part by part. Returns how many test images it classifies correctly, on the device."""
        if student.row == "full":
            return (yield from super().parts(student))
        seed = seeds.derive(self.seed, "paired", student.repeat)
        given = student.make_examples()
        channels, height, width = first_image(given.images).shape[1:]
        fresh = build(student.net, (channels, height, width), self.num_classes, seeds.derive(seed, "student"))
        module, images = to_device(fresh, self.device), torch.as_tensor(given.images)
        zeta = smoothing(student.net.name)
        teacher = None if student.row.endswith("_hard") else self.teacher
        yield from fit_rd3(module, images, given.labels, self.num_classes, student.recipe, zeta, seed, teacher)
        return count_correct(module.eval(), self.test_images, self.test_labels)
