"""Measures generated images on noisy labels.

`python -m tadperf.bench.studies.generative --seeds 0 1 2 3 4 --out DIR`.

Tables, each as mean and sample deviation over the seeds, and written after every seed:
quality: the images before and after refinement in the eyes of a judge, a network trained on the true labels of all
training images; it measures, and nothing learns from it. anomalies: the decisions of a detector trained on the trusted
view and of one trained on the labels as given, about the same images, against the judge's. accuracy: of students, on
test images; matching: the same of sets matched from real and from refined images. Every run lies in DIR, and one that
is there is not made again.
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
PER_CLASS = 20  # images of a class that both detectors decide about


class Case(NamedTuple):
    """A finished generative run with everything that measures it."""

    task: Task
    data: NormalisedData
    seen: TrainingSamples
    run: Run
    result: dict[str, Any]
    judge: nn.Module
    detector: nn.Module


class Study(NamedTuple):
    """What all runs of a study share."""

    preset: str
    noise: str
    sets: Sequence[str]  # "section.key=value"
    out: Path
    donor: Path | None  # `out` of a study that trained the same diffusion models

    def config(self, seed: int, synthesis: str, *more: str) -> Config:
        options = {"data.noise": self.noise, "seed": seed, "synthesis": synthesis, "device": "cpu"}
        return merge(self.preset, None, [*self.sets, *more], options)


def distilled(config: Config, place: Path, donor: Path | None = None) -> dict[str, Any]:
    """The result of a run without students; a run that is there goes on, one that is not takes what `donor` learned."""
    if place.exists() and (result := finished_result(place, config)):
        return result
    with Run.create(place, config, place.exists()) as run:
        task = prepare(config)
        if donor is not None:
            start.inherit(donor, task, run)
        return distill_task(task, run, evaluate=False)


def case(study: Study, seed: int) -> Case:
    """The generative run of a seed, and the judge: trained as the detector is, on the true labels of all images."""
    config, place = study.config(seed, "generative"), study.out / f"generative-{seed}"
    result = distilled(config, place, study.donor and study.donor / place.name)
    task = prepare(config)
    data = normalise_data(task)
    with Run.create(place, config, resume=True) as run:
        samples, _ = trusted_samples(task, data, run, silent)
        seen = training_samples(data, samples)
        model = build_detector(config.detector, seen.images, task.train.num_classes, 0)
        detector = load_detector(place / "detector.safetensors", model, task.train.num_classes)
    clean = task.train.labels if task.train.clean_labels is None else task.train.clean_labels
    file = place / "judge.safetensors"
    judge = build_detector(config.detector, data.train, task.train.num_classes, 0)
    if file.exists():
        judge = load_detector(file, judge, task.train.num_classes)
    else:
        judge = trained(task, data, clean, "judge")
        files.save_tensors(file, judge.state_dict())
    return Case(task, data, seen, run, result, judge, detector)


def trained(task: Task, data: NormalisedData, labels: Tensor, name: str) -> nn.Module:
    """A network like the detector, trained on all training images under `labels`."""
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
    """Judge's agreement and diversity, and the detector's share of anomalies, before and after refinement."""
    config = c.task.config
    labels = torch.arange(c.task.train.num_classes).repeat_interleave(config.match.ipc)
    found: dict[str, float] = {}
    for name, file in (("before", INITIAL), ("after", Path("distilled.safetensors"))):
        images = artifact.load(c.run.path / file).images
        judged, said = (classify_images(net, images) for net in (c.judge, c.detector))
        found[f"agreement {name}"] = float((judged.logits.argmax(1) == labels).double().mean())
        found[f"anomalous {name}"] = float(select.is_anomalous(said.logits, labels, config.refine.beta).double().mean())
        found[f"diversity {name}"] = select.diversity(judged.features, labels)
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
    """Precision and recall of anomaly decisions about images made from random samples under the labels as given.

    Truly anomalous is what the judge takes for another class. Many are, since the labels they start from are wrong.
    """
    config, seed = c.task.config, seeds.derive(c.task.config.seed, "anomalies")
    given = c.task.train.labels
    index = pick_real(given, PER_CLASS, torch.Generator().manual_seed(seed % 2**63))
    source = get_diffusion_model(RefineContext(c.task, c.data, c.seen, c.run, silent))
    latents = encode(source, c.task.train.images[index], config.refine.batch)
    own = [seeds.derive(seed, k) for k in range(len(index))]
    made = generate(source, latents, given[index], own, config.refine.strength, config.refine.batch)
    images = c.data.normaliser(made)
    truly = classify_images(c.judge, images).logits.argmax(1) != given[index]
    found = {"truly anomalous": float(truly.double().mean())}
    for name, net in (("trusted view", c.detector), ("labels as given", trained(c.task, c.data, given, "on given"))):
        flagged = select.is_anomalous(classify_images(net, images).logits, given[index], config.refine.beta)
        both = float((flagged & truly).sum())
        found[f"{name}: precision"] = both / max(float(flagged.sum()), 1.0)
        found[f"{name}: recall"] = both / max(float(truly.sum()), 1.0)
        found[f"{name}: flagged"] = float(flagged.double().mean())
    return found


def accuracy(c: Case, repeats: int) -> dict[str, float]:
    """Mean test accuracy of `repeats` students a row."""
    config, seed = c.task.config, c.task.config.seed
    labels = c.seen.labels.where(c.seen.confirmed, -1)

    def random_real(repeat: int) -> Examples:
        index = pick_real(labels, config.match.ipc, seeds.generator(seed, "random real", repeat))
        return Examples(c.seen.images[index], labels[index])

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
        row: tested(c, [Student("", r, net, recipe, partial(examples, r)) for r in range(repeats)])
        for row, examples in rows.items()
    }


def matched(c: Case, study: Study, repeats: int) -> dict[str, float]:
    """Mean test accuracy of students of what is matched from real images and from the refined ones."""
    seed = c.task.config.seed
    matching, hybrid = (study.out / f"{kind}-{seed}" for kind in ("matching", "hybrid"))
    distilled(study.config(seed, "matching"), matching, c.run.path)
    distilled(study.config(seed, "hybrid", f"experts.path={matching.resolve()}"), hybrid, c.run.path)
    found = {}
    for place in (matching, hybrid):
        made = artifact.load(place / "distilled.safetensors")
        both = Examples(made.images, made.labels)
        everyone = [Student("", r, made.net, made.recipe, lambda both=both: both) for r in range(repeats)]
        found[place.name.partition("-")[0]] = tested(c, everyone)
    return found


def tested(c: Case, students: Sequence[Student]) -> float:
    """Mean test accuracy; a student's seed is its number alone, so rows are compared on the same initial weights."""
    scores: list[float] = []
    scorer = StudentScorer(c.data.test, c.data.test_labels, c.task.train.num_classes, c.task.config.seed, c.task.device)
    score_students(scorer, students, lambda _, score: scores.append(score))
    return statistics.fmean(sorted(scores))


def table(found: dict[int, dict[str, float]]) -> str:
    """Markdown: a row a figure, a column a seed, then mean and deviation."""
    lines = [f"| | {' | '.join(f'seed {s}' for s in found)} | mean ± deviation |", f"|{' --- |' * (len(found) + 2)}"]
    for name in next(iter(found.values())):
        values = [of_seed[name] for of_seed in found.values()]
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
    parser.add_argument("--repeats", type=int, default=5, help="students a row and seed")
    parser.add_argument("--set", action="append", default=[], dest="sets", metavar="A.B=C")
    parser.add_argument("--from", type=Path, dest="donor", help="another study's --out: its diffusion models are taken")
    parser.add_argument("--out", type=Path, required=True, help="folder of the runs, the tables and generative.json")
    asked = parser.parse_args(arguments)
    asked.out.mkdir(parents=True, exist_ok=True)
    study = Study(asked.preset, asked.noise, asked.sets, asked.out, asked.donor)
    head = f"preset {' '.join((study.preset, *study.sets))}, {study.noise}, {available_cores()} cores, {date.today()}"
    found: dict[str, dict[int, dict[str, float]]] = {part: {} for part in asked.parts}
    for part in asked.parts:  # a part of every seed before the next part: a study cut short has whole tables
        for seed in asked.seeds:
            c = case(study, seed)
            measure = {
                "quality": quality,
                "anomalies": anomalies,
                "accuracy": partial(accuracy, repeats=asked.repeats),
                "matching": partial(matched, study=study, repeats=asked.repeats),
            }[part]
            found[part][seed] = measure(c)
            shown = "\n\n".join(f"{name}\n\n{table(rows)}" for name, rows in found.items() if rows)
            files.write_bytes(asked.out / "generative.md", f"{head}\n\n{shown}\n".encode())
            files.write_json(asked.out / "generative.json", {"what": head, "versions": versions(), **found})
    print((asked.out / "generative.md").read_text())


if __name__ == "__main__":
    main()
