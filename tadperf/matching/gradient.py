"""The gradient of the matching loss with respect to synthetic images, labels and learning rate.

    L = |theta_T - target|^2 / |theta_0 - target|^2,    theta_{i+1} = theta_i - lr * g_i,
    g_i = d loss(theta_i; A_i(x[B_i]), y[B_i]) / d theta                     (MTT; Cazenavette et al., 2022)

`adjoint` is exact at constant memory: it stores at most KEPT parameter vectors and one step's activations; where T is
larger, the vectors between are computed again from the last one kept, in the same bits. With
lambda_T = dL / d theta_T, for i = T-1 ... 0, and h_i = lambda_{i+1} . g_i (tadperf):

    dL/dx += -lr dh_i/dx,    dL/dlr += -h_i,    lambda_i = lambda_{i+1} - lr dh_i/dtheta_i

`unroll` differentiates through all T steps at once, the published way: the reference in tests, memory linear in T.
`tesla` keeps lambda_i = lambda_T, which drops the Hessian factor (Cui et al., 2023): for comparison only.

How one step and its products are computed is a `ways.Way`. Where autograd differentiates it twice, no custom operator
and no autograd.Function may enter: under torch.compile their second derivatives are silently wrong. Only the network is
differentiated twice; the augmentation, applied before it, only once.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from tadperf.data import augment
from tadperf.matching import step_backends
from tadperf.matching.convnet_second_order import Products
from tadperf.matching.step_backends import StepBackend
from tadperf.nets.flat import FlatNet

# Parameter vectors kept. T = 80 then repeats every other forward step, and one is 0.20 of a step's time: +10 %
KEPT = 40


class Step(NamedTuple):
    """One inner step: which synthetic images (int64 [B]), under which drawn augmentation."""

    index: Tensor
    drawn: augment.Draw


class Gradient(NamedTuple):
    """The matching loss and its gradients; `labels` is None for hard labels."""

    loss: Tensor  # scalar
    images: Tensor  # like the images
    labels: Tensor | None  # like the label logits
    lr: Tensor  # scalar
    end: Tensor  # [P], the student after T steps


def matching_loss(end: Tensor, start: Tensor, target: Tensor) -> Tensor:
    """Squared distance to the expert's later weights, as a share of the way that the expert went (MTT, eq. 3)."""
    return (end - target).square().sum() / (start - target).square().sum()


def step(way: StepBackend, theta: Tensor, x: Tensor, y: Tensor, lr: Tensor, step: Step) -> Tensor:
    """theta after one inner step, without a graph."""
    with torch.no_grad():
        batch = augment.apply(x[step.index], step.drawn)
    return theta - lr * way.gradient(theta, batch, y[step.index])


def products(
    way: StepBackend, theta: Tensor, lam: Tensor, x: Tensor, y: Tensor, drawn: augment.Draw, exact: bool
) -> Products:
    """`Products` of one step by its batch x before the augmentation."""
    x = x.detach().requires_grad_()
    batch = augment.apply(x, drawn)
    found = way.products(theta, lam, batch.detach(), y, exact)
    (of_x,) = torch.autograd.grad(batch, x, found.x)
    return found._replace(x=of_x)


def adjoint(
    net: FlatNet,
    start: Tensor,
    target: Tensor,
    images: Tensor,
    labels: Tensor,
    lr: Tensor,
    steps: Sequence[Step],
    exact: bool = True,
    way: StepBackend | None = None,
) -> Gradient:
    """The exact gradient at constant memory in T; with `exact=False` TESLA's approximation of it.

    start, target: [P]; images: [M, C, H, W]; labels: int64 [M] or logits [M, C]; lr: scalar tensor. way: how one step
    is computed; by default the fastest that needs no compiler.
    """
    way = way or step_backends.eager(net)
    x, y, lr = images.detach(), labels.detach(), lr.detach()
    soft = y.is_floating_point()
    stride = -(-len(steps) // KEPT)
    # one block: many vectors would tear holes into a heap
    marks = start.new_empty(-(-len(steps) // stride), len(start))
    theta = start.detach()
    for i, drawn in enumerate(steps):
        if i % stride == 0:
            marks[i // stride] = theta
        theta = step(way, theta, x, y, lr, drawn)
    end, distance = theta, (start - target).square().sum()
    lam = 2 * (end - target) / distance
    grad_x, grad_y, grad_lr = torch.zeros_like(x), torch.zeros_like(y) if soft else None, torch.zeros_like(lr)
    for first in reversed(range(0, len(steps), stride)):
        part = steps[first : first + stride]
        path = [marks[first // stride]]
        for drawn in part[:-1]:
            path.append(step(way, path[-1], x, y, lr, drawn))
        for index, drawn in reversed(part):
            found = products(way, path.pop(), lam, x[index], y[index], drawn, exact)
            grad_lr -= found.h
            if found.theta is not None:
                lam = lam - lr * found.theta
            if grad_y is not None and found.labels is not None:
                grad_y.index_add_(0, index, found.labels, alpha=-1)
            grad_x.index_add_(0, index, found.x, alpha=-1)
    return Gradient(
        (end - target).square().sum() / distance, grad_x * lr, None if grad_y is None else grad_y * lr, grad_lr, end
    )


def tesla(
    net: FlatNet,
    start: Tensor,
    target: Tensor,
    images: Tensor,
    labels: Tensor,
    lr: Tensor,
    steps: Sequence[Step],
    way: StepBackend | None = None,
) -> Gradient:
    """TESLA's constant-memory gradient: inexact (its error grows with T and lr); for comparison only."""
    return adjoint(net, start, target, images, labels, lr, steps, exact=False, way=way)


def unroll(
    net: FlatNet,
    start: Tensor,
    target: Tensor,
    images: Tensor,
    labels: Tensor,
    lr: Tensor,
    steps: Sequence[Step],
    way: StepBackend | None = None,
) -> Gradient:
    """The same gradient by differentiating through all T steps at once, by autograd whatever the way: memory grows."""
    x, lr = images.detach().requires_grad_(), lr.detach().requires_grad_()
    y = labels.detach().requires_grad_(labels.is_floating_point())
    theta = start.detach().requires_grad_()
    for index, drawn in steps:
        theta = theta - lr * step_backends.step_gradient(
            net, theta, augment.apply(x[index], drawn), y[index], create_graph=True
        )
    loss = matching_loss(theta, start, target)
    grads = torch.autograd.grad(loss, [x, lr] + ([y] if y.requires_grad else []))
    return Gradient(loss.detach(), grads[0], grads[2] if y.requires_grad else None, grads[1], theta.detach())


GRADIENTS: dict[str, Callable[..., Gradient]] = {"adjoint": adjoint, "unroll": unroll, "tesla": tesla}
