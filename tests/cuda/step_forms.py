"""One inner step of matching and its products on the twin: types of the maps, errors, kernels and bytes of each form.

python tests/cuda/run_twin.py tests/cuda/step_forms.py [width side batch]
"""

from __future__ import annotations

import json
import sys
from typing import Any

import costs
import torch
from torch import Tensor

from tadperf.config import NetConfig
from tadperf.matching import convnet_second_order, step_backends
from tadperf.nets import fused, training
from tadperf.nets.architectures import build
from tadperf.nets.flat import FlatNet

NORMS = ("norm_relu_pool_moments", "norm_relu_pool_gradient", "norm_relu_pool_dual", "norm_relu_pool_dual_gradient")
FORMS = {"float32": (torch.float32, 0), "bfloat16": (torch.bfloat16, 0), "padded": (torch.float32, 4)}


def record_types(module: Any, names: tuple[str, ...], types: list[str]) -> None:
    """Makes these functions add the type of their first tensor to `types`."""
    for name in names:
        setattr(module, name, _with_type(getattr(module, name), types))


def _with_type(function: Any, types: list[str]) -> Any:
    def run(first: Any, *args: Any) -> Any:
        types.append(str((first if isinstance(first, Tensor) else first[0]).dtype).removeprefix("torch."))
        return function(first, *args)

    return run


def inputs(config: NetConfig, side: int, batch: int) -> tuple[FlatNet, list[Tensor]]:
    net, generator = FlatNet(build(config, (3, side, side), 10, 0)), torch.Generator().manual_seed(0)
    lam = torch.randn(net.num_parameters, generator=generator)
    x, y = torch.randn(batch, 3, side, side, generator=generator), torch.randn(batch, 10, generator=generator)
    return net, [net.flatten(), lam, x, y]


def matching_step(net: FlatNet, values: list[Tensor], precision: torch.dtype) -> list[Tensor]:
    """Returns the gradient of a step and all of its products."""
    theta, lam, x, y = values
    backend = step_backends.eager(net, precision)
    assert backend.name == "formulas"
    products = [value for value in backend.products(theta, lam, x, y, True) if value is not None]
    return [backend.gradient(theta, x, y), *products]


def training_gradient(net: FlatNet, values: list[Tensor], precision: torch.dtype) -> list[Tensor]:
    """Returns the gradient of the weights in the training of an expert."""
    _, _, x, y = values
    predict = fused.fused_forward(net.module)
    if x.is_cuda and precision != torch.float32:
        predict = training.in_precision(predict, precision)
    gradients = torch.autograd.grad(predict(x), list(net.module.parameters()), y, allow_unused=True)
    return [gradient for gradient in gradients if gradient is not None]


def measure(config: NetConfig, side: int, batch: int) -> dict[str, Any]:
    types: list[str] = []
    record_types(convnet_second_order, NORMS, types)
    record_types(fused, ("norm_relu_pool",), types)
    found: dict[str, Any] = {}
    for name, function in (("matching", matching_step), ("training", training_gradient)):
        net, values = inputs(config, side, batch)
        expected = function(net, values, torch.float32)
        net.module.cuda()
        on_device = [value.cuda() for value in values]
        for form, (precision, fused.PAD_IMAGES_TO) in FORMS.items():
            types.clear()
            costs.total, costs.counting = costs.Costs(), True
            results = function(net, on_device, precision)
            costs.counting = False
            errors = [float((a.cpu() - b).norm() / b.norm()) for a, b in zip(results, expected, strict=True)]
            row = {"types": sorted(set(types)), "error": max(errors), "dtypes": [str(r.dtype) for r in results]}
            found[f"{name} {form}"] = row | {"kernels": costs.total.kernels, "bytes": costs.total.bytes}
    return found


if __name__ == "__main__":
    width, side, batch = map(int, sys.argv[1:] or (16, 8, 6))
    config = NetConfig.model_validate({"width": width, "depth": 2 if side < 32 else 3})
    print(json.dumps(measure(config, side, batch)))
