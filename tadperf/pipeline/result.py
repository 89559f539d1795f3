"""The result of a run: what result.json holds."""

from __future__ import annotations

import json
from collections.abc import Sequence
from typing import Any

from tadperf import files
from tadperf.artifact import DistilledSet
from tadperf.compute.device import describe_device
from tadperf.nets.students import summarise
from tadperf.pipeline.scoring import BASELINES
from tadperf.run.folder import Run
from tadperf.task.samples import SampleSelection
from tadperf.task.task import Task
from tadperf.trust.metrics import round_metrics
from tadperf.trust.state import TrustState

REFINED = "refined.json"  # what refinement says of itself
REFINE_FILES = {"refined": "refined.png", "gradcam": "gradcam.png"}
TRUST_FILES = {"labels": "labels.csv", "trust": "trust.png"}


def trust_report(task: Task, samples: SampleSelection, rounds: Sequence[TrustState]) -> dict[str, Any]:
    """What was learned from: `coverage` is its share of all samples; clean labels, where known, measure it only."""
    clean, mode = task.train.clean_labels, task.config.trust.mode
    right = None if clean is None else float((samples.labels == clean[samples.index]).double().mean())
    return {
        "mode": mode,
        "used_clean_labels": mode == "oracle",
        "samples": len(samples.index),
        "coverage": len(samples.index) / len(task.train),
        "label_accuracy": right,
        "rounds": files.to_json_value(round_metrics(rounds, clean)),
    }


def build_result(
    task: Task, distilled: DistilledSet, scores: dict[str, list[float]], run: Run, trust: dict[str, Any]
) -> dict[str, Any]:
    """What a run says at its end: result.json, and the JSON of the command line."""
    config, stages = task.config, run.stages()
    baselines = {row: summarise(scores[row]) for row in BASELINES if row in scores}
    made = json.loads((run.path / REFINED).read_bytes()) if config.synthesis != "matching" else None
    return {
        "data": {
            **distilled.data,
            "train": len(task.train),
            "test": len(task.test),
            "classes": task.train.num_classes,
            "shape": list(task.train.shape),
            "noise": config.data.noise,
        },
        "ipc": config.match.ipc,
        "seed": config.seed,
        "synthesis": config.synthesis,
        "method": config.match.method,
        "trust": trust,
        **({"refine": made} if made else {}),
        "accuracy": {row: summarise(runs_) for row, runs_ in scores.items() if row not in baselines},
        "baselines": baselines,
        "lr": distilled.lr,
        "stages": stages,
        "seconds": sum(stage["seconds"] for stage in stages.values()),
        "device": describe_device(task.device),
        "paths": {
            "run": str(run.path),
            "distilled": str(run.path / "distilled.safetensors"),
            "grid": str(run.path / "grid.png"),
            "metrics": str(run.path / "metrics.jsonl"),
            **{name: str(run.path / file) for name, file in TRUST_FILES.items() if trust["rounds"]},
            **{name: str(run.path / file) for name, file in REFINE_FILES.items() if config.synthesis != "matching"},
        },
    }
