"""Joins what a user knows with what the proxies have learned: further probabilities and further features."""

from __future__ import annotations

import torch
from torch import Tensor

from tadperf.data.dataset import describe_tensor
from tadperf.trust.probe import pool
from tadperf.trust.proxies import MAX_FEATURES, ProxyOutputs, compact_features

MIN_PROBABILITY = 1e-3  # smaller probabilities are raised to this one; not tuned


def join_signals(
    outputs: ProxyOutputs, labels: Tensor, evidence: tuple[Tensor, ...], features: Tensor | None, seed: int
) -> ProxyOutputs:
    """Returns the proxies' outputs with further sources in them (tadperf). Without any, returns `outputs`.

    evidence: probabilities [N, C] of each source, out of fold. They are averaged with the proxies' probabilities, and
    the weights predict the given labels best (`pool`). The losses are then those of the average. features: finite
    floats [N, D]; centred, reduced to MAX_FEATURES by a random projection (`seed`), and scaled to the length of the
    proxies' features, so that both have the same weight in a cosine. labels: int64 [N], as given.
    Raises ValueError if a shape does not fit.
    """
    count, classes = outputs.probabilities.shape
    device = outputs.losses.device
    for number, source in enumerate(evidence):
        if source.shape != (count, classes):
            raise ValueError(f"evidence: {describe_tensor(source)} of source {number}: must be [{count}, {classes}]")
    if evidence:
        sources = [source.to(device, torch.float32) for source in evidence]
        probabilities = pool([outputs.probabilities, *sources], labels)
        outputs = ProxyOutputs(label_loss(probabilities, labels), probabilities, outputs.features)
    if features is None:
        return outputs
    if features.ndim != 2 or len(features) != count:
        raise ValueError(f"features: {describe_tensor(features)}: must be [{count}, D]")
    length = outputs.features.norm(dim=1).mean()
    joined = compact_features(features.to(device).float(), MAX_FEATURES, seed) * length
    return outputs._replace(features=torch.cat([outputs.features, joined], 1))


def label_loss(probabilities: Tensor, labels: Tensor) -> Tensor:
    """Returns the cross-entropy of each label [N], clipped at log 1000: outliers must not form a mixture component."""
    return -probabilities.gather(1, labels.unsqueeze(1)).squeeze(1).clamp(min=MIN_PROBABILITY).log()
