"""How one inner step and its second derivatives are computed: by autograd, written out, or compiled.

All are exact, to rounding, and are held to one float64 test. Written out is a ConvNet with instance norm (`written`);
autograd takes every network; compiled means one fullgraph region for the step and one for its products, made from the
written form or, for other networks, by nested torch.func.grad (reverse over reverse).
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
from tadperf.matching import convnet_second_order
from tadperf.matching.convnet_second_order import Products
from tadperf.nets.flat import FlatNet

__all__ = [
    "Products",
    "StepBackend",
    "autograd",
    "choose_step_backend",
    "compiled",
    "eager",
    "step_gradient",
    "student_loss",
]

# What "auto" reckons with on a CPU, for networks that are not written out: seconds to compile both regions, the share
# of an eager step's time that they save, operations a second of eager convolutions there and back. On two Zen 4 cores
# the ConvNet with group norm took 56 s, saved 2 % and ran at 1.0e11; VGG-11 98 s, lost 11 % and ran at 1.25e11.
COMPILE_SECONDS = 75.0
SAVED = 0.02
RATE = 1e11

log = logging.getLogger(__name__)


class StepBackend(NamedTuple):
    """gradient: (theta, x, y) to g [P]. products: (theta, lambda, x, y, exact) to `Products`. x is augmented."""

    gradient: Callable[[Tensor, Tensor, Tensor], Tensor]
    products: Callable[[Tensor, Tensor, Tensor, Tensor, bool], Products]
    name: str
    cache: str | None = None  # the key of its compiled code, where there is some


def student_loss(logits: Tensor, labels: Tensor) -> Tensor:
    """Mean cross-entropy with hard labels (int64 [B]) or with the softmax of label logits (float [B, C])."""
    return F.cross_entropy(logits, labels.softmax(1) if labels.is_floating_point() else labels)


def step_gradient(net: FlatNet, theta: Tensor, x: Tensor, y: Tensor, create_graph: bool = False) -> Tensor:
    """g [P] by autograd; theta must require a gradient."""
    (g,) = torch.autograd.grad(student_loss(net(theta, x), y), theta, create_graph=create_graph)
    return g


def _by_autograd(
    net: FlatNet, precision: torch.dtype, theta: Tensor, lam: Tensor, x: Tensor, y: Tensor, exact: bool
) -> Products:
    theta, x = theta.detach().requires_grad_(), x.detach().requires_grad_()
    y = y.detach().requires_grad_(y.is_floating_point())
    with _autocast(x, precision):
        h = lam @ step_gradient(net, theta, x, y, create_graph=True)
    found = list(torch.autograd.grad(h, [x] + [y] * y.requires_grad + [theta] * exact))
    of_theta = found.pop() if exact else None
    return Products(h.detach(), found[0], found[1] if y.requires_grad else None, of_theta)


def _autocast(x: Tensor, precision: torch.dtype) -> torch.autocast:
    return torch.autocast(x.device.type, precision, enabled=precision != torch.float32)


def autograd(net: FlatNet, precision: torch.dtype = torch.float32) -> StepBackend:
    """Any network, by PyTorch's autograd twice over."""

    def gradient(theta: Tensor, x: Tensor, y: Tensor) -> Tensor:
        with _autocast(x, precision):
            return step_gradient(net, theta.detach().requires_grad_(), x, y).detach()

    return StepBackend(gradient, partial(_by_autograd, net, precision), "autograd")


def eager(net: FlatNet, precision: torch.dtype = torch.float32) -> StepBackend:
    """The fastest way that compiles nothing: written out where the network is covered."""
    form = convnet_second_order.convnet_form(net.module, precision)
    if form is None:
        return autograd(net, precision)
    return StepBackend(
        torch.no_grad()(partial(convnet_second_order.step_gradient, form, net)),
        torch.no_grad()(partial(convnet_second_order.products, form, net)),
        "written out",
    )


def functional(net: FlatNet, precision: torch.dtype = torch.float32) -> StepBackend:
    """Any network by nested torch.func.grad: what compiles whole."""

    def loss(theta: Tensor, x: Tensor, y: Tensor) -> Tensor:
        with _autocast(x, precision):
            return student_loss(net(theta, x), y)

    step = torch.func.grad(loss)

    def products(theta: Tensor, lam: Tensor, x: Tensor, y: Tensor, exact: bool) -> Products:
        soft = y.is_floating_point()
        wanted = (1, *[2] * soft, *[0] * exact)

        def along(*inputs: Tensor) -> Tensor:
            return lam @ step(*inputs)  # pyright: ignore

        of_inputs, h = torch.func.grad_and_value(along, wanted)(theta, x, y)
        found: list[Tensor] = list(of_inputs)  # pyright: ignore[reportArgumentType]
        of_theta = found.pop() if exact else None
        return Products(h, found[0], found[1] if soft else None, of_theta)

    return StepBackend(step, products, "functional")


def compiled(net: FlatNet, precision: torch.dtype = torch.float32) -> StepBackend:
    """Step and products as one fullgraph region of torch.compile each, for static shapes; falls back with a warning."""
    plain = eager(net, precision)
    base = plain if plain.name == "written out" else functional(net, precision)

    def region(function: Callable, other: Callable) -> Callable:
        return with_fallback(
            "torch.compile", lambda: torch.compile(function, fullgraph=True, dynamic=False), "eager", lambda: other
        )

    key = f"matching {base.name} {net.num_parameters}"
    load_compile_cache(key)
    return StepBackend(
        region(base.gradient, plain.gradient), region(base.products, plain.products), f"compiled, {base.name}", key
    )


def choose_step_backend(
    config: MatchConfig, net: FlatNet, shape: tuple[int, ...], device: torch.device, iterations: int
) -> StepBackend:
    """The way of a run: as match.compile says; "auto" by the work that is left, never by a clock, and says so.

    shape: [B, C, H, W] of a step's batch. iterations: that are left.
    """
    precision = getattr(torch, config.precision)
    if config.compile == "off":
        return eager(net, precision)
    if config.compile == "on":
        return compiled(net, precision)
    plain = eager(net, precision)
    if device.type == "cuda":
        way, why = compiled(net, precision), "on CUDA"
    elif plain.name == "written out":
        # Norm, ReLU and pool are native there; Inductor's form of these lines takes longer (bench/results/distil.md)
        way, why = plain, "no compiled form of it is faster on a CPU"
    else:
        saved = SAVED * iterations * config.steps * 10 * flops(net, shape) / RATE
        reckoned = f"compiling takes about {COMPILE_SECONDS:.0f} s and would save about {saved:.3g} s"
        way, why = (compiled(net, precision) if saved > COMPILE_SECONDS else plain), reckoned
    log.info("matching runs %s: %s", way.name, why)
    return way


def flops(net: FlatNet, shape: tuple[int, ...]) -> float:
    """Operations of one forward pass over a batch of this shape."""
    from torch.utils.flop_counter import FlopCounterMode

    with FlopCounterMode(display=False) as counter, torch.no_grad():
        net.module(torch.zeros(shape, device=next(net.module.parameters()).device))
    return float(counter.get_total_flops())
