"""Runs tadperf's Triton launchers on the twin: all of their code up to the launch, then the operator's CPU form.

A launch is counted and its tensors are checked. The values of the results come from the operator's CPU form, which
tests/kernels compares with the Triton form in Triton's interpreter.
"""

from __future__ import annotations

import importlib
import pkgutil
from collections.abc import Callable
from typing import Any

import costs
import torch
from counters import LAUNCH, counters
from graphs import Graph
from torch import Tensor
from torch.utils._python_dispatch import _disable_current_modes
from trees import leaves, tensors_of
from twin import Twin, note_access, unwrap

# CPU forms whose arguments differ from those of the launcher. For all others, ops.<module>.<name> takes the same.
CPU_FORMS: dict[str, Callable[..., Any]] = {}
# For launchers that fill some of their arguments: (arguments, result) -> the tensors that the CPU form returns.
FILLED: dict[str, Callable[[tuple[Any, ...], Any], Any]] = {
    "norm_relu_pool_dual.norm_relu_pool_dual": lambda args, _: (args[3], args[2]),
    "norm_relu_pool_dual.norm_relu_pool_dual_gradient": lambda args, result: (args[4], result),
}


def cpu_form(name: str) -> Callable[[Callable[..., Any]], Callable[..., Any]]:
    """Registers the CPU form of the launcher `<module>.<name>`."""

    def register(function: Callable[..., Any]) -> Callable[..., Any]:
        CPU_FORMS[name] = function
        return function

    return register


@cpu_form("norm_relu_pool.norm_relu_pool")
def _norm_relu_pool(*args: Any) -> Any:
    from tadperf.kernels.ops.norm_relu_pool import norm_relu_pool_moments

    return norm_relu_pool_moments(*args)


@cpu_form("norm_relu_pool_dual.norm_relu_pool_dual")
def _norm_relu_pool_dual(x: Any, affine: Any, moments: Tensor, y: Any, eps: float, pool: bool) -> Any:
    from tadperf.kernels import norm_relu_pool_dual

    return norm_relu_pool_dual(x, affine, eps, pool)


@cpu_form("norm_relu_pool_dual.norm_relu_pool_dual_gradient")
def _norm_relu_pool_dual_gradient(grad: Any, x: Any, affine: Any, moments: Tensor, grad_x: Any, pool: bool) -> Any:
    from tadperf.kernels import norm_relu_pool_dual_gradient

    grad_x, *by_channel = norm_relu_pool_dual_gradient(grad, x, affine, moments, pool)
    return grad_x, torch.stack(by_channel)


@cpu_form("mixture.mixture")
def _mixture(
    losses: Tensor, groups: Tensor, count: int, iterations: int, tolerance: float, floor: float, monotone: bool
) -> Any:
    from tadperf.kernels import mixture

    options = {"iterations": iterations, "tolerance": tolerance, "floor": floor, "monotone": monotone}
    return mixture(losses, groups, count, **options)


@cpu_form("trajectory_distance.gradient")
def _trajectory_gradient(*args: Any) -> Any:
    from tadperf.kernels.ops.trajectory_distance import _gradients

    return _gradients(*args)


@cpu_form("trajectory_distance.trajectory_distance")
def _trajectory_distance(*args: Any) -> Any:
    from tadperf.kernels import trajectory_distance

    return trajectory_distance(*args)


@cpu_form("per_sample_linear.per_sample_linear")
def _per_sample_linear(*args: Any) -> Any:
    from tadperf.kernels.ops.per_sample_linear import _forward

    return _forward(*args)


@cpu_form("diverse_pick.diverse_pick")
def _diverse_pick(*args: Any) -> Any:
    from tadperf.kernels import diverse_pick

    *tensors, top_k, weight = args
    return diverse_pick(*tensors, top_k=top_k, weight=weight)


def install() -> None:
    """Makes the operators take their Triton launchers for Twins, and the launchers end without a launch."""
    from tadperf.kernels import dispatch, gpu

    gpu.available = lambda: True
    dispatch.PLAIN_TYPES = (*dispatch.PLAIN_TYPES, Twin)
    dispatch._no_mode = lambda: torch._C._len_torch_dispatch_stack() <= 1  # the mode of the twin
    try:
        from triton.runtime.jit import JITFunction
    except ImportError:
        gpu.available = lambda: False
        return
    JITFunction.run = _count_launch
    for info in pkgutil.iter_modules(gpu.__path__):
        if info.name in ("launch_configs", "trial"):  # they launch nothing
            continue
        try:
            module = importlib.import_module(f"{gpu.__name__}.{info.name}")
        except ImportError:  # raised again by the operators that need it
            continue
        for name, value in list(vars(module).items()):
            launches = callable(value) and getattr(value, "__module__", "") == module.__name__
            if launches and not name.startswith("_") and not isinstance(value, (JITFunction, type)):
                setattr(module, name, _with_values(f"{info.name}.{name}", value))


def _count_launch(self: Any, *args: Any, grid: Any, warmup: bool, **_: Any) -> None:
    """Replaces the launch of a kernel."""
    if any(isinstance(x, Tensor) and not isinstance(x, Twin) for x in args):
        counters.fail(f"the Triton kernel {self.fn.__name__} gets a CPU tensor")
    counters.add(LAUNCH, f"triton {self.fn.__name__}")


def _with_values(name: str, launcher: Callable[..., Any]) -> Callable[..., Any]:
    def run(*args: Any, **kwargs: Any) -> Any:
        outside = _launches_inside == 0
        if not outside or not any(isinstance(leaf, Twin) for leaf in leaves((args, kwargs))):
            return launcher(*args, **kwargs)
        before = counters.counts[LAUNCH]
        result = _run_launcher(launcher, args, kwargs)
        filled = FILLED[name](args, result) if name in FILLED else result
        targets = [unwrap(tensor) for tensor in tensors_of(filled)]
        compute, values = _cpu_form(name), unwrap((args, kwargs))
        if costs.counting:
            costs.launcher(values, targets, counters.counts[LAUNCH] - before, Graph.recording)

        def fill() -> None:
            with _disable_current_modes(), torch.no_grad():
                computed = compute(*values[0], **values[1])
                for target, value in zip(targets, tensors_of(computed), strict=True):
                    assert (target.shape, target.dtype) == (value.shape, value.dtype), f"{name}: forms differ"
                    if target is not value:
                        target.copy_(value)

        note_access([leaf for leaf in leaves((args, kwargs)) if isinstance(leaf, Twin)], targets)
        if Graph.recording is not None:
            Graph.recording.keep(targets)
            Graph.recording.add(fill, (), {}, None)
        fill()
        return result

    return run


_launches_inside = 0  # launchers that call each other give values once, in the outermost


def _run_launcher(launcher: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    global _launches_inside
    _launches_inside += 1
    try:
        return launcher(*args, **kwargs)
    finally:
        _launches_inside -= 1


def _cpu_form(name: str) -> Callable[..., Any]:
    module, function = name.split(".")
    if name in CPU_FORMS:
        return CPU_FORMS[name]
    form = getattr(importlib.import_module(f"tadperf.kernels.ops.{module}"), function, None)
    assert form is not None, f"tests/cuda/launchers.py has no CPU form of kernels/gpu/{module}.{function}"
    return form
