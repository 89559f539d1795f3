"""The usual networks of dataset distillation, in their forms for small images."""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
from torch import Tensor, nn

from tadperf.config import NetConfig
from tadperf.errors import UserError

Shape = tuple[int, int, int]  # channels, height, width


def norm_layer(kind: str, channels: int, size: int) -> nn.Module:
    """Returns a normalisation layer for feature maps of side `size`.

    Instance norm would turn a 1 x 1 map into zero (the value minus its mean), so there all channels are normalised
    together.
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
    """Builds the ConvNet of dataset condensation (Zhao et al., 2021): blocks of 3 x 3 conv, norm, ReLU, average pool.

    depth: number of blocks; by default as many as bring the feature map to 4 x 4: 3 for 32 x 32, 4 for 64 x 64.
    Images of 28 x 28 are padded to 32 x 32.
    """
    channels, _, size = shape
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
    """The basic block of ResNet (He et al., 2016)."""

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


def resnet(shape: Shape, num_classes: int, blocks: int = 2, norm: str = "instance") -> nn.Module:
    """Builds a ResNet in its 32 x 32 form, without stride and pool in the stem; maps of 4 x 4 keep their size.

    blocks: in each of the four stages; 1 gives ResNet-10 and 2 gives ResNet-18.
    """
    channels, _, size = shape
    layers: list[nn.Module] = [nn.Conv2d(channels, 64, 3, 1, 1, bias=False), norm_layer(norm, 64, size), nn.ReLU()]
    channels = 64
    for stage, planes in enumerate((64, 128, 256, 512)):
        stride = 2 if stage and size > 4 else 1
        size = (size - 1) // stride + 1
        layers.append(Residual(channels, planes, stride, norm, size))
        layers += [Residual(planes, planes, 1, norm, size) for _ in range(blocks - 1)]
        channels = planes
    return nn.Sequential(*layers, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(channels, num_classes))


def alexnet(shape: Shape, num_classes: int) -> nn.Module:
    """Builds dataset condensation's AlexNet for 32 x 32 images: five convolutions, three pools, one linear layer."""
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
    """Builds VGG-11 with normalisation and one linear layer; there is no pool after a 1 x 1 map."""
    channels, _, size = shape
    layers: list[nn.Module] = []
    pooled = {1, 2, 4, 6, 8}  # convolutions that a pool follows
    for number, planes in enumerate((64, 128, 256, 256, 512, 512, 512, 512), start=1):
        layers += [nn.Conv2d(channels, planes, 3, padding=1), norm_layer(norm, planes, size), nn.ReLU()]
        channels = planes
        if number in pooled and size > 1:
            layers.append(nn.MaxPool2d(2))
            size //= 2
    return nn.Sequential(*layers, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(channels, num_classes))


class DenseLayer(nn.Module):
    """The bottleneck layer of DenseNet (Huang et al., 2017): adds `growth` channels to its input."""

    def __init__(self, channels: int, growth: int, norm: str, size: int):
        super().__init__()
        self.body = nn.Sequential(
            norm_layer(norm, channels, size),
            nn.ReLU(),
            nn.Conv2d(channels, 4 * growth, 1, bias=False),
            norm_layer(norm, 4 * growth, size),
            nn.ReLU(),
            nn.Conv2d(4 * growth, growth, 3, padding=1, bias=False),
        )

    def forward(self, x: Tensor) -> Tensor:
        return torch.cat([x, self.body(x)], 1)


def densenet121(shape: Shape, num_classes: int, norm: str = "instance", growth: int = 32) -> nn.Module:
    """Builds DenseNet-121 in its 32 x 32 form: a 3 x 3 stem without stride and pool, and no pool after a 1 x 1 map."""
    channels, _, size = shape
    layers: list[nn.Module] = [nn.Conv2d(channels, 2 * growth, 3, padding=1, bias=False)]
    channels = 2 * growth
    for stage, depth in enumerate((6, 12, 24, 16)):
        if stage:  # the transition before the stage halves the channels and the map
            layers += [norm_layer(norm, channels, size), nn.ReLU(), nn.Conv2d(channels, channels // 2, 1, bias=False)]
            channels //= 2
            if size > 1:
                layers.append(nn.AvgPool2d(2))
                size //= 2
        for _ in range(depth):
            layers.append(DenseLayer(channels, growth, norm, size))
            channels += growth
    layers += [norm_layer(norm, channels, size), nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten()]
    return nn.Sequential(*layers, nn.Linear(channels, num_classes))


def build(net: NetConfig, shape: Shape, num_classes: int, seed: int) -> nn.Module:
    """Builds a network with fresh weights, which depend on `seed` alone; no generator's state is changed.

    A name with "bn" at its end has batch norm, and net.norm does not matter, as in the code of dataset condensation.
    Raises UserError if the images are not square.
    """
    if shape[1] != shape[2]:
        raise UserError("shape", f"{shape[1]} x {shape[2]}", "networks need square images; use --image-size N")
    norm = "batch" if net.name.endswith("bn") else net.norm
    builders: dict[str, Callable[[], nn.Module]] = {
        "convnet": lambda: convnet(shape, num_classes, net.depth, net.width, norm),
        "resnet10": lambda: resnet(shape, num_classes, 1, norm),
        "resnet18": lambda: resnet(shape, num_classes, 2, norm),
        "alexnet": lambda: alexnet(shape, num_classes),
        "vgg11": lambda: vgg11(shape, num_classes, norm),
        "densenet121": lambda: densenet121(shape, num_classes, norm),
    }
    with torch.random.fork_rng(devices=[]):
        torch.default_generator.manual_seed(seed)  # torch.manual_seed would reseed the CUDA generators too
        return builders[net.name.removesuffix("bn")]()
