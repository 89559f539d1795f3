"""For networks of other people the adjoint equals the full unroll, by formulas or by autograd."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from tadperf.config import MatchConfig
from tadperf.errors import UserError
from tadperf.matching.convnet_second_order import convnet_form
from tadperf.matching.gradient import adjoint, unroll
from tadperf.matching.trajectories import draw_steps
from tadperf.nets.flat import FlatNet

CLASSES, CHANNELS, SIZE, WIDTH = 3, 3, 8, 6
pytestmark = pytest.mark.usefixtures("one_thread")


def block(
    conv: dict[str, Any] | None = None,
    norm: nn.Module | None = None,
    relu: nn.Module | None = None,
    pool: nn.Module | None = None,
) -> list[nn.Module]:
    convolution: dict[str, Any] = {"kernel_size": 3, "padding": 1} | (conv or {})
    return [
        nn.Conv2d(CHANNELS, WIDTH, **convolution),
        norm or nn.GroupNorm(WIDTH, WIDTH),
        relu or nn.ReLU(),
        pool or nn.AvgPool2d(2),
    ]


def network(layers: list[nn.Module], bias: bool = True) -> nn.Sequential:
    with torch.no_grad():
        features = nn.Sequential(*layers, nn.Flatten())(torch.zeros(2, CHANNELS, SIZE, SIZE)).shape[1]
    return nn.Sequential(*layers, nn.Flatten(), nn.Linear(features, CLASSES, bias=bias))


def pool_of_odd_map(pool: nn.Module) -> nn.Sequential:
    """Returns a network whose last pool takes a 3 x 3 map."""
    second = [nn.Conv2d(WIDTH, 4, 3, padding=1), nn.GroupNorm(4, 4), nn.ReLU(), pool]
    return network([*block({"padding": 0}), *second])


class ScaledReLU(nn.ReLU):
    def forward(self, input: Tensor) -> Tensor:
        return 0.5 * super().forward(input)


class Residual(nn.Sequential):
    def forward(self, input: Tensor) -> Tensor:
        return super().forward(input) + input.mean()


def with_hook(net: nn.Sequential) -> nn.Sequential:
    net[0].register_forward_hook(lambda module, inputs, output: 2 * output + output.square())
    return net


def with_own_forward(net: nn.Sequential) -> nn.Sequential:
    plain = net[2].forward
    net[2].forward = lambda input: plain(input) ** 2
    return net


def with_parametrization(net: nn.Sequential) -> nn.Sequential:
    nn.utils.parametrizations.weight_norm(net[0])
    return net


def with_shared_kernel() -> nn.Sequential:
    second = nn.Conv2d(CHANNELS, CHANNELS, 3, padding=1)
    first = nn.Conv2d(CHANNELS, CHANNELS, 3, padding=1)
    second.weight = first.weight
    norms = [nn.GroupNorm(CHANNELS, CHANNELS) for _ in range(2)]
    return network([first, norms[0], nn.ReLU(), nn.AvgPool2d(2), second, norms[1], nn.ReLU(), nn.AvgPool2d(2)])


def with_pool_twice() -> nn.Sequential:
    pool = nn.AvgPool2d(2)
    return network([*block(pool=pool), pool])


def subclass() -> nn.Sequential:
    return Residual(*network(block()))


COVERED: dict[str, Callable[[], nn.Sequential]] = {
    "tadperf's own block": lambda: network(block()),
    "no pool": lambda: network([*block()[:3]]),
    "no padding": lambda: network(block({"padding": 0})),
    "padding 3": lambda: network(block({"padding": 3})),
    "pool of an odd map": lambda: pool_of_odd_map(nn.AvgPool2d(2)),
    "another eps": lambda: network(block(norm=nn.GroupNorm(WIDTH, WIDTH, eps=0.1))),
    "pool without counting the padding": lambda: network(block(pool=nn.AvgPool2d(2, count_include_pad=False))),
    "named layers": lambda: nn.Sequential(
        OrderedDict(zip(("conv", "norm", "relu", "pool", "flatten", "head"), network(block()), strict=True))
    ),
}
NOT_COVERED: dict[str, Callable[[], nn.Sequential]] = {
    "overlapping pool": lambda: network(block(pool=nn.AvgPool2d(3, 2, 1))),
    "pool of 4": lambda: network(block(pool=nn.AvgPool2d(4))),
    "pool of stride 1": lambda: network(block(pool=nn.AvgPool2d(2, 1))),
    "pool that rounds up": lambda: pool_of_odd_map(nn.AvgPool2d(2, ceil_mode=True)),
    "pool with another divisor": lambda: network(block(pool=nn.AvgPool2d(2, divisor_override=3))),
    "pool used twice": with_pool_twice,
    "reflecting padding": lambda: network(block({"padding_mode": "reflect"})),
    "circular padding": lambda: network(block({"padding_mode": "circular"})),
    "padding by name": lambda: network(block({"padding": "same"})),
    "padding that is not square": lambda: network(block({"padding": (1, 2)})),
    "stride": lambda: network(block({"stride": 2})),
    "dilation": lambda: network(block({"dilation": 2})),
    "groups": lambda: network(block({"groups": 3})),
    "kernel 5": lambda: network(block({"kernel_size": 5, "padding": 2})),
    "no bias": lambda: network(block({"bias": False})),
    "norm without weights": lambda: network(block(norm=nn.GroupNorm(WIDTH, WIDTH, affine=False))),
    "group norm": lambda: network(block(norm=nn.GroupNorm(2, WIDTH))),
    "classifier without bias": lambda: network(block(), bias=False),
    "subclass of ReLU": lambda: network(block(relu=ScaledReLU())),
    "subclass of Sequential": subclass,
    "forward hook": lambda: with_hook(network(block())),
    "replaced forward": lambda: with_own_forward(network(block())),
    "weight norm": lambda: with_parametrization(network(block())),
    "shared kernel": with_shared_kernel,
}


def assert_adjoint_is_exact(module: nn.Sequential) -> None:
    """Takes three steps with soft labels in float64. All parameters are random, so no derivative is 0 by symmetry."""
    generator = torch.Generator().manual_seed(0)
    net = FlatNet(module.double())
    start = net.flatten() + 0.3 * torch.randn(net.num_parameters, generator=generator, dtype=torch.float64)
    target = start + 0.1 * torch.randn(start.shape, generator=generator, dtype=torch.float64)
    images = torch.randn(6, CHANNELS, SIZE, SIZE, generator=generator, dtype=torch.float64)
    labels = torch.randn(6, CLASSES, generator=generator, dtype=torch.float64)
    steps = draw_steps(MatchConfig(steps=3, batch=4), 6, SIZE, "none", generator).split()
    arguments = net, start, target, images, labels, torch.tensor(0.3, dtype=torch.float64), steps
    ours, exact = adjoint(*arguments), unroll(*arguments)
    for name in ("loss", "images", "labels", "lr", "end"):
        truth = getattr(exact, name)
        assert truth.norm() > 0
        assert float((getattr(ours, name) - truth).norm() / truth.norm()) < 1e-8, name


@pytest.mark.parametrize("name", COVERED)
def test_formulas_are_exact_for_the_networks_that_they_cover(name):
    assert convnet_form(COVERED[name]()) is not None
    assert_adjoint_is_exact(COVERED[name]())


@pytest.mark.parametrize("name", NOT_COVERED)
def test_autograd_takes_the_networks_that_the_formulas_do_not_cover(name):
    assert convnet_form(NOT_COVERED[name]()) is None
    assert_adjoint_is_exact(NOT_COVERED[name]())


def test_a_network_with_running_statistics_is_refused():
    with pytest.raises(UserError, match="running statistics"):
        FlatNet(nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.Flatten(), nn.Linear(144, 3)))
