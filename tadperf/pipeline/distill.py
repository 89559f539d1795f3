"""The main road: data -> trust -> experts -> matching -> one distilled file -> what it is worth."""

from __future__ import annotations

import sys
from collections.abc import Callable, Mapping, Sequence
from types import MappingProxyType
from typing import Any

from tadperf import artifact, files
from tadperf.artifact import DistilledSet
from tadperf.compute import ranks
from tadperf.compute.workers import BackgroundTasks
from tadperf.matching.state import initial_state
from tadperf.pipeline.matching import get_experts, match
from tadperf.pipeline.package import INITIAL, package_set
from tadperf.pipeline.result import REFINED, build_result
from tadperf.pipeline.scoring import BackgroundScoring, ScoreStore, baselines, distilled_students, score_all_students
from tadperf.pipeline.trusted import load_data, trusted_samples
from tadperf.progress import Progress, silent
from tadperf.refine.loop import refine
from tadperf.report.grid import save_grid
from tadperf.run.folder import Run
from tadperf.task.samples import NormalisedData, TrainingSamples, training_samples
from tadperf.task.task import Task


def synthesise(
    task: Task,
    data: NormalisedData,
    seen: TrainingSamples,
    run: Run,
    progress: Progress,
    beside: Callable[[int], Callable[[], None]] | None = None,
) -> DistilledSet:
    """The synthetic set: by matching, by the diffusion model, or by matching from the diffusion model's images."""
    config, made = task.config, None
    if config.synthesis != "matching":
        made = refine(task, data, seen, run, progress)
        files.write_json(run.path / REFINED, made.report)
    if made is not None and config.synthesis == "generative":
        lr = made.lr or config.evaluate.real_lr
        first, final = (initial_state(*pair, config.match) for pair in (made.first, (made.images, made.labels)))
        package_set(task, data, first, lr).save(run.path / INITIAL)
        return package_set(task, data, final, lr)
    with run.stage("experts"):
        trained = get_experts(task, seen, run, progress)
    with run.stage("matching"):
        return package_set(task, data, match(task, data, seen, trained, run, progress, made, beside))


def distill_task(
    task: Task,
    run: Run,
    progress: Progress = silent,
    data: NormalisedData | None = None,
    known: Mapping[str, Sequence[float]] = MappingProxyType({}),
    tested: bool = True,
) -> dict[str, Any]:
    """The whole job in a run folder; returns what result.json holds. A resumed run skips what is done.

    data: the arrays of `job`, where they are there already; known: accuracies of rows that need no new students.
    tested: whether students tell what the set is worth.
    """
    config = task.config
    (run.path / "checkpoints").mkdir(exist_ok=True)
    file = run.path / "distilled.safetensors"
    data = data or load_data(task, run, progress)
    samples, trust = trusted_samples(task, data, run, progress)
    seen = training_samples(data, samples)
    with BackgroundTasks() as pool:
        early = BackgroundScoring(pool, ScoreStore(run, known))

        def beside(idle: int) -> Callable[[], None]:
            others = baselines(task, data, samples, seen, artifact.load(run.path / INITIAL))
            early.start(task, data, others, idle)
            return early.collect

        if not ranks.once(file.exists):
            alone = task.device.type == "cpu" and ranks.world_size() == 1 and sys.platform.startswith("linux")
            synthesise(task, data, seen, run, progress, beside if alone else None).save(file)
            ranks.barrier()
        distilled, initial = artifact.load(file), artifact.load(run.path / INITIAL)
        save_grid(run.path / "grid.png", distilled)
        scores: dict[str, list[float]] = {}
        if tested:
            with run.stage("evaluate"):
                e = config.evaluate
                everyone = distilled_students(distilled, e.networks, e.repeats, task.device)
                everyone += baselines(task, data, samples, seen, initial)
                scores = score_all_students(task, data, everyone, early, progress)
    result = build_result(task, distilled, scores, run, trust)
    run.finish(result)
    return result
