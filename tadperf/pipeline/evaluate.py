"""The command `tadperf evaluate`: measures a distilled file."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from tadperf import artifact
from tadperf.compute.device import resolve_device
from tadperf.compute.torch_settings import torch_settings
from tadperf.compute.work_progress import reporting
from tadperf.config import Config
from tadperf.data.images import normalise_images
from tadperf.nets.students import Student, StudentScorer, score_students, summarise
from tadperf.pipeline.scoring import assigned_students, distilled_students, training_work
from tadperf.progress import Progress, silent


def evaluate_file(
    path: Path,
    data: str | None = None,
    networks: Sequence[str] | None = None,
    repeats: int | None = None,
    seed: int = 0,
    device: str = "auto",
    progress: Progress = silent,
) -> dict[str, Any]:
    """Returns the test accuracy of a distilled file. Needs the file and its test data, and no run folder.

    data: a data set with a test split; by default the one that was distilled. networks, repeats: by default those of
    the file's config.
    """
    distilled = artifact.load(path)
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
