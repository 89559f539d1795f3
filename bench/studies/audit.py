"""Compares the search for wrong labels with cleanlab.

Run `python -m tadperf.bench.studies.audit [--data DATA --labels FILE:KEY --samples N]`.

Without --data it measures the time and the F1 of `find_label_issues` and of cleanlab on the probabilities of simulated
classifiers; both take turns. With --data it runs the dual loop on real images with known clean labels. It then prints,
for each round, the average precision (area under the precision-recall curve) of tadperf's score and of cleanlab's three
scores from the same held-out probabilities.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Iterator, Sequence
from dataclasses import replace
from datetime import date

import numpy as np
import torch
from sklearn.metrics import average_precision_score, f1_score

from tadperf import seeds
from tadperf.bench.operators.engine import interleaved, threads
from tadperf.config import Config
from tadperf.config.merge import merge
from tadperf.data.dataset import Dataset
from tadperf.data.images import normalise_images
from tadperf.data.noise import add_noise
from tadperf.data.normalise import fit_normaliser
from tadperf.data.open import open_data
from tadperf.data.pick import pick_real
from tadperf.nets.problem import Problem
from tadperf.progress import silent
from tadperf.trust.label_issues import find_label_issues
from tadperf.trust.metrics import compare_with_clean
from tadperf.trust.proxies import ProxyOutputs, train_proxies
from tadperf.trust.quality import METHODS
from tadperf.trust.state import TrustState, as_given
from tadperf.trust.verdicts import assign_verdicts

RANKINGS = METHODS[1:]  # cleanlab's scores
SIZES = ((50_000, 10), (50_000, 100), (20_000, 1000))


def simulate(count: int, classes: int, seed: int = 0) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Returns labels (30 % wrong), probabilities of a mostly correct classifier, and a mask of the errors."""
    rng = np.random.default_rng(seed)
    clean, wrong = rng.integers(0, classes, count), rng.random(count) < 0.3
    labels = np.where(wrong, (clean + 1) % classes, clean)
    logits = 1.5 * rng.normal(size=(count, classes)).astype(np.float32)
    logits[np.arange(count), clean] += 4
    p = np.exp(logits - logits.max(1, keepdims=True))
    return labels, p / p.sum(1, keepdims=True), wrong


def speed(repeats: int) -> list[str]:
    """Returns Markdown rows: milliseconds with quantiles, and F1 of the suspected label errors."""
    from cleanlab.filter import find_label_issues as peer  # pyright: ignore[reportMissingImports]

    lines = ["| size | | ms, median (20 %, 80 %) | cleanlab / tadperf | F1 |", "| --- | --- | --- | --- | --- |"]
    for count, classes in SIZES:
        labels, p, wrong = simulate(count, classes)
        functions = {
            "tadperf": lambda y=labels, p=p: find_label_issues(y, p),
            "cleanlab": lambda y=labels, p=p: peer(y, p),
            "cleanlab, one process": lambda y=labels, p=p: peer(y, p, n_jobs=1),
        }
        times = interleaved(functions, repeats)
        ours = float(np.median(times["tadperf"]))
        for name, function in functions.items():
            low, median, high = np.quantile(times[name], (0.2, 0.5, 0.8))
            figures = f"{median:.1f} ({low:.1f}, {high:.1f}) | {median / ours:.1f} | {f1_score(wrong, function()):.3f}"
            lines.append(f"| {count} x {classes} | {name} | {figures} |")
    return lines


def dual_loop_rounds(data: Dataset, config: Config) -> Iterator[tuple[ProxyOutputs, TrustState]]:
    """Yields the outputs of the proxies and the state after each round of the dual loop."""
    images = normalise_images(fit_normaliser(data.images, config.data.normalise), data.images)
    problem = Problem(
        images, data.labels, data.class_names, config.net, config.data.augment, config.seed, torch.device("cpu")
    )
    state = as_given(data.labels, data.class_names)
    for number in range(1, config.trust.rounds + 1):
        seed = seeds.derive(config.seed, "trust", number)
        outputs = train_proxies(replace(problem, seed=seed), state.view(), config.trust, silent)
        state = assign_verdicts(outputs, state, number, config.trust, seed)
        yield outputs, state


def cleanlab_precision(labels: np.ndarray, probabilities: np.ndarray, wrong: np.ndarray) -> dict[str, float]:
    """Returns the average precision of cleanlab's scores by name."""
    from cleanlab.rank import get_label_quality_scores  # pyright: ignore[reportMissingImports]

    p = probabilities / probabilities.sum(1, keepdims=True)
    return {
        name: float(average_precision_score(wrong, 1 - get_label_quality_scores(labels, p, method=name)))
        for name in RANKINGS
    }


def quality(data: Dataset, config: Config) -> list[str]:
    """Returns Markdown rows, one for each round, and prints each row after its round."""
    assert data.clean_labels is not None, "measuring needs the clean labels"
    wrong, labels = (data.labels != data.clean_labels).numpy(), data.labels.numpy()
    lines = [
        "| round | tadperf | cleanlab: " + " | ".join(RANKINGS) + " | correct among kept | labels kept | seconds |",
        "|" + " --- |" * (len(RANKINGS) + 5),
    ]
    begun = time.perf_counter()
    for number, (outputs, state) in enumerate(dual_loop_rounds(data, config), 1):
        assert isinstance(outputs.probabilities, torch.Tensor), "the data of this study are small"
        precision = cleanlab_precision(labels, outputs.probabilities.double().numpy(), wrong)
        figures = compare_with_clean(state, data.clean_labels)
        cells = [
            str(number),
            f"{average_precision_score(wrong, state.score.numpy()):.3f}",
            *(f"{value:.3f}" for value in precision.values()),
            f"{figures['view_accuracy']:.3f}",
            f"{figures['coverage']:.3f}",
            f"{time.perf_counter() - begun:.0f}",
        ]
        lines.append(f"| {' | '.join(cells)} |")
        print(lines[-1], flush=True)
    return lines


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--data")
    parser.add_argument("--labels", help="labels to use instead, as for tadperf distill")
    parser.add_argument("--noise", default="none")
    parser.add_argument("--samples", type=int, help="number of samples, the same from each given class")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--repeats", type=int, default=11)
    parser.add_argument("--set", action="append", default=[], dest="sets", metavar="A.B=C")
    options = parser.parse_args(arguments)
    with threads(None) as count:
        print(f"{count} threads, torch {torch.__version__}, {date.today()}")
        if options.data is None:
            print("\n".join(speed(options.repeats)))
            return
        given = {"data.path": options.data, "data.noise": options.noise, "seed": options.seed}
        config = merge(sets=options.sets, options=given)
        train, _ = open_data(options.data, labels=options.labels)
        train = add_noise(train, options.noise, options.seed)
        if options.samples:
            each = options.samples // train.num_classes
            generator = seeds.generator(options.seed, "samples")
            train = train.subset(pick_real(train.labels, each, generator).sort().values)
        print(f"{len(train)} samples of {train.name}")
        print("\n".join(quality(train, config)))


if __name__ == "__main__":
    main()
