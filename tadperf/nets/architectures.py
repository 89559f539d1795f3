"""The networks of the field in their small-image forms, and a network seen as one flat vector of parameters."""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
from torch import Tensor, nn

from tadperf.config import NetConfig

Shape = tuple[int, int, int]  # channels, height, width


def norm_layer(kind: str, channels: int, size: int) -> nn.Module:
    """A normalisation layer; `size` is the side of its feature map.

    Instance norm of a 1 x 1 map would erase it (value minus its own mean): there all channels are normalised together.
    """
    if kind == "instance":
        return nn.GroupNorm(channels if size > 1 else 1, channels)
    if kind == "group":
        return nn.GroupNorm(math.gcd(4, channels), channels)
    if kind == "layer":
        return nn.GroupNorm(1, channels)
    if kind == "batch":
        return nn.BatchNorm2d(channels)
    return nn.Identity()


def convnet(
    shape: Shape, num_classes: int, depth: int | None = None, width: int = 128, norm: str = "instance"
) -> nn.Module:
    """The ConvNet of dataset condensation (Zhao et al., 2021): blocks of conv 3 x 3, norm, ReLU and average pool.

    By default blocks are added until the feature map is 4 x 4: 3 for 32 x 32, 4 for 64 x 64; 28 x 28 is padded to 32.
    """
    channels, height, size = shape
    assert height == size, "networks take square images"
    padding = 3 if size == 28 else 1
    size += 2 * (padding - 1)
    depth = depth or max(1, round(math.log2(size / 4)))
    layers: list[nn.Module] = []
    for block in range(depth):
        layers += [
            nn.Conv2d(channels, width, 3, padding=padding if block == 0 else 1),
            norm_layer(norm, width, size),
            nn.ReLU(),
        ]
        channels = width
        if size > 1:
            layers.append(nn.AvgPool2d(2))
            size //= 2
    return nn.Sequential(*layers, nn.Flatten(), nn.Linear(channels * size * size, num_classes))


class Residual(nn.Module):
    """Basic block of ResNet (He et al., 2016)."""

    def __init__(self, channels: int, planes: int, stride: int, norm: str, size: int):
        super().__init__()
        self.body = nn.Sequential(
            nn.Conv2d(channels, planes, 3, stride, 1, bias=False),
            norm_layer(norm, planes, size),
            nn.ReLU(),
            nn.Conv2d(planes, planes, 3, 1, 1, bias=False),
            norm_layer(norm, planes, size),
        )
        self.shortcut = nn.Sequential()
        if stride != 1 or channels != planes:
            self.shortcut = nn.Sequential(
                nn.Conv2d(channels, planes, 1, stride, bias=False), norm_layer(norm, planes, size)
            )

    def forward(self, x: Tensor) -> Tensor:
        return torch.relu(self.body(x) + self.shortcut(x))


def resnet18(shape: Shape, num_classes: int, norm: str = "instance") -> nn.Module:
    """ResNet-18 without the stem's stride and pool (its 32 x 32 form); strides stop where the map is 4 x 4."""
    channels, _, size = shape
    layers: list[nn.Module] = [nn.Conv2d(channels, 64, 3, 1, 1, bias=False), norm_layer(norm, 64, size), nn.ReLU()]
    channels = 64
    for stage, planes in enumerate((64, 128, 256, 512)):
        stride = 2 if stage and size > 4 else 1
        size = (size - 1) // stride + 1
        layers += [Residual(channels, planes, stride, norm, size), Residual(planes, planes, 1, norm, size)]
        channels = planes
    return nn.Sequential(*layers, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(channels, num_classes))


def alexnet(shape: Shape, num_classes: int) -> nn.Module:
    """AlexNet in dataset condensation's form for 32 x 32 images: five convolutions, three pools, one linear layer."""
    channels, _, size = shape
    layers: list[nn.Module] = []
    for planes, kernel, pool in ((128, 5, True), (192, 5, True), (256, 3, False), (192, 3, False), (192, 3, True)):
        layers += [nn.Conv2d(channels, planes, kernel, padding=kernel // 2), nn.ReLU()]
        channels = planes
        if pool and size > 1:
            layers.append(nn.MaxPool2d(2))
            size //= 2
    return nn.Sequential(*layers, nn.Flatten(), nn.Linear(channels * size * size, num_classes))


def vgg11(shape: Shape, num_classes: int, norm: str = "instance") -> nn.Module:
    """VGG-11 with normalisation and one linear layer; pools stop where the map is 1 x 1."""
    channels, _, size = shape
    layers: list[nn.Module] = []
    for planes, pool in (
        (64, True),
        (128, True),
        (256, False),
        (256, True),
        (512, False),
        (512, True),
        (512, False),
        (512, True),
    ):
        layers += [nn.Conv2d(channels, planes, 3, padding=1), norm_layer(norm, planes, size), nn.ReLU()]
        channels = planes
        if pool and size > 1:
            layers.append(nn.MaxPool2d(2))
            size //= 2
    return nn.Sequential(*layers, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(channels, num_classes))


def build(net: NetConfig, shape: Shape, num_classes: int, seed: int) -> nn.Module:
    """A fresh network for images of `shape`; its weights depend on `seed` alone and no global state is touched."""
    makers: dict[str, Callable[[], nn.Module]] = {
        "convnet": lambda: convnet(shape, num_classes, net.depth, net.width, net.norm),
        "resnet18": lambda: resnet18(shape, num_classes, net.norm),
        "alexnet": lambda: alexnet(shape, num_classes),
        "vgg11": lambda: vgg11(shape, num_classes, net.norm),
    }
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return makers[net.name]()
