"""Backends that compute one inner step and its second derivatives: explicit formulas, autograd, or compiled.

All are exact up to rounding, and one float64 test covers all of them. The formulas of `convnet_second_order` cover the
ConvNet with instance norm; their norm, ReLU and pool are compiled operators on a CPU and on CUDA. Autograd works for
every network. Compiled means one fullgraph region for the step and one for its products. Both regions come from the
formulas or, for other networks, from nested torch.func.grad (reverse over reverse).
"""

from __future__ import annotations

import logging
from collections.abc import Callable
from functools import partial
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from tadperf.compute.compile import load_compile_cache, with_fallback
from tadperf.config import MatchConfig
from tadperf.kernels import implementations
from tadperf.matching import convnet_second_order
from tadperf.matching.convnet_second_order import Loss, Products
from tadperf.nets.flat import FlatNet

# On a CPU, match.compile = auto uses these estimates for networks without formulas: seconds to compile both regions,
# the share of an eager step's time that compiling saves, and operations per second of eager convolutions, forward and
# backward. Measured on two Zen 4 cores: the ConvNet with group norm took 56 s, saved 2 % and ran at 1.0e11; VGG-11
# took 98 s, lost 11 % and ran at 1.25e11.
COMPILE_SECONDS = 75.0
COMPILE_SAVING = 0.02
EAGER_FLOPS = 1e11

log = logging.getLogger(__name__)


class StepBackend(NamedTuple):
    """Computes one inner step.

    gradient: (theta, x, y) -> g [P]. products: (theta, lambda, x, y, exact) -> `Products`. x is already augmented.
    """

    gradient: Callable[[Tensor, Tensor, Tensor], Tensor]
    products: Callable[[Tensor, Tensor, Tensor, Tensor, bool], Products]
    name: str
    cache: str | None = None  # the key of its compiled code in the cache; None if there is nothing to save


def student_loss(logits: Tensor, labels: Tensor) -> Tensor:
    """Returns the mean cross-entropy. labels: int64 [B], or logits [B, K], whose softmax is the target."""
    return F.cross_entropy(logits, labels.softmax(1) if labels.is_floating_point() else labels)


def step_gradient(
    net: FlatNet, theta: Tensor, x: Tensor, y: Tensor, create_graph: bool = False, loss: Loss = student_loss
) -> Tensor:
    """Returns g [P] by autograd. theta must require a gradient."""
    (g,) = torch.autograd.grad(loss(net(theta, x), y), theta, create_graph=create_graph)
    return g


def _products_by_autograd(
    net: FlatNet, precision: torch.dtype, loss: Loss, theta: Tensor, lam: Tensor, x: Tensor, y: Tensor, exact: bool
) -> Products:
    theta, x = theta.detach().requires_grad_(), x.detach().requires_grad_()
    y = y.detach().requires_grad_(y.is_floating_point())
    with _autocast(x, precision):
        h = lam @ step_gradient(net, theta, x, y, create_graph=True, loss=loss)
    inputs = [x] + [y] * y.requires_grad + [theta] * exact
    grads = list(torch.autograd.grad(h, inputs, allow_unused=True, materialize_grads=True))
    grad_theta = grads.pop() if exact else None
    return Products(h.detach(), grads[0], grads[1] if y.requires_grad else None, grad_theta)


def _autocast(x: Tensor, precision: torch.dtype) -> torch.autocast:
    return torch.autocast(x.device.type, precision, enabled=precision != torch.float32)


def autograd(net: FlatNet, precision: torch.dtype = torch.float32, loss: Loss | None = None) -> StepBackend:
    """Returns the backend for any network: PyTorch's autograd, applied twice. loss: by default `student_loss`."""
    loss = loss or student_loss

    def gradient(theta: Tensor, x: Tensor, y: Tensor) -> Tensor:
        with _autocast(x, precision):
            return step_gradient(net, theta.detach().requires_grad_(), x, y, loss=loss).detach()

    return StepBackend(gradient, partial(_products_by_autograd, net, precision, loss), "autograd")


def eager(net: FlatNet, precision: torch.dtype = torch.float32, loss: Loss | None = None) -> StepBackend:
    """Returns the fastest backend that compiles nothing: formulas for networks that they cover, otherwise autograd."""
    form = convnet_second_order.convnet_form(net.module, precision, loss)
    if form is None:
        return autograd(net, precision, loss)
    return StepBackend(
        torch.no_grad()(partial(convnet_second_order.step_gradient, form, net)),
        torch.no_grad()(partial(convnet_second_order.products, form, net)),
        "formulas",
    )


def functional(net: FlatNet, precision: torch.dtype = torch.float32) -> StepBackend:
    """Returns the backend for any network by nested torch.func.grad, which torch.compile takes as one region."""

    def loss(theta: Tensor, x: Tensor, y: Tensor) -> Tensor:
        with _autocast(x, precision):
            return student_loss(net(theta, x), y)

    gradient: Callable[..., Tensor] = torch.func.grad(loss)

    def products(theta: Tensor, lam: Tensor, x: Tensor, y: Tensor, exact: bool) -> Products:
        soft = y.is_floating_point()

        def h_of(theta: Tensor, x: Tensor, y: Tensor) -> Tensor:
            return lam @ gradient(theta, x, y)

        arguments = (1, *[2] * soft, *[0] * exact)  # x, label logits, theta
        by_argument, h = torch.func.grad_and_value(h_of, arguments)(theta, x, y)
        grads: list[Tensor] = list(by_argument)
        grad_theta = grads.pop() if exact else None
        return Products(h, grads[0], grads[1] if soft else None, grad_theta)

    return StepBackend(gradient, products, "functional")


def compiled(net: FlatNet, precision: torch.dtype = torch.float32) -> StepBackend:
    """Returns the compiled backend: a fullgraph region for the step and one for its products, for static shapes.

    If compiling fails, warns and falls back to `eager`.
    """
    fallback = eager(net, precision)
    base = fallback if fallback.name == "formulas" else functional(net, precision)

    def region(function: Callable, eager_function: Callable) -> Callable:
        return with_fallback(
            "torch.compile",
            lambda: torch.compile(function, fullgraph=True, dynamic=False),
            "eager",
            lambda: eager_function,
        )

    key = f"matching {base.name} {net.num_parameters}"
    load_compile_cache(key)
    gradient, products = region(base.gradient, fallback.gradient), region(base.products, fallback.products)
    return StepBackend(gradient, products, f"compiled, {base.name}", key)


def choose_step_backend(
    config: MatchConfig, net: FlatNet, shape: tuple[int, ...], device: torch.device, iterations: int
) -> StepBackend:
    """Chooses the backend as match.compile says, and logs why. "auto" estimates the work; it never measures time.

    shape: [B, C, H, W] of a step's batch. iterations: outer steps that the backend will run.
    """
    precision = getattr(torch, config.precision)
    if config.compile == "off":
        return eager(net, precision)
    if config.compile == "on":
        return compiled(net, precision)
    backend = eager(net, precision)
    operators = implementations()["norm_relu_pool_dual"]
    if backend.name == "formulas" and (device.type == "cpu" or operators.get(device.type) == "triton"):
        # On a CPU, Inductor's code for norm, ReLU and pool is slower than ours (bench/results/matching.md). On CUDA it
        # moves more bytes than the Triton kernels (counted, bench/results/ledger.md) and takes a minute to build.
        reason = "its norm, ReLU and pool are compiled operators"
    elif device.type == "cuda":
        backend, reason = compiled(net, precision), "it runs on CUDA"
    else:
        saved = COMPILE_SAVING * iterations * config.steps * 10 * flops(net, shape) / EAGER_FLOPS
        reason = f"compiling would take about {COMPILE_SECONDS:.0f} s and save about {saved:.3g} s"
        backend = compiled(net, precision) if saved > COMPILE_SECONDS else backend
    log.info("matching uses %s: %s", backend.name, reason)
    return backend


def flops(net: FlatNet, shape: tuple[int, ...]) -> float:
    """Returns the number of operations of one forward pass over a batch of this shape."""
    from torch.utils.flop_counter import FlopCounterMode

    with FlopCounterMode(display=False) as counter, torch.no_grad():
        net.module(torch.zeros(shape, device=next(net.module.parameters()).device))
    return float(counter.get_total_flops())
