"""The command `tadperf evaluate`: measures a distilled file, alone or beside coresets."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from tadperf import artifact
from tadperf.artifact import DistilledSet
from tadperf.compute.device import resolve_device
from tadperf.compute.torch_settings import torch_settings
from tadperf.compute.work_progress import reporting
from tadperf.config import Config, NetConfig
from tadperf.data.images import normalise_images
from tadperf.errors import UserError
from tadperf.nets.students import Examples, Student, StudentScorer, score_students, summarise
from tadperf.nets.training import Optimizer
from tadperf.pipeline.protocol import (
    PROTOCOL_REPEATS,
    ProtocolRun,
    check_protocol,
    full_recipe,
    image_sets,
    measure,
    needs_teacher,
)
from tadperf.pipeline.protocol_scorers import TEACHERS, Teacher, train_teacher
from tadperf.pipeline.scoring import assigned_students, distilled_students, training_work
from tadperf.pipeline.trusted_view import open_trusted_view
from tadperf.progress import Progress, silent
from tadperf.task.samples import TrainingSamples

RD3_TEACHER = "resnet18"


def evaluate_protocol(
    path: Path,
    protocol: str,
    data: str | None = None,
    networks: Sequence[str] | None = None,
    repeats: int | None = None,
    seed: int = 0,
    device: str = "auto",
    progress: Progress = silent,
    optimizer: Optimizer | None = None,
) -> dict[str, Any]:
    """Compares a distilled file with random images and coresets of its trusted view, paired by repeat (tadperf).

    protocol: hard, soft, published or rd3; see `pipeline.protocol`. The other arguments as for `evaluate_file`; repeats
    is 10 by default, and rd3 trains ResNet-18 by default. The repeats differ in the initial weights, the order of
    images and the random images, not in the distilled set: a claim about a method needs several distilled sets.
    Raises UserError for an unknown protocol, or if the training images or the trusted labels are missing.
    """
    check_protocol(protocol)
    if protocol == "rd3" and optimizer:
        raise UserError("--optimizer", optimizer, "the protocol rd3 always trains with Adam; leave it out")
    distilled, folder = _load(path, optimizer), path.parent
    target = resolve_device(device)
    test = distilled.test_split(data, progress)
    config = Config.model_validate(distilled.config)
    with torch_settings(tf32=config.tf32, benchmark=target.type == "cuda"):
        _, samples = open_trusted_view(distilled, folder, target, progress)
        images = normalise_images(distilled.normaliser, test.images, target)
        teacher = _teacher(protocol, distilled, samples, seed, target)
        sets = image_sets(distilled, samples, folder, seed)
        run = ProtocolRun(
            protocol,
            distilled,
            samples,
            sets,
            teacher,
            (images, test.labels),
            config.evaluate,
            repeats or PROTOCOL_REPEATS,
            seed,
            target,
            progress,
        )
        names = networks or (("resnet18",) if protocol == "rd3" else config.evaluate.networks)
        results = {name: measure(run, _student_net(protocol, distilled, name)) for name in names}
    head = {"file": str(path), "data": test.name, "protocol": protocol, "ipc": distilled.ipc, "repeats": run.repeats}
    return {**head, "accuracy": {name: r["rows"]["distilled"] for name, r in results.items()}, "networks": results}


def _load(path: Path, optimizer: Optimizer | None) -> DistilledSet:
    """Loads a file, with another optimiser in its recipe if one is given."""
    distilled = artifact.load(path)
    return replace(distilled, recipe=distilled.recipe._replace(optimizer=optimizer)) if optimizer else distilled


def _student_net(protocol: str, distilled: DistilledSet, name: str) -> NetConfig:
    """Returns the network of students: the file's settings; rd3 uses batch norm, as in ResNet-18."""
    norm = "batch" if protocol == "rd3" else distilled.net.norm
    return distilled.net.model_copy(update={"name": name, "norm": norm})


def _teacher(
    protocol: str, distilled: DistilledSet, samples: TrainingSamples, seed: int, device: torch.device
) -> Teacher | None:
    """Trains the teacher on the trusted samples: for rd3 one ResNet-18, else TEACHERS networks of the file's kind."""
    if not needs_teacher(protocol, distilled):
        return None
    evaluate = Config.model_validate(distilled.config).evaluate
    net = _student_net(protocol, distilled, RD3_TEACHER if protocol == "rd3" else distilled.net.name)
    count = 1 if protocol == "rd3" else TEACHERS
    known = Examples(samples.images, samples.labels, samples.weights)
    return train_teacher(known, distilled.num_classes, net, full_recipe(distilled, evaluate), count, seed, device)


def evaluate_file(
    path: Path,
    data: str | None = None,
    networks: Sequence[str] | None = None,
    repeats: int | None = None,
    seed: int = 0,
    device: str = "auto",
    progress: Progress = silent,
    optimizer: Optimizer | None = None,
) -> dict[str, Any]:
    """Returns the test accuracy of a distilled file. Needs the file and its test data, and no run folder.

    data: a data set with a test split; by default the one that was distilled. networks, repeats: by default those of
    the file's config. optimizer: sgd or muon; by default that of the file's recipe.
    """
    distilled = _load(path, optimizer)
    target = resolve_device(device)
    test = distilled.test_split(data, progress)
    config = Config.model_validate(distilled.config)
    evaluate = config.evaluate
    students = distilled_students(distilled, networks or evaluate.networks, repeats or evaluate.repeats, target)
    rows: dict[str, dict[int, float]] = {}

    def done(student: Student, score: float) -> None:
        rows.setdefault(student.row, {})[student.repeat] = score
        progress("evaluate", sum(len(scores) for scores in rows.values()), len(students), **{student.row: score})

    with torch_settings(tf32=config.tf32, benchmark=target.type == "cuda"):
        images = normalise_images(distilled.normaliser, test.images, target)
        progress("evaluate", 0, len(students))
        scorer = StudentScorer(images, test.labels, distilled.num_classes, seed, target)
        total = training_work(assigned_students(students), len(images))
        with reporting(progress, "evaluate:training", total):
            score_students(scorer, students, done)
    accuracy = {row: summarise([scores[repeat] for repeat in sorted(scores)]) for row, scores in rows.items()}
    return {"file": str(path), "data": test.name, "accuracy": accuracy}
