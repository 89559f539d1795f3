"""The adjoint for other people's matching code: any network, augmentation and twice differentiable loss, checked."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from tadperf.data.augment import Draw
from tadperf.data.dataset import describe_tensor
from tadperf.errors import UserError
from tadperf.matching import gradient, step_backends
from tadperf.matching.convnet_second_order import Loss
from tadperf.matching.gradient import Gradient, Step
from tadperf.nets.flat import FlatNet

SUM_TOLERANCE = 1e-3  # by how much the probabilities of a label may differ from 1 in their sum; not tuned


def adjoint(
    net: nn.Module | FlatNet,
    start: Tensor | Sequence[Tensor],
    target: Tensor | Sequence[Tensor],
    images: Tensor,
    labels: Tensor,
    lr: Tensor | float,
    steps: Sequence[Step],
    *,
    loss: Loss | None = None,
    probabilities: bool = False,
    exact: bool = True,
) -> Gradient:
    """Returns the matching loss and its gradients by images, soft labels and learning rate, at constant memory in T.

    Checks its arguments and calls `tadperf.matching.gradient.adjoint`, which has the equations. The images, labels and
    lr that an unrolled loop would differentiate need no requires_grad: set their `grad` from the result.

    net: any module whose forward takes images and returns logits. A ConvNet with instance norm (tadperf's, or one with
    `features` and `classifier` as in published code) uses explicit second derivatives, other networks use autograd.
    It has its own parameters: give the network itself, not the ReparamModule that MTT's scripts wrap it in.
    start, target: the parameters theta_0 and the expert's later ones, in the order of `net.parameters()`: one vector
    [P], or a list of tensors. images: float [M, C, H, W]. labels: int64 [M], or float [M, K]. lr: scalar.
    steps: the T inner steps; `Step(rows)` or `Step(rows, augmentation)`. See `repeatable` for random augmentations.
    loss: a function (logits [B, K], labels of the batch) -> scalar that can be differentiated twice; the default is the
    mean cross-entropy. probabilities: float labels are class probabilities, not logits; for the default loss only.
    exact: False gives TESLA's approximation.
    Raises UserError for arguments that do not fit, and for a network with buffers, such as batch norm's statistics.
    """
    net = net if isinstance(net, FlatNet) else FlatNet(net)
    start, target = (_flat(name, values, net) for name, values in (("start", start), ("target", target)))
    if torch.equal(start, target):
        raise UserError("target", "equal to start", "the matching loss divides by their distance; use a later epoch")
    _check_images(images, labels, steps)
    lr = torch.as_tensor(lr, dtype=start.dtype, device=start.device).detach()
    if lr.numel() != 1:
        raise UserError("lr", describe_tensor(lr), "must be one number")
    if probabilities:
        _check_probabilities(labels, loss)
        loss = F.cross_entropy
    elif loss is None and labels.is_floating_point() and labels.ndim != 2:
        raise UserError("labels", describe_tensor(labels), "must be int64 [M], or float [M, K] for soft labels")
    backend = step_backends.eager(net, loss=loss)
    return gradient.adjoint(net, start, target, images, labels, lr.reshape(()), steps, exact, backend)


def repeatable(augmentation: Callable[[Tensor], Tensor]) -> Callable[[Tensor], Tensor]:
    """Returns a random augmentation that draws the same values at every call, for `Step` (tadperf).

    The adjoint applies an augmentation in the forward and in the backward sweep. The values come from a seed that is
    drawn from PyTorch's CPU generator now; the state of the generators is the same before and after each call.
    augmentation: draws with PyTorch's global generators only, not with those of NumPy or Python.
    """
    seed = int(torch.randint(2**62, ()))

    def run(x: Tensor) -> Tensor:
        devices = [x.device] if x.is_cuda else []
        with torch.random.fork_rng(devices=devices):
            torch.default_generator.manual_seed(seed)  # torch.manual_seed would reseed all CUDA devices
            if x.is_cuda:
                with torch.cuda.device(x.device):
                    torch.cuda.manual_seed(seed)
            return augmentation(x)

    return run


def _flat(name: str, values: Tensor | Sequence[Tensor], net: FlatNet) -> Tensor:
    """Returns parameters as one vector [P]; raises UserError if their shapes are not those of the network."""
    if not isinstance(values, Tensor):
        shapes = [value.shape for value in values]
        if shapes != net.shapes:
            pairs = zip(net.names, net.shapes, shapes, strict=False)
            wrong = next((f"{n} has {list(b)}, not {list(a)}" for n, a, b in pairs if a != b), "")
            remedy = f"must be the network's {len(net.shapes)} parameters in their order" + (wrong and f": {wrong}")
            raise UserError(name, f"{len(shapes)} tensors", remedy)
        values = torch.cat([value.detach().reshape(-1) for value in values])
    if values.shape != (net.num_parameters,) or not values.is_floating_point():
        remedy = f"must be a float vector of the network's {net.num_parameters} parameters, or a list of them"
        raise UserError(name, describe_tensor(values), remedy)
    return values.detach()


def _check_images(images: Tensor, labels: Tensor, steps: Sequence[Step]) -> None:
    if images.ndim < 2 or not images.is_floating_point():
        raise UserError("images", describe_tensor(images), "must be float [M, C, H, W]")
    if labels.shape[:1] != images.shape[:1]:
        raise UserError("labels", describe_tensor(labels), f"must have a label for each of the {len(images)} images")
    if not steps:
        raise UserError("steps", "none", "must hold at least one Step")
    for i, step in enumerate(steps):
        if not isinstance(step, Step):
            raise UserError(f"steps[{i}]", type(step).__name__, "must be a Step(rows, augmentation)")
        rows, drawn = step
        if not isinstance(rows, Tensor) or (rows.dtype, rows.ndim) != (torch.int64, 1) or not len(rows):
            kind = describe_tensor(rows) if isinstance(rows, Tensor) else type(rows).__name__
            raise UserError(f"steps[{i}].rows", kind, "must be int64 [B], the rows of the images of the step")
        if not isinstance(drawn, Draw) and not callable(drawn):
            raise UserError(f"steps[{i}].drawn", type(drawn).__name__, "must be a function of the images, or a Draw")
    rows = torch.cat([step.rows for step in steps])
    low, high = int(rows.min()), int(rows.max())
    if low < 0 or high >= len(images):
        raise UserError("steps", f"row {low if low < 0 else high}", f"must be in 0..{len(images) - 1}")


def _check_probabilities(labels: Tensor, loss: Loss | None) -> None:
    if loss is not None:
        raise UserError("probabilities", True, "only tells the default loss what labels are; leave it out with a loss")
    if not labels.is_floating_point() or labels.ndim != 2:
        raise UserError("labels", describe_tensor(labels), "must be float [M, K] with probabilities=True")
    sums = labels.detach().sum(1)
    if float(labels.detach().min()) < 0 or float((sums - 1).abs().max()) > SUM_TOLERANCE:
        row = int((sums - 1).abs().argmax())
        remedy = "must be probabilities that sum to 1; leave out probabilities=True if they are logits"
        raise UserError("labels", f"row {row} sums to {float(sums[row]):.4g}", remedy)
