"""The images that training steps read, in their order, with the augmentation of each one."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from tadperf.compute.transfer import upload
from tadperf.data.augment import Draw


class ImageDraws(NamedTuple):
    """The indices of K images in their order, int64 [K], and the drawn augmentation of each one."""

    order: Tensor
    drawn: Draw

    def tensors(self) -> list[Tensor]:
        """Returns the indices and the fields of the augmentation that are not None."""
        return [self.order, *(field for field in self.drawn if field is not None)]

    def with_tensors(self, tensors: Sequence[Tensor]) -> ImageDraws:
        """Returns the draws with other values, in the order of `tensors`."""
        order, *fields = tensors
        values = iter(fields)
        return ImageDraws(order, Draw(*(None if field is None else next(values) for field in self.drawn)))

    def to(self, device: torch.device) -> ImageDraws:
        """Returns the draws on a device. To CUDA they travel in one copy, and the CPU does not wait for it."""
        return upload(self, device)

    def select(self, rows: Tensor) -> ImageDraws:
        """Returns the draws at `rows` (int64 [B])."""
        return self.with_tensors([tensor.index_select(0, rows) for tensor in self.tensors()])

    def split(self, sizes: Sequence[int]) -> list[ImageDraws]:
        """Cuts the draws into parts of these sizes, which must sum to K."""
        parts = zip(*(tensor.split(list(sizes)) for tensor in self.tensors()), strict=True)
        return [self.with_tensors(part) for part in parts]
