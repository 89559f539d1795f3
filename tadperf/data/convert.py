"""Turns the arrays that users pass into tensors."""

from __future__ import annotations

import numpy as np
import torch
from numpy.typing import ArrayLike
from torch import Tensor

from tadperf.errors import UserError


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
