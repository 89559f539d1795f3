"""Loss, confidence, prediction, margin and entropy of every sample, in one read of the logits.

With p = softmax(x) over the C classes of one row x, and its given label y:

    loss        -log p_y               0 if y is -1
    confidence  max p
    prediction  argmax x               the lowest index of equal maxima; -1 if p is undefined
    margin      largest p minus second largest p
    entropy     -sum p log p           a class of probability 0 adds 0

A logit of -inf is a class of probability 0. If softmax is undefined (a NaN or +inf in the row, or all -inf), every
result is NaN and the prediction is -1. The loss of an ignored row is 0 even then. Only the loss has a gradient:
softmax(x) - onehot(y), and 0 for an ignored row.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from tadperf.kernels import gpu, native, registry
from tadperf.kernels.checks import check_dense, check_like, check_memory
from tadperf.kernels.dispatch import Route, record_call, route
from tadperf.kernels.native import ELEMENT_TYPES
from tadperf.kernels.shared import PerSample, empty_results

registry.register("per_sample")
LABEL_TYPES = (torch.int32, torch.int64)


def per_sample(logits: Tensor, labels: Tensor) -> PerSample:
    """Computes loss, confidence, prediction, margin and entropy per sample (tadperf; formulas at the top of this file).

    logits: float [..., C] with C >= 2, any strides. labels: int32 or int64 [...], 0 to C-1, or -1 to ignore the sample.
    Returns float32 (float64 for float64 logits) [...]. Losses and entropies are in nats.
    float32, bfloat16 and float16 run compiled code on a CPU, on torch.get_num_threads() threads, with the same bits
    for any number of threads. On CUDA they run a Triton kernel. Everything else runs `per_sample_reference`.
    Raises ValueError for wrong shapes, types or labels. CUDA does not check labels, because that would wait for the
    device: the loss of a label out of range is NaN.
    """
    _check(logits, labels)
    if logits.ndim != 2:
        flat = per_sample(logits.reshape(-1, logits.shape[-1]), labels.reshape(-1))
        return PerSample(*(result.view(labels.shape) for result in flat))
    chosen = route("per_sample", logits, labels)
    if chosen is Route.REFERENCE:
        return per_sample_reference(logits, labels)
    if chosen is Route.DISPATCHER or (logits.requires_grad and torch.is_grad_enabled()):
        # Not `_operator(...)`: PyTorch 2.15 hides a direct call that has only tensors as arguments from its profiler.
        loss, *others = torch.ops.tadperf.per_sample(logits, labels)
        return PerSample(loss, *(result.detach() for result in others))
    return _forward(logits, labels)


def per_sample_reference(logits: Tensor, labels: Tensor) -> PerSample:
    """Computes `per_sample` in plain PyTorch, on any device and float type. Can be differentiated to any order."""
    _check(logits, labels)
    x = logits if logits.dtype == torch.float64 else logits.float()
    if ((labels < -1) | (labels >= x.shape[-1])).any():
        raise ValueError(_out_of_range(labels, x.shape[-1]))
    log_p = x.log_softmax(-1)
    defined = ~log_p.isnan().any(-1)
    valid = labels >= 0
    label_log_p = log_p.gather(-1, labels.clamp(min=0).long().unsqueeze(-1)).squeeze(-1)
    with torch.no_grad():
        p = log_p.exp()
        two = p.topk(2, -1).values
        # argmax alone may return any of several maxima: this takes the first
        prediction = (x == x.amax(-1, keepdim=True)).byte().argmax(-1)
        entropy = -torch.where(p > 0, p * log_p, 0).sum(-1)
        undefined = torch.where(defined, 0.0, float("nan")).to(x.dtype)
    return PerSample(
        loss=torch.where(valid, 0 - label_log_p, 0),
        confidence=two[..., 0] + undefined,
        prediction=torch.where(defined, prediction, -1),
        margin=two[..., 0] - two[..., 1] + undefined,
        entropy=entropy + undefined,
    )


def _check(logits: Tensor, labels: Tensor) -> None:
    check_dense(logits=logits, labels=labels)
    shape = logits.shape
    if not logits.is_floating_point() or not shape or shape[-1] < 2:
        raise ValueError(f"logits: {logits.dtype} {tuple(shape)}: expected floats [..., C] with C of 2 or more")
    if labels.dtype not in LABEL_TYPES or labels.shape != shape[:-1]:
        raise ValueError(f"labels: {labels.dtype} {tuple(labels.shape)}: expected int32 or int64 {tuple(shape[:-1])}")
    if labels.device != logits.device:
        raise ValueError(f"labels: on {labels.device}: expected {logits.device}, like the logits")


def _out_of_range(labels: Tensor, classes: int) -> str:
    row = int(((labels < -1) | (labels >= classes)).flatten().nonzero()[0])
    return f"labels: {int(labels.flatten()[row])} at sample {row}: expected 0 to {classes - 1}, or -1 to ignore"


def fill_native(
    logits: Tensor,
    labels: Tensor,
    out: PerSample,
    first: int = 0,
    classes: int | None = None,
    state: Tensor | None = None,
    top: Tensor | None = None,
    **options: int,
) -> None:
    """Fills the results by compiled code. Raises ValueError for a label out of range.

    The logits may be columns first..first+columns of all `classes`. `state`, float32 [6 N], then carries the running
    values of the rows from one call to the next. top: float32 [N], receives the largest logits. options: `isa` and
    `threads` of `native.call`.
    """
    classes = logits.shape[1] if classes is None else classes
    wrong = native.call("per_sample", logits, labels, *out, first, classes, state, top, **options)
    if wrong >= 0:
        raise ValueError(_out_of_range(labels, classes))


def _forward(logits: Tensor, labels: Tensor) -> PerSample:
    check_memory(logits=logits, labels=labels)
    if logits.dtype in ELEMENT_TYPES and logits.is_cpu and native.available():
        record_call("per_sample", "cpu")
        if not logits.is_contiguous() and logits.stride(1) != 1:
            logits = logits.contiguous()
        out, classes = empty_results(labels), logits.shape[1]
        logits = logits.resolve_neg()  # integers are never negated lazily
        if native.call_resolved("per_sample", (logits, labels, *out), 0, classes, None, None) >= 0:
            raise ValueError(_out_of_range(labels, classes))
        return out
    if logits.dtype in ELEMENT_TYPES and logits.is_cuda and gpu.available():
        from tadperf.kernels.gpu import per_sample as triton

        record_call("per_sample", "cuda")
        return triton.per_sample(logits.detach(), labels)
    record_call("per_sample", None)
    with torch.no_grad():
        return per_sample_reference(logits, labels)


@torch.library.custom_op("tadperf::per_sample", mutates_args=())
def _operator(logits: Tensor, labels: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    _check(logits, labels)
    if logits.ndim != 2:
        return per_sample(logits, labels)[:]
    return _forward(logits, labels)[:]  # a plain tuple


@_operator.register_fake
def _(logits: Tensor, labels: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    dtype = torch.float64 if logits.dtype == torch.float64 else torch.float32
    loss, confidence, margin, entropy = (logits.new_empty(labels.shape, dtype=dtype) for _ in range(4))
    return loss, confidence, labels.new_empty(labels.shape, dtype=torch.int64), margin, entropy


def loss_gradient(
    logits: Tensor,
    labels: Tensor,
    top: Tensor,
    confidence: Tensor,
    scale: Tensor,
    out: Tensor,
    first: int = 0,
    classes: int | None = None,
) -> Tensor:
    """Fills `out` with (exp(logits - top) * confidence - onehot(labels)) * scale, and 0 where a label is -1 (tadperf).

    logits: [N, C], or columns first..first+C of all `classes`. out: [N, C], contiguous; may be `logits` itself.
    top (the largest logit of all classes), confidence, scale: float32 [N], contiguous. Compiled for float32. Raises
    ValueError for wrong shapes, types or devices.
    """
    _check_gradient(logits, labels, top, confidence, scale, out)
    if logits.is_cuda and gpu.available():
        from tadperf.kernels.gpu import per_sample as triton

        record_call("per_sample_gradient", "cuda")
        return triton.loss_gradient(logits, labels, top, confidence, scale, out, first, classes)
    compiled = native.available() and logits.is_cpu and logits.dtype == out.dtype == torch.float32
    if not compiled or logits.stride(1) != 1:
        record_call("per_sample_gradient", None)
        p = (logits.float() - top[:, None]).exp_().mul_(confidence[:, None])
        index = torch.arange(first, first + logits.shape[1], device=labels.device)
        gradient = (p - (index == labels[:, None]).float()) * scale[:, None]
        return out.copy_(torch.where(labels[:, None] >= 0, gradient, 0))
    record_call("per_sample_gradient", "cpu")
    native.call("per_sample_gradient", logits, labels, top, confidence, scale, out, first)
    return out


def _check_gradient(
    logits: Tensor, labels: Tensor, top: Tensor, confidence: Tensor, scale: Tensor, out: Tensor
) -> None:
    check_dense(logits=logits, labels=labels, top=top, confidence=confidence, scale=scale, out=out)
    if logits.ndim != 2 or not logits.is_floating_point():
        raise ValueError(f"logits: {logits.dtype} {tuple(logits.shape)}: expected floats [N, C]")
    if labels.dtype not in (torch.int32, torch.int64):
        raise ValueError(f"labels: {labels.dtype}: expected int32 or int64")
    check_like("labels", labels, logits.shape[:1], labels.dtype, logits.device)
    check_like("out", out, logits.shape, logits.dtype, logits.device)
    for name, x in (("top", top), ("confidence", confidence), ("scale", scale)):
        check_like(name, x, logits.shape[:1], torch.float32, logits.device)
    for name, x in (("top", top), ("confidence", confidence), ("scale", scale), ("out", out)):
        if not x.is_contiguous():
            raise ValueError(f"{name}: strides {x.stride()}: expected a contiguous tensor")
    check_memory(logits=logits, labels=labels, top=top, confidence=confidence, scale=scale, out=out)


@torch.library.custom_op("tadperf::per_sample_gradient", mutates_args=())
def _gradient(logits: Tensor, labels: Tensor, prediction: Tensor, confidence: Tensor, scale: Tensor) -> Tensor:
    if logits.ndim == 2:
        check_like("prediction", prediction, logits.shape[:1], torch.int64, logits.device)
    top = logits.gather(1, prediction.clamp(min=0)[:, None])[:, 0].float()
    out = torch.empty_like(logits, memory_format=torch.contiguous_format)
    return loss_gradient(logits.resolve_neg(), labels, top, confidence.contiguous(), scale.contiguous(), out)


@_gradient.register_fake
def _(logits: Tensor, labels: Tensor, prediction: Tensor, confidence: Tensor, scale: Tensor) -> Tensor:
    return torch.empty_like(logits, memory_format=torch.contiguous_format)


def _save_for_second(ctx: Any, inputs: tuple[Tensor, ...], output: Tensor) -> None:
    logits, labels, _, _, scale = inputs
    ctx.save_for_backward(logits, labels, scale)


def _second_backward(ctx: Any, upstream: Tensor) -> tuple[Tensor | None, ...]:
    """Differentiates (p - onehot) * scale in plain PyTorch, so that autograd can differentiate the result again."""
    logits, labels, scale = ctx.saved_tensors
    counts = (labels >= 0).unsqueeze(-1)
    p, v = logits.float().softmax(-1), upstream.float()
    mean = (p * v).sum(-1, keepdim=True)
    grad_logits = torch.where(counts, p * (v - mean) * scale.unsqueeze(-1), 0).to(logits.dtype)
    grad_scale = torch.where(counts, mean - v.gather(-1, labels.clamp(min=0).long().unsqueeze(-1)), 0).squeeze(-1)
    return grad_logits, None, None, None, grad_scale


_gradient.register_autograd(_second_backward, setup_context=_save_for_second)


def _save(ctx: Any, inputs: tuple[Tensor, Tensor], output: tuple[Tensor, ...]) -> None:
    _, confidence, prediction, *_ = output
    ctx.save_for_backward(*inputs, prediction, confidence)


def _backward(ctx: Any, loss_grad: Tensor, *_: Tensor | None) -> tuple[Tensor, None]:
    logits, labels, prediction, confidence = ctx.saved_tensors
    if logits.dtype in ELEMENT_TYPES and logits.ndim == 2:
        return torch.ops.tadperf.per_sample_gradient(logits, labels, prediction, confidence, loss_grad), None
    scale = torch.where(labels >= 0, loss_grad, 0).unsqueeze(-1)
    p = logits.to(loss_grad.dtype).softmax(-1)
    index = labels.clamp(min=0).long().unsqueeze(-1)
    grad = p.scatter_add(-1, index, torch.full_like(scale, -1)) * scale
    return torch.where(labels.unsqueeze(-1) >= 0, grad, 0).to(logits.dtype), None


_operator.register_autograd(_backward, setup_context=_save)
