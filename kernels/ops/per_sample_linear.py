"""`per_sample` on the logits of a linear classifier, without storing all logits.

    per_sample_linear(f, W, y, b) = per_sample(f W^T + b, y)

For N samples and C classes the logits alone would take 4 N C bytes, and their gradient as much again. On a CPU the
operator computes one block of rows and classes at a time, in a small buffer that the compiled loops read from the
cache. The running state of a row (the online softmax) goes from one block of classes to the next. On CUDA one Triton
kernel computes tiles of logits, reduces them and never stores them. The gradient of the loss computes the logits again,
block by block.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from tadperf.kernels import gpu, native, registry
from tadperf.kernels.checks import check_dense, check_like, check_memory
from tadperf.kernels.dispatch import Route, is_direct, record_call, route
from tadperf.kernels.native import ELEMENT_TYPES
from tadperf.kernels.ops.per_sample import (
    PerSample,
    empty_results,
    fill_native,
    loss_gradient,
    per_sample,
    per_sample_reference,
)

registry.register("per_sample_linear")

CPU_BLOCK = 1 << 20  # logits, 4 MB; for half types the float32 copies of the operands take up to 4 MB more
GPU_BLOCK = 1 << 26  # logits of the backward pass, 256 MB, so that the matrix products are large
MAX_ROWS, MAX_CLASSES = 4096, 1024  # of a block on a CPU


def per_sample_linear(features: Tensor, weight: Tensor, labels: Tensor, bias: Tensor | None = None) -> PerSample:
    """Computes the results of `per_sample` for the logits features @ weight.T + bias (tadperf).

    features: float [..., D]. weight: [C, D], C >= 2, of the same type. labels: int32 or int64 [...], 0 to C-1, or -1 to
    ignore the sample. bias: [C] or None. Returns the same as `per_sample`. The loss has a gradient for features, weight
    and bias. Half types are multiplied and summed in float32. On CUDA the backward pass first rounds the gradient of
    the logits to the half type.
    Memory besides results and gradients: 8 MB on a CPU, for any N and C. For half types the gradient of the weight is
    summed in float32, 4 C D bytes. On CUDA the backward pass takes 256 MB. Without compiled code all logits are stored.
    float64 stores all logits and runs `per_sample` on them.
    Raises ValueError for wrong shapes, types or labels. On CUDA the loss of a label out of range is NaN.
    """
    _check(features, weight, labels, bias)
    if features.ndim != 2:
        flat = per_sample_linear(features.reshape(-1, features.shape[-1]), weight, labels.reshape(-1), bias)
        return PerSample(*(result.view(labels.shape) for result in flat))
    if features.dtype not in ELEMENT_TYPES:
        if is_direct(features, weight, labels, bias):
            check_memory(features=features, weight=weight, labels=labels, bias=bias)
        record_call("per_sample_linear", None)
        return per_sample(_all_logits(features, weight, bias), labels)
    chosen = route("per_sample_linear", features, weight, labels, bias)
    if chosen is Route.REFERENCE:
        return per_sample_linear_reference(features, weight, labels, bias)
    needs_grad = any(t is not None and t.requires_grad for t in (features, weight, bias))
    if chosen is Route.DISPATCHER or (needs_grad and torch.is_grad_enabled()):
        loss, *others, _ = _operator(features, weight, labels, bias)
        return PerSample(loss, *(result.detach() for result in others))
    with torch.no_grad():
        return PerSample(*_forward(features, weight, labels, bias)[:5])


def per_sample_linear_reference(
    features: Tensor, weight: Tensor, labels: Tensor, bias: Tensor | None = None
) -> PerSample:
    """Computes `per_sample_linear` in plain PyTorch, with all logits at once, on any device and float type."""
    _check(features, weight, labels, bias)
    return per_sample_reference(_all_logits(features, weight, bias), labels)


def _all_logits(features: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    dtype = torch.float64 if features.dtype == torch.float64 else torch.float32
    return F.linear(features.to(dtype), weight.to(dtype), None if bias is None else bias.to(dtype))


def _check(features: Tensor, weight: Tensor, labels: Tensor, bias: Tensor | None) -> None:
    def wrong(name: str, t: Tensor, expected: str) -> ValueError:
        return ValueError(f"{name}: {t.dtype} {tuple(t.shape)} on {t.device}: expected {expected}")

    check_dense(features=features, weight=weight, labels=labels, bias=bias)
    if not features.is_floating_point() or features.ndim < 1 or features.shape[-1] < 1:
        raise wrong("features", features, "floats [..., D] with D of 1 or more")
    dtype, device, depth = features.dtype, features.device, features.shape[-1]
    if weight.ndim != 2 or weight.shape[0] < 2 or weight.shape[1] != depth or weight.dtype != dtype:
        raise wrong("weight", weight, f"{dtype} (C, {depth}) with C of 2 or more")
    if labels.dtype not in (torch.int32, torch.int64) or labels.shape != features.shape[:-1]:
        raise wrong("labels", labels, f"int32 or int64 {tuple(features.shape[:-1])}")
    if bias is not None and (bias.dtype != dtype or bias.shape != weight.shape[:1]):
        raise wrong("bias", bias, f"{dtype} {tuple(weight.shape[:1])}")
    for name, t in (("weight", weight), ("labels", labels), ("bias", bias)):
        if t is not None and t.device != device:
            raise wrong(name, t, f"{device}, like the features")


def _blocks(n: int, size: int) -> list[slice]:
    return [slice(begin, min(begin + size, n)) for begin in range(0, n, size)]


def _block_sizes(features: Tensor, classes: int) -> tuple[int, int]:
    """Returns the number of rows and of classes of a block of logits."""
    if features.is_cuda:
        return max(1, GPU_BLOCK // classes), classes
    rows, columns = MAX_ROWS, min(classes, MAX_CLASSES)
    if features.dtype != torch.float32:  # limits their float32 copies [rows, D] and [columns, D]
        rows, columns = (max(1, min(n, CPU_BLOCK // 2 // features.shape[1])) for n in (rows, columns))
    return min(rows, CPU_BLOCK // columns), columns


def _linear(features: Tensor, weight: Tensor, bias: Tensor | None, buffer: Tensor) -> Tensor:
    """Returns features @ weight.T + bias in float32. Writes it into `buffer`, except for half types on CUDA."""
    if features.is_cuda and features.dtype != torch.float32:
        logits = torch.mm(features, weight.t(), out_dtype=torch.float32)
        return logits if bias is None else logits.add_(bias)
    out = buffer[: len(features) * len(weight)].view(len(features), len(weight))
    if bias is None:
        return torch.mm(features.float(), weight.float().t(), out=out)
    return torch.addmm(bias.float(), features.float(), weight.float().t(), out=out)


def _forward(features: Tensor, weight: Tensor, labels: Tensor, bias: Tensor | None) -> tuple[Tensor, ...]:
    """Returns the five results, and the largest logit of each row."""
    check_memory(features=features, weight=weight, labels=labels, bias=bias)
    if features.is_cuda and gpu.available():
        from tadperf.kernels.gpu import per_sample_linear as triton

        record_call("per_sample_linear", "cuda")
        return triton.per_sample_linear(features, weight, labels, bias)
    if not (features.is_cpu and native.available()):
        record_call("per_sample_linear", None)
        logits = _all_logits(features, weight, bias)
        return *per_sample_reference(logits, labels), logits.amax(1)
    record_call("per_sample_linear", "cpu")
    samples, classes = len(features), len(weight)
    results, top = empty_results(labels), features.new_empty(samples, dtype=torch.float32)
    rows, columns = _block_sizes(features, classes)
    buffer = features.new_empty(min(rows, samples) * columns, dtype=torch.float32)
    state = features.new_empty(6 * min(rows, samples), dtype=torch.float32)
    for row in _blocks(samples, rows):
        out = PerSample(*(result[row] for result in results))
        block_state = state[: 6 * (row.stop - row.start)]
        for column in _blocks(classes, columns):
            logits = _linear(features[row], weight[column], None if bias is None else bias[column], buffer)
            fill_native(logits, labels[row], out, column.start, classes, block_state, top[row])
    return *results, top


@torch.library.custom_op("tadperf::per_sample_linear", mutates_args=())
def _operator(
    features: Tensor, weight: Tensor, labels: Tensor, bias: Tensor | None
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    _check(features, weight, labels, bias)
    if features.ndim != 2:
        raise ValueError(f"features: {tuple(features.shape)}: expected [N, D]")
    return _forward(features, weight, labels, bias)  # pyright: ignore[reportReturnType]


@_operator.register_fake
def _(
    features: Tensor, weight: Tensor, labels: Tensor, bias: Tensor | None
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    loss, confidence, prediction, margin, entropy = empty_results(labels)
    return loss, confidence, prediction, margin, entropy, labels.new_empty(labels.shape, dtype=torch.float32)


@torch.library.custom_op("tadperf::per_sample_linear_gradient", mutates_args=())
def _gradient(
    features: Tensor,
    weight: Tensor,
    labels: Tensor,
    bias: Tensor | None,
    top: Tensor,
    confidence: Tensor,
    scale: Tensor,
) -> tuple[Tensor, Tensor, Tensor]:
    _check(features, weight, labels, bias)
    check_memory(features=features, weight=weight, labels=labels, bias=bias)
    for name, x in (("top", top), ("confidence", confidence), ("scale", scale)):
        check_like(name, x, features.shape[:1], torch.float32, features.device)
    (samples, depth), classes = features.shape, len(weight)
    rows, columns = _block_sizes(features, classes)
    exact = features.dtype == torch.float32
    grad_features = torch.empty_like(features, memory_format=torch.contiguous_format)
    grad_weight = torch.zeros(classes, depth, dtype=torch.float32, device=weight.device)
    grad_bias = torch.zeros(classes, dtype=torch.float32, device=weight.device)
    buffer = features.new_empty(min(rows, samples) * columns, dtype=torch.float32)
    scale = scale.contiguous()
    for row in _blocks(samples, rows):
        x = features[row]
        grad_x = grad_features[row].zero_() if exact else torch.zeros_like(x, dtype=torch.float32)
        for column in _blocks(classes, columns):
            w, b = weight[column], None if bias is None else bias[column]
            block = _linear(x, w, b, buffer)
            loss_gradient(block, labels[row], top[row], confidence[row], scale[row], block, column.start, classes)
            grad_bias[column] += block.sum(0)
            _add_products(grad_x, grad_weight[column], block, x, w)
        if not exact:
            grad_features[row] = grad_x
    return grad_features, grad_weight.to(weight.dtype), grad_bias.to(weight.dtype)


def _add_products(grad_x: Tensor, grad_w: Tensor, block: Tensor, x: Tensor, w: Tensor) -> None:
    """Adds block @ w to grad_x and block.T @ x to grad_w, in float32. On CUDA the operands keep a half type."""
    if x.is_cuda and x.dtype != torch.float32:
        block = block.to(x.dtype)
        grad_x += torch.mm(block, w, out_dtype=torch.float32)
        grad_w += torch.mm(block.t(), x, out_dtype=torch.float32)
    else:
        grad_x.addmm_(block, w.float())
        grad_w.addmm_(block.t(), x.float())


@_gradient.register_fake
def _(
    features: Tensor,
    weight: Tensor,
    labels: Tensor,
    bias: Tensor | None,
    top: Tensor,
    confidence: Tensor,
    scale: Tensor,
) -> tuple[Tensor, Tensor, Tensor]:
    return (
        torch.empty_like(features, memory_format=torch.contiguous_format),
        torch.empty_like(weight, memory_format=torch.contiguous_format),
        weight.new_empty(len(weight)),
    )


def _save(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    _, confidence, _, _, _, top = output
    ctx.save_for_backward(*inputs, top, confidence)


def _backward(ctx: Any, loss_grad: Tensor, *_: Tensor | None) -> tuple[Tensor | None, ...]:
    features, weight, labels, bias, top, confidence = ctx.saved_tensors
    grad_features, grad_weight, grad_bias = _gradient(features, weight, labels, bias, top, confidence, loss_grad)
    return grad_features, grad_weight, None, None if bias is None else grad_bias


_operator.register_autograd(_backward, setup_context=_save)
