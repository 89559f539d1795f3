"""The stages data and trust: selects the samples that a run learns from, and their labels."""

from __future__ import annotations

import math
from pathlib import Path

import torch

from tadperf.compute.work_progress import reporting
from tadperf.data.normalise import normalise_work
from tadperf.nets.problem import Problem
from tadperf.progress import Progress
from tadperf.refine.start import starting_trust
from tadperf.report.drawing import save_safely
from tadperf.report.trust_growth import save_trust_growth
from tadperf.run.folder import Run
from tadperf.task.samples import NormalisedData, SampleSelection, normalise_data, select_samples
from tadperf.task.task import Task
from tadperf.trust.evidence import loop_signals, open_evidence
from tadperf.trust.loop import dual_loop
from tadperf.trust.metrics import round_metrics
from tadperf.trust.state import RECALLED, TRUSTED, TrustState


def load_data(task: Task, run: Run, progress: Progress) -> NormalisedData:
    """The stage "data": normalises the images."""
    with run.stage("data"):
        progress("data", 0, 1)
        train, test, kind = task.train, task.test, task.config.data.normalise
        total = normalise_work(kind, len(train), len(test), math.prod(train.shape))
        with reporting(progress, "data:normalise", total):
            data = normalise_data(task)
        progress("data", 1, 1)
    return data


def trusted_samples(
    task: Task, data: NormalisedData, run: Run, progress: Progress
) -> tuple[SampleSelection, list[TrustState]]:
    """Selects the samples as trust.mode says. Returns the selection and the rounds of the dual loop.

    on: the samples that the dual loop trusts. off: all samples under their given labels. oracle: all samples under
    their clean labels. The modes off and oracle have no rounds.
    """
    train, mode = task.train, task.config.trust.mode
    if mode == "on":
        rounds = find_trusted(task, data, run, progress)
        index, labels, weights = rounds[-1].view()
        verdict = rounds[-1].verdict[index]
        confirmed = (verdict == TRUSTED) | (verdict == RECALLED)
        return select_samples(task, index, labels, weights, confirmed), rounds
    labels = train.clean_labels if mode == "oracle" else train.labels
    assert labels is not None
    return select_samples(task, torch.arange(len(train)), labels), []


def find_trusted(task: Task, data: NormalisedData, run: Run, progress: Progress) -> list[TrustState]:
    """The stage "trust": runs the dual loop and returns its rounds. A resumed run reads the finished rounds.

    With refine.start it returns the trust state of that run instead.
    """
    config, train, stopped = task.config, task.train, None
    with run.stage("trust"):
        if config.refine.start and config.synthesis != "matching":
            rounds = [starting_trust(Path(config.refine.start), train)]
        else:
            names, augment = train.class_names, config.data.augment
            problem = Problem(data.train, train.labels, names, config.net, augment, config.seed, task.device)
            evidence = open_evidence(config.trust, train, task.device, progress)
            signals = loop_signals(evidence, train.labels, train.num_classes, progress)
            _, rounds, stopped = dual_loop(
                problem, config.trust, run.path / "trust", progress, evidence=signals[0], features=signals[1]
            )
        rounds[-1].save(run.path / "trust.safetensors")
        rounds[-1].export(run.path / "labels.csv", train.file_names)
        save_safely(save_trust_growth, run.path / "trust.png", rounds)
        run.rewind("trust", 0)
        records = round_metrics(rounds, train.clean_labels)
        if stopped is not None:
            records[-1]["stopped"] = stopped
        for record in records:
            run.log("trust", record.pop("round"), **record)
    return rounds
