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

from tadperf.kernels import native


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
    Returns float32 (float64 for float64 logits) [...]; losses and entropies are in nats. float32 on a CPU runs
    compiled code on torch.get_num_threads() threads, with the same bits for any number of them; the rest runs
    `per_sample_reference`. Raises ValueError for shapes, types or labels that do not fit.
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


def _out_of_range(labels: Tensor, classes: int) -> str:
    row = int(((labels < -1) | (labels >= classes)).flatten().nonzero()[0])
    return f"labels: {int(labels.flatten()[row])} at sample {row}: expected 0 to {classes - 1}, or -1 to ignore"


def _native(logits: Tensor, labels: Tensor) -> PerSample:
    logits, labels = logits.detach(), labels.detach()
    if logits.stride(1) != 1:
        logits = logits.contiguous()
    floats = [torch.empty(len(labels)) for _ in range(4)]
    out = PerSample(floats[0], floats[1], torch.empty(len(labels), dtype=torch.int64), floats[2], floats[3])
    module, isa = native.module(), native.isa_index()
    assert module is not None
    if module.per_sample(logits, labels, *out, isa, torch.get_num_threads()) >= 0:
        raise ValueError(_out_of_range(labels, logits.shape[1]))
    return out


def _forward(logits: Tensor, labels: Tensor) -> PerSample:
    if logits.dtype == torch.float32 and logits.device.type == "cpu" == labels.device.type and native.available():
        return _native(logits, labels)
    with torch.no_grad():
        return per_sample_reference(logits, labels)


@torch.library.custom_op("tadperf::per_sample", mutates_args=())
def _operator(logits: Tensor, labels: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    return tuple(_forward(logits, labels))


@_operator.register_fake
def _(logits: Tensor, labels: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    dtype = torch.float64 if logits.dtype == torch.float64 else torch.float32
    loss, confidence, margin, entropy = (logits.new_empty(labels.shape, dtype=dtype) for _ in range(4))
    return loss, confidence, labels.new_empty(labels.shape, dtype=torch.int64), margin, entropy


def _save(ctx, inputs: tuple[Tensor, Tensor], output) -> None:
    ctx.save_for_backward(*inputs)


def _backward(ctx, loss_grad: Tensor, *_: Tensor | None) -> tuple[Tensor, None]:
    logits, labels = ctx.saved_tensors
    scale = torch.where(labels >= 0, loss_grad, 0).unsqueeze(-1)
    p = logits.to(loss_grad.dtype).softmax(-1)
    index = labels.clamp(min=0).long().unsqueeze(-1)
    grad = p.scatter_add(-1, index, torch.full_like(scale, -1)) * scale
    return torch.where(labels.unsqueeze(-1) >= 0, grad, 0).to(logits.dtype), None


_operator.register_autograd(_backward, setup_context=_save)
