"""Measures the effect of each part of the dual loop.

Run `python -m tadperf.bench.studies.trust --noise asymmetric:0.4 --seeds 5`. It uses the digits with added noise and
the preset's ConvNet. Rows: the complete loop, and the loop without one part. Columns: the final state compared with the
true labels, as mean and sample deviation over the seeds. average precision: how well the score finds wrong labels.
accuracy: test accuracy of a network trained on the trusted samples with their weights.
"""

from __future__ import annotations

import argparse
import math
import statistics
import time
from collections.abc import Sequence
from datetime import date
from pathlib import Path
from typing import Any

import torch
from sklearn.metrics import average_precision_score

from tadperf import files
from tadperf.compute.versions import versions
from tadperf.compute.workers import available_cores
from tadperf.config import Config
from tadperf.config.merge import merge
from tadperf.data.dataset import Dataset
from tadperf.data.images import normalise_images
from tadperf.data.noise import add_noise
from tadperf.data.normalise import fit_normaliser
from tadperf.data.open import open_data
from tadperf.nets.problem import Problem
from tadperf.nets.students import Examples, train_student
from tadperf.nets.training import Recipe, accuracy
from tadperf.pipeline.scoring import equal_steps
from tadperf.trust.loop import dual_loop
from tadperf.trust.metrics import compare_with_clean
from tadperf.trust.state import TrustState

ROWS: dict[str, dict[str, Any]] = {
    "full": {},
    "all classes in one mixture": {"class_wise": False},
    "threshold 0.5": {"dynamic_threshold": False},
    "no recall": {"recall": False},
    "no relabel": {"relabel": False},
    "with consistency 1": {"consistency": 1.0},
    "no neighbours": {"graph": False},
    "no transition matrix": {"transition": False},
    "proxies judge what they learned": {"held_out": False},
    "no mixup": {"mixup": False},
    "no memory in the score": {"memory": False},
    "one round": {"rounds": 1},
}
# These rows are also measured without the neighbours, which can hide the effect of the other parts.
ALONE = {
    "all classes in one mixture",
    "threshold 0.5",
    "no recall",
    "no relabel",
    "with consistency 1",
    "proxies judge what they learned",
    "no mixup",
    "one round",
}
ROWS |= {f"no neighbours, {row}": {"graph": False, **parts} for row, parts in ROWS.items() if row in ALONE}
FIGURES = (
    "view_accuracy",
    "coverage",
    "precision",
    "recall",
    "recalled_accuracy",
    "relabel_accuracy",
    "average_precision",
    "accuracy",
    "seconds",
)


def run_dual_loop(data: Dataset, config: Config) -> tuple[TrustState, float]:
    """Runs the dual loop. Returns its final state and the seconds that it took."""
    begun = time.perf_counter()
    images = normalise_images(fit_normaliser(data.images, config.data.normalise), data.images)
    device = torch.device("cpu")
    problem = Problem(images, data.labels, data.class_names, config.net, config.data.augment, config.seed, device)
    state = dual_loop(problem, config.trust).state
    return state, time.perf_counter() - begun


def student_accuracy(state: TrustState, train: Dataset, test: Dataset, config: Config) -> float:
    """Returns the test accuracy of a network that learns the trusted samples, with their weights.

    It uses the recipe of the baseline "full_trusted" of a run.
    """
    normaliser, view, e = fit_normaliser(train.images, config.data.normalise), state.view(), config.evaluate
    epochs = equal_steps(e.full_epochs, len(train), len(view.index))
    recipe = Recipe(epochs, e.batch, e.real_lr, e.momentum, e.weight_decay, config.data.augment)
    images = normalise_images(normaliser, train.images)[view.index]
    device = torch.device("cpu")
    examples = Examples(images, view.labels, view.weights)
    network = train_student(examples, train.num_classes, config.net, recipe, config.seed, device)
    return accuracy(network, normalise_images(normaliser, test.images), test.labels)


def run_variant(noise: str, seed: int, parts: dict[str, Any]) -> dict[str, float]:
    """Returns the figures of one run."""
    options = {"data.noise": noise, "seed": seed, **{f"trust.{name}": value for name, value in parts.items()}}
    config = merge("digits", options=options)
    train, test = open_data("digits")
    assert test is not None
    train = add_noise(train, noise, seed)
    clean = train.labels if train.clean_labels is None else train.clean_labels
    state, seconds = run_dual_loop(train, config)
    wrong = train.labels != clean
    return {
        **compare_with_clean(state, clean),
        "average_precision": float(average_precision_score(wrong, state.score)) if wrong.any() else math.nan,
        "accuracy": student_accuracy(state, train, test, config),
        "seconds": seconds,
    }


def summary(values: Sequence[float]) -> str:
    """Returns mean and sample deviation of the known values."""
    known = [value for value in values if not math.isnan(value)]
    if not known:
        return ""
    deviation = statistics.stdev(known) if len(known) > 1 else 0.0
    return f"{statistics.fmean(known):.3f} ± {deviation:.3f}"


def table(results: dict[str, list[dict[str, float]]]) -> str:
    """Returns the figures as Markdown, a row for each variant."""
    lines = [f"| | {' | '.join(name.replace('_', ' ') for name in FIGURES)} |", f"|{' --- |' * (len(FIGURES) + 1)}"]
    for row, runs in results.items():
        lines.append(f"| {row} | {' | '.join(summary([run[name] for run in runs]) for name in FIGURES)} |")
    return "\n".join(lines)


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--noise", nargs="+", default=["asymmetric:0.4"])
    parser.add_argument("--seeds", type=int, default=5)
    parser.add_argument("--rows", nargs="+", choices=list(ROWS), default=list(ROWS))
    parser.add_argument("--out", type=Path, help="folder for trust-<noise>.md and .json")
    options = parser.parse_args(arguments)
    torch.set_num_threads(1)
    for noise in options.noise:
        results: dict[str, list[dict[str, float]]] = {}
        head = f"digits, {noise}, seeds 0 to {options.seeds - 1}, {available_cores()} cores, {date.today()}"
        text = ""
        for row in options.rows:
            results[row] = [run_variant(noise, seed, ROWS[row]) for seed in range(options.seeds)]
            text = f"{head}\n\n{table(results)}\n"
            if options.out:  # after every row, so that an interrupted study keeps its finished rows
                name = options.out / f"trust-{noise.replace(':', '-')}"
                files.write_bytes(name.with_suffix(".md"), text.encode())
                files.write_json(name.with_suffix(".json"), {"what": head, "versions": versions(), "runs": results})
        print(text, flush=True)


if __name__ == "__main__":
    main()
