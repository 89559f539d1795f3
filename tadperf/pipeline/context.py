"""Makes the values that all stages of a run share."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from tadperf.pipeline.trusted import load_data, trusted_samples
from tadperf.progress import Progress
from tadperf.run.folder import Run
from tadperf.task.samples import NormalisedData, SampleSelection, TrainingSamples, training_samples
from tadperf.task.task import Task
from tadperf.trust.state import TrustState


@dataclass(frozen=True)
class RunContext:
    """A task, its run folder, and the results of the stages data and trust."""

    task: Task
    run: Run
    progress: Progress
    data: NormalisedData
    rounds: Sequence[TrustState]  # of the dual loop; empty unless trust.mode is on
    selection: SampleSelection
    samples: TrainingSamples  # the samples of `selection`, normalised


def open_context(task: Task, run: Run, progress: Progress, data: NormalisedData | None = None) -> RunContext:
    """Runs the stages data and trust. If `data`, the normalised data of the task, is given, runs trust alone.

    The progress of all stages also saves their time, so that a killed stage keeps it.
    """
    progress = run.saving_time(progress)
    data = data or load_data(task, run, progress)
    selection, rounds = trusted_samples(task, data, run, progress)
    return RunContext(task, run, progress, data, rounds, selection, training_samples(data, selection))
