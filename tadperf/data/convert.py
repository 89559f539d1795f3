"""Turns the arrays that users pass into tensors."""

from __future__ import annotations

import numpy as np
import torch
from numpy.typing import ArrayLike
from torch import Tensor

from tadperf.data.dataset import describe_tensor
from tadperf.errors import UserError

MAX_UNNAMED = 100_000  # classes without names; one damaged label would ask for any number of names


def as_tensor(name: str, values: Tensor | ArrayLike) -> Tensor:
    """Returns a tensor, NumPy array or list as a tensor without gradient.

    Copies only an array that PyTorch cannot share: one with negative strides, a foreign byte order or no write access.
    Raises UserError, with `name` as the field, if the values are not numbers or not rectangular.
    """
    if isinstance(values, Tensor):
        return values.detach()
    try:
        array = np.asarray(values)
    except ValueError as error:
        raise UserError(name, type(values).__name__, f"must be a rectangular array of numbers ({error})") from None
    if array.dtype.kind == "f" and array.dtype.itemsize > 8:  # PyTorch has no long double
        array = array.astype(np.float64)
    if array.dtype.kind not in "biuf":
        raise UserError(name, f"{array.dtype} {list(array.shape)}", "must be an array of numbers")
    shared = array.flags.writeable and array.dtype.isnative and min(array.strides, default=0) >= 0
    return torch.from_numpy(array if shared else array.astype(array.dtype.newbyteorder("="), order="C"))


def label_logits(labels: Tensor, probabilities: bool) -> Tensor:
    """Returns float labels as float32 logits. Probabilities [M, C] become their logarithms; 0 becomes the smallest one.

    Raises UserError if probabilities are negative or do not sum to 1.
    """
    if labels.ndim != 2:
        raise UserError("labels", describe_tensor(labels), "must be int64 [M], or float [M, C] for soft labels")
    if not probabilities:
        return labels.float()
    sums = labels.double().sum(-1)
    if not len(labels) or not (sums - 1).abs().max() < 1e-3 or labels.min() < 0:
        total = float(sums.flatten()[0]) if sums.numel() else 0.0
        raise UserError("labels", f"the first row sums to {total:.4g}", "probabilities must be at least 0 and sum to 1")
    return labels.double().clamp_min(torch.finfo(torch.float32).tiny).log().float()


def number_names(labels: Tensor) -> tuple[str, ...]:
    """Returns "0", "1", ... for the classes that labels [M] or [M, C] tell. Raises UserError for an absurd label."""
    count = labels.shape[1] if labels.ndim == 2 else int(labels.max()) + 1 if labels.numel() else 0
    if count > MAX_UNNAMED:
        raise UserError("labels", count - 1, f"is above {MAX_UNNAMED}; give class_names for this many classes")
    return tuple(map(str, range(max(1, count))))
