"""What the adjoint wants of one inner step."""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from tadperf.kernels.conv3x3 import conv3x3, conv3x3_input, conv3x3_kernel, covers
from tadperf.kernels.norm_relu_pool import norm_relu_pool_gradient, norm_relu_pool_moments
from tadperf.kernels.norm_relu_pool_dual import Affine, Dual, norm_relu_pool_dual, norm_relu_pool_dual_gradient
from tadperf.nets.flat import FlatNet


class Products(NamedTuple):
    """h = lambda . g of one step, and its derivatives by the batch, by soft labels, and by theta where it is wanted."""

    h: Tensor  # scalar
    x: Tensor  # [B, C, H, W]
    labels: Tensor | None  # [B, K]
    theta: Tensor | None  # [P]


class Block(NamedTuple):
    """Names of a convolution and its norm among the parameters, and what else they do."""

    conv: str
    norm: str
    padding: tuple[int, int]
    eps: float
    pool: bool


class ConvNetForm(NamedTuple):
    """A ConvNet of instance norms: its blocks and the name of its classifier; dtype is that of its convolutions."""

    blocks: tuple[Block, ...]
    classifier: str
    dtype: torch.dtype = torch.float32


def convnet_form(module: nn.Module, dtype: torch.dtype = torch.float32) -> ConvNetForm | None:
    """What these formulas need to know of a network; None for one that they do not cover."""
    layers = list(module.named_children()) if isinstance(module, nn.Sequential) else []
    blocks: list[Block] = []
    while len(layers) > 3:
        (conv, c), (norm, n), (_, relu), *layers = layers
        pool = isinstance(layers[0][1], nn.AvgPool2d)
        layers = layers[1:] if pool else layers
        if not (isinstance(c, nn.Conv2d) and isinstance(n, nn.GroupNorm) and isinstance(relu, nn.ReLU)):
            return None
        if n.num_groups != n.num_channels or c.bias is None or c.kernel_size != (3, 3):
            return None
        blocks.append(Block(conv, norm, (int(c.padding[0]), int(c.padding[1])), n.eps, pool))
    if [type(layer) for _, layer in layers] != [nn.Flatten, nn.Linear] or not blocks:
        return None
    return ConvNetForm(tuple(blocks), layers[1][0], dtype)


def step_gradient(form: ConvNetForm, net: FlatNet, theta: Tensor, x: Tensor, y: Tensor) -> Tensor:
    """g [P]: the gradient of the student's loss on a batch x [B, C, H, W], with labels int64 [B] or logits [B, K]."""
    p, maps = net.views(theta), []
    x = _channels_last(x)
    for block in form.blocks:
        a = _conv(x, p[f"{block.conv}.weight"], block, form)
        made, moments = norm_relu_pool_moments(a, *_affine(p, block), block.eps, block.pool)
        maps.append((x, a, moments))
        x = made
    features, weight = x.flatten(1), p[f"{form.classifier}.weight"]
    logits = torch.addmm(p[f"{form.classifier}.bias"], features, weight.T)
    delta = (logits.softmax(1) - _target(y, logits)) / len(y)
    grads = {f"{form.classifier}.weight": delta.T @ features, f"{form.classifier}.bias": delta.sum(0)}
    grad = (delta @ weight).view(x.shape)
    for block, (x, a, moments) in zip(reversed(form.blocks), reversed(maps), strict=True):
        names = f"{block.norm}.weight", f"{block.norm}.bias"
        of_a, grads[names[0]], grads[names[1]] = norm_relu_pool_gradient(
            grad, a, *_affine(p, block), moments, block.pool
        )
        kernel = p[f"{block.conv}.weight"]
        grads[f"{block.conv}.weight"] = _kernel_gradient(of_a, x, kernel, block, form)
        if block is not form.blocks[0]:
            grad = _input_gradient(of_a, x, kernel, block, form)
    return _concatenate_gradients(net, grads, theta)


def products(
    form: ConvNetForm, net: FlatNet, theta: Tensor, lam: Tensor, x: Tensor, y: Tensor, exact: bool = True
) -> Products:
    """`Products` of one step: a tangent pass along lam [P] and its reverse; without `exact` none by theta."""
    p, moved, maps = net.views(theta), net.views(lam), []
    both = _channels_last(
        x
    )  # of the first block, whose tangent is 0; then value and tangent, one after the other in the batch
    for block in form.blocks:
        made, kept = _forward(both, p, moved, block, form)
        maps.append((both, *kept))
        both = torch.cat([made.value, made.dot])  # a Dual as a list would keep the graph out of the compiler's cache
    grad, grads, h, of_labels = _classifier(both, p, moved, y, form)
    of_x = x
    for block, (both, a, moments) in zip(reversed(form.blocks), reversed(maps), strict=True):
        first = block is form.blocks[0]
        of_a, of_weight, of_bias = norm_relu_pool_dual_gradient(grad, a, _duals(p, moved, block), moments, block.pool)
        grads |= {f"{block.norm}.weight": of_weight, f"{block.norm}.bias": of_bias}
        kernel, kernel_dot = p[f"{block.conv}.weight"], moved[f"{block.conv}.weight"]
        joined = of_a.dot if first else torch.cat([of_a.dot, of_a.value])
        if exact:
            grads[f"{block.conv}.weight"] = _kernel_gradient(joined, both, kernel, block, form)
        if first:
            of_x = _input_gradient(joined, both, kernel, block, form) + _input_gradient(
                of_a.value, both, kernel_dot, block, form
            )
        else:
            dot, value = _input_gradient(joined, both, kernel, block, form).chunk(2)
            grad = Dual(value, dot + _input_gradient(of_a.value, value, kernel_dot, block, form))
    return Products(h, of_x, of_labels, _concatenate_gradients(net, grads, theta) if exact else None)


def _forward(
    both: Tensor, p: dict[str, Tensor], moved: dict[str, Tensor], block: Block, form: ConvNetForm
) -> tuple[Dual, tuple[Dual, Tensor]]:
    """A block's output with its tangent; and what its reverse needs."""
    kernel, kernel_dot = p[f"{block.conv}.weight"], moved[f"{block.conv}.weight"]
    if block is form.blocks[0]:
        a = Dual(_conv(both, kernel, block, form), _conv(both, kernel_dot, block, form))
    else:
        value, dot = _conv(both, kernel, block, form).chunk(2)
        a = Dual(value, dot + _conv(both[: len(value)], kernel_dot, block, form))
    y, moments = norm_relu_pool_dual(a, _duals(p, moved, block), block.eps, block.pool)
    return y, (a, moments)


def _classifier(
    both: Tensor, p: dict[str, Tensor], moved: dict[str, Tensor], y: Tensor, form: ConvNetForm
) -> tuple[Dual, dict[str, Tensor], Tensor, Tensor | None]:
    """The gradient of the features, those of the classifier, h, and h's by label logits; of tangents all."""
    weight, bias = p[f"{form.classifier}.weight"], p[f"{form.classifier}.bias"]
    weight_dot, bias_dot = moved[f"{form.classifier}.weight"], moved[f"{form.classifier}.bias"]
    features, features_dot = both.flatten(1).chunk(2)
    q = torch.addmm(bias, features, weight.T).softmax(1)
    logits_dot = torch.addmm(bias_dot, features_dot, weight.T).addmm(features, weight_dot.T)
    count, target = len(q), _target(y, q)
    delta, centred = (q - target) / count, logits_dot - (q * logits_dot).sum(1, keepdim=True)
    delta_dot = q * centred / count
    h, of_labels = (delta * logits_dot).sum(), None
    if y.is_floating_point():
        of_labels = -target * (centred - (target * centred).sum(1, keepdim=True)) / count
    grads = {
        f"{form.classifier}.weight": torch.addmm(delta_dot.T @ features, delta.T, features_dot),
        f"{form.classifier}.bias": delta_dot.sum(0),
    }
    shape = (count, *both.shape[1:])
    value, dot = delta @ weight, torch.addmm(delta_dot @ weight, delta, weight_dot)
    return Dual(value.view(shape), dot.view(shape)), grads, h, of_labels


def _target(y: Tensor, logits: Tensor) -> Tensor:
    return y.softmax(1) if y.is_floating_point() else F.one_hot(y, logits.shape[1]).to(logits.dtype)


def _affine(p: dict[str, Tensor], block: Block) -> tuple[Tensor, Tensor]:
    return p[f"{block.norm}.weight"], p[f"{block.norm}.bias"]


def _duals(p: dict[str, Tensor], moved: dict[str, Tensor], block: Block) -> Affine:
    return Affine(*_affine(p, block), *_affine(moved, block))


def _channels_last(x: Tensor) -> Tensor:
    return x.contiguous(memory_format=torch.channels_last)


def _conv(x: Tensor, kernel: Tensor, block: Block, form: ConvNetForm) -> Tensor:
    """Without its bias, which an instance norm takes off again; the gradient of that bias is 0."""
    if _winograd(x, kernel, block, form):
        return conv3x3(x, kernel)
    return _channels_last(
        F.conv2d(_cast(x, form), _channels_last(_cast(kernel, form)), padding=block.padding).to(x.dtype)
    )


def _winograd(x: Tensor, kernel: Tensor, block: Block, form: ConvNetForm) -> bool:
    wanted = block.padding == (1, 1) and form.dtype == torch.float32
    return wanted and covers(x, kernel.shape[1], kernel.shape[0])


def _input_gradient(grad: Tensor, like: Tensor, kernel: Tensor, block: Block, form: ConvNetForm) -> Tensor:
    if _winograd(grad, kernel, block, form):
        return conv3x3_input(grad, kernel)
    return _convolution_backward(grad, like[: len(grad)], kernel, block, form, 0)


def _kernel_gradient(grad: Tensor, x: Tensor, kernel: Tensor, block: Block, form: ConvNetForm) -> Tensor:
    if _winograd(grad, kernel, block, form):
        return conv3x3_kernel(grad, x)
    return _convolution_backward(grad, x, kernel, block, form, 1)


def _convolution_backward(
    grad: Tensor, x: Tensor, kernel: Tensor, block: Block, form: ConvNetForm, wanted: int
) -> Tensor:
    mask: Any = [wanted == 0, wanted == 1, False]
    found = torch.ops.aten.convolution_backward(
        _cast(grad, form),
        _cast(x, form),
        _channels_last(_cast(kernel, form)),
        None,
        [1, 1],
        list(block.padding),
        [1, 1],
        False,
        [0, 0],
        1,
        mask,
    )[wanted]
    return found.to(grad.dtype)


def _cast(x: Tensor, form: ConvNetForm) -> Tensor:
    return x.to(form.dtype) if x.dtype == torch.float32 else x  # float64 stays what it is: the tests' truth


def _concatenate_gradients(net: FlatNet, grads: dict[str, Tensor], theta: Tensor) -> Tensor:
    """One vector [P]; what has no gradient, the convolutions' biases, is 0."""
    parts = zip(net.names, net.sizes, strict=True)
    return torch.cat([grads[name].reshape(-1) if name in grads else theta.new_zeros(size) for name, size in parts])
