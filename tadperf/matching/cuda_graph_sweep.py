"""Runs all T inner steps and their adjoint as one CUDA graph."""

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
    """Computes `gradient.adjoint` as one CUDA graph per iteration, instead of kernel by kernel (tadperf).

    Takes the arguments of `adjoint` after `net`. Records one graph for each pattern of batch sizes. A graph keeps the
    memory of one adjoint. If nothing can be recorded, `GraphedStep` warns once and runs kernel by kernel. CUDA only.
    """

    def __init__(self, net: FlatNet, backend: StepBackend, exact: bool = True) -> None:
        self._adjoint = partial(adjoint, net, exact=exact, backend=backend)
        self._gradient: Gradient | None = None  # fixed memory that the graph writes into
        self.graphed_step = GraphedStep(self._write_gradient)

    def __call__(
        self, start: Tensor, target: Tensor, images: Tensor, labels: Tensor, lr: Tensor, steps: Sequence[Step]
    ) -> Gradient:
        if self._gradient is None:
            label_gradient = torch.empty_like(labels) if labels.is_floating_point() else None
            loss, lr_gradient = torch.empty_like(lr), torch.empty_like(lr)
            end = torch.empty_like(start)
            self._gradient = Gradient(loss, torch.empty_like(images), label_gradient, lr_gradient, end)
        self.graphed_step(start, target, images, labels, lr, *join_steps(steps, images.device))
        # Copies: the next call writes into the same memory.
        loss, image_gradient, label_gradient, lr_gradient, end = self._gradient
        label_gradient = None if label_gradient is None else label_gradient.clone()
        return Gradient(loss.clone(), image_gradient.clone(), label_gradient, lr_gradient.clone(), end.clone())

    def _write_gradient(
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
        assert self._gradient is not None
        steps = split_steps(index, Draw(affine, color, hole), sizes)
        gradient = self._adjoint(start, target, images, labels, lr, steps)
        for memory, value in zip(self._gradient, gradient, strict=True):
            if memory is not None and value is not None:
                memory.copy_(value)


def join_steps(steps: Sequence[Step], device: torch.device) -> tuple[Tensor | Hashable | None, ...]:
    """Joins the steps into few tensors, so that few copies are needed.

    Returns the rows of all images, the three fields of their augmentation, and the sizes of the steps.
    """
    fields = zip(*(step.drawn for step in steps), strict=True)
    drawn = (None if field[0] is None else torch.cat(field).to(device) for field in fields)
    return torch.cat([step.rows for step in steps]).to(device), *drawn, tuple(len(step.rows) for step in steps)


def split_steps(index: Tensor, drawn: Draw, sizes: tuple[int, ...]) -> list[Step]:
    """Splits what `join_steps` joined."""
    ends = torch.tensor(sizes).cumsum(0).tolist()
    rows = [drawn.rows(end - size, end) for size, end in zip(sizes, ends, strict=True)]
    return [Step(part, part_drawn) for part, part_drawn in zip(index.split(sizes), rows, strict=True)]
