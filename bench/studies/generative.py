"""Measures generated images on noisy labels.

Run `python -m tadperf.bench.studies.generative --seeds 0 1 2 3 4 --out DIR`. It writes these tables after every seed,
with mean and sample deviation over the seeds. DIR keeps every run, and a later call reuses them.

quality: a judge rates the images before and after refinement. The judge is a network trained on the true labels of all
training images. It only measures, and nothing learns from it.
anomalies: the decisions of two detectors about the same images are compared with the judge's. One detector learned the
trusted samples, the other the given labels.
accuracy: the test accuracy of students.
matching: the test accuracy of students of sets matched from real and from refined images.
"""

from __future__ import annotations

import argparse
import statistics
from collections.abc import Callable, Sequence
from datetime import date
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from tadperf import artifact, files, seeds
from tadperf.compute.versions import versions
from tadperf.compute.workers import available_cores
from tadperf.config import Config
from tadperf.config.merge import merge
from tadperf.data.pick import pick_real
from tadperf.nets import training
from tadperf.nets.problem import Problem
from tadperf.nets.students import Examples, Student, StudentScorer, score_students
from tadperf.pipeline.distill import distill_task
from tadperf.pipeline.package import INITIAL, student_recipe
from tadperf.pipeline.prepare import prepare
from tadperf.pipeline.trusted import trusted_samples
from tadperf.progress import silent
from tadperf.refine import select, start
from tadperf.refine.context import RefineContext
from tadperf.refine.detector import build_detector, classify_images, load_detector, train_detector
from tadperf.refine.models.base import encode, generate
from tadperf.refine.networks import get_diffusion_model
from tadperf.run.folder import Run, finished_result
from tadperf.task.samples import NormalisedData, TrainingSamples, normalise_data, training_samples
from tadperf.task.task import Task

PARTS = ("quality", "anomalies", "accuracy", "matching")
PER_CLASS = 20  # images of each class for both detectors; not tuned


class Case(NamedTuple):
    """A finished generative run, and the networks that measure it."""

    task: Task
    data: NormalisedData
    samples: TrainingSamples
    run: Run
    result: dict[str, Any]
    judge: nn.Module
    detector: nn.Module


class Study(NamedTuple):
    """The settings that all runs of a study share."""

    preset: str
    noise: str
    sets: Sequence[str]  # "section.key=value"
    out: Path
    donor: Path | None  # `out` of a study with the same diffusion models

    def config(self, seed: int, synthesis: str, *more: str) -> Config:
        options = {"data.noise": self.noise, "seed": seed, "synthesis": synthesis, "device": "cpu"}
        return merge(self.preset, None, [*self.sets, *more], options)


def run_distilled(config: Config, place: Path, donor: Path | None = None) -> dict[str, Any]:
    """Returns the result of a run without students. Continues an old run. A new run takes the models of `donor`."""
    if place.exists() and (result := finished_result(place, config)):
        return result
    with Run.create(place, config, place.exists()) as run:
        task = prepare(config)
        if donor is not None:
            start.inherit(donor, task, run)
        return distill_task(task, run, evaluate=False)


def load_case(study: Study, seed: int) -> Case:
    """Returns the generative run of a seed. Trains the judge like the detector, on the true labels of all images."""
    config, place = study.config(seed, "generative"), study.out / f"generative-{seed}"
    result = run_distilled(config, place, study.donor and study.donor / place.name)
    task = prepare(config)
    data = normalise_data(task)
    with Run.create(place, config, resume=True) as run:
        selection, _ = trusted_samples(task, data, run, silent)
        samples = training_samples(data, selection)
        model = build_detector(config.detector, samples.images, task.train.num_classes, 0)
        detector = load_detector(place / "detector.safetensors", model, task.train.num_classes)
    clean = task.train.labels if task.train.clean_labels is None else task.train.clean_labels
    file = place / "judge.safetensors"
    judge = build_detector(config.detector, data.train, task.train.num_classes, 0)
    if file.exists():
        judge = load_detector(file, judge, task.train.num_classes)
    else:
        judge = train_network(task, data, clean, "judge")
        files.save_tensors(file, judge.state_dict())
    return Case(task, data, samples, run, result, judge, detector)


def train_network(task: Task, data: NormalisedData, labels: Tensor, name: str) -> nn.Module:
    """Returns a network like the detector, trained on all training images with these labels."""
    problem = Problem(
        data.train,
        labels,
        task.train.class_names,
        task.config.detector,
        task.config.data.augment,
        seeds.derive(task.config.seed, name),
        task.device,
    )
    return train_detector(task.config.detector, problem)


def quality(c: Case) -> dict[str, float]:
    """Returns the judge's agreement, the diversity and the share that the detector rejects, before and after."""
    config = c.task.config
    labels = torch.arange(c.task.train.num_classes).repeat_interleave(config.match.ipc)
    found: dict[str, float] = {}
    for name, file in (("before", INITIAL), ("after", Path("distilled.safetensors"))):
        images = artifact.load(c.run.path / file).images
        judge_output, detector_output = (classify_images(net, images) for net in (c.judge, c.detector))
        found[f"agreement {name}"] = float((judge_output.logits.argmax(1) == labels).double().mean())
        rejected = select.is_anomalous(detector_output.logits, labels, config.refine.beta)
        found[f"anomalous {name}"] = float(rejected.double().mean())
        found[f"diversity {name}"] = select.diversity(judge_output.features, labels)
    stages = c.result["stages"]
    return found | {
        "diversity ratio": found["diversity after"] / found["diversity before"],
        "rounds": float(len(c.result["refine"]["rounds"]) - 1),
        "detector, held out": c.result["refine"]["detector"]["held_out"],
        "judge, test": training.accuracy(c.judge, c.data.test, c.data.test_labels),
        "trusted labels right": c.result["trust"]["label_accuracy"],
        **{f"seconds, {name}": stages[name]["seconds"] for name in ("trust", "detector", "diffusion", "refine")},
    }


def anomalies(c: Case) -> dict[str, float]:
    """Returns precision and recall of the decisions about images generated from random samples with given labels.

    An image is truly anomalous if the judge sees another class. Many are, because the given labels are often wrong.
    """
    config, seed = c.task.config, seeds.derive(c.task.config.seed, "anomalies")
    given = c.task.train.labels
    index = pick_real(given, PER_CLASS, torch.Generator().manual_seed(seed % 2**63))
    source = get_diffusion_model(RefineContext(c.task, c.data, c.samples, c.run, silent))
    latents = encode(source, c.task.train.images[index], config.refine.batch)
    image_seeds = [seeds.derive(seed, k) for k in range(len(index))]
    generated = generate(source, latents, given[index], image_seeds, config.refine.strength, config.refine.batch)
    images = c.data.normaliser(generated)
    truly = classify_images(c.judge, images).logits.argmax(1) != given[index]
    found = {"truly anomalous": float(truly.double().mean())}
    detectors = {"trusted view": c.detector, "labels as given": train_network(c.task, c.data, given, "on given")}
    for name, net in detectors.items():
        flagged = select.is_anomalous(classify_images(net, images).logits, given[index], config.refine.beta)
        hits = float((flagged & truly).sum())
        found[f"{name}: precision"] = hits / max(float(flagged.sum()), 1.0)
        found[f"{name}: recall"] = hits / max(float(truly.sum()), 1.0)
        found[f"{name}: flagged"] = float(flagged.double().mean())
    return found


def accuracy(c: Case, repeats: int) -> dict[str, float]:
    """Returns the mean test accuracy of `repeats` students by row."""
    config, seed = c.task.config, c.task.config.seed
    labels = c.samples.labels.where(c.samples.confirmed, -1)

    def random_real(repeat: int) -> Examples:
        index = pick_real(labels, config.match.ipc, seeds.generator(seed, "random real", repeat))
        return Examples(c.samples.images[index], labels[index])

    def always(images: Tensor, labels: Tensor) -> Callable[[int], Examples]:
        return lambda _: Examples(images, labels)

    rows: dict[str, Callable[[int], Examples]] = {"random trusted": random_real}
    hard = torch.arange(c.task.train.num_classes).repeat_interleave(config.match.ipc)
    for name, file in (("generated", INITIAL), ("refined", Path("distilled.safetensors"))):
        images = artifact.load(c.run.path / file).images
        soft = classify_images(c.detector, images).logits
        rows[f"{name}, hard labels"] = always(images, hard)
        rows[f"{name}, soft labels"] = always(images, soft)
    net, recipe = config.net, student_recipe(config, config.evaluate.real_lr)
    return {
        row: mean_accuracy(c, [Student("", r, net, recipe, partial(examples, r)) for r in range(repeats)])
        for row, examples in rows.items()
    }


def matching_accuracy(c: Case, study: Study, repeats: int) -> dict[str, float]:
    """Returns the mean test accuracy of sets matched from real images and from refined ones."""
    seed = c.task.config.seed
    matching, hybrid = (study.out / f"{kind}-{seed}" for kind in ("matching", "hybrid"))
    run_distilled(study.config(seed, "matching"), matching, c.run.path)
    run_distilled(study.config(seed, "hybrid", f"experts.path={matching.resolve()}"), hybrid, c.run.path)
    found = {}
    for place in (matching, hybrid):
        distilled = artifact.load(place / "distilled.safetensors")
        examples = Examples(distilled.images, distilled.labels)
        students = [
            Student("", r, distilled.net, distilled.recipe, lambda examples=examples: examples) for r in range(repeats)
        ]
        found[place.name.partition("-")[0]] = mean_accuracy(c, students)
    return found


def mean_accuracy(c: Case, students: Sequence[Student]) -> float:
    """Returns the mean test accuracy. A student's seed is its number only, so all rows start from the same weights."""
    scores: list[float] = []
    scorer = StudentScorer(c.data.test, c.data.test_labels, c.task.train.num_classes, c.task.config.seed, c.task.device)
    score_students(scorer, students, lambda _, score: scores.append(score))
    return statistics.fmean(sorted(scores))


def table(found: dict[int, dict[str, float]]) -> str:
    """Returns Markdown: a row for each figure, a column for each seed, then mean and deviation."""
    lines = [f"| | {' | '.join(f'seed {s}' for s in found)} | mean ± deviation |", f"|{' --- |' * (len(found) + 2)}"]
    for name in next(iter(found.values())):
        values = [figures[name] for figures in found.values()]
        spread = f" ± {statistics.stdev(values):.3f}" if len(values) > 1 else ""
        cells = " | ".join(f"{value:.3f}" for value in values)
        lines.append(f"| {name} | {cells} | {statistics.fmean(values):.3f}{spread} |")
    return "\n".join(lines)


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--preset", default="digits")
    parser.add_argument("--noise", default="asymmetric:0.4")
    parser.add_argument("--seeds", nargs="+", type=int, default=[0, 1, 2, 3, 4])
    parser.add_argument("--parts", nargs="+", choices=PARTS, default=PARTS)
    parser.add_argument("--repeats", type=int, default=5, help="students for each row and seed")
    parser.add_argument("--set", action="append", default=[], dest="sets", metavar="A.B=C")
    parser.add_argument("--from", type=Path, dest="donor", help="--out of another study, to use its diffusion models")
    parser.add_argument("--out", type=Path, required=True, help="folder of the runs, the tables and generative.json")
    options = parser.parse_args(arguments)
    options.out.mkdir(parents=True, exist_ok=True)
    study = Study(options.preset, options.noise, options.sets, options.out, options.donor)
    head = f"preset {' '.join((study.preset, *study.sets))}, {study.noise}, {available_cores()} cores, {date.today()}"
    found: dict[str, dict[int, dict[str, float]]] = {part: {} for part in options.parts}
    for part in options.parts:  # all seeds of a part first, so that an interrupted study has complete tables
        for seed in options.seeds:
            c = load_case(study, seed)
            measure = {
                "quality": quality,
                "anomalies": anomalies,
                "accuracy": partial(accuracy, repeats=options.repeats),
                "matching": partial(matching_accuracy, study=study, repeats=options.repeats),
            }[part]
            found[part][seed] = measure(c)
            tables = "\n\n".join(f"{name}\n\n{table(rows)}" for name, rows in found.items() if rows)
            files.write_bytes(options.out / "generative.md", f"{head}\n\n{tables}\n".encode())
            files.write_json(options.out / "generative.json", {"what": head, "versions": versions(), **found})
    print((options.out / "generative.md").read_text())


if __name__ == "__main__":
    main()
