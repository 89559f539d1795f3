"""The command `tadperf evaluate --protocol`: compares a distilled set with random images and coresets, pair by pair."""

from __future__ import annotations

import statistics
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from tadperf import seeds
from tadperf.artifact import DistilledSet
from tadperf.config import EvalConfig, NetConfig
from tadperf.data.images import Images, first_image
from tadperf.data.pick import pick_central, pick_real
from tadperf.errors import UserError
from tadperf.nets.rd3 import RD3_RECIPE
from tadperf.nets.students import Examples, Student, StudentScorer, score_students, summarise
from tadperf.nets.training import Recipe
from tadperf.pipeline.coresets import pick_k_centres
from tadperf.pipeline.ddranking import ddranking_scores
from tadperf.pipeline.package import INITIAL, load_stored_set
from tadperf.pipeline.paired import compare_rows, interval
from tadperf.pipeline.protocol_scorers import PairedScorer, RD3Scorer, Teacher
from tadperf.pipeline.scoring import class_labels
from tadperf.progress import Progress
from tadperf.task.samples import TrainingSamples

PROTOCOLS = ("hard", "soft", "published", "rd3")
PROTOCOL_REPEATS = 10  # pairs of each comparison; the smallest p is 2 / 2^10 = 0.002
RATE_STUDENTS = 2  # trained for each row and learning rate, and tested on held-out samples
ROWS = ("distilled", "initial", "k_means", "k_centres", "random")  # the order of the table
SCORED = ("distilled_hard", "distilled_plain", "random_plain")  # further rows that DD-Ranking's scores need


class ImageSet(NamedTuple):
    """Images [M, C, H, W] of a row, their classes int64 [M], and their own label logits [M, K] or None."""

    images: Tensor
    classes: Tensor
    logits: Tensor | None = None


@dataclass(frozen=True)
class ProtocolRun:
    """What all rows of one protocol share.

    sets: the images of each row by repeat. teacher: labels images, if the protocol needs it. test: images and labels.
    """

    protocol: str
    distilled: DistilledSet
    samples: TrainingSamples
    sets: Mapping[str, Callable[[int], ImageSet]]
    teacher: Teacher | None
    test: tuple[Images, Tensor]
    evaluate: EvalConfig
    repeats: int
    seed: int
    device: torch.device
    progress: Progress


def check_protocol(name: str) -> None:
    """Raises UserError for an unknown protocol."""
    if name not in PROTOCOLS:
        raise UserError("--protocol", name, f"unknown protocol; choose one of {', '.join(PROTOCOLS)}")


def image_sets(
    distilled: DistilledSet, samples: TrainingSamples, folder: Path, seed: int
) -> dict[str, Callable[[int], ImageSet]]:
    """Returns the images of each row, all with the same number of images per class.

    distilled: the set. initial: the images that it started from, if the run folder has them. k_means, k_centres:
    coresets of the trusted view. random: random trusted images, other ones in each repeat. Rows of real images take
    confirmed samples only, and no held-out ones.
    """
    labels, ipc, device = samples.confirmed_labels, distilled.ipc, first_image(samples.images).device

    def real(index: Tensor) -> ImageSet:
        return ImageSet(samples.images[index], labels[index])

    def stored(given: DistilledSet) -> ImageSet:
        logits = given.labels if given.labels.is_floating_point() else None
        return ImageSet(given.images.to(device), class_labels(given), logits)

    central = real(pick_central(samples.images, labels, ipc, seeds.derive(seed, "k-means")))
    centres = real(pick_k_centres(samples.images, labels, ipc, seeds.derive(seed, "k-centres")))
    sets: dict[str, Callable[[int], ImageSet]] = {"distilled": lambda _: stored(distilled)}
    if (folder / INITIAL).exists():
        initial = load_stored_set(folder / INITIAL)
        sets["initial"] = lambda _: stored(initial)
    return sets | {
        "k_means": lambda _: central,
        "k_centres": lambda _: centres,
        "random": lambda repeat: real(pick_real(labels, ipc, seeds.generator(seed, "random set", repeat))),
    }


def needs_teacher(protocol: str, distilled: DistilledSet) -> bool:
    """Returns whether a teacher labels the images of the protocol."""
    return protocol in ("soft", "rd3") or (protocol == "published" and distilled.labels.is_floating_point())


def examples(run: ProtocolRun, row: str, repeat: int) -> Examples:
    """Returns the training data of a row. The labels depend on the protocol, not on the row.

    hard: classes. soft: the teacher's logits for all rows. published: the labels stored in the file; the rows of real
    images get the teacher's logits if these are soft. rd3: classes; the teacher labels each batch during training.
    """
    images, classes, logits = run.sets[row.partition("_plain")[0].partition("_hard")[0]](repeat)
    if row.endswith("_hard") or run.protocol in ("hard", "rd3") or run.teacher is None:
        return Examples(images, classes)
    if run.protocol == "published" and logits is not None:
        return Examples(images, logits)
    return Examples(images, run.teacher(images))


def row_students(run: ProtocolRun, net: NetConfig, row: str, recipe: Recipe, repeats: int) -> list[Student]:
    """Returns the students of a row. Rows whose name ends with _plain train without augmentation."""
    recipe = recipe._replace(augment="none") if row.endswith("_plain") else recipe
    return [Student(row, repeat, net, recipe, partial(examples, run, row, repeat)) for repeat in range(repeats)]


def row_recipes(run: ProtocolRun, net: NetConfig) -> dict[str, Recipe]:
    """Returns the recipe of each row: the file's, with a learning rate that suits the row; rd3 has one for all rows.

    hard, soft: every row has the choice between the file's learned rate and evaluate.real_lr, by the accuracy of
    RATE_STUDENTS students on held-out trusted samples (if equal, the higher rate); the test data choose nothing.
    published: the file's rate for the distilled set, evaluate.real_lr for the others, as in the report of the run.
    """
    rows = [*run.sets, "distilled_hard"]
    if run.protocol == "rd3":
        return dict.fromkeys(rows, RD3_RECIPE)
    recipe, real_lr = run.distilled.recipe, run.evaluate.real_lr
    if run.protocol == "published":
        return {row: recipe if row.startswith("distilled") else recipe._replace(lr=real_lr) for row in rows}
    rates = sorted({recipe.lr, real_lr})
    students = [
        student._replace(row=f"{row}, rate {number}")
        for row in rows
        for number, rate in enumerate(rates)
        for student in row_students(run, net, row, recipe._replace(lr=rate), RATE_STUDENTS)
    ]
    scores = _scores(run, _scorer(run, (run.samples.held_out, run.samples.held_out_labels)), students, "learning rates")
    mean = {name: statistics.fmean(runs) for name, runs in scores.items()}
    best = {row: max((mean[f"{row}, rate {number}"], rate) for number, rate in enumerate(rates))[1] for row in rows}
    return {row: recipe._replace(lr=rate) for row, rate in best.items()}


def measure(run: ProtocolRun, net: NetConfig) -> dict[str, Any]:
    """Returns the rows of a network with intervals and paired tests, the verdict, and DD-Ranking's scores."""
    recipes = row_recipes(run, net)
    students = protocol_students(run, net, recipes)
    scores = _scores(run, _scorer(run, run.test), students, "evaluate")
    scores.setdefault("distilled_hard", scores["distilled"])
    comparison = compare_rows(scores["distilled"], {row: scores[row] for row in run.sets if row != "distilled"})
    differences = comparison.pop("rows")
    rows = {
        row: {**summarise(runs), "interval": interval(runs), **({"lr": recipes[row].lr} if row in recipes else {})}
        | ({"against_distilled": differences[row]} if row in differences else {})
        for row, runs in scores.items()
    }
    ranking = ddranking_scores(
        scores["distilled"], scores["random"], *(scores[row] for row in SCORED), full=scores["full"]
    )
    return {"rows": rows, "comparison": comparison, "ddranking": ranking}


def protocol_students(run: ProtocolRun, net: NetConfig, recipes: Mapping[str, Recipe]) -> list[Student]:
    """Returns the students of all rows, and those that only DD-Ranking's scores need."""
    students = [s for row in run.sets for s in row_students(run, net, row, recipes[row], run.repeats)]
    for row in SCORED:
        if row != "distilled_hard" or run.protocol != "hard":
            recipe = recipes[row if row in recipes else row.partition("_")[0]]
            students += row_students(run, net, row, recipe, run.repeats)
    everything = Examples(run.samples.images, run.samples.labels, run.samples.weights)
    recipe, count = full_recipe(run.distilled, run.evaluate), max(1, run.evaluate.full_repeats)
    return students + [Student("full", repeat, net, recipe, lambda: everything) for repeat in range(count)]


def full_recipe(distilled: DistilledSet, evaluate: EvalConfig) -> Recipe:
    """Returns the recipe for all trusted samples, that of the row full_trusted of a run."""
    return distilled.recipe._replace(lr=evaluate.real_lr, epochs=evaluate.full_epochs)


def _scorer(run: ProtocolRun, test: tuple[Images, Tensor]) -> StudentScorer:
    values = *test, run.distilled.num_classes, run.seed, run.device
    if run.protocol == "rd3":
        assert run.teacher is not None
        return RD3Scorer(*values, run.teacher)
    return PairedScorer(*values)


def _scores(run: ProtocolRun, scorer: StudentScorer, students: Sequence[Student], stage: str) -> dict[str, list[float]]:
    """Returns the accuracies of the students by row, in the order of their repeats."""
    found: dict[str, dict[int, float]] = {student.row: {} for student in students}

    def done(student: Student, score: float) -> None:
        found[student.row][student.repeat] = score
        run.progress(stage, sum(map(len, found.values())), len(students), **{student.row: score})

    run.progress(stage, 0, len(students))
    score_students(scorer, students, done)
    return {row: [scores[repeat] for repeat in sorted(scores)] for row, scores in found.items()}
