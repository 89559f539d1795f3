"""Class probabilities of large sets: the likeliest classes of each sample, instead of a matrix [N, C].

With 1.28 M samples and 1000 classes a matrix takes 5.1 GB, and these take 0.17 GB. Rows of the matrix are made again
for a block of samples at a time.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

LARGE = 2**28  # samples x classes from which this form is used: 1 GB for each [N, C]
TOP = 16  # classes that a sample keeps; figures in bench/results/trust.md
BLOCK = 2**24  # samples x classes in a block: 64 MB; not tuned


def is_large(count: int, num_classes: int) -> bool:
    """Returns whether a set keeps the likeliest classes only."""
    return count * num_classes >= LARGE


def blocks_of(count: int, num_classes: int) -> list[slice]:
    """Returns slices of `count` samples whose probabilities of all classes fit in a block."""
    step = max(BLOCK // num_classes, 1)
    return [slice(start, min(start + step, count)) for start in range(0, count, step)]


class TopClasses(NamedTuple):
    """The M likeliest classes int32 [N, M] of each sample, the likeliest first, and their probabilities [N, M].

    rest: [N], the mass of all other classes, which share it evenly. The sum of a row may differ from 1.
    """

    classes: Tensor
    values: Tensor
    rest: Tensor
    num_classes: int

    @property
    def shape(self) -> tuple[int, int]:
        """Returns N and C."""
        return len(self.rest), self.num_classes

    @property
    def device(self) -> torch.device:
        return self.rest.device

    @property
    def is_cuda(self) -> bool:
        return self.rest.is_cuda

    def map(self, change: Callable[[Tensor], Tensor]) -> TopClasses:
        """Returns the result of the same change to each of the three tensors."""
        return TopClasses(change(self.classes), change(self.values), change(self.rest), self.num_classes)

    def scaled(self, factor: Tensor) -> TopClasses:
        """Returns the rows times a factor [N] each."""
        return self._replace(values=self.values * factor.unsqueeze(1), rest=self.rest * factor)

    def dense(self, rows: slice | Tensor) -> Tensor:
        """Returns the probabilities of all classes for some rows, a new tensor [n, C]."""
        share = self.rest[rows] / max(self.num_classes - self.classes.shape[1], 1)
        return share.unsqueeze(1).repeat(1, self.num_classes).scatter_(1, self.classes[rows].long(), self.values[rows])

    def write(self, rows: slice, p: Tensor) -> None:
        """Replaces some rows by the likeliest classes of p [n, C]."""
        top = p.topk(self.classes.shape[1], 1)
        self.classes[rows], self.values[rows] = top.indices.to(torch.int32), top.values
        self.rest[rows] = (p.sum(1) - top.values.sum(1)).clamp(min=0)


Probabilities = Tensor | TopClasses


def no_classes(count: int, num_classes: int, device: torch.device) -> TopClasses:
    """Returns rows of zeros, for `write`."""
    top = min(TOP, num_classes)
    classes = torch.arange(top, dtype=torch.int32, device=device).repeat(count, 1)
    return TopClasses(classes, torch.zeros(count, top, device=device), torch.zeros(count, device=device), num_classes)


def one_hot(labels: Tensor, num_classes: int) -> TopClasses:
    """Returns the one-hot rows of labels int64 [N]."""
    ones = torch.ones(len(labels), 1, device=labels.device)
    return TopClasses(labels.to(torch.int32).unsqueeze(1), ones, torch.zeros_like(ones[:, 0]), num_classes)


def from_blocks(
    blocks: Iterable[tuple[slice, Tensor]], count: int, num_classes: int, device: torch.device
) -> TopClasses:
    """Returns the likeliest classes of `count` rows that come in blocks [n, C]."""
    result = no_classes(count, num_classes, device)
    for rows, p in blocks:
        result.write(rows, p)
    return result


def from_tensors(tensors: Iterable[Tensor], num_classes: int) -> TopClasses:
    """Returns the TopClasses of its three tensors."""
    classes, values, rest = tensors
    return TopClasses(classes, values, rest, num_classes)


def concatenate(parts: Sequence[TopClasses]) -> TopClasses:
    """Returns the rows of all parts, one after the other."""
    fields = (torch.cat(values) for values in zip(*(part[:3] for part in parts), strict=True))
    return from_tensors(fields, parts[0].num_classes)


def mean_of(parts: Sequence[TopClasses]) -> TopClasses:
    """Returns the mean of several sources for the same samples."""
    count, num_classes = parts[0].shape
    blocks = (
        (rows, torch.stack([part.dense(rows) for part in parts]).mean(0)) for rows in blocks_of(count, num_classes)
    )
    return from_blocks(blocks, count, num_classes, parts[0].device)


def select(p: Probabilities, rows: Tensor) -> Probabilities:
    """Returns some samples, in the same form."""
    return p[rows] if isinstance(p, Tensor) else p.map(lambda values: values[rows])


def dense_rows(p: Probabilities, rows: slice | Tensor) -> Tensor:
    """Returns the probabilities of all classes for some rows, [n, C]."""
    if isinstance(p, Tensor):
        return p[rows.to(p.device) if isinstance(rows, Tensor) else rows]
    return p.dense(rows)


def likeliest(p: Probabilities) -> Tensor:
    """Returns the likeliest class of each sample, int64 [N]."""
    return p.argmax(1) if isinstance(p, Tensor) else p.classes[:, 0].long()


def largest(p: Probabilities) -> Tensor:
    """Returns the probability of the likeliest class, [N]."""
    return p.amax(1) if isinstance(p, Tensor) else p.values[:, 0]
