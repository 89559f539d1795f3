"""Builds the result of a run, the content of result.json."""

from __future__ import annotations

from typing import Any

from tadperf import files
from tadperf.artifact import DistilledSet
from tadperf.compute.device import describe_device
from tadperf.nets.students import summarise
from tadperf.pipeline.context import RunContext
from tadperf.pipeline.ladder import ladder
from tadperf.pipeline.scoring import BASELINES
from tadperf.run.folder import read_json
from tadperf.trust.metrics import round_metrics

REFINED = "refined.json"  # the report of refinement
REPORT = "report.html"
REFINE_FILES = {"refined": "refined.png", "gradcam": "gradcam.png"}
TRUST_FILES = {"labels": "labels.csv", "trust": "trust.png"}


def trust_report(context: RunContext) -> dict[str, Any]:
    """Describes the selected samples. `coverage` is their share of all samples.

    If clean labels are known, they measure the selected labels and the rounds.
    """
    train, selection, mode = context.task.train, context.selection, context.task.config.trust.mode
    clean = train.clean_labels
    return {
        "mode": mode,
        "used_clean_labels": mode == "oracle",
        "samples": len(selection.index),
        "coverage": len(selection.index) / len(train),
        "label_accuracy": None
        if clean is None
        else float((selection.labels == clean[selection.index]).double().mean()),
        "rounds": files.to_json_value(round_metrics(context.rounds, clean)),
    }


def build_result(context: RunContext, distilled: DistilledSet, scores: dict[str, list[float]]) -> dict[str, Any]:
    """Returns the content of result.json. scores: test accuracies by row of the report."""
    task, run = context.task, context.run
    config, train, stages = task.config, task.train, run.stages()
    refinement = {}
    if config.synthesis != "matching":
        remedy = "delete it, then use --resume to write it again"
        refinement = {"refine": read_json(run.path / REFINED, remedy)}
    return {
        "data": {
            **distilled.data,
            "train": len(train),
            "test": len(task.test),
            "classes": train.num_classes,
            "shape": list(train.shape),
            "noise": config.data.noise,
        },
        "ipc": config.match.ipc,
        **({"factor": config.match.factor} if config.match.factor > 1 else {}),
        "seed": config.seed,
        "synthesis": config.synthesis,
        "method": config.match.method,
        "trust": trust_report(context),
        **refinement,
        "accuracy": {row: summarise(runs) for row, runs in scores.items() if row not in BASELINES},
        "baselines": {row: summarise(scores[row]) for row in BASELINES if row in scores},
        "ladder": ladder(scores, config.net.name),
        "lr": distilled.lr,
        "stages": stages,
        "seconds": sum(stage["seconds"] for stage in stages.values()),
        "device": describe_device(task.device),
        "paths": _paths(context),
    }


def _paths(context: RunContext) -> dict[str, str]:
    names = {"distilled": "distilled.safetensors", "report": REPORT, "grid": "grid.png", "metrics": "metrics.jsonl"}
    if context.rounds:
        names |= TRUST_FILES
    if context.task.config.synthesis != "matching":
        names |= REFINE_FILES
    folder = context.run.path
    return {"run": str(folder), **{name: str(folder / file) for name, file in names.items()}}
