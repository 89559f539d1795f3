"""What comes of a run: the distilled set as a file, the students that tell what it is worth, the report."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import torch

from tadperf import artifact, evaluate, runs, seeds
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
TRUST_FILES = {"labels": "labels.csv", "trust": "trust.png"}
BASELINES = ("initial", "random_real", "full_data", "full_trusted")
PLACES = {"experts": {"path", "workers"}}  # of the config: they change no result, so they are not in the file


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


def students(
    job: Job, data: Arrays, samples: Samples, seen: View, distilled: DistilledSet, initial: DistilledSet
) -> list[Student]:
    """Who is trained for the report: on the distilled set, what it started from, random real and all real images.

    Random ones come from the samples that trust is sure of. All images are taken with the labels as given and, where
    trust changed something, as it left them.
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

    rows = distilled_students(distilled, e.networks, e.repeats, job.device)
    rows += [s._replace(row="initial") for s in distilled_students(initial, [config.net.name], e.repeats, job.device)]
    rows += [Student("random_real", r, config.net, real, partial(random_real, r)) for r in range(e.repeats)]
    given = partial(Examples, data.train, data.labels)
    rows += [Student("full_data", r, config.net, full, given) for r in range(e.full_repeats)]
    if config.trust.mode != "off":
        rows += [Student("full_trusted", r, config.net, full, trusted) for r in range(e.full_repeats)]
    return rows


def worth(
    job: Job, data: Arrays, everyone: Sequence[Student], run: Run, progress: Progress,
    given: Mapping[str, Sequence[float]],
) -> dict[str, list[float]]:  # fmt: skip
    """Test accuracies by row of the report; a student that a killed run had finished is not trained again.

    given: accuracies of whole rows, in the order of their repeats, that are known already.
    """
    note = run.path / "checkpoints" / "evaluate.json"
    known: dict[str, dict[str, float]] = json.loads(note.read_text()) if note.exists() else {}
    known |= {row: {str(repeat): score for repeat, score in enumerate(scores)} for row, scores in given.items()}
    missing = [s for s in everyone if str(s.repeat) not in known.get(s.row, {})]
    finished = len(everyone) - len(missing)

    def done(student: Student, score: float) -> None:
        nonlocal finished
        known.setdefault(student.row, {})[str(student.repeat)] = score
        finished += 1
        runs.write_json(note, known)
        run.log("evaluate", finished, row=student.row, repeat=student.repeat, accuracy=score)
        progress("evaluate", finished, len(everyone), **{student.row: score})

    progress("evaluate", finished, len(everyone))
    evaluate.evaluate(missing, data.test, data.test_labels, job.train.num_classes, job.config.seed, job.device, done)
    rows = dict.fromkeys(s.row for s in everyone)
    return {row: [known[row][str(repeat)] for repeat in range(len(known[row]))] for row in rows}


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
