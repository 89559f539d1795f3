"""Runs all T inner steps and their adjoint as one CUDA graph."""

from __future__ import annotations

from functools import partial

import torch
from torch import Tensor

from tadperf.compute.cuda_graphs import GraphedStep
from tadperf.data.augment import Draw
from tadperf.data.image_draws import ImageDraws
from tadperf.matching.gradient import Gradient, StepDraws, adjoint
from tadperf.matching.step_backends import StepBackend
from tadperf.nets.flat import FlatNet


class GraphedSweep:
    """Computes `gradient.adjoint` as one CUDA graph per iteration, instead of kernel by kernel (tadperf).

    Takes the arguments of `adjoint` after `net`, with joined steps. Records one graph for each pattern of batch sizes.
    A graph keeps the memory of one adjoint. If nothing can be recorded, `GraphedStep` warns once and runs kernel by
    kernel. CUDA only.
    """

    def __init__(self, net: FlatNet, backend: StepBackend, exact: bool = True, scaled: bool = True) -> None:
        self._adjoint = partial(adjoint, net, exact=exact, backend=backend, scaled=scaled)
        self._layers = len(net.layer_sizes) if scaled else None
        self._gradient: Gradient | None = None  # fixed memory that the graph writes into
        self.graphed_step = GraphedStep(self._write_gradient)

    def __call__(
        self, start: Tensor, target: Tensor, images: Tensor, labels: Tensor, lr: Tensor, drawn: StepDraws
    ) -> Gradient:
        if self._gradient is None:
            self._gradient = Gradient(
                loss=torch.empty_like(lr),
                images=torch.empty_like(images),
                labels=torch.empty_like(labels) if labels.is_floating_point() else None,
                lr=torch.empty_like(lr),
                end=torch.empty_like(start),
                layers=None if self._layers is None else start.new_empty(self._layers),
            )
        order, (affine, color, hole) = drawn.draws
        self.graphed_step(start, target, images, labels, lr, order, affine, color, hole, drawn.sizes)
        # Copies: the next call writes into the same memory.
        return Gradient(*(None if memory is None else memory.clone() for memory in self._gradient))  # pyright: ignore

    def _write_gradient(
        self,
        start: Tensor,
        target: Tensor,
        images: Tensor,
        labels: Tensor,
        lr: Tensor,
        order: Tensor,
        affine: Tensor | None,
        color: Tensor | None,
        hole: Tensor | None,
        sizes: tuple[int, ...],
    ) -> None:
        assert self._gradient is not None
        steps = StepDraws(ImageDraws(order, Draw(affine, color, hole)), sizes).split()
        gradient = self._adjoint(start, target, images, labels, lr, steps)
        for memory, value in zip(self._gradient, gradient, strict=True):
            if memory is not None and value is not None:
                memory.copy_(value)
