"""Further sources of the dual loop that a user brings: probabilities and features of the samples."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from tadperf.data.dataset import describe_tensor
from tadperf.trust.proxies import MAX_FEATURES, ProxyOutputs, compact_features
from tadperf.trust.top_classes import Probabilities, dense_rows

MIN_PROBABILITY = 1e-3  # smaller probabilities are raised to this one; not tuned
MAX_PARTITION_LOSS = -math.log(MIN_PROBABILITY)  # nats


def check_evidence(evidence: tuple[Probabilities, ...], count: int, classes: int, device: torch.device) -> list[Tensor]:
    """Returns the probabilities [N, C] of each source, float32 on the device. Raises ValueError for a wrong shape."""
    check_shapes(evidence, count, classes)
    return [dense_rows(source, slice(None)).to(device, torch.float32) for source in evidence]


def check_shapes(evidence: tuple[Probabilities, ...], count: int, classes: int) -> None:
    """Raises ValueError if a source has a wrong shape."""
    for number, source in enumerate(evidence):
        if tuple(source.shape) != (count, classes):
            name = describe_tensor(source) if isinstance(source, Tensor) else str(list(source.shape))
            raise ValueError(f"evidence: {name} of source {number}: must be [{count}, {classes}]")


def join_features(outputs: ProxyOutputs, features: Tensor | None, seed: int) -> ProxyOutputs:
    """Returns the proxies' outputs with further features beside theirs (tadperf). With None, returns `outputs`.

    features: finite floats [N, D]; centred, reduced to MAX_FEATURES by a random projection (`seed`), and scaled to the
    length of the proxies' features, so that both have the same weight in a cosine. Raises ValueError for a wrong shape.
    """
    if features is None:
        return outputs
    count = len(outputs.features)
    if features.ndim != 2 or len(features) != count:
        raise ValueError(f"features: {describe_tensor(features)}: must be [{count}, D]")
    length = outputs.features.norm(dim=1).mean()
    joined = compact_features(features.to(outputs.features.device).float(), MAX_FEATURES, seed) * length
    return outputs._replace(features=torch.cat([outputs.features, joined], 1))


def label_loss(probabilities: Tensor, labels: Tensor) -> Tensor:
    """Returns the cross-entropy of each label [N], clipped at log 1000: outliers must not form a mixture component."""
    return -probabilities.gather(1, labels.unsqueeze(1)).squeeze(1).clamp(min=MIN_PROBABILITY).log()
