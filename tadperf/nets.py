"""The networks of the field in their small-image forms, and a network seen as one flat vector of parameters."""

from __future__ import annotations

import math
from collections.abc import Callable
from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from tadperf.config import NetConfig
from tadperf.kernels import implementations, norm_relu_pool
from tadperf.kernels.conv3x3 import conv3x3

Shape = tuple[int, int, int]  # channels, height, width
FEW_CHANNELS = 1  # of images whose first convolution is a matrix product on a CPU


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
            nn.Conv2d(channels, planes, 3, stride, 1, bias=False), norm_layer(norm, planes, size), nn.ReLU(),
            nn.Conv2d(planes, planes, 3, 1, 1, bias=False), norm_layer(norm, planes, size),
        )  # fmt: skip
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


def first_order(module: nn.Module) -> Callable[[Tensor], Tensor]:
    """`module` as a function of x that trains and predicts faster: the same up to rounding, differentiable once.

    Instance norm, ReLU and average pool become one operator (tadperf.kernels), and a convolution before them is
    Winograd's (`conv3x3`) and goes without its bias, which they take off again: its gradient is exactly 0 then, where
    plain PyTorch has rounding noise.
    One step of the digits ConvNet on 100 images takes 3.4 ms for 5.3, on 256 images 8.0 ms for 18.4 (one thread, AVX2).
    Whatever is no plain sequence of layers, and a second derivative, needs `module` itself.
    """
    device = next(module.parameters()).device.type
    if not isinstance(module, nn.Sequential) or implementations()["norm_relu_pool"].get(device) in (None, "reference"):
        return module
    layers, parts, place = list(module), [], 0
    while place < len(layers):
        taken, part = _block(layers[place : place + 4])
        parts.append(part)
        place += taken

    def run(x: Tensor) -> Tensor:
        x = x.contiguous(memory_format=torch.channels_last) if x.ndim == 4 else x
        for part in parts:
            x = part(x)
        return x

    return run


def _block(layers: list[nn.Module]) -> tuple[int, Callable[[Tensor], Tensor]]:
    """How many of the layers one function stands for, and that function."""
    match layers:
        case [nn.Conv2d() as conv, nn.GroupNorm() as norm, nn.ReLU(), *rest] if norm.num_groups == norm.num_channels:
            pool = bool(rest) and isinstance(rest[0], nn.AvgPool2d) and rest[0].kernel_size == 2
            return 3 + pool, partial(_conv_norm_relu_pool, conv, norm, pool)
    return 1, layers[0]


def _conv_norm_relu_pool(conv: nn.Conv2d, norm: nn.GroupNorm, pool: bool, x: Tensor) -> Tensor:
    if x.is_cpu and not x.requires_grad and conv.in_channels <= FEW_CHANNELS and conv.kernel_size == (3, 3):
        x = _few_channels(x, conv.weight, conv.padding[0])  # pyright: ignore[reportArgumentType]
    elif conv.kernel_size == (3, 3) and conv.padding == conv.stride == (1, 1):
        x = conv3x3(x, conv.weight)
    else:
        x = F.conv2d(x, conv.weight, None, conv.stride, conv.padding)  # pyright: ignore[reportArgumentType]
    return norm_relu_pool(x, norm.weight, norm.bias, norm.eps, pool)


def _few_channels(x: Tensor, weight: Tensor, padding: int) -> Tensor:
    """A 3 x 3 convolution of stride 1 as one matrix product, its result in channels_last; weight [K, C, 3, 3].

    On 100 grey images of 8 x 8 it takes 0.21 ms with the gradient of the weight, PyTorch's own convolution 0.75 ms. Of
    these orders of the factors another costs up to six times as much: MKL's kernels differ so, and autograd chooses by
    strides.
    """
    windows = F.pad(x, (padding,) * 4).unfold(2, 3, 1).unfold(3, 3, 1)  # [B, C, H, W, 3, 3]
    images, channels, height, width = windows.shape[:4]
    columns = windows.permute(1, 4, 5, 0, 2, 3).reshape(9 * channels, images * height * width)
    product = columns.t() @ weight.flatten(1).t().contiguous()
    return product.view(images, height, width, -1).permute(0, 3, 1, 2)


class FlatNet:
    """A network as a pure function of one flat parameter vector: `flat(theta, x) -> logits`.

    theta is [P]; trajectories, distances and updates then are single vector operations (tadperf).
    """

    def __init__(self, module: nn.Module):
        assert not list(module.buffers()), "running statistics are not parameters: use a norm without them"
        self.module = module
        self.names, parameters = zip(*module.named_parameters(), strict=True)
        self.shapes = [p.shape for p in parameters]
        self.sizes = [p.numel() for p in parameters]
        self.num_parameters = sum(self.sizes)

    def flatten(self) -> Tensor:
        """The module's own parameters as a new vector [P]."""
        return torch.cat([p.detach().flatten() for p in self.module.parameters()])

    def views(self, theta: Tensor) -> dict[str, Tensor]:
        """Each parameter as a named view of `theta` [P]."""
        parts = zip(self.names, theta.split(self.sizes), self.shapes, strict=True)
        return {name: part.view(shape) for name, part, shape in parts}

    def __call__(self, theta: Tensor, x: Tensor) -> Tensor:
        return torch.func.functional_call(self.module, self.views(theta), (x,))
