"""Computes the gradient of the matching loss with respect to synthetic images, labels and learning rate.

    L = |theta_T - target|^2 / |theta_0 - target|^2,    theta_{i+1} = theta_i - lr * g_i,
    g_i = d loss(theta_i; A_i(x[B_i]), y[B_i]) / d theta                     (MTT; Cazenavette et al., 2022)

`adjoint` is exact at constant memory: it stores at most KEPT_VECTORS parameter vectors and the activations of one step.
If T is larger, it recomputes the vectors in between from the last stored one, with the same bits. It starts from
lambda_T = dL / d theta_T. For i = T-1 ... 0 and h_i = lambda_{i+1} . g_i (tadperf):

    dL/dx += -lr dh_i/dx,    dL/dlr += -h_i,    lambda_i = lambda_{i+1} - lr dh_i/dtheta_i

`unroll` differentiates through all T steps at once, as the published code does. Its memory grows with T. It is the
reference in tests. `tesla` keeps lambda_i = lambda_T, which drops the Hessian factor (Cui et al., 2023). It is for
comparison only.

A `StepBackend` computes one inner step and its products. Where autograd differentiates a step twice, no custom operator
and no autograd.Function may be part of it: under torch.compile their second derivatives are silently wrong. Only the
network is differentiated twice. The augmentation, which is applied before it, is differentiated once.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import NamedTuple, cast

import torch
from torch import Tensor

from tadperf.data import augment
from tadperf.data.image_draws import ImageDraws
from tadperf.kernels import trajectory_distance
from tadperf.kernels.ops.trajectory_distance import student_gradient
from tadperf.matching import step_backends
from tadperf.matching.convnet_second_order import Products
from tadperf.matching.step_backends import StepBackend
from tadperf.nets.flat import FlatNet

# Parameter vectors that `adjoint` stores. At T = 80 it then runs every other forward step twice. A forward step takes
# 0.20 of a step's time, so this costs 10 %.
KEPT_VECTORS = 40


Augmentation = Callable[[Tensor], Tensor]  # differentiable; equal results for equal images, at every call


class Step(NamedTuple):
    """One inner step: the rows of its synthetic images (int64 [B]) and their drawn augmentation.

    drawn: by default none. `StepDraws` joins draws, not functions.
    """

    rows: Tensor
    drawn: augment.Draw | Augmentation = augment.Draw(None, None, None)


class StepDraws(NamedTuple):
    """The draws of all T inner steps, joined so that they move to a device in one copy.

    draws: one inner step after the other. sizes: the number of images of each one.
    """

    draws: ImageDraws
    sizes: tuple[int, ...]

    @classmethod
    def join(cls, steps: Sequence[Step]) -> StepDraws:
        """Joins inner steps."""
        fields = zip(*(cast(augment.Draw, step.drawn) for step in steps), strict=True)
        drawn = augment.Draw(*(None if field[0] is None else torch.cat(field) for field in fields))
        return cls(ImageDraws(torch.cat([step.rows for step in steps]), drawn), tuple(len(step.rows) for step in steps))

    def split(self) -> list[Step]:
        """Returns the inner steps as views."""
        return [Step(*part) for part in self.draws.split(self.sizes)]

    def to(self, device: torch.device) -> StepDraws:
        return StepDraws(self.draws.to(device), self.sizes)


class Gradient(NamedTuple):
    """The matching loss and its gradients. `labels` is None for hard labels."""

    loss: Tensor  # scalar; 0 if the gradient is unscaled
    images: Tensor  # [M, C, H, W]
    labels: Tensor | None  # [M, K]
    lr: Tensor  # scalar
    end: Tensor  # [P], the student after T steps
    layers: Tensor | None = None  # [layers], the matching loss of each layer; only reported


def matching_loss(end: Tensor, start: Tensor, target: Tensor) -> Tensor:
    """Returns |end - target|^2 / |start - target|^2 (MTT, eq. 3)."""
    return (end - target).square().sum() / (start - target).square().sum()


class Distance(NamedTuple):
    """The matching loss, its gradient lambda_T [P] with respect to the student, and the loss of each layer [layers]."""

    loss: Tensor
    lam: Tensor
    layers: Tensor | None


def matching_distance(end: Tensor, start: Tensor, target: Tensor, layer_sizes: Sequence[int]) -> Distance:
    """Computes the matching loss and what the adjoint and the report need of it.

    On CUDA one operator reads the three vectors once for all sums, and a second one writes lambda. A CPU keeps the
    order of sums of `matching_loss`.
    """
    end, start, target = end.detach(), start.detach(), target.detach()
    by_layer = trajectory_distance(end, target, start, tuple(layer_sizes))
    if end.is_cuda:
        expert_distance = by_layer.expert_distance.sum()
        lam = student_gradient(end, target, 2 / expert_distance)
        return Distance(by_layer.distance.sum() / expert_distance, lam, by_layer.ratio)
    expert_distance = (start - target).square().sum()
    lam = 2 * (end - target) / expert_distance
    return Distance((end - target).square().sum() / expert_distance, lam, by_layer.ratio)


def unscaled_distance(end: Tensor, target: Tensor) -> Distance:
    """Returns lambda_T without its factor 2 / |start - target|^2, and neither loss. `scaled_gradients` adds them."""
    return Distance(end.new_zeros(()), end - target, None)


def scaled_gradients(
    parts: Sequence[Gradient], starts: Sequence[Tensor], targets: Sequence[Tensor], layer_sizes: Sequence[int]
) -> list[Gradient]:
    """Finishes the unscaled gradients of K trajectories with one call of `trajectory_distance` on K rows (tadperf).

    A gradient is linear in lambda_T, so its factor 2 / |start - target|^2 can be applied last. Overwrites `parts`.
    """
    ends, begins, aims = (torch.stack(list(rows)) for rows in ([part.end for part in parts], starts, targets))
    by_layer = trajectory_distance(ends, aims, begins, tuple(layer_sizes))  # [K, layers]
    expert_distances = by_layer.expert_distance.sum(1)
    losses, factors = by_layer.distance.sum(1) / expert_distances, 2 / expert_distances
    for part, factor in zip(parts, factors.unbind(), strict=True):
        torch._foreach_mul_([x for x in (part.images, part.labels, part.lr) if x is not None], factor)
    rows = zip(parts, losses.unbind(), by_layer.ratio.unbind(), strict=True)
    return [part._replace(loss=loss, layers=layers) for part, loss, layers in rows]


def augmented(x: Tensor, drawn: augment.Draw | Augmentation) -> Tensor:
    """Applies the augmentation of a step to its images."""
    return augment.apply(x, drawn) if isinstance(drawn, augment.Draw) else drawn(x)


def augmented_with_adjoint(x: Tensor, drawn: augment.Draw | Augmentation) -> tuple[Tensor, Callable[[Tensor], Tensor]]:
    """Returns `augmented(x, drawn)` without a graph, and the function from its gradient to the gradient of x."""
    if isinstance(drawn, augment.Draw):
        return augment.apply_with_adjoint(x, drawn)
    x = x.detach().requires_grad_()
    result = drawn(x)
    return result.detach(), lambda grad: torch.autograd.grad(result, x, grad)[0]


def inner_step(backend: StepBackend, theta: Tensor, x: Tensor, y: Tensor, lr: Tensor, step: Step) -> Tensor:
    """Returns theta [P] after one inner step, without a graph. x, y: all synthetic images and their labels."""
    with torch.no_grad():
        batch = augmented(x[step.rows], step.drawn)
    return theta - lr * backend.gradient(theta, batch, y[step.rows])


def step_products(
    backend: StepBackend,
    theta: Tensor,
    lam: Tensor,
    x: Tensor,
    y: Tensor,
    drawn: augment.Draw | Augmentation,
    exact: bool,
) -> Products:
    """Returns the `Products` of one step with respect to its batch x [B, C, H, W] before the augmentation."""
    batch, adjoint_of_augmentation = augmented_with_adjoint(x, drawn)
    products = backend.products(theta, lam, batch, y, exact)
    return products._replace(x=adjoint_of_augmentation(products.x))


def adjoint(
    net: FlatNet,
    start: Tensor,
    target: Tensor,
    images: Tensor,
    labels: Tensor,
    lr: Tensor,
    steps: Sequence[Step],
    exact: bool = True,
    backend: StepBackend | None = None,
    scaled: bool = True,
) -> Gradient:
    """Computes the exact gradient at constant memory in T (tadperf); with `exact=False` TESLA's approximation.

    start, target: float [P]. images: [M, C, H, W]. labels: int64 [M], or logits [M, K]. lr: scalar tensor. steps: the
    T inner steps. backend: computes one step; the default is the fastest one that needs no compiler. scaled: False
    leaves the losses and a common factor to `scaled_gradients`.
    """
    backend = backend or step_backends.eager(net)
    x, y, lr = images.detach(), labels.detach(), lr.detach()
    soft = y.is_floating_point()
    stride = -(-len(steps) // KEPT_VECTORS)
    # One block of memory: many separate vectors would leave holes in the heap.
    stored = start.new_empty(-(-len(steps) // stride), len(start))
    theta = start.detach()
    for i, step in enumerate(steps):
        if i % stride == 0:
            stored[i // stride] = theta
        theta = inner_step(backend, theta, x, y, lr, step)
    end = theta
    sizes = list(net.layer_sizes.values())
    loss, lam, layers = matching_distance(end, start, target, sizes) if scaled else unscaled_distance(end, target)
    cuts = slices_by_pass([len(step.rows) for step in steps], len(x))
    grad_x, grad_y, grad_lr = torch.zeros_like(x), torch.zeros_like(y) if soft else None, torch.zeros_like(lr)
    for first in reversed(range(0, len(steps), stride)):
        segment = steps[first : first + stride]
        thetas = [stored[first // stride]]
        for step in segment[:-1]:
            thetas.append(inner_step(backend, thetas[-1], x, y, lr, step))
        for i in reversed(range(first, first + len(segment))):
            rows, drawn = steps[i]
            h = step_products(backend, thetas.pop(), lam, x[rows], y[rows], drawn, exact)
            grad_lr -= h.h
            if h.theta is not None:
                lam = lam - lr * h.theta
            for part in cuts[i]:
                if grad_y is not None and h.labels is not None:
                    grad_y.index_add_(0, rows[part], h.labels[part], alpha=-1)
                grad_x.index_add_(0, rows[part], h.x[part], alpha=-1)
    return Gradient(loss, grad_x * lr, None if grad_y is None else grad_y * lr, grad_lr, end, layers)


def slices_by_pass(sizes: Sequence[int], count: int) -> list[list[slice]]:
    """Cuts each of the joined batches, of these sizes, where a pass over `count` images ends (tadperf).

    `loop.draw_steps` draws each image once in a pass, so no part has an image twice. CUDA adds the rows of a part in
    parallel: if an image came twice, the order of its sums, and so the last bits, would change from run to run.
    """
    parts, begin = [], 0
    for size in sizes:
        ends = [*range(count - begin % count, size, count), size]
        parts.append([slice(first, end) for first, end in zip([0, *ends], ends, strict=False)])
        begin += size
    return parts


def tesla(
    net: FlatNet,
    start: Tensor,
    target: Tensor,
    images: Tensor,
    labels: Tensor,
    lr: Tensor,
    steps: Sequence[Step],
    backend: StepBackend | None = None,
    scaled: bool = True,
) -> Gradient:
    """Computes TESLA's gradient at constant memory. Its error grows with T and lr. Arguments as for `adjoint`."""
    return adjoint(net, start, target, images, labels, lr, steps, exact=False, backend=backend, scaled=scaled)


def unroll(
    net: FlatNet,
    start: Tensor,
    target: Tensor,
    images: Tensor,
    labels: Tensor,
    lr: Tensor,
    steps: Sequence[Step],
    backend: StepBackend | None = None,
) -> Gradient:
    """Differentiates through all T steps at once; memory grows with T. Arguments as for `adjoint`.

    Always uses autograd and ignores `backend`.
    """
    x, lr = images.detach().requires_grad_(), lr.detach().requires_grad_()
    y = labels.detach().requires_grad_(labels.is_floating_point())
    theta = start.detach().requires_grad_()
    for rows, drawn in steps:
        batch = augmented(x[rows], drawn)
        theta = theta - lr * step_backends.step_gradient(net, theta, batch, y[rows], create_graph=True)
    loss = matching_loss(theta, start, target)
    grads = torch.autograd.grad(loss, [x, lr] + ([y] if y.requires_grad else []))
    layers = matching_distance(theta, start, target, list(net.layer_sizes.values())).layers
    return Gradient(loss.detach(), grads[0], grads[2] if y.requires_grad else None, grads[1], theta.detach(), layers)


GRADIENTS: dict[str, Callable[..., Gradient]] = {"adjoint": adjoint, "unroll": unroll, "tesla": tesla}
