"""A faster forward pass for networks built by tadperf: convolution, instance norm, ReLU and pool as one block."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.modules import module as torch_module

from tadperf.kernels import conv3x3, implementations, norm_relu_pool

# For up to this many input channels, a CPU computes the first convolution as a matrix product. For grey images that
# takes 0.21 ms instead of 0.75 ms (`_few_channel_conv`); for all layers it would take 1.9 to 2.5 times as long.
FEW_CHANNELS = 1
# On CUDA, images of 3 channels and the first kernel are padded with zeros to this number of channels; 0: never. cuDNN
# says that TF32 kernels want a multiple of 4, and that it may pad by itself. No GPU has timed it; gpu_plan times both.
PAD_IMAGES_TO = 0


def fused_forward(module: nn.Module) -> Callable[[Tensor], Tensor]:
    """Returns a faster function that equals `module` up to rounding. It can be differentiated once only.

    Instance norm, ReLU and average pool become one operator (tadperf.kernels). A 3 x 3 convolution before them uses
    Winograd's algorithm (`conv3x3`). The norm cancels the bias of this convolution, so the bias is left out; its
    gradient is then exactly 0, where plain PyTorch has rounding noise.
    One step of the digits ConvNet on 100 images takes 3.4 ms instead of 5.3, on 256 images 8.0 ms instead of 18.4 (one
    thread, AVX2).
    Returns `module` itself for anything but a plain Sequential of PyTorch's and tadperf's layers without hooks. Only
    layers with the settings of `tadperf.nets.architectures` are fused.
    """
    if not _is_plain_sequential(module):
        return module
    layers, functions, position = list(cast(nn.Sequential, module)), [], 0
    while position < len(layers):
        count, function = _fused_block(layers[position : position + 4])
        functions.append(function)
        position += count

    def run(x: Tensor) -> Tensor:
        if x.ndim != 4:
            return module(x)
        x = x.contiguous(memory_format=torch.channels_last)
        for function in functions:
            x = function(x)
        return x

    return run


def _is_plain_sequential(module: nn.Module) -> bool:
    """Returns whether the layers may be called one by one on channels_last images, and compiled code exists for them.

    So the network is a Sequential without hooks, and all its layers are from PyTorch or tadperf.
    """
    if type(module) is not nn.Sequential or any(has_hooks(layer) for layer in (module, *module)):
        return False
    if any(type(layer).__module__.split(".")[0] not in ("torch", "tadperf") for layer in module.modules()):
        return False  # an unknown layer may depend on the memory format, for example by Tensor.view
    parameter = next(module.parameters(), None)
    if parameter is None:
        return False
    return implementations()["norm_relu_pool"].get(parameter.device.type) not in (None, "reference")


def has_hooks(layer: nn.Module) -> bool:
    """Returns whether a call of the layer does more than its class's `forward`."""
    hooks = (
        layer._forward_hooks,
        layer._forward_pre_hooks,
        layer._backward_hooks,
        layer._backward_pre_hooks,
        torch_module._global_forward_hooks,
        torch_module._global_forward_pre_hooks,
        torch_module._global_backward_hooks,
        torch_module._global_backward_pre_hooks,
    )
    return any(hooks) or "forward" in vars(layer)


def _fused_block(layers: list[nn.Module]) -> tuple[int, Callable[[Tensor], Tensor]]:
    """Returns one function for the first layers, and the number of layers that it replaces."""
    match layers:
        case [nn.Conv2d() as conv, nn.GroupNorm() as norm, nn.ReLU() as relu, *rest] if fits_block(conv, norm, relu):
            pool = bool(rest) and is_half_pool(rest[0])
            return 3 + pool, partial(_conv_norm_relu_pool, conv, norm, pool)
    return 1, layers[0]


def fits_block(conv: nn.Conv2d, norm: nn.GroupNorm, relu: nn.ReLU) -> bool:
    """Returns whether the layers are a plain convolution, instance norm with weight and bias, and ReLU."""
    return (
        (type(conv), type(norm), type(relu)) == (nn.Conv2d, nn.GroupNorm, nn.ReLU)
        and conv.padding_mode == "zeros"
        and isinstance(conv.padding, tuple)
        and conv.dilation == (1, 1)
        and conv.groups == 1
        and norm.num_groups == norm.num_channels == conv.out_channels
        and norm.weight is not None
        and norm.bias is not None
        and norm.eps > 0
    )


def is_half_pool(layer: nn.Module) -> bool:
    """Returns whether the layer is a 2 x 2 average pool with stride 2 and no padding."""
    return (
        type(layer) is nn.AvgPool2d
        and layer.kernel_size in (2, (2, 2))
        and layer.stride in (2, (2, 2))
        and layer.padding in (0, (0, 0))
        and not layer.ceil_mode
        and layer.divisor_override is None
    )


def _conv_norm_relu_pool(conv: nn.Conv2d, norm: nn.GroupNorm, pool: bool, x: Tensor) -> Tensor:
    padding, weight = cast(tuple[int, int], conv.padding), conv.weight
    if x.is_cuda and PAD_IMAGES_TO:
        x, weight = pad_channels(x), pad_channels(weight)
    three_by_three = conv.kernel_size == (3, 3) and conv.stride == (1, 1) and padding[0] == padding[1]
    if three_by_three and x.is_cpu and not x.requires_grad and conv.in_channels <= FEW_CHANNELS:
        x = _few_channel_conv(x, weight, padding[0])
    elif three_by_three and padding == (1, 1):
        x = conv3x3(x, weight.to(x.dtype))  # bfloat16 maps under autocast
    else:
        x = F.conv2d(x, weight, None, conv.stride, padding)
    return norm_relu_pool(x, norm.weight, norm.bias, norm.eps, pool)


def pad_channels(x: Tensor) -> Tensor:
    """Pads images [B, 3, H, W] or a kernel [K, 3, H, W] on CUDA to PAD_IMAGES_TO channels. Keeps all others."""
    missing = PAD_IMAGES_TO - x.shape[1]
    return F.pad(x, (0, 0, 0, 0, 0, missing)) if x.is_cuda and x.shape[1] == 3 and missing > 0 else x


def _few_channel_conv(x: Tensor, weight: Tensor, padding: int) -> Tensor:
    """Computes a 3 x 3 convolution of stride 1 as one matrix product, in channels_last; weight [K, C, 3, 3].

    On 100 grey images of 8 x 8 it takes 0.21 ms with the gradient of the weight; PyTorch's convolution takes 0.75 ms.
    Other orders of the factors take up to six times as long: MKL's kernels differ that much, and the strides decide
    which of them autograd uses.
    """
    windows = F.pad(x, (padding,) * 4).unfold(2, 3, 1).unfold(3, 3, 1)  # [B, C, H, W, 3, 3]
    images, channels, height, width = windows.shape[:4]
    columns = windows.permute(1, 4, 5, 0, 2, 3).reshape(9 * channels, images * height * width)
    product = columns.t() @ weight.flatten(1).t().contiguous()
    return product.view(images, height, width, -1).permute(0, 3, 1, 2)
