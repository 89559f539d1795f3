"""The command `tadperf distill`: data, trust, experts, matching, one distilled file, and its evaluation."""

from __future__ import annotations

import sys
from collections.abc import Mapping, Sequence
from types import MappingProxyType
from typing import Any

from tadperf import files
from tadperf.artifact import DistilledSet
from tadperf.compute import ranks
from tadperf.compute.torch_settings import torch_settings
from tadperf.compute.workers import BackgroundTasks
from tadperf.data.broken import save_broken
from tadperf.matching.state import initial_state
from tadperf.pipeline.context import RunContext, open_context
from tadperf.pipeline.experts import get_experts
from tadperf.pipeline.matching import match
from tadperf.pipeline.package import DISTILLED, INITIAL, load_stored_set, package_set
from tadperf.pipeline.result import REFINED, REPORT, build_result
from tadperf.pipeline.scoring import (
    BackgroundScoring,
    ScoreStore,
    baseline_students,
    distilled_students,
    score_all_students,
    warn_at_chance,
)
from tadperf.progress import Progress, silent
from tadperf.refine.loop import RefinedImages, refine
from tadperf.report.drawing import save_safely
from tadperf.report.grid import save_grid
from tadperf.report.page import save_run_page
from tadperf.run.folder import Run
from tadperf.task.samples import NormalisedData
from tadperf.task.task import Task


def distill_task(
    task: Task,
    run: Run,
    progress: Progress = silent,
    data: NormalisedData | None = None,
    known: Mapping[str, Sequence[float]] = MappingProxyType({}),
    evaluate: bool = True,
) -> dict[str, Any]:
    """Runs all stages in a run folder and returns the result. A resumed run skips finished work.

    data: the normalised data of the task, if the caller has them. known: accuracies of rows that need no students.
    evaluate: whether students measure the set and its baselines.
    """
    with torch_settings(tf32=task.config.tf32, benchmark=task.device.type == "cuda"):
        (run.path / "checkpoints").mkdir(exist_ok=True)
        save_broken(run.path / "broken.csv", task.train, task.test)
        context = open_context(task, run, progress, data)
        with BackgroundTasks() as pool:
            scoring = BackgroundScoring(context, pool, ScoreStore(run, known))
            distilled = _distilled_set(context, scoring)
            save_safely(save_grid, run.path / "grid.png", distilled)
            scores = _evaluate(context, distilled, scoring) if evaluate else {}
            warn_at_chance(scores, task.train.num_classes)
        result = build_result(context, distilled, scores)
        state = context.rounds[-1] if context.rounds else None
        train = task.train
        save_safely(save_run_page, run.path / REPORT, result, distilled, train.images, train.file_names, state)
        run.finish(result)
        return result


def synthesise(context: RunContext, scoring: BackgroundScoring | None = None) -> DistilledSet:
    """Makes the synthetic set by matching, by the diffusion model, or by matching from the diffusion model's images.

    scoring: trains baseline students while matching runs.
    """
    task, run = context.task, context.run
    refined = None
    if task.config.synthesis != "matching":
        refined = refine(task, context.data, context.samples, run, context.progress)
        files.write_json(run.path / REFINED, refined.report)
        if task.config.synthesis == "generative":
            return _package_refined(context, refined)
    with run.stage("experts"):
        experts = get_experts(context)
    with run.stage("matching"):
        state = match(context, experts, refined.images if refined else None, scoring)
        return package_set(task, context.data.normaliser, state)


def _package_refined(context: RunContext, refined: RefinedImages) -> DistilledSet:
    """Packs the refined images, and saves the images before refinement as the initial set."""
    task, normaliser = context.task, context.data.normaliser
    lr = refined.lr or task.config.evaluate.real_lr
    first = initial_state(*refined.first, task.config.match)
    package_set(task, normaliser, first, lr).save(context.run.path / INITIAL)
    return package_set(task, normaliser, initial_state(refined.images, refined.labels, task.config.match), lr)


def _distilled_set(context: RunContext, scoring: BackgroundScoring) -> DistilledSet:
    """Loads the run's distilled set. Makes it first if it, or another file of the same stage, is missing."""
    names = [DISTILLED, INITIAL] + [REFINED] * (context.task.config.synthesis != "matching")
    if not ranks.once(lambda: all((context.run.path / name).exists() for name in names)):
        # Background students are forked processes: on Linux only, and without CUDA or other ranks.
        can_fork = context.task.device.type == "cpu" and ranks.world_size() == 1 and sys.platform.startswith("linux")
        synthesise(context, scoring if can_fork else None).save(context.run.path / DISTILLED)
        ranks.barrier()
    return load_stored_set(context.run.path / DISTILLED)


def _evaluate(context: RunContext, distilled: DistilledSet, scoring: BackgroundScoring) -> dict[str, list[float]]:
    """The stage "evaluate": returns the test accuracies of all students by row."""
    config, initial = context.task.config.evaluate, load_stored_set(context.run.path / INITIAL)
    with context.run.stage("evaluate"):
        students = distilled_students(distilled, config.networks, config.repeats, context.task.device)
        students += baseline_students(context, initial)
        return score_all_students(context, students, scoring)
