"""Loss, confidence, prediction, margin and entropy of every sample, in one read of the logits.

With p = softmax(x) over the C classes of one row x, and its given label y:

    loss        -log p_y               0 where y is -1
    confidence  max p
    prediction  argmax x               the lowest index among equals; -1 where p is undefined
    margin      largest p minus second largest p
    entropy     -sum p log p           a class of probability 0 adds 0

A logit of -inf is a class of probability 0. Where softmax is undefined (a NaN or +inf in the row, or all -inf), every
result is NaN and the prediction is -1; the loss of an ignored row is 0 even there. Only the loss has a gradient:
softmax(x) - onehot(y), 0 for an ignored row.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from tadperf.kernels import gpu, native

ELEMENTS = {torch.float32: 0, torch.bfloat16: 1, torch.float16: 2}  # as kernels/cpu/per_sample.h numbers them


class PerSample(NamedTuple):
    """What `per_sample` gives, each in the batch shape of its logits; `prediction` is int64, the others floats."""

    loss: Tensor
    confidence: Tensor
    prediction: Tensor
    margin: Tensor
    entropy: Tensor


def per_sample(logits: Tensor, labels: Tensor) -> PerSample:
    """Loss, confidence, prediction, margin and entropy of each sample (tadperf; see this module's first lines).

    logits: float [..., C], C >= 2, any strides. labels: int32 or int64 [...], in 0..C-1, or -1 to ignore.
    Returns float32 (float64 for float64 logits) [...]; losses and entropies are in nats. float32, bfloat16 and float16
    run compiled code on a CPU, on torch.get_num_threads() threads with the same bits for any number of them, and a
    Triton kernel on CUDA; the rest runs `per_sample_reference`. Raises ValueError for shapes, types or labels that do
    not fit. On CUDA labels out of range are not looked for, as that would wait for the device: their loss is NaN.
    """
    _check(logits, labels)
    if logits.ndim != 2:
        flat = per_sample(logits.reshape(-1, logits.shape[-1]), labels.reshape(-1))
        return PerSample(*(result.view(labels.shape) for result in flat))
    if torch.compiler.is_compiling() or (logits.requires_grad and torch.is_grad_enabled()):
        loss, *others = _operator(logits, labels)
        return PerSample(loss, *(result.detach() for result in others))
    return _forward(logits, labels)  # the dispatcher would cost tens of microseconds


def per_sample_reference(logits: Tensor, labels: Tensor) -> PerSample:
    """`per_sample` in plain PyTorch, on any device and float dtype; differentiable by autograd to any order."""
    _check(logits, labels)
    x = logits if logits.dtype == torch.float64 else logits.float()
    if ((labels < -1) | (labels >= x.shape[-1])).any():
        raise ValueError(_out_of_range(labels, x.shape[-1]))
    log_p = x.log_softmax(-1)
    defined = ~log_p.isnan().any(-1)
    valid = labels >= 0
    picked = log_p.gather(-1, labels.clamp(min=0).long().unsqueeze(-1)).squeeze(-1)
    with torch.no_grad():
        p = log_p.exp()
        two = p.topk(2, -1).values
        # argmax documents no order among equals: take the first index that holds the maximum
        prediction = (x == x.amax(-1, keepdim=True)).byte().argmax(-1)
        entropy = -torch.where(p > 0, p * log_p, 0).sum(-1)
        undefined = torch.where(defined, 0.0, float("nan")).to(x.dtype)
    return PerSample(
        loss=torch.where(valid, 0 - picked, 0),
        confidence=two[..., 0] + undefined,
        prediction=torch.where(defined, prediction, -1),
        margin=two[..., 0] - two[..., 1] + undefined,
        entropy=entropy + undefined,
    )


def _check(logits: Tensor, labels: Tensor) -> None:
    if not logits.is_floating_point() or logits.ndim < 1 or logits.shape[-1] < 2:
        raise ValueError(f"logits: {logits.dtype} {tuple(logits.shape)}: expected floats [..., C] with C of 2 or more")
    if labels.dtype not in (torch.int32, torch.int64) or labels.shape != logits.shape[:-1]:
        raise ValueError(
            f"labels: {labels.dtype} {tuple(labels.shape)}: expected int32 or int64 {tuple(logits.shape[:-1])}"
        )
    if labels.device != logits.device:
        raise ValueError(f"labels: on {labels.device}: expected {logits.device}, where the logits are")


def _out_of_range(labels: Tensor, classes: int) -> str:
    row = int(((labels < -1) | (labels >= classes)).flatten().nonzero()[0])
    return f"labels: {int(labels.flatten()[row])} at sample {row}: expected 0 to {classes - 1}, or -1 to ignore"


def empty_results(labels: Tensor) -> PerSample:
    """Room for float32 results of labels [N], on their device whatever the default one is."""
    n = labels.shape
    return PerSample(
        loss=labels.new_empty(n, dtype=torch.float32),
        confidence=labels.new_empty(n, dtype=torch.float32),
        prediction=labels.new_empty(n, dtype=torch.int64),
        margin=labels.new_empty(n, dtype=torch.float32),
        entropy=labels.new_empty(n, dtype=torch.float32),
    )


def fill_native(logits: Tensor, labels: Tensor, out: PerSample, isa: int, threads: int, *part: int) -> None:
    """Runs the compiled loops on checked CPU tensors; `part`: first column, classes, addresses of state and top."""
    module = native.module()
    assert module is not None
    assert logits.stride(1) == 1 or 0 in logits.shape or logits.shape[1] == 1
    wrong = module.per_sample(
        logits.data_ptr(),
        ELEMENTS[logits.dtype],
        *logits.shape,
        logits.stride(0),
        labels.data_ptr(),
        labels.dtype == torch.int64,
        labels.stride(0),
        *[result.data_ptr() for result in out],
        isa,
        threads,
        *part,
    )
    if wrong >= 0:
        raise ValueError(_out_of_range(labels, part[1] if part else logits.shape[1]))


def _forward(logits: Tensor, labels: Tensor) -> PerSample:
    if logits.dtype in ELEMENTS and logits.is_cpu and native.available():
        if logits.stride(1) != 1 or logits.is_neg():
            logits = logits.resolve_neg().contiguous()
        out = empty_results(labels)
        fill_native(logits, labels, out, native.isa_index(), torch.get_num_threads())
        return out
    if logits.dtype in ELEMENTS and logits.is_cuda and gpu.available():
        from tadperf.kernels.gpu import per_sample as twin

        return twin.per_sample(logits.detach(), labels)
    with torch.no_grad():
        return per_sample_reference(logits, labels)


@torch.library.custom_op("tadperf::per_sample", mutates_args=())
def _operator(logits: Tensor, labels: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
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
    """Fills `out` with (exp(logits - top) * confidence - onehot(labels)) * scale, 0 where a label is -1 (tadperf).

    logits: [N, C], or columns first..first+C of more `classes`; out: [N, C], contiguous, or `logits` itself; top (the
    largest logit of all classes), confidence, scale: float32 [N], contiguous. Compiled for float32.
    """
    if logits.is_cuda and gpu.available():
        from tadperf.kernels.gpu import per_sample as twin

        return twin.loss_gradient(logits, labels, top, confidence, scale, out, first, classes)
    module = native.module()
    if module is None or not logits.is_cpu or not logits.dtype == out.dtype == torch.float32 or logits.stride(1) != 1:
        p = (logits.float() - top[:, None]).exp_().mul_(confidence[:, None])
        index = torch.arange(first, first + logits.shape[1], device=labels.device)
        gradient = (p - (index == labels[:, None]).float()) * scale[:, None]
        return out.copy_(torch.where(labels[:, None] >= 0, gradient, 0))
    module.per_sample_gradient(
        logits.data_ptr(),
        out.data_ptr(),
        *logits.shape,
        logits.stride(0),
        first,
        labels.data_ptr(),
        labels.dtype == torch.int64,
        labels.stride(0),
        *[of_row.data_ptr() for of_row in (top, confidence, scale)],
        native.isa_index(),
        torch.get_num_threads(),
    )
    return out


@torch.library.custom_op("tadperf::per_sample_gradient", mutates_args=())
def _gradient(logits: Tensor, labels: Tensor, prediction: Tensor, confidence: Tensor, scale: Tensor) -> Tensor:
    top = logits.gather(1, prediction.clamp(min=0)[:, None])[:, 0].float()
    out = torch.empty_like(logits, memory_format=torch.contiguous_format)
    return loss_gradient(logits.resolve_neg(), labels, top, confidence, scale.contiguous(), out)


@_gradient.register_fake
def _(logits: Tensor, labels: Tensor, prediction: Tensor, confidence: Tensor, scale: Tensor) -> Tensor:
    return torch.empty_like(logits, memory_format=torch.contiguous_format)


def _save_for_second(ctx, inputs, output) -> None:
    logits, labels, _, _, scale = inputs
    ctx.save_for_backward(logits, labels, scale)


def _second_backward(ctx, upstream: Tensor):
    """Through (p - onehot) * scale, in plain PyTorch, which differentiates it in its turn."""
    logits, labels, scale = ctx.saved_tensors
    counts = (labels >= 0).unsqueeze(-1)
    p, v = logits.float().softmax(-1), upstream.float()
    mean = (p * v).sum(-1, keepdim=True)
    of_logits = torch.where(counts, p * (v - mean) * scale.unsqueeze(-1), 0).to(logits.dtype)
    of_scale = torch.where(counts, mean - v.gather(-1, labels.clamp(min=0).long().unsqueeze(-1)), 0).squeeze(-1)
    return of_logits, None, None, None, of_scale


_gradient.register_autograd(_second_backward, setup_context=_save_for_second)


def _save(ctx, inputs: tuple[Tensor, Tensor], output) -> None:
    _, confidence, prediction, *_ = output
    ctx.save_for_backward(*inputs, prediction, confidence)


def _backward(ctx, loss_grad: Tensor, *_: Tensor | None) -> tuple[Tensor, None]:
    logits, labels, prediction, confidence = ctx.saved_tensors
    if logits.dtype in ELEMENTS and logits.ndim == 2:
        return _gradient(logits, labels, prediction, confidence, loss_grad), None
    scale = torch.where(labels >= 0, loss_grad, 0).unsqueeze(-1)
    p = logits.to(loss_grad.dtype).softmax(-1)
    index = labels.clamp(min=0).long().unsqueeze(-1)
    grad = p.scatter_add(-1, index, torch.full_like(scale, -1)) * scale
    return torch.where(labels.unsqueeze(-1) >= 0, grad, 0).to(logits.dtype), None


_operator.register_autograd(_backward, setup_context=_save)
