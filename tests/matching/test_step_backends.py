"""Compares one inner step and its products by formulas, by autograd and compiled, in float64."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor
from torch._dynamo.utils import counters

from tadperf.config import MatchConfig, NetConfig
from tadperf.matching import step_backends
from tadperf.matching.convnet_second_order import convnet_form
from tadperf.matching.gradient import adjoint, unroll
from tadperf.matching.step_backends import StepBackend
from tadperf.nets.architectures import build
from tadperf.nets.flat import FlatNet

pytestmark = pytest.mark.usefixtures("one_thread")

compute_adjoint: Any = adjoint  # a type checker cannot count the arguments of *single


def error(a: Any, b: Any) -> float:
    return float((a - b).norm() / b.norm())


def step_problem(
    config: NetConfig, shape: tuple[int, int, int], batch: int, dtype: torch.dtype, soft: bool
) -> tuple[FlatNet, Tensor, Tensor, Tensor, Tensor]:
    torch.manual_seed(0)
    net = FlatNet(build(config, shape, 10, 0).to(dtype))
    theta = net.flatten()
    y = torch.randn(batch, 10, dtype=dtype) if soft else torch.arange(batch) % 10
    return net, theta, torch.randn_like(theta), torch.randn(batch, *shape, dtype=dtype), y


def errors(backend: StepBackend, truth: StepBackend, *inputs: Any) -> list[float]:
    theta, lam, x, y = inputs
    pairs: list[Any] = [(backend.gradient(theta, x, y), truth.gradient(theta, x, y))]
    pairs += zip(backend.products(theta, lam, x, y, True), truth.products(theta, lam, x, y, True), strict=True)
    assert all((a is None) == (b is None) for a, b in pairs)
    return [error(a, b) for a, b in pairs if a is not None and b is not None]


SHAPES = [(2, 6, (3, 8, 8), 5), (2, 32, (1, 8, 8), 9), (3, 16, (3, 33, 33), 2), (None, 5, (1, 28, 28), 3)]


@pytest.mark.parametrize("soft", [False, True], ids=["hard", "soft"])
@pytest.mark.parametrize(("depth", "width", "shape", "batch"), SHAPES)
def test_formulas_equal_autograd(depth, width, shape, batch, soft):
    config = NetConfig(depth=depth, width=width)
    net, *double = step_problem(config, shape, batch, torch.float64, soft)
    backend = step_backends.eager(net)
    assert backend.name == "formulas"
    assert max(errors(backend, step_backends.autograd(net), *double)) < 1e-12
    theta, lam, x, y = (value.float() if value.is_floating_point() else value for value in double)
    single = FlatNet(build(config, shape, 10, 0))
    ours = step_backends.eager(single).products(theta, lam, x, y, True)
    autograd: Any = step_backends.autograd(net)  # a type checker cannot count the arguments of *double
    truth = autograd.products(*double, True)
    assert max(error(a.double(), b) for a, b in zip(ours[1:], truth[1:], strict=True) if a is not None) < 1e-5


def test_other_networks_use_autograd():
    others: list[dict[str, Any]] = [
        {"norm": "group", "width": 8},
        {"norm": "none"},
        {"name": "resnet18"},
        {"name": "alexnet"},
        {"depth": 4, "width": 4},  # the last map of an 8 x 8 image is 1 x 1: all channels share a norm
    ]
    for config in map(NetConfig.model_validate, others):
        module = build(config, (1, 8, 8), 10, 0)
        assert convnet_form(module) is None
        assert step_backends.eager(FlatNet(module)).name == "autograd"


@pytest.mark.parametrize("norm", ["instance", "layer"])
def test_compiled_equals_the_unrolled_gradient_in_float64(problem, norm):
    """Compares the gradient of three steps with the eager unroll, by formulas and by nested torch.func.grad."""
    config = NetConfig(depth=1, width=3, norm=norm)
    p = problem(soft=True, steps=3, size=6, count=4, batch=4, config=config)
    counters.clear()
    ours, reference = adjoint(*p, backend=step_backends.compiled(p.net)), unroll(*p)
    for name in ("loss", "images", "labels", "lr", "end"):
        assert error(getattr(ours, name), getattr(reference, name)) < 1e-10, name
    if norm == "instance":  # both regions are cached, so a second process starts warm
        assert counters["aot_autograd"]["total"] == 2
        assert not counters["aot_autograd"]["autograd_cache_bypass"]


def test_the_adjoint_in_float32_equals_the_unroll_to_1e_5(problem):
    config = NetConfig(depth=2, width=32)
    p = problem(soft=True, steps=8, size=8, count=20, batch=20, config=config)
    net = FlatNet(p.net.module.float())
    single = [value.float() if value.is_floating_point() else value for value in p[1:6]]
    reference = unroll(*p._replace(net=FlatNet(build(config, (3, 8, 8), 4, 3).double())))
    ours = compute_adjoint(net, *single, p.steps)
    assert error(ours.images.double(), reference.images) < 1e-5
    assert ours.labels is not None
    assert error(ours.labels.double(), reference.labels) < 1e-5


@pytest.mark.parametrize("norm", ["instance", "group"])
def test_the_error_of_bfloat16_convolutions_stays_below_10_percent(problem, norm):
    """Bounds the error of the images' gradient over 4 steps. bench/results/matching.md has the measured figures."""
    config = NetConfig(depth=2, width=16, norm=norm)
    p = problem(steps=4, size=8, count=8, batch=8, config=config, strategy="none")
    net = FlatNet(build(config, (3, 8, 8), 4, 3))
    single = [value.float() if value.is_floating_point() else value for value in p[1:6]]
    backend = step_backends.eager(net, torch.bfloat16)
    ours = compute_adjoint(net, *single, p.steps, backend=backend)
    assert ours.images.dtype == torch.float32
    assert 1e-4 < error(ours.images.double(), unroll(*p).images) < 0.1  # float32 would be below 1e-4


def test_auto_chooses_by_the_amount_of_work():
    small = FlatNet(build(NetConfig(width=8), (1, 8, 8), 10, 0))
    other = FlatNet(build(NetConfig(width=8, norm="group"), (1, 8, 8), 10, 0))
    config, cpu = MatchConfig(), torch.device("cpu")

    def name(net: FlatNet, iterations: int, compile: str = "auto") -> str:
        chosen = config.model_copy(update={"compile": compile})
        return step_backends.choose_step_backend(chosen, net, (50, 1, 8, 8), cpu, iterations).name

    assert name(small, 10**9) == "formulas"
    assert name(other, 10) == "autograd"
    assert name(other, 10**9) == "compiled, functional"
    assert name(other, 10**9, "off") == "autograd"
    assert name(small, 1, "on") == "compiled, formulas"


@pytest.mark.parametrize("implementation", ["triton", "reference"])
def test_auto_compiles_on_cuda_only_what_has_no_kernels(monkeypatch, implementation):
    small = FlatNet(build(NetConfig(width=8), (1, 8, 8), 10, 0))
    other = FlatNet(build(NetConfig(width=8, norm="group"), (1, 8, 8), 10, 0))
    found = {"norm_relu_pool_dual": {"cpu": "native", "cuda": implementation}}
    monkeypatch.setattr(step_backends, "implementations", lambda: found)

    def name(net: FlatNet, compile: str = "auto") -> str:
        config = MatchConfig().model_copy(update={"compile": compile})
        return step_backends.choose_step_backend(config, net, (50, 1, 8, 8), torch.device("cuda"), 10).name

    assert name(small) == ("formulas" if implementation == "triton" else "compiled, formulas")
    assert name(small, "on") == "compiled, formulas"
    assert name(small, "off") == "formulas"
    assert name(other) == "compiled, functional"
