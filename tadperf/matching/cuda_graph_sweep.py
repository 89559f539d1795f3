"""A whole sweep, the T inner steps and their adjoint, as one CUDA graph."""

from __future__ import annotations

from collections.abc import Hashable, Sequence
from functools import partial

import torch
from torch import Tensor

from tadperf.compute.cuda_graphs import GraphedStep
from tadperf.data.augment import Draw
from tadperf.matching.gradient import Gradient, Step, adjoint
from tadperf.matching.step_backends import StepBackend
from tadperf.nets.flat import FlatNet


class GraphedSweep:
    """`gradient.adjoint` of one iteration after another, each launched at once instead of kernel by kernel (tadperf).

    Called as `adjoint` is, after `net`. One graph for each pattern of batch sizes; its memory is one sweep's. Where
    nothing can be recorded, that costs a warning (`Replayed`). CUDA only.
    """

    def __init__(self, net: FlatNet, way: StepBackend, exact: bool = True) -> None:
        self.compute = partial(adjoint, net, exact=exact, way=way)
        self.found: Gradient | None = None
        self.replayed = GraphedStep(self.into)

    def __call__(
        self, start: Tensor, target: Tensor, images: Tensor, labels: Tensor, lr: Tensor, steps: Sequence[Step]
    ) -> Gradient:
        if self.found is None:
            of_labels = torch.empty_like(labels) if labels.is_floating_point() else None
            scalars = torch.empty_like(lr), torch.empty_like(lr)
            self.found = Gradient(scalars[0], torch.empty_like(images), of_labels, scalars[1], torch.empty_like(start))
        self.replayed(start, target, images, labels, lr, *join_steps(steps, images.device))
        loss, images, of_labels, of_lr, end = self.found
        of_labels = (
            None if of_labels is None else of_labels.clone()
        )  # a copy: the next call writes into the same memory
        return Gradient(loss.clone(), images.clone(), of_labels, of_lr.clone(), end.clone())

    def into(
        self,
        start: Tensor,
        target: Tensor,
        images: Tensor,
        labels: Tensor,
        lr: Tensor,
        index: Tensor,
        affine: Tensor | None,
        color: Tensor | None,
        hole: Tensor | None,
        sizes: tuple[int, ...],
    ) -> None:
        """Computes the gradient into `found`."""
        assert self.found is not None
        steps = split_steps(index, Draw(affine, color, hole), sizes)
        for kept, new in zip(self.found, self.compute(start, target, images, labels, lr, steps), strict=True):
            if kept is not None and new is not None:
                kept.copy_(new)


def join_steps(steps: Sequence[Step], device: torch.device) -> tuple[Tensor | Hashable | None, ...]:
    """All steps' images, their three fields of augmentation and the steps' sizes: few tensors, so few copies."""
    fields = zip(*(step.drawn for step in steps), strict=True)
    drawn = (None if field[0] is None else torch.cat(field).to(device) for field in fields)
    return torch.cat([step.index for step in steps]).to(device), *drawn, tuple(len(step.index) for step in steps)


def split_steps(index: Tensor, drawn: Draw, sizes: tuple[int, ...]) -> list[Step]:
    """The steps again: `joined` backwards."""
    ends = torch.tensor(sizes).cumsum(0).tolist()
    rows = [drawn.rows(end - size, end) for size, end in zip(sizes, ends, strict=True)]
    return [Step(part, own) for part, own in zip(index.split(sizes), rows, strict=True)]
