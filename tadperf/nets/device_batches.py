"""Training batches that the GPU makes itself, so that a CUDA graph can hold a whole training step."""

from __future__ import annotations

import torch
from torch import Tensor

from tadperf.compute.transfer import PackedCopies
from tadperf.data import augment
from tadperf.data.image_draws import ImageDraws
from tadperf.data.images import Images


class DeviceBatches:
    """The draws of some epochs on a CUDA device, and the position of the next batch in them (tadperf).

    `load` uploads draws in one copy, without a wait. `next_batch` reads the position from the device and moves it on.
    So a recorded graph makes the next batch at each replay, and a step needs no copy and no other launch.
    """

    def __init__(self, images: Images, batch: int, device: torch.device) -> None:
        """images: must take an index on the device. batch: the largest batch."""
        self._images, self._memory, self._draws = images, None, None
        self._position = torch.zeros((), dtype=torch.int64, device=device)
        self._offsets = torch.arange(batch, device=device)

    def load(self, draws: ImageDraws) -> None:
        """Uploads draws and goes to their start. Each call must bring as many as the first one: they share memory."""
        if self._memory is None:
            self._memory = PackedCopies(draws.tensors(), self._position.device)
            self._draws = draws.with_tensors(self._memory.tensors)
        else:
            self._memory.copy(draws.tensors())
        self._position.zero_()

    def next_batch(self, size: int) -> tuple[Tensor, Tensor]:
        """Returns the indices int64 [B] and the augmented images [B, C, H, W] of the next `size` draws."""
        assert self._draws is not None, "load comes first"
        index, drawn = self._draws.select(self._offsets[:size] + self._position)
        self._position += size
        return index, augment.apply(self._images[index], drawn)
