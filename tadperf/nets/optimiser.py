"""The rules by which training changes the weights: SGD, Muon, and the gradient of GSAM for flat minima."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

# The defaults of torch.optim.Muon.
MUON_EPS, MUON_STEPS, MUON_COEFFICIENTS = 1e-7, 5, (3.4445, -4.7750, 2.0315)


@torch.no_grad()
def sgd_step(
    parameters: tuple[Tensor, ...],
    velocity: tuple[Tensor, ...],
    gradients: tuple[Tensor, ...],
    lr: float | Tensor,
    momentum: float,
    weight_decay: float,
) -> None:
    """Updates all parameters in place by one step of SGD, with the same rule as torch.optim.SGD.

    It does not use that class: the first optimiser of a process imports the compiler, 2 s in every worker.
    lr: on CUDA it may be a float32 scalar of the device, so that one recorded graph serves all learning rates.
    """
    if parameters[0].is_cuda:
        return fused_sgd_step(parameters, velocity, gradients, lr, momentum, weight_decay)
    assert not isinstance(lr, Tensor), "a CPU takes the learning rate as a number"
    torch._foreach_mul_(velocity, momentum)
    torch._foreach_add_(velocity, gradients)
    if weight_decay:
        torch._foreach_add_(velocity, parameters, alpha=weight_decay)
    torch._foreach_add_(parameters, velocity, alpha=-lr)
    return None


def fused_sgd_step(
    parameters: tuple[Tensor, ...],
    velocity: tuple[Tensor, ...],
    gradients: tuple[Tensor, ...],
    lr: float | Tensor,
    momentum: float,
    weight_decay: float,
) -> None:
    """Computes `sgd_step` by PyTorch's fused operator: one launch, and one pass through memory instead of four."""
    # The operator refuses strides that differ. A convolution's gradient may have others where a dimension is 1.
    pairs = zip(gradients, parameters, strict=True)
    gradients = tuple(g if g.stride() == p.stride() else torch.empty_like(p).copy_(g) for g, p in pairs)
    buffers = velocity if momentum else ()
    options: dict[str, Any] = {"dampening": 0.0, "nesterov": False, "maximize": False, "is_first_step": False}
    options |= {"weight_decay": weight_decay, "momentum": momentum, "lr": lr}
    torch._fused_sgd_(parameters, gradients, buffers, **options)


@torch.no_grad()
def muon_step(
    parameters: tuple[Tensor, ...],
    velocity: tuple[Tensor, ...],
    gradients: tuple[Tensor, ...],
    lr: float | Tensor,
    momentum: float,
    weight_decay: float,
) -> None:
    """Updates matrices and kernels in place by Muon (Jordan et al., 2024), and all other parameters by `sgd_step`.

    Muon takes the rule of torch.optim.Muon with its defaults: Nesterov momentum, and the step of a matrix [A, B] scaled
    by sqrt(max(1, A / B)). A kernel [A, C, H, W] is a matrix [A, C H W]. Biases, norms and the last matrix, the
    classifier, take SGD. Both have the same learning rate, momentum and factor of weight decay (tadperf).
    """
    matrices = [number for number, parameter in enumerate(parameters) if parameter.ndim > 1][:-1]
    for number in matrices:
        parameter, gradient, average = parameters[number], gradients[number], velocity[number]
        average.lerp_(gradient, 1 - momentum)
        update = orthogonalise(gradient.lerp(average, momentum).flatten(1)).view(parameter.shape)
        scale = math.sqrt(max(1, parameter.shape[0] / parameter[0].numel()))
        parameter.mul_(1 - lr * weight_decay)
        if isinstance(lr, Tensor):
            parameter.sub_(update * (lr * scale))
        else:
            parameter.add_(update, alpha=-lr * scale)
    others = sorted(set(range(len(parameters))) - set(matrices))
    rest, slow, slopes = (tuple(v[number] for number in others) for v in (parameters, velocity, gradients))
    sgd_step(rest, slow, slopes, lr, momentum, weight_decay)


def orthogonalise(matrix: Tensor, dtype: torch.dtype = torch.bfloat16) -> Tensor:
    """Returns U f(S) V^T of a matrix U S V^T [A, B]: five Newton-Schulz steps bring singular values to 0.7 to 1.2.

    Each step is X -> a X + (b X X^T + c (X X^T)^2) X, from X = matrix / |matrix|, as in torch.optim.Muon.
    """
    wide = matrix.shape[0] <= matrix.shape[1]
    x = matrix.to(dtype) if wide else matrix.to(dtype).T
    x = x / x.norm().clamp(min=MUON_EPS)
    a, b, c = MUON_COEFFICIENTS
    for _ in range(MUON_STEPS):
        gram = x @ x.T
        x = torch.addmm(x, torch.addmm(gram, gram, gram, beta=b, alpha=c), x, beta=a)
    return x if wide else x.T


def gsam_gradient(
    gradient: Callable[[], tuple[Tensor, ...]], parameters: tuple[Tensor, ...], rho: float, alpha: float
) -> tuple[Tensor, ...]:
    """Returns the gradient of GSAM (Zhuang et al., 2022) on ASAM's ellipsoid (Kwon et al., 2021), for flat minima.

    gradient: computes the gradient at the current parameters p. Moves to p + rho p^2 g / |p g|, takes the gradient g'
    there, and subtracts alpha times the part of g that is orthogonal to g'. FTD's and DATM's public code do the same;
    alpha = 0 is ASAM. The parameters are restored. CUDA takes other sums than the CPU, with few launches.
    """
    if parameters[0].is_cuda:
        return gsam_gradient_foreach(gradient, parameters, rho, alpha)
    initial = gradient()
    with torch.no_grad():
        before = [p.clone() for p in parameters]
        squares = torch.zeros((), device=initial[0].device, dtype=initial[0].dtype)
        for p, g in zip(parameters, initial, strict=True):
            squares = squares + (p * g).square().sum()
        length = squares.sqrt()
        for p, g in zip(parameters, initial, strict=True):
            p.add_(p.square() * g * (rho / (length + 1e-12)))
    perturbed = gradient()
    with torch.no_grad():
        for p, b in zip(parameters, before, strict=True):
            p.copy_(b)
        product = sum((g * h).sum() for g, h in zip(initial, perturbed, strict=True))
        share = product / (sum(h.square().sum() for h in perturbed) + 1e-12)
        return tuple(h - alpha * (g - share * h) for g, h in zip(initial, perturbed, strict=True))


def gsam_gradient_foreach(
    gradient: Callable[[], tuple[Tensor, ...]], parameters: tuple[Tensor, ...], rho: float, alpha: float
) -> tuple[Tensor, ...]:
    """Computes `gsam_gradient` for all parameters at once, by torch._foreach functions."""
    initial = gradient()
    with torch.no_grad():
        before = [torch.empty_like(p) for p in parameters]
        torch._foreach_copy_(before, parameters)
        products = torch._foreach_mul(parameters, initial)
        length = torch.stack(torch._foreach_norm(products)).square().sum().sqrt()
        torch._foreach_mul_(products, parameters)
        torch._foreach_mul_(products, rho / (length + 1e-12))
        torch._foreach_add_(parameters, products)
    perturbed = gradient()
    with torch.no_grad():
        torch._foreach_copy_(parameters, before)
        product = torch.cat([part.reshape(-1) for part in torch._foreach_mul(initial, perturbed)]).sum()
        share = product / (torch.stack(torch._foreach_norm(perturbed)).square().sum() + 1e-12)
        # g' - alpha (g - share g')
        result = torch._foreach_mul(perturbed, 1 + alpha * share)
        torch._foreach_add_(result, initial, alpha=-alpha)
        return tuple(result)


UPDATES = {"sgd": sgd_step, "muon": muon_step}
