"""The stages data and trust: which samples are learned from, and with which labels."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch

from tadperf.pipeline.result import trust_report
from tadperf.progress import Progress
from tadperf.refine.start import starting_trust
from tadperf.report.trust_growth import save_trust_growth
from tadperf.run.folder import Run
from tadperf.task.samples import NormalisedData, SampleSelection, normalise_data, select_samples
from tadperf.task.task import Task
from tadperf.trust.loop import dual_loop
from tadperf.trust.metrics import round_metrics
from tadperf.trust.state import RECALLED, TRUSTED, TrustState


def trusted_samples(
    task: Task, data: NormalisedData, run: Run, progress: Progress
) -> tuple[SampleSelection, dict[str, Any]]:
    """What is learned from: by the dual loop, by the true labels, or all as given; and what the report says of it."""
    train, mode = task.train, task.config.trust.mode
    everyone, rounds = torch.arange(len(train)), []
    if mode == "off":
        samples = select_samples(task, everyone, train.labels)
    elif mode == "oracle":
        assert train.clean_labels is not None
        samples = select_samples(task, everyone, train.clean_labels)
    else:
        rounds = find_trusted(task, data, run, progress)
        index, labels, weights = rounds[-1].view()
        certain = rounds[-1].verdict[index]
        samples = select_samples(task, index, labels, weights, (certain == TRUSTED) | (certain == RECALLED))
    return samples, trust_report(task, samples, rounds)


def find_trusted(task: Task, data: NormalisedData, run: Run, progress: Progress) -> list[TrustState]:
    """The stage "trust": the dual loop, round by round; a resumed run reads the rounds that are finished."""
    config, train = task.config, task.train
    with run.stage("trust"):
        if config.refine.start and config.synthesis != "matching":
            state = starting_trust(Path(config.refine.start), train)
            rounds = [state]
        else:
            state, rounds = dual_loop(
                data.train,
                train.labels,
                train.class_names,
                config.net,
                config.trust,
                config.data.augment,
                config.seed,
                task.device,
                run.path / "trust",
                progress,
            )
        state.save(run.path / "trust.safetensors")
        state.export(run.path / "labels.csv")
        save_trust_growth(run.path / "trust.png", rounds)
        run.rewind("trust", 0)
        for record in round_metrics(rounds, train.clean_labels):
            run.log("trust", record.pop("round"), **record)
    return rounds


def load_data(task: Task, run: Run, progress: Progress) -> NormalisedData:
    """The stage "data"."""
    with run.stage("data"):
        progress("data", 0, 1)
        data = normalise_data(task)
        progress("data", 1, 1)
    return data
