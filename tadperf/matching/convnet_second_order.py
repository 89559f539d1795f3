"""Computes gradient and second-order products of one inner step of the ConvNet with instance norm, by formulas.

A tangent `name_dot` is the derivative of `name` along lambda in parameter space. Gradients and h are those of the
student's mean cross-entropy, or of the loss in the form.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from tadperf.kernels import (
    Affine,
    Dual,
    conv3x3,
    conv3x3_input,
    conv3x3_kernel,
    norm_relu_pool_dual,
    norm_relu_pool_dual_gradient,
    norm_relu_pool_gradient,
    norm_relu_pool_moments,
)
from tadperf.kernels.ops.conv3x3 import covers
from tadperf.kernels.ops.norm_relu_pool_dual import join
from tadperf.matching.layer_chain import layer_chain
from tadperf.nets.flat import FlatNet
from tadperf.nets.fused import fits_block, is_half_pool, pad_channels

Loss = Callable[[Tensor, Tensor], Tensor]  # logits [B, K], labels of the batch -> scalar


class Products(NamedTuple):
    """h = lambda . g of one step, and the derivatives of h."""

    h: Tensor  # scalar
    x: Tensor  # [B, C, H, W], with respect to the batch
    labels: Tensor | None  # [B, K], with respect to soft labels; None for hard labels
    theta: Tensor | None  # [P], with respect to the parameters; None unless it was requested


class Block(NamedTuple):
    """One block of a ConvNet: the names of its convolution and its norm, and their settings."""

    conv: str
    norm: str
    padding: tuple[int, int]
    eps: float
    pool: bool


class ConvNetForm(NamedTuple):
    """A ConvNet with instance norm: its blocks, and the name of its classifier.

    dtype: type of the convolutions, and on CUDA of all maps from the images to the classifier. Parameters, moments and
    the classifier are float32, as in training (`nets.training.in_precision`).
    loss: None is the mean cross-entropy with classes or label logits, by formulas. Another loss is differentiated by
    autograd, twice, with respect to the logits and labels alone.
    """

    blocks: tuple[Block, ...]
    classifier: str
    dtype: torch.dtype = torch.float32
    loss: Loss | None = None


def convnet_form(module: nn.Module, dtype: torch.dtype = torch.float32, loss: Loss | None = None) -> ConvNetForm | None:
    """Returns the form of a ConvNet with instance norm, or None if the formulas of this file do not cover `module`.

    They cover a chain (`layer_chain`) of blocks, Flatten and Linear. A block is a 3 x 3 convolution of stride 1 with
    bias and zero padding, instance norm with weight and bias, ReLU, and possibly a 2 x 2 average pool. No layer may
    have hooks, be parametrized, or share parameters with another one.
    """
    layers = layer_chain(module)
    if layers is None:
        return None
    blocks: list[Block] = []
    while len(layers) > 3:
        (conv_name, conv), (norm_name, norm), (_, relu), *layers = layers
        if not _is_covered(conv, norm, relu):
            return None
        pool = is_half_pool(layers[0][1])
        layers = layers[1:] if pool else layers
        padding = cast(tuple[int, int], conv.padding)
        blocks.append(Block(conv_name, norm_name, padding, cast(nn.GroupNorm, norm).eps, pool))
    if not blocks or len(layers) != 2:
        return None
    (_, flatten), (classifier, linear) = layers
    if type(flatten) is not nn.Flatten or (flatten.start_dim, flatten.end_dim) != (1, -1):
        return None
    if type(linear) is not nn.Linear or linear.bias is None:
        return None
    if len(list(module.parameters())) != 4 * len(blocks) + 2:  # shared parameters
        return None
    return ConvNetForm(tuple(blocks), classifier, dtype, loss)


def _is_covered(conv: nn.Module, norm: nn.Module, relu: nn.Module) -> bool:
    """Returns whether the formulas cover a block of these layers."""
    if not (isinstance(conv, nn.Conv2d) and isinstance(norm, nn.GroupNorm) and isinstance(relu, nn.ReLU)):
        return False
    return (
        fits_block(conv, norm, relu)
        and conv.bias is not None
        and conv.kernel_size == (3, 3)
        and conv.stride == (1, 1)
        and conv.padding[0] == conv.padding[1]
    )


def step_gradient(form: ConvNetForm, net: FlatNet, theta: Tensor, x: Tensor, y: Tensor) -> Tensor:
    """Returns the gradient g [P] of the student's loss on a batch x [B, C, H, W].

    y: labels int64 [B], or label logits [B, K], or what the form's loss takes.
    """
    params, saved = _parameters(form, net, theta), []
    x = _as_maps(x, form)
    for block in form.blocks:
        conv = _conv(x, params[f"{block.conv}.weight"], block, form)
        output, moments = norm_relu_pool_moments(conv, *_affine(params, block), block.eps, block.pool)
        saved.append((x, conv, moments))
        x = output
    weight = params[f"{form.classifier}.weight"]
    features = x.flatten(1).to(weight.dtype)
    logits = torch.addmm(params[f"{form.classifier}.bias"], features, weight.T)
    delta = _loss_gradient(form.loss, logits, y)
    grads = {f"{form.classifier}.weight": delta.T @ features, f"{form.classifier}.bias": delta.sum(0)}
    grad = (delta @ weight).view(x.shape).to(x.dtype)
    for block, (x, conv, moments) in zip(reversed(form.blocks), reversed(saved), strict=True):
        affine = _affine(params, block)
        grad_conv, grad_scale, grad_shift = norm_relu_pool_gradient(grad, conv, *affine, moments, block.pool)
        grads |= {f"{block.norm}.weight": grad_scale, f"{block.norm}.bias": grad_shift}
        kernel = params[f"{block.conv}.weight"]
        grads[f"{block.conv}.weight"] = _kernel_gradient(grad_conv, x, kernel, block, form)
        if block is not form.blocks[0]:
            grad = _input_gradient(grad_conv, x, kernel, block, form)
    return _concatenate_gradients(net, grads, theta)


def products(
    form: ConvNetForm, net: FlatNet, theta: Tensor, lam: Tensor, x: Tensor, y: Tensor, exact: bool = True
) -> Products:
    """Returns the `Products` of one step: a forward pass with tangents along lam [P], and its reverse.

    Without `exact` the derivative with respect to theta is not computed.
    """
    params, params_dot, saved = _parameters(form, net, theta), _parameters(form, net, lam), []
    # The first input has no tangent. Later inputs hold value and tangent, one after the other in the batch.
    stacked = _as_maps(x, form)
    for block in form.blocks:
        output, conv, moments = _forward(stacked, params, params_dot, block, form)
        saved.append((stacked, conv, moments))
        # Passing a list of Dual values would keep the graph out of the compiler's cache.
        stacked = join(*output)
    grad, grads, h, grad_labels = _classifier(stacked, params, params_dot, y, form)
    grad_x = x
    for block, (stacked, conv, moments) in zip(reversed(form.blocks), reversed(saved), strict=True):
        first = block is form.blocks[0]
        grad_conv, grad_scale, grad_shift = norm_relu_pool_dual_gradient(
            grad, conv, _dual_affine(params, params_dot, block), moments, block.pool
        )
        grads |= {f"{block.norm}.weight": grad_scale, f"{block.norm}.bias": grad_shift}
        kernel, kernel_dot = params[f"{block.conv}.weight"], params_dot[f"{block.conv}.weight"]
        grad_stacked = grad_conv.dot if first else join(grad_conv.dot, grad_conv.value)
        if exact:
            grads[f"{block.conv}.weight"] = _kernel_gradient(grad_stacked, stacked, kernel, block, form)
        if first:
            grad_x = _input_gradient(grad_stacked, stacked, kernel, block, form) + _input_gradient(
                grad_conv.value, stacked, kernel_dot, block, form
            )
            grad_x = grad_x[:, : x.shape[1]].to(x.dtype)
        else:
            dot, value = _input_gradient(grad_stacked, stacked, kernel, block, form).chunk(2)
            grad = Dual(value, dot + _input_gradient(grad_conv.value, value, kernel_dot, block, form))
    return Products(h, grad_x, grad_labels, _concatenate_gradients(net, grads, theta) if exact else None)


def _forward(
    stacked: Tensor, params: dict[str, Tensor], params_dot: dict[str, Tensor], block: Block, form: ConvNetForm
) -> tuple[Dual, Dual, Tensor]:
    """Returns the output of a block and of its convolution, with tangents, and the moments of the norm."""
    kernel, kernel_dot = params[f"{block.conv}.weight"], params_dot[f"{block.conv}.weight"]
    if block is form.blocks[0]:
        conv = Dual(_conv(stacked, kernel, block, form), _conv(stacked, kernel_dot, block, form))
    else:
        value, dot = _conv(stacked, kernel, block, form).chunk(2)
        conv = Dual(value, dot + _conv(stacked[: len(value)], kernel_dot, block, form))
    output, moments = norm_relu_pool_dual(conv, _dual_affine(params, params_dot, block), block.eps, block.pool)
    return output, conv, moments


def _classifier(
    stacked: Tensor, params: dict[str, Tensor], params_dot: dict[str, Tensor], y: Tensor, form: ConvNetForm
) -> tuple[Dual, dict[str, Tensor], Tensor, Tensor | None]:
    """Runs the classifier and the loss: the forward pass with tangents, and its reverse.

    Returns the gradient of the features with its tangent, the tangents of the gradients of weight and bias, h, and the
    derivative of h with respect to label logits.
    """
    weight, bias = params[f"{form.classifier}.weight"], params[f"{form.classifier}.bias"]
    weight_dot, bias_dot = params_dot[f"{form.classifier}.weight"], params_dot[f"{form.classifier}.bias"]
    features, features_dot = stacked.flatten(1).to(weight.dtype).chunk(2)
    logits = torch.addmm(bias, features, weight.T)
    logits_dot = torch.addmm(bias_dot, features_dot, weight.T).addmm(features, weight_dot.T)
    delta, delta_dot, h, grad_labels = (
        _cross_entropy_products(logits, logits_dot, y)
        if form.loss is None
        else _loss_products(form.loss, logits, logits_dot, y)
    )
    grads = {
        f"{form.classifier}.weight": torch.addmm(delta_dot.T @ features, delta.T, features_dot),
        f"{form.classifier}.bias": delta_dot.sum(0),
    }
    shape = (len(logits), *stacked.shape[1:])
    value, dot = delta @ weight, torch.addmm(delta_dot @ weight, delta, weight_dot)
    grad = Dual(*(part.view(shape).to(stacked.dtype) for part in (value, dot)))
    return grad, grads, h, grad_labels


class LossProducts(NamedTuple):
    """The gradient of the loss by the logits, its tangent, h, and the derivative of h by soft labels."""

    delta: Tensor  # [B, K]
    delta_dot: Tensor  # [B, K]
    h: Tensor  # scalar
    labels: Tensor | None  # [B, K]


def _loss_gradient(loss: Loss | None, logits: Tensor, y: Tensor) -> Tensor:
    if loss is None:
        return (logits.softmax(1) - _target(y, logits)) / len(y)
    with torch.enable_grad():
        logits = logits.detach().requires_grad_()
        return torch.autograd.grad(loss(logits, y), logits)[0]


def _cross_entropy_products(logits: Tensor, logits_dot: Tensor, y: Tensor) -> LossProducts:
    q = logits.softmax(1)
    count, target = len(q), _target(y, q)
    delta, centred = (q - target) / count, logits_dot - (q * logits_dot).sum(1, keepdim=True)
    delta_dot = q * centred / count
    h, grad_labels = (delta * logits_dot).sum(), None
    if y.is_floating_point():
        grad_labels = -target * (centred - (target * centred).sum(1, keepdim=True)) / count
    return LossProducts(delta, delta_dot, h, grad_labels)


def _loss_products(loss: Loss, logits: Tensor, logits_dot: Tensor, y: Tensor) -> LossProducts:
    soft = y.is_floating_point()
    with torch.enable_grad():
        logits, y = logits.detach().requires_grad_(), y.detach().requires_grad_(soft)
        (delta,) = torch.autograd.grad(loss(logits, y), logits, create_graph=True)
        h = (delta * logits_dot).sum()
        inputs = [logits, y] if soft else [logits]
        if h.requires_grad:
            grads = torch.autograd.grad(h, inputs, allow_unused=True, materialize_grads=True)
        else:  # a loss that is linear in the logits
            grads = tuple(map(torch.zeros_like, inputs))
    return LossProducts(delta.detach(), grads[0], h.detach(), grads[1] if soft else None)


def _target(y: Tensor, logits: Tensor) -> Tensor:
    """Returns the target probabilities [B, K]."""
    return y.softmax(1) if y.is_floating_point() else F.one_hot(y, logits.shape[1]).to(logits.dtype)


def _parameters(form: ConvNetForm, net: FlatNet, theta: Tensor) -> dict[str, Tensor]:
    """Returns the parameters by name. On CUDA, the kernels of convolutions are laid out once here, not at every use."""
    params = net.views(theta)
    if theta.is_cuda:
        first, *others = (f"{block.conv}.weight" for block in form.blocks)
        params |= {name: _channels_last(_cast(params[name], form)) for name in others}
        params[first] = _as_maps(params[first], form)
    return params


def _as_maps(x: Tensor, form: ConvNetForm) -> Tensor:
    """Returns images, or the first kernel, in channels_last; on CUDA also in the type of the maps, perhaps padded."""
    return _channels_last(pad_channels(_cast(x, form)) if x.is_cuda else x)


def _affine(params: dict[str, Tensor], block: Block) -> tuple[Tensor, Tensor]:
    return params[f"{block.norm}.weight"], params[f"{block.norm}.bias"]


def _dual_affine(params: dict[str, Tensor], params_dot: dict[str, Tensor], block: Block) -> Affine:
    return Affine(*_affine(params, block), *_affine(params_dot, block))


def _channels_last(x: Tensor) -> Tensor:
    return x.contiguous(memory_format=torch.channels_last)


def _conv(x: Tensor, kernel: Tensor, block: Block, form: ConvNetForm) -> Tensor:
    """Returns the convolution without its bias. The instance norm cancels the bias, so the bias has the gradient 0."""
    if _uses_conv3x3(x, kernel, block, form):
        return conv3x3(x, kernel)
    output = F.conv2d(_cast(x, form), _channels_last(_cast(kernel, form)), padding=block.padding)
    return _channels_last(output.to(x.dtype))


def _uses_conv3x3(x: Tensor, kernel: Tensor, block: Block, form: ConvNetForm) -> bool:
    same_size = block.padding == (1, 1) and form.dtype == torch.float32
    return same_size and covers(x, kernel.shape[1], kernel.shape[0])


def _input_gradient(grad: Tensor, x: Tensor, kernel: Tensor, block: Block, form: ConvNetForm) -> Tensor:
    """Returns the gradient of the convolution's input. x: the input; only its shape beyond the batch is used."""
    if _uses_conv3x3(grad, kernel, block, form):
        return conv3x3_input(grad, kernel)
    return _convolution_backward(grad, x[: len(grad)], kernel, block, form, 0)


def _kernel_gradient(grad: Tensor, x: Tensor, kernel: Tensor, block: Block, form: ConvNetForm) -> Tensor:
    if _uses_conv3x3(grad, kernel, block, form):
        return conv3x3_kernel(grad, x)
    return _convolution_backward(grad, x, kernel, block, form, 1)


def _convolution_backward(
    grad: Tensor, x: Tensor, kernel: Tensor, block: Block, form: ConvNetForm, output: int
) -> Tensor:
    """Returns the gradient of the input (output = 0) or of the kernel (output = 1)."""
    mask: Any = [output == 0, output == 1, False]
    gradients = torch.ops.aten.convolution_backward(
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
    )
    return gradients[output].to(grad.dtype)


def _cast(x: Tensor, form: ConvNetForm) -> Tensor:
    """Casts float32 to the dtype of the convolutions. Keeps float64, which the tests use as the truth."""
    return x.to(form.dtype) if x.dtype == torch.float32 else x


def _concatenate_gradients(net: FlatNet, grads: dict[str, Tensor], theta: Tensor) -> Tensor:
    """Returns one vector [P]. Parameters without a gradient, the biases of the convolutions, get 0.

    The gradient of the first kernel loses its padded channels.
    """
    parts, shapes = list(zip(net.names, net.sizes, strict=True)), dict(zip(net.names, net.shapes, strict=True))
    for name, grad in grads.items():
        grads[name] = (grad[:, : shapes[name][1]] if grad.ndim == 4 else grad).to(theta.dtype)
    zeros = theta.new_zeros(max(size for name, size in parts if name not in grads))
    return torch.cat([grads[name].reshape(-1) if name in grads else zeros[:size] for name, size in parts])
