"""Training batches that the GPU makes itself, so that a CUDA graph can hold several whole training steps."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Generic, TypeVar

import torch
from torch import Tensor
from torch.utils._pytree import tree_flatten, tree_unflatten

from tadperf.compute.transfer import PackedCopies
from tadperf.data import augment
from tadperf.data.image_draws import ImageDraws
from tadperf.data.images import Images

Draws = TypeVar("Draws")
STEPS_PER_GRAPH = 8  # one launch by the CPU for so many steps; not tuned


class DeviceDraws(Generic[Draws]):
    """The draws of some epochs on a CUDA device, and the position of the next batch in them (tadperf).

    Draws are a NamedTuple, or another structure, of tensors with one row for each image. `load` uploads them in one
    copy, without a wait. `next_rows` reads the position from the device and moves it on. So a recorded graph takes the
    next batch at each replay, and a step needs no copy and no other launch.
    """

    def __init__(self, batch: int, device: torch.device) -> None:
        """batch: the largest batch."""
        self._memory: PackedCopies | None = None
        self._position = torch.zeros((), dtype=torch.int64, device=device)
        self._offsets = torch.arange(batch, device=device)

    def load(self, draws: Draws) -> None:
        """Uploads draws and goes to their start. Each call must bring as many as the first one: they share memory."""
        leaves, self._structure = tree_flatten(draws)
        tensors = [leaf for leaf in leaves if leaf is not None]
        self._present = [leaf is not None for leaf in leaves]
        if self._memory is None:
            self._memory = PackedCopies(tensors, self._position.device)
        else:
            self._memory.copy(tensors)
        self._position.zero_()

    def next_rows(self, size: int) -> Draws:
        """Returns the next `size` rows of every tensor."""
        assert self._memory is not None, "load comes first"
        rows = self._offsets[:size] + self._position
        selected = iter([tensor.index_select(0, rows) for tensor in self._memory.tensors])
        self._position += size
        return tree_unflatten([next(selected) if present else None for present in self._present], self._structure)


class DeviceBatches:
    """Augmented images on a CUDA device, batch by batch (tadperf)."""

    def __init__(self, images: Images, batch: int, device: torch.device) -> None:
        """images: must take an index on the device. batch: the largest batch."""
        self._images, self._draws = images, DeviceDraws[ImageDraws](batch, device)
        self.load = self._draws.load

    def next_batch(self, size: int) -> tuple[Tensor, Tensor]:
        """Returns the indices int64 [B] and the augmented images [B, C, H, W] of the next `size` draws."""
        index, drawn = self._draws.next_rows(size)
        return index, augment.apply(self._images[index], drawn)


def batch_sizes(count: int, batch: int) -> list[int]:
    """Returns the sizes of the batches of one epoch over `count` images."""
    return [min(batch, count - start) for start in range(0, count, batch)]


def graph_steps(sizes: Sequence[int]) -> Iterator[tuple[int, ...]]:
    """Cuts the batch sizes of consecutive steps into the sizes of each CUDA graph."""
    for start in range(0, len(sizes), STEPS_PER_GRAPH):
        yield tuple(sizes[start : start + STEPS_PER_GRAPH])
