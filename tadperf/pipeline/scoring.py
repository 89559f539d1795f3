"""Students that measure a synthetic set and its baselines."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import torch

from tadperf import artifact, files, seeds
from tadperf.artifact import DistilledSet
from tadperf.compute import ranks
from tadperf.compute.device import resolve_device
from tadperf.compute.workers import BackgroundTasks
from tadperf.config import Config
from tadperf.data.images import Chosen, normalise_images
from tadperf.data.pick import pick_real
from tadperf.nets.students import Examples, Student, score_students, student_scorer, summarise
from tadperf.pipeline.package import student_recipe
from tadperf.progress import Progress, silent
from tadperf.run.folder import Run
from tadperf.task.samples import NormalisedData, SampleSelection, TrainingSamples
from tadperf.task.task import Task

BASELINES = ("initial", "random_real", "full_data", "full_trusted")


def distilled_students(
    distilled: DistilledSet, networks: Sequence[str], repeats: int, where: torch.device
) -> list[Student]:
    """The students of one distilled set: every network, `repeats` times."""
    data = Examples(distilled.images.to(where), distilled.labels)
    named = {name: distilled.net.model_copy(update={"name": name}) for name in networks}
    return [
        Student(name, r, net, distilled.recipe, lambda: data) for name, net in named.items() for r in range(repeats)
    ]


def baselines(
    task: Task, data: NormalisedData, samples: SampleSelection, seen: TrainingSamples, initial: DistilledSet
) -> list[Student]:
    """Who is trained to compare with: on what the set started from, on random real and on all real images.

    Random ones come from the samples that trust is sure of. All images are taken with the labels as given and, where
    trust changed something, as it left them. None needs the distilled set.
    """
    config, e = task.config, task.config.evaluate
    real = student_recipe(config, e.real_lr)._replace(lr=e.real_lr)
    full = real._replace(epochs=e.full_epochs)
    labels = seen.labels.where(seen.certain, -1)

    def random_real(repeat: int) -> Examples:
        index = pick_real(labels, config.match.ipc, seeds.generator(config.seed, "random real", repeat))
        return Examples(seen.images[index], labels[index])

    def trusted() -> Examples:
        return Examples(Chosen(data.train, samples.index), samples.labels, samples.weights)

    rows = [s._replace(row="initial") for s in distilled_students(initial, [config.net.name], e.repeats, task.device)]
    rows += [Student("random_real", r, config.net, real, partial(random_real, r)) for r in range(e.repeats)]
    given = partial(Examples, data.train, data.labels)
    rows += [Student("full_data", r, config.net, full, given) for r in range(e.full_repeats)]
    if config.trust.mode != "off":
        rows += [Student("full_trusted", r, config.net, full, trusted) for r in range(e.full_repeats)]
    return rows


class ScoreStore:
    """Test accuracies of a run's students, kept as they come: what a killed run had measured is not measured again."""

    def __init__(self, run: Run, given: Mapping[str, Sequence[float]]) -> None:
        """given: accuracies of whole rows, in the order of their repeats, that are known already."""
        self.run, self.note = run, run.path / "checkpoints" / "evaluate.json"
        self.known: dict[str, dict[str, float]] = ranks.once(
            lambda: json.loads(self.note.read_text()) if self.note.exists() else {}
        )
        self.known |= {
            row: {str(repeat): score for repeat, score in enumerate(scores)} for row, scores in given.items()
        }

    def missing(self, students: Sequence[Student]) -> list[Student]:
        """Those whose accuracy is not known."""
        return [s for s in students if str(s.repeat) not in self.known.get(s.row, {})]

    def add(self, student: Student, score: float) -> None:
        self.known.setdefault(student.row, {})[str(student.repeat)] = score
        files.write_json(self.note, self.known)
        self.run.log(
            "evaluate", sum(map(len, self.known.values())), row=student.row, repeat=student.repeat, accuracy=score
        )


class BackgroundScoring:
    """Students that are trained beside another stage, on cores that it leaves idle; `pool` ends them."""

    def __init__(self, pool: BackgroundTasks, scores: ScoreStore) -> None:
        self.pool, self.scores, self.students = pool, scores, []

    def start(self, task: Task, data: NormalisedData, students: Sequence[Student], workers: int) -> None:
        """Begins those whose accuracy is not known, `workers` at a time."""
        self.students = self.scores.missing(students)
        if self.students and workers > 0:
            score = student_scorer(data.test, data.test_labels, task.train.num_classes, task.config.seed, task.device)
            self.pool.start(score, self.students, min(workers, len(self.students)))

    def collect(self) -> None:
        """Keeps the accuracies that have come so far."""
        for position, score in self.pool.ready():
            self.scores.add(self.students[position], score)

    def stop(self) -> list[Student]:
        """Begins no further one; those that are being trained still."""
        self.pool.cancel()
        self.collect()
        return [self.students[position] for position in self.pool.waited_for()]


def score_all_students(
    task: Task, data: NormalisedData, everyone: Sequence[Student], early: BackgroundScoring, progress: Progress
) -> dict[str, list[float]]:
    """Test accuracies by row of the report, of the students that are not known and not under way already."""
    scores, under_way = early.scores, {(s.row, s.repeat) for s in early.stop()}

    def done(student: Student, score: float) -> None:
        scores.add(student, score)
        progress("evaluate", len(everyone) - len(scores.missing(everyone)), len(everyone), **{student.row: score})

    missing = scores.missing(everyone)
    progress("evaluate", len(everyone) - len(missing), len(everyone))
    missing = [s for s in missing if (s.row, s.repeat) not in under_way]
    score_students(missing, data.test, data.test_labels, task.train.num_classes, task.config.seed, task.device, done)
    for position, score in early.pool.rest():
        done(early.students[position], score)
    rows = dict.fromkeys(s.row for s in everyone)
    return {row: [scores.known[row][str(repeat)] for repeat in range(len(scores.known[row]))] for row in rows}


def evaluate_file(
    path: Path,
    data: str | None = None,
    networks: Sequence[str] | None = None,
    repeats: int | None = None,
    seed: int = 0,
    device: str = "auto",
    progress: Progress = silent,
) -> dict[str, Any]:
    """Test accuracy of a distilled file, from nothing but the file and its test data."""
    distilled = artifact.load(path)
    where = resolve_device(device)
    test = distilled.test_split(data)
    images = normalise_images(distilled.normaliser, test.images, where)
    chosen = Config.model_validate(distilled.config).evaluate
    everyone = distilled_students(distilled, networks or chosen.networks, repeats or chosen.repeats, where)
    rows: dict[str, dict[int, float]] = {}

    def done(student: Student, score: float) -> None:
        rows.setdefault(student.row, {})[student.repeat] = score
        progress("evaluate", sum(map(len, rows.values())), len(everyone), **{student.row: score})

    progress("evaluate", 0, len(everyone))
    score_students(everyone, images, test.labels, distilled.num_classes, seed, where, done)
    accuracy = {row: summarise([by[r] for r in sorted(by)]) for row, by in rows.items()}
    return {"file": str(path), "data": test.name, "accuracy": accuracy}
