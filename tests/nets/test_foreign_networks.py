"""Networks that tadperf did not build: their accuracy and their outputs equal those of plain PyTorch."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from sklearn.datasets import load_digits
from torch import Tensor, nn
from torch.nn.utils import parametrize

from tadperf.artifact import DistilledSet
from tadperf.config import Config, NetConfig
from tadperf.data.normalise import Normaliser
from tadperf.errors import UserError
from tadperf.nets.architectures import build
from tadperf.nets.fused import fused_forward
from tadperf.nets.training import Recipe, accuracy

pytestmark = pytest.mark.usefixtures("one_thread")
WIDTH = 32


def network(
    conv: dict[str, Any] | None = None,
    norm: nn.Module | None = None,
    pool: nn.Module | None = None,
    kind: Callable[..., nn.Sequential] = nn.Sequential,
    channels: int = 1,
) -> nn.Sequential:
    """Builds a ConvNet of two blocks; the second one has the given convolution, norm and pool."""
    return kind(
        nn.Conv2d(channels, WIDTH, 3, padding=1),
        nn.GroupNorm(WIDTH, WIDTH),
        nn.ReLU(),
        nn.AvgPool2d(2),
        nn.Conv2d(WIDTH, WIDTH, **{"kernel_size": 3, "padding": 1, **(conv or {})}),
        nn.GroupNorm(WIDTH, WIDTH) if norm is None else norm,
        nn.ReLU(),
        nn.AvgPool2d(2) if pool is None else pool,
        nn.AdaptiveAvgPool2d(2),
        nn.Flatten(),
        nn.Linear(4 * WIDTH, 10),
    )


class Reversed(nn.Sequential):
    """A Sequential whose `forward` does more than its layers."""

    def forward(self, input: Tensor) -> Tensor:
        return super().forward(input).flip(1)


class View(nn.Module):
    """Flattens by Tensor.view, which fails for channels_last maps."""

    def forward(self, x: Tensor) -> Tensor:
        return x.view(len(x), -1)


class Doubled(nn.Module):
    def forward(self, weight: Tensor) -> Tensor:
        return 2 * weight


class Shifted(nn.Conv2d):
    """A convolution with a `forward` of its own."""

    def forward(self, input: Tensor) -> Tensor:
        return super().forward(input.roll(1, 3))


def with_hook() -> nn.Sequential:
    module = network()
    module[5].register_forward_hook(lambda _, inputs, output: output.roll(1, 1))
    return module


def with_pre_hook() -> nn.Sequential:
    module = network()
    module.register_forward_pre_hook(lambda _, inputs: (inputs[0].flip(3),))
    return module


def with_parametrized_weight() -> nn.Sequential:
    module = network()
    parametrize.register_parametrization(module[4], "weight", Doubled())
    return module


def with_own_convolution() -> nn.Sequential:
    module = network()
    module[4] = Shifted(WIDTH, WIDTH, 3, padding=1)
    return module


def with_view() -> nn.Sequential:
    module = network()
    module[9] = View()
    return module


def with_first_layer(**settings: Any) -> nn.Sequential:
    module = network()
    module[0] = nn.Conv2d(1, WIDTH, **{"kernel_size": 3, "padding": 1, **settings})
    return module


def with_replaced_forward() -> nn.Sequential:
    module = network()
    forward = module[4].forward
    module[4].forward = lambda input: forward(input.flip(2))
    return module


NETWORKS: dict[str, Callable[[], nn.Sequential]] = {
    "circular padding": lambda: network({"padding_mode": "circular"}),
    "reflected padding": lambda: network({"padding_mode": "reflect"}),
    "padding by name": lambda: network({"padding": "same"}),
    "no padding": lambda: network({"padding": 0}),
    "uneven padding": lambda: network({"padding": (1, 2)}),
    "dilation": lambda: network({"dilation": 2, "padding": 2}),
    "groups": lambda: network({"groups": 4}),
    "stride": lambda: network({"stride": 2}),
    "no bias": lambda: network({"bias": False}),
    "5 x 5": lambda: network({"kernel_size": 5, "padding": 2}),
    "pool with stride 1": lambda: network(pool=nn.AvgPool2d(2, stride=1)),
    "pool with padding": lambda: network(pool=nn.AvgPool2d(2, padding=1)),
    "pool with ceil_mode": lambda: network({"padding": 0, "kernel_size": 2}, pool=nn.AvgPool2d(2, ceil_mode=True)),
    "pool with divisor": lambda: network(pool=nn.AvgPool2d(2, divisor_override=1)),
    "pool of 3 x 3": lambda: network(pool=nn.AvgPool2d(3, stride=1)),
    "maximum pool": lambda: network(pool=nn.MaxPool2d(2)),
    "norm without weight": lambda: network(norm=nn.GroupNorm(WIDTH, WIDTH, affine=False)),
    "norm of groups": lambda: network(norm=nn.GroupNorm(4, WIDTH)),
    "large eps": lambda: network(norm=nn.GroupNorm(WIDTH, WIDTH, eps=0.5)),
    "batch norm": lambda: network(norm=nn.BatchNorm2d(WIDTH)),
    "dropout": lambda: network(pool=nn.Dropout(0.9)),
    "subclass of Sequential": lambda: network(kind=Reversed),
    "hook": with_hook,
    "hook before": with_pre_hook,
    "replaced forward": with_replaced_forward,
    "parametrized weight": with_parametrized_weight,
    "subclass of Conv2d": with_own_convolution,
    "layer that needs contiguous maps": with_view,
    "one channel, stride 2": lambda: with_first_layer(stride=2),
    "one channel, uneven padding": lambda: with_first_layer(padding=(1, 2)),
    "one channel, circular padding": lambda: with_first_layer(padding_mode="circular"),
    "one channel, dilation": lambda: with_first_layer(dilation=2),
}


def digits() -> tuple[Tensor, Tensor]:
    """Returns images uint8 [N, 1, 8, 8] and labels of the built-in digits."""
    pixels, labels = load_digits(return_X_y=True)
    return torch.from_numpy(pixels * 15.9).byte().view(-1, 1, 8, 8), torch.from_numpy(labels)


@pytest.fixture(scope="module")
def distilled() -> DistilledSet:
    """Returns a set whose normaliser changes the images. The images of the set do not matter here."""
    net = NetConfig.model_validate({"width": 4, "depth": 1})
    return DistilledSet(
        images=torch.randn(10, 1, 8, 8),
        labels=torch.arange(10),
        lr=0.01,
        normaliser=Normaliser(torch.tensor([0.3]), torch.tensor([0.4])),
        class_names=tuple(map(str, range(10))),
        net=net,
        recipe=Recipe(1, 10, 0.01, 0.9, 0.0, "none"),
        config=Config().model_dump(mode="json"),
        augment="none",
        seed=0,
        versions={},
        data={},
    )


def train(module: nn.Module, images: Tensor, labels: Tensor) -> None:
    """Trains the network in plain PyTorch, so that its accuracy depends on its settings."""
    parameters = list(module.parameters())
    for _ in range(8):
        loss = nn.functional.cross_entropy(module(images[:300]), labels[:300])
        for parameter, gradient in zip(parameters, torch.autograd.grad(loss, parameters), strict=True):
            parameter.data -= 0.3 * gradient


@pytest.mark.parametrize("name", NETWORKS)
def test_the_accuracy_equals_that_of_a_plain_loop(distilled, name):
    torch.manual_seed(0)
    module, (images, labels) = NETWORKS[name](), digits()
    normalised = distilled.normaliser(images)
    train(module, normalised, labels)
    module.eval()
    with torch.no_grad():
        logits = torch.cat([module(part) for part in normalised.split(100)])
    module.train()
    module[-1].eval()
    modes = [layer.training for layer in module.modules()]
    score = distilled.accuracy(module, (images, labels))
    assert abs(score - float((logits.argmax(1) == labels).double().mean())) <= 1 / len(labels)  # one tie may round
    assert 0.2 < score < 1
    assert [layer.training for layer in module.modules()] == modes
    module.eval()
    with torch.no_grad():
        torch.testing.assert_close(fused_forward(module)(normalised), logits, rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize("name", ["convnet", "vgg11"])
def test_networks_of_tadperf_are_fused(name):
    module = build(NetConfig.model_validate({"name": name, "width": 8}), (1, 8, 8), 3, 0)
    assert fused_forward(module) is not module


def test_an_image_without_batch_dimension_runs_the_network_itself():
    module, image = nn.Sequential(nn.Conv2d(1, 4, 3), nn.ReLU(), nn.Flatten(0), nn.Linear(144, 3)), torch.randn(1, 8, 8)
    torch.testing.assert_close(fused_forward(module)(image), module(image))


def test_a_network_without_parameters_has_an_accuracy():
    images, labels = torch.eye(4).view(4, 1, 2, 2), torch.tensor([0, 1, 2, 0])
    for module in (nn.Flatten(), nn.Sequential(nn.Flatten(), nn.ReLU())):
        assert accuracy(module, images, labels) == 0.75


def test_an_accuracy_needs_images():
    with pytest.raises(UserError, match=r"^images: 0: there are none to test the network on"):
        accuracy(nn.Flatten(), torch.zeros(0, 1, 2, 2), torch.zeros(0, dtype=torch.int64))
