"""What comes of a run: the distilled set as a file, the students that tell what it is worth, the report."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import torch

from tadperf import artifact, evaluate, parallel, ranks, runs, seeds
from tadperf import device as devices
from tadperf.artifact import DistilledSet
from tadperf.config import Config
from tadperf.data import prepare as prepare_images
from tadperf.data.pick import pick_real
from tadperf.evaluate import Examples, Recipe, Student
from tadperf.job import Arrays, Job, Samples, View
from tadperf.matching.distil import State
from tadperf.progress import Progress, silent
from tadperf.runs import Run
from tadperf.training import Chosen
from tadperf.trust import TrustState
from tadperf.trust.measure import growth

# The set before the first iteration, in the form of a distilled one.
INITIAL = Path("checkpoints", "initial.safetensors")
REFINED = "refined.json"  # what refinement says of itself
REFINE_FILES = {"refined": "refined.png", "gradcam": "gradcam.png"}
TRUST_FILES = {"labels": "labels.csv", "trust": "trust.png"}
BASELINES = ("initial", "random_real", "full_data", "full_trusted")
PLACES = {"experts": {"path", "workers"}, "refine": {"start"}}  # of the config: of this machine, so not in the file


def student_recipe(config: Config, lr: float) -> Recipe:
    """How students are trained: the learned learning rate unless one is set."""
    e = config.evaluate
    return Recipe(e.epochs, e.batch, e.lr or lr, e.momentum, e.weight_decay, config.data.augment)


def package(job: Job, data: Arrays, state: State, lr: float | None = None) -> DistilledSet:
    """The synthetic set of a state with everything needed to use it; `lr` in place of the learned one."""
    config, lr = job.config, lr or float(state.log_lr.exp())
    return DistilledSet(
        state.average.cpu(), state.labels.cpu(), lr, job.train.class_names, data.normaliser, config.data.augment,
        config.net, student_recipe(config, lr), config.model_dump(mode="json", exclude=PLACES), config.seed,
        runs.versions(), {"name": job.train.name, "source": job.train.source, "fingerprint": job.train.fingerprint},
    )  # fmt: skip


def distilled_students(
    distilled: DistilledSet, networks: Sequence[str], repeats: int, where: torch.device
) -> list[Student]:
    """The students of one distilled set: every network, `repeats` times."""
    data = Examples(distilled.images.to(where), distilled.labels)
    named = {name: distilled.net.model_copy(update={"name": name}) for name in networks}
    return [
        Student(name, r, net, distilled.recipe, lambda: data) for name, net in named.items() for r in range(repeats)
    ]


def baselines(job: Job, data: Arrays, samples: Samples, seen: View, initial: DistilledSet) -> list[Student]:
    """Who is trained to compare with: on what the set started from, on random real and on all real images.

    Random ones come from the samples that trust is sure of. All images are taken with the labels as given and, where
    trust changed something, as it left them. None needs the distilled set.
    """
    config, e = job.config, job.config.evaluate
    real = student_recipe(config, e.real_lr)._replace(lr=e.real_lr)
    full = real._replace(epochs=e.full_epochs)
    labels = seen.labels.where(seen.certain, -1)

    def random_real(repeat: int) -> Examples:
        index = pick_real(labels, config.match.ipc, seeds.generator(config.seed, "random real", repeat))
        return Examples(seen.images[index], labels[index])

    def trusted() -> Examples:
        return Examples(Chosen(data.train, samples.index), samples.labels, samples.weights)

    rows = [s._replace(row="initial") for s in distilled_students(initial, [config.net.name], e.repeats, job.device)]
    rows += [Student("random_real", r, config.net, real, partial(random_real, r)) for r in range(e.repeats)]
    given = partial(Examples, data.train, data.labels)
    rows += [Student("full_data", r, config.net, full, given) for r in range(e.full_repeats)]
    if config.trust.mode != "off":
        rows += [Student("full_trusted", r, config.net, full, trusted) for r in range(e.full_repeats)]
    return rows


class Scores:
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
        runs.write_json(self.note, self.known)
        self.run.log(
            "evaluate", sum(map(len, self.known.values())), row=student.row, repeat=student.repeat, accuracy=score
        )


class Early:
    """Students that are trained beside another stage, on cores that it leaves idle; `pool` ends them."""

    def __init__(self, pool: parallel.Beside, scores: Scores) -> None:
        self.pool, self.scores, self.students = pool, scores, []

    def start(self, job: Job, data: Arrays, students: Sequence[Student], workers: int) -> None:
        """Begins those whose accuracy is not known, `workers` at a time."""
        self.students = self.scores.missing(students)
        if self.students and workers > 0:
            score = evaluate.scorer(data.test, data.test_labels, job.train.num_classes, job.config.seed, job.device)
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


def worth(
    job: Job, data: Arrays, everyone: Sequence[Student], early: Early, progress: Progress
) -> dict[str, list[float]]:
    """Test accuracies by row of the report, of the students that are not known and not under way already."""
    scores, under_way = early.scores, {(s.row, s.repeat) for s in early.stop()}

    def done(student: Student, score: float) -> None:
        scores.add(student, score)
        progress("evaluate", len(everyone) - len(scores.missing(everyone)), len(everyone), **{student.row: score})

    missing = scores.missing(everyone)
    progress("evaluate", len(everyone) - len(missing), len(everyone))
    missing = [s for s in missing if (s.row, s.repeat) not in under_way]
    evaluate.evaluate(missing, data.test, data.test_labels, job.train.num_classes, job.config.seed, job.device, done)
    for position, score in early.pool.rest():
        done(early.students[position], score)
    rows = dict.fromkeys(s.row for s in everyone)
    return {row: [scores.known[row][str(repeat)] for repeat in range(len(scores.known[row]))] for row in rows}


def trust_report(job: Job, samples: Samples, rounds: Sequence[TrustState]) -> dict[str, Any]:
    """What was learned from: `coverage` is its share of all samples; clean labels, where known, measure it only."""
    clean, mode = job.train.clean_labels, job.config.trust.mode
    right = None if clean is None else float((samples.labels == clean[samples.index]).double().mean())
    return {
        "mode": mode, "used_clean_labels": mode == "oracle", "samples": len(samples.index),
        "coverage": len(samples.index) / len(job.train), "label_accuracy": right,
        "rounds": runs.plain(growth(rounds, clean)),
    }  # fmt: skip


def report(
    job: Job, distilled: DistilledSet, scores: dict[str, list[float]], run: Run, trust: dict[str, Any]
) -> dict[str, Any]:
    """What a run says at its end: result.json, and the JSON of the command line."""
    config, stages = job.config, run.stages()
    baselines = {row: evaluate.summary(scores[row]) for row in BASELINES if row in scores}
    made = json.loads((run.path / REFINED).read_bytes()) if config.synthesis != "matching" else None
    return {
        "data": {
            **distilled.data, "train": len(job.train), "test": len(job.test), "classes": job.train.num_classes,
            "shape": list(job.train.shape), "noise": config.data.noise,
        },
        "ipc": config.match.ipc,
        "seed": config.seed,
        "synthesis": config.synthesis,
        "method": config.match.method,
        "trust": trust,
        **({"refine": made} if made else {}),
        "accuracy": {row: evaluate.summary(runs_) for row, runs_ in scores.items() if row not in baselines},
        "baselines": baselines,
        "lr": distilled.lr,
        "stages": stages,
        "seconds": sum(stage["seconds"] for stage in stages.values()),
        "device": devices.describe(job.device),
        "paths": {
            "run": str(run.path), "distilled": str(run.path / "distilled.safetensors"),
            "grid": str(run.path / "grid.png"), "metrics": str(run.path / "metrics.jsonl"),
            **{name: str(run.path / file) for name, file in TRUST_FILES.items() if trust["rounds"]},
            **{name: str(run.path / file) for name, file in REFINE_FILES.items() if config.synthesis != "matching"},
        },
    }  # fmt: skip


def evaluate_file(
    path: Path, data: str | None = None, networks: Sequence[str] | None = None, repeats: int | None = None,
    seed: int = 0, device: str = "auto", progress: Progress = silent,
) -> dict[str, Any]:  # fmt: skip
    """Test accuracy of a distilled file, from nothing but the file and its test data."""
    distilled = artifact.load(path)
    where = devices.resolve(device)
    test = distilled.test_split(data)
    images = prepare_images(distilled.normaliser, test.images, where)
    chosen = Config.model_validate(distilled.config).evaluate
    everyone = distilled_students(distilled, networks or chosen.networks, repeats or chosen.repeats, where)
    rows: dict[str, dict[int, float]] = {}

    def done(student: Student, score: float) -> None:
        rows.setdefault(student.row, {})[student.repeat] = score
        progress("evaluate", sum(map(len, rows.values())), len(everyone), **{student.row: score})

    progress("evaluate", 0, len(everyone))
    evaluate.evaluate(everyone, images, test.labels, distilled.num_classes, seed, where, done)
    accuracy = {row: evaluate.summary([by[r] for r in sorted(by)]) for row, by in rows.items()}
    return {"file": str(path), "data": test.name, "accuracy": accuracy}
