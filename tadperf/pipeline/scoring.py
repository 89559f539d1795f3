"""Students that measure a synthetic set and its baselines."""

from __future__ import annotations

import logging
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path

import torch
from torch import Tensor

from tadperf import files, seeds
from tadperf.artifact import DistilledSet
from tadperf.compute import ranks
from tadperf.compute.work_progress import SharedCount, counting, reporting, work
from tadperf.compute.workers import BackgroundTasks
from tadperf.data.images import ImageSubset
from tadperf.data.pick import pick_real
from tadperf.errors import UserError
from tadperf.nets.students import Examples, Student, StudentScorer, score_students
from tadperf.pipeline.context import RunContext
from tadperf.pipeline.package import INITIAL, load_stored_set, student_recipe
from tadperf.run.folder import Run, read_json

BASELINES = ("initial", "initial_hard", "random_real", "random_given", "full_data", "full_trusted")
REAL_IMAGES = ("random_real", "random_given", "full_data", "full_trusted")  # rows that train at evaluate.real_lr
# Students of a row that only the ladder needs. With 3, the ladder adds 8 % to the CPU time of the default job.
LADDER_REPEATS = 3

log = logging.getLogger(__name__)


def distilled_students(
    distilled: DistilledSet, networks: Sequence[str], repeats: int, device: torch.device
) -> list[Student]:
    """Returns the students of a distilled set: every network, `repeats` times."""
    examples = Examples(distilled.images.to(device), distilled.labels)
    return [
        Student(name, repeat, distilled.net.model_copy(update={"name": name}), distilled.recipe, lambda: examples)
        for name in networks
        for repeat in range(repeats)
    ]


def baseline_students(context: RunContext, initial: DistilledSet) -> list[Student]:
    """Returns the students that the distilled set is compared with. None of them needs the distilled set.

    initial: trained on `initial`, the set before the first iteration. initial_hard: on its images with hard labels, if
    its labels are soft. random_real: on match.ipc random confirmed samples of each class. random_given: on match.ipc
    random images of each class, labels as given, unless trust is off. full_data: on all images, labels as given.
    full_trusted: on the samples and labels that trust selected, in as many steps as full_data.
    """
    config, evaluate = context.task.config, context.task.config.evaluate
    data, selection, samples, repeats = context.data, context.selection, context.samples, range(evaluate.repeats)
    recipe = student_recipe(config, evaluate.real_lr)._replace(lr=evaluate.real_lr)
    full_recipe = recipe._replace(epochs=evaluate.full_epochs)
    trusted_recipe = recipe._replace(epochs=equal_steps(evaluate.full_epochs, len(data.labels), len(selection.index)))
    labels = samples.confirmed_labels

    def random_real(repeat: int) -> Examples:
        index = pick_real(labels, config.match.ipc, seeds.generator(config.seed, "random real", repeat))
        return Examples(samples.images[index], labels[index])

    def random_given(repeat: int) -> Examples:
        index = pick_real(data.labels, config.match.ipc, seeds.generator(config.seed, "random given", repeat))
        return Examples(ImageSubset(data.train, index), data.labels[index])

    def full_data() -> Examples:
        return Examples(data.train, data.labels)

    def full_trusted() -> Examples:
        return Examples(ImageSubset(data.train, selection.index), selection.labels, selection.weights)

    full_repeats, few = range(evaluate.full_repeats), repeats[:LADDER_REPEATS]
    students = _initial_students(initial, "initial", config.net.name, evaluate.repeats, context.task.device)
    students += [Student("random_real", r, config.net, recipe, partial(random_real, r)) for r in repeats]
    students += [Student("full_data", r, config.net, full_recipe, full_data) for r in full_repeats]
    if config.trust.mode != "off":
        students += [Student("full_trusted", r, config.net, trusted_recipe, full_trusted) for r in full_repeats]
        students += [Student("random_given", r, config.net, recipe, partial(random_given, r)) for r in few]
    if initial.labels.is_floating_point():
        hard = replace(initial, labels=class_labels(initial))
        students += _initial_students(hard, "initial_hard", config.net.name, len(few), context.task.device)
    return students


def equal_steps(epochs: int, count: int, part: int) -> int:
    """Returns the epochs of `part` images that take as many steps as `epochs` epochs of `count` images."""
    return round(epochs * count / part)


def class_labels(made: DistilledSet) -> Tensor:
    """Returns the class of each image of a set that a run has made, int64 [M].

    A run makes its images class by class, so the position gives the class. The largest logit of a soft label can be
    another class: that of an image that the experts do not classify correctly.
    """
    if not made.labels.is_floating_point():
        return made.labels
    classes = torch.arange(made.num_classes).repeat_interleave(len(made.images) // made.num_classes)
    assert len(classes) == len(made.images)
    return classes


def _initial_students(
    initial: DistilledSet, row: str, network: str, repeats: int, device: torch.device
) -> list[Student]:
    return [student._replace(row=row) for student in distilled_students(initial, [network], repeats, device)]


class ScoreStore:
    """The test accuracies of a run's students by row and repeat. Saves each one, so a resumed run skips it."""

    def __init__(self, run: Run, known: Mapping[str, Sequence[float]]) -> None:
        """known: accuracies of complete rows, in the order of their repeats, that need no students."""
        self._run, self._file = run, run.path / "checkpoints" / "evaluate.json"
        self._scores: dict[str, dict[str, float]] = ranks.once(lambda: _read_scores(self._file))
        self._scores |= {row: {str(r): score for r, score in enumerate(scores)} for row, scores in known.items()}

    def missing(self, students: Sequence[Student]) -> list[Student]:
        """Returns the students without a score."""
        return [s for s in students if str(s.repeat) not in self._scores.get(s.row, {})]

    def add(self, student: Student, score: float) -> None:
        """Saves and logs a score."""
        self._scores.setdefault(student.row, {})[str(student.repeat)] = score
        files.write_json(self._file, self._scores)
        count = sum(len(scores) for scores in self._scores.values())
        self._run.log("evaluate", count, row=student.row, repeat=student.repeat, accuracy=score)

    def row(self, name: str) -> list[float]:
        """Returns the scores of a row in the order of their repeats."""
        scores = self._scores[name]
        return [scores[str(repeat)] for repeat in range(len(scores))]


def _read_scores(file: Path) -> dict[str, dict[str, float]]:
    if not file.exists():
        return {}
    remedy = "delete it, then use --resume to train its students again"
    scores = read_json(file, remedy)
    for row in scores.values():
        if not isinstance(row, dict) or not all(isinstance(score, float) for score in row.values()):
            raise UserError("--resume", file, f"is damaged; {remedy}")
    return scores


class BackgroundScoring:
    """Trains baseline students on cores that another stage leaves idle."""

    def __init__(self, context: RunContext, pool: BackgroundTasks, scores: ScoreStore) -> None:
        """pool: runs the students; leaving its block ends them."""
        self._context, self._pool, self.scores = context, pool, scores
        self._students: list[Student] = []
        self._count, self._ended = SharedCount(), 0  # work that students have done, and of those with a saved score

    def start(self, cores: int) -> None:
        """Starts the baseline students without a score, one for each idle core at a time.

        The set before the first iteration must be saved.
        """
        context = self._context
        students = baseline_students(context, load_stored_set(context.run.path / INITIAL))
        self._students = self.scores.missing(students)
        if self._students and cores > 0:
            task, data = context.task, context.data
            score = StudentScorer(data.test, data.test_labels, task.train.num_classes, task.config.seed, task.device)
            with counting(self._count.add):
                self._pool.start(score, self._students, min(cores, len(self._students)))

    def collect(self) -> None:
        """Saves the scores that are ready. Does not wait."""
        for position, score in self._pool.completed():
            student = self._students[position]
            self.scores.add(student, score)
            self._ended += training_work([student], len(self._context.data.test))

    def stop_starting(self) -> list[Student]:
        """Stops starting students. Returns those still in training."""
        self._pool.cancel()
        self.collect()
        return [self._students[position] for position in self._pool.pending()]

    def work_done(self) -> int:
        """Returns the units of work that the students still in training have done."""
        return self._count.total() - self._ended

    def wait(self) -> Iterator[tuple[Student, float]]:
        """Waits for the students that are still in training. Yields each with its score when it finishes."""
        for position, score in self._pool.as_completed():
            yield self._students[position], score


def assigned_students(students: Sequence[Student]) -> list[Student]:
    """Returns the students that this rank trains."""
    return [students[position] for position in ranks.assigned(len(students))]


def training_work(students: Sequence[Student], tested: int) -> int:
    """Returns the units of work (`work_progress.work`) of training the students, and of testing each on some images."""
    return sum(work(s.recipe.epochs * len(s.make_examples().images), tested) for s in students)


def score_all_students(
    context: RunContext, students: Sequence[Student], scoring: BackgroundScoring
) -> dict[str, list[float]]:
    """Returns the test accuracies by row. Trains the students that have no score and are not yet in training."""
    task, data, scores = context.task, context.data, scoring.scores
    pending = scoring.stop_starting()
    in_training = {(s.row, s.repeat) for s in pending}

    def done(student: Student, score: float) -> None:
        scores.add(student, score)
        count = len(students) - len(scores.missing(students))
        context.progress("evaluate", count, len(students), **{student.row: score})

    missing = scores.missing(students)
    context.progress("evaluate", len(students) - len(missing), len(students))
    missing = [s for s in missing if (s.row, s.repeat) not in in_training]
    scorer = StudentScorer(data.test, data.test_labels, task.train.num_classes, task.config.seed, task.device)
    total = training_work([*assigned_students(missing), *pending], len(data.test))
    with reporting(context.progress, "evaluate:training", total, scoring.work_done):
        score_students(scorer, missing, done)
        for student, score in scoring.wait():
            done(student, score)
    return {row: scores.row(row) for row in dict.fromkeys(s.row for s in students)}


def warn_at_chance(scores: Mapping[str, Sequence[float]], num_classes: int) -> None:
    """Logs a warning for every row whose mean accuracy is not above that of a guess, 1 / `num_classes`."""
    for row, runs in scores.items():
        mean = sum(runs) / len(runs)
        if mean <= 1 / num_classes:
            field = "evaluate.real_lr" if row in REAL_IMAGES else "evaluate.lr"
            log.warning(
                "students of %s reach %.1f %%, which is not better than a guess (%.1f %%); "
                "if their loss diverged, use a smaller %s",
                row,
                100 * mean,
                100 / num_classes,
                field,
            )
