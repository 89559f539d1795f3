"""Training batches that the GPU makes itself, so that a CUDA graph can hold several whole training steps."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from itertools import accumulate
from typing import Generic, NamedTuple, TypeVar

import torch
from torch import Tensor
from torch.utils._pytree import tree_flatten, tree_unflatten

from tadperf.compute.transfer import ALIGNMENT, PackedCopies, upload_all
from tadperf.data import augment
from tadperf.data.image_draws import ImageDraws
from tadperf.data.images import Images

Draws = TypeVar("Draws")
STEPS_PER_GRAPH = 8  # one launch by the CPU for so many steps; not tuned


class Field(NamedTuple):
    """One tensor of the draws: its place in their memory and the words (4 bytes) of a row."""

    start: int
    words: int
    dtype: torch.dtype
    shape: torch.Size  # of a row


class DeviceDraws(Generic[Draws]):
    """The draws of some epochs on a CUDA device, and the position of the next batch in them (tadperf).

    Draws are a NamedTuple, or another structure, of tensors with one row of 4- or 8-byte values for each image. `load`
    uploads them in one copy, without a wait. `next_rows` reads the position from the device and moves it on. So a
    recorded graph takes the next batch at each replay, and a step needs no copy and no other launch.
    """

    def __init__(self, device: torch.device) -> None:
        self._position = torch.zeros((), dtype=torch.int64, device=device)
        self._memory: PackedCopies | None = None  # the words of all tensors, one tensor after the other
        self._words: dict[int, tuple[Tensor, Tensor]] = {}  # of a batch, by its size; recorded graphs read them

    def load(self, draws: Draws) -> None:
        """Uploads draws and goes to their start. Each call must bring as many as the first one: they share memory."""
        leaves, self._structure = tree_flatten(draws)
        tensors = [leaf for leaf in leaves if leaf is not None]
        self._present = [leaf is not None for leaf in leaves]
        words = [tensor.reshape(len(tensor), -1).contiguous().view(torch.int32) for tensor in tensors]
        starts = accumulate((part.numel() for part in words), initial=0)
        values = zip(starts, words, tensors, strict=False)
        self._fields = [Field(start, part.shape[1], x.dtype, x.shape[1:]) for start, part, x in values]
        packed = [torch.cat([part.flatten() for part in words])]
        if self._memory is None:
            self._memory = PackedCopies(packed, self._position.device)
        else:
            self._memory.copy(packed)
        self._position.zero_()

    def next_rows(self, size: int) -> Draws:
        """Returns the next `size` rows of every tensor, by three launches for all tensors together."""
        assert self._memory is not None, "load comes first"
        if size not in self._words:
            first, step = upload_all(words_of_batch(self._fields, size), self._position.device)
            self._words[size] = first, step
        (memory,) = self._memory.tensors
        batch = memory.index_select(0, torch.addcmul(*self._words[size], self._position))
        self._position += size
        rows, start = [], 0
        for _, words, dtype, shape in self._fields:
            rows.append(batch[start : start + size * words].view(dtype).view(size, *shape))
            start += _padded(size * words)
        selected = iter(rows)
        return tree_unflatten([next(selected) if present else None for present in self._present], self._structure)


def words_of_batch(fields: Sequence[Field], size: int) -> tuple[Tensor, Tensor]:
    """Returns the places of a batch's words in memory if it starts at row 0, and how far they move with each row.

    Both are int64 [W]. In the batch every tensor starts at a multiple of 16 bytes, and the words between are the first
    one of the memory.
    """
    first, step = [], []
    for start, words, _, _ in fields:
        padding = _padded(size * words) - size * words
        first += [torch.arange(start, start + size * words), torch.zeros(padding, dtype=torch.int64)]
        step += [torch.full((size * words,), words), torch.zeros(padding, dtype=torch.int64)]
    return torch.cat(first), torch.cat(step)


def _padded(words: int) -> int:
    return math.ceil(words * 4 / ALIGNMENT) * ALIGNMENT // 4


class DeviceBatches:
    """Augmented images on a CUDA device, batch by batch (tadperf)."""

    def __init__(self, images: Images, device: torch.device) -> None:
        """images: must take an index on the device."""
        self._images, self._draws = images, DeviceDraws[ImageDraws](device)
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
