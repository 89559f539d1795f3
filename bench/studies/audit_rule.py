"""Compares the issues of `find_label_issues` with the likeliest class and with cleanlab, on data of scikit-learn.

Run `python -m tadperf.bench.studies.audit_rule [--seeds N]`. Uses cleanlab if it is installed. Labels get symmetric
noise (any other class) or asymmetric noise (the next class). Probabilities are held out (3 folds).
"""

from __future__ import annotations

import argparse
from collections.abc import Iterator, Sequence

import numpy as np
from sklearn.datasets import load_digits, make_classification
from sklearn.ensemble import RandomForestClassifier
from sklearn.linear_model import LogisticRegression
from sklearn.metrics import average_precision_score, f1_score
from sklearn.model_selection import StratifiedKFold, cross_val_predict
from sklearn.neighbors import KNeighborsClassifier
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import StandardScaler

from tadperf.trust import find_label_issues, label_quality_scores

NOISE = (("symmetric", 0.02), ("symmetric", 0.1), ("symmetric", 0.3), ("asymmetric", 0.2), ("asymmetric", 0.4))
MODELS = {
    "logistic": lambda: make_pipeline(StandardScaler(), LogisticRegression(max_iter=300)),
    "forest": lambda: RandomForestClassifier(60, n_jobs=1, random_state=0),
    "neighbours": lambda: KNeighborsClassifier(10),
}


def data_sets() -> Iterator[tuple[str, np.ndarray, np.ndarray]]:
    """Yields a name, features [N, D] and clean classes [N]."""
    pixels, digits = load_digits(return_X_y=True)
    yield "digits", np.asarray(pixels), np.asarray(digits)
    options = {"n_features": 20, "n_informative": 10, "n_clusters_per_class": 1, "class_sep": 1.5, "flip_y": 0}
    features, clean = make_classification(2000, n_classes=5, random_state=0, **options)
    yield "five classes", np.asarray(features), np.asarray(clean)
    weights = [0.7, 0.2, 0.07, 0.03]
    features, clean = make_classification(2000, n_classes=4, weights=weights, random_state=0, **options)
    yield "imbalanced", np.asarray(features), np.asarray(clean)


def add_noise(clean: np.ndarray, kind: str, rate: float, rng: np.random.Generator) -> np.ndarray:
    """Returns labels [N] of which a share `rate` is wrong."""
    classes = int(clean.max()) + 1
    shift = rng.integers(1, classes, len(clean)) if kind == "symmetric" else 1
    return np.where(rng.random(len(clean)) < rate, (clean + shift) % classes, clean)


def figures(labels: np.ndarray, p: np.ndarray, features: np.ndarray, wrong: np.ndarray) -> list[float]:
    """Returns F1 of tadperf, tadperf with features, the likeliest class and cleanlab; then AP of tadperf, cleanlab."""
    masks = [find_label_issues(labels, p), find_label_issues(labels, p, features), p.argmax(1) != labels]
    scores = [label_quality_scores(labels, p)]
    try:
        from cleanlab.filter import find_label_issues as peer  # pyright: ignore[reportMissingImports]
        from cleanlab.rank import get_label_quality_scores  # pyright: ignore[reportMissingImports]

        peer_mask, peer_score = peer(labels, p, n_jobs=1), get_label_quality_scores(labels, p)
    except ImportError:
        peer_mask, peer_score = np.zeros_like(wrong), np.zeros(len(wrong))
    return [
        *(float(f1_score(wrong, mask)) for mask in (*masks, peer_mask)),
        *(float(average_precision_score(wrong, -score)) for score in (*scores, peer_score)),
    ]


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--seeds", type=int, default=1)
    options = parser.parse_args(arguments)
    print("| data | noise | model | F1 tadperf | with features | likeliest class | cleanlab | AP tadperf | cleanlab |")
    print("| --- | --- | --- | --- | --- | --- | --- | --- | --- |")
    rows = []
    for name, features, clean in data_sets():
        for kind, rate in NOISE:
            for model, make in MODELS.items():
                runs = []
                for seed in range(options.seeds):
                    labels = add_noise(clean, kind, rate, np.random.default_rng(seed))
                    folds = StratifiedKFold(3, shuffle=True, random_state=seed)
                    p = np.asarray(cross_val_predict(make(), features, labels, cv=folds, method="predict_proba"))
                    runs.append(figures(labels, p, features, labels != clean))
                rows.append(np.mean(runs, 0))
                print(f"| {name} | {kind} {rate} | {model} | {' | '.join(f'{v:.3f}' for v in rows[-1])} |", flush=True)
    print(f"| mean | | | {' | '.join(f'{v:.3f}' for v in np.mean(rows, 0))} |")


if __name__ == "__main__":
    main()
