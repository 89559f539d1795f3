"""Which generated images are anomalous, and which candidates take their places."""

from __future__ import annotations

import torch
from torch import Tensor

from tadperf.config import RefineConfig
from tadperf.kernels import diverse_pick, per_sample
from tadperf.refine.detector import DetectorOutput


def anomalous(logits: Tensor, labels: Tensor, beta: float) -> Tensor:
    """bool [M]: whether the detector takes the image for another class, or has less confidence than beta (2507.13074).

    logits: float [M, C]; labels: int64 [M], the class each image is meant to show. Logits with NaN are anomalous.
    """
    said = per_sample(logits, labels)
    return ~((said.prediction == labels) & (said.confidence >= beta))


def confidence(logits: Tensor, labels: Tensor) -> Tensor:
    """q_c float64 [...]: the probability of the wanted class; logits [..., C], labels int64 [...].

    In float64, since in float32 the candidates of a sure detector all stand at 1 and have no order.
    """
    return logits.double().softmax(-1).gather(-1, labels.unsqueeze(-1)).squeeze(-1)


def choose(
    candidates: DetectorOutput, labels: Tensor, qualified: Tensor, qualified_labels: Tensor, config: RefineConfig
) -> Tensor:
    """The winner's place among the candidates of each anomaly, int64 [A]; -1 where none is finite (2507.13074).

    candidates: logits [A, N, C] and features [A, N, D]; labels int64 [A]. qualified: features [Q, D] of the images that
    are not anomalous, of classes qualified_labels [Q]. Only candidates of the right label compete, where there is one.
    """
    wanted = labels[:, None].expand(candidates.logits.shape[:2])
    right = candidates.logits.argmax(-1) == wanted
    scores = confidence(candidates.logits, wanted)
    scores = scores.masked_fill(~right & right.any(1, keepdim=True), -torch.inf)
    return diverse_pick(
        candidates.features, scores, qualified, labels, qualified_labels, top_k=config.top_k, weight=config.weight
    ).index


def diversity(features: Tensor, labels: Tensor) -> float:
    """Mean distance of two images of a class in features [M, D], over the classes with two or more; NaN without any."""
    means = []
    for label in labels.unique():
        own = features[labels == label].double()
        if len(own) > 1:
            means.append(torch.cdist(own, own).sum() / (len(own) * (len(own) - 1)))
    return float(torch.stack(means).mean()) if means else float("nan")
