"""Finds anomalous images, and chooses the candidates that replace them."""

from __future__ import annotations

import torch
from torch import Tensor

from tadperf.config import RefineConfig
from tadperf.kernels import diverse_pick, per_sample
from tadperf.refine.detector import DetectorOutput


def is_anomalous(logits: Tensor, labels: Tensor, beta: float) -> Tensor:
    """Returns which images are anomalous, bool [M]: predicted as another class, or confidence below beta (2507.13074).

    logits: float [M, C]; labels: int64 [M], the class that each image should show. NaN logits are anomalous.
    """
    output = per_sample(logits, labels)
    return ~((output.prediction == labels) & (output.confidence >= beta))


def confidence(logits: Tensor, labels: Tensor) -> Tensor:
    """Returns q_c, the probability of each label, float64 [...]; logits [..., C], labels int64 [...].

    Uses float64: in float32, all candidates of a confident detector round to 1 and cannot be ranked.
    """
    return logits.double().softmax(-1).gather(-1, labels.unsqueeze(-1)).squeeze(-1)


def choose(
    candidates: DetectorOutput, labels: Tensor, qualified: Tensor, qualified_labels: Tensor, config: RefineConfig
) -> Tensor:
    """Returns the index of the best candidate for each of A anomalies, int64 [A]; -1 if none is finite (2507.13074).

    candidates: logits [A, N, C] and features [A, N, D]; labels int64 [A]. qualified: features [Q, D] of the images that
    are not anomalous, with classes qualified_labels [Q]. If some candidates of an anomaly are predicted as its label,
    only those compete.
    """
    expected = labels[:, None].expand(candidates.logits.shape[:2])
    correct = candidates.logits.argmax(-1) == expected
    scores = confidence(candidates.logits, expected)
    scores = scores.masked_fill(~correct & correct.any(1, keepdim=True), -torch.inf)
    return diverse_pick(
        candidates.features, scores, qualified, labels, qualified_labels, top_k=config.top_k, weight=config.weight
    ).index


def diversity(features: Tensor, labels: Tensor) -> float:
    """Returns the mean distance between two images of one class in features [M, D], averaged over the classes.

    Classes with one image do not count. NaN if no class has two images.
    """
    means = []
    for label in labels.unique():
        points = features[labels == label].double()
        if len(points) > 1:
            means.append(torch.cdist(points, points).sum() / (len(points) * (len(points) - 1)))
    return float(torch.stack(means).mean()) if means else float("nan")
