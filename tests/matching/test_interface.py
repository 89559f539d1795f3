"""`tadperf.matching.adjoint` in foreign code: its gradients equal those of a full unroll in float64."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from tadperf.errors import UserError
from tadperf.matching import FlatNet, Gradient, Step, adjoint, repeatable, step_backends

CLASSES, COUNT, BATCH, RATE = 4, 6, 4, 0.2
pytestmark = pytest.mark.usefixtures("one_thread")


class ForeignConvNet(nn.Module):
    """Has the structure of the published ConvNets: blocks in `features`, then one linear layer."""

    def __init__(self, depth: int = 2, width: int = 5, norm: type[nn.Module] | None = None) -> None:
        super().__init__()
        layers: list[nn.Module] = []
        for channels in [3] + [width] * (depth - 1):
            norm_layer = nn.GroupNorm(width, width, affine=True) if norm is None else norm(width)
            layers += [nn.Conv2d(channels, width, 3, padding=1), norm_layer, nn.ReLU(inplace=True), nn.AvgPool2d(2, 2)]
        self.features = nn.Sequential(*layers)
        self.classifier = nn.Linear(width * (8 // 2**depth) ** 2, CLASSES)

    def forward(self, x: Tensor) -> Tensor:
        maps = self.features(x)
        return self.classifier(maps.view(maps.size(0), -1))


class MLP(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.hidden, self.out = nn.Linear(3 * 8 * 8, 7), nn.Linear(7, CLASSES)

    def forward(self, x: Tensor) -> Tensor:
        return self.out(torch.tanh(self.hidden(x.flatten(1))))


class Problem:
    """A foreign matching script in float64: three steps on six images."""

    def __init__(self, net: nn.Module, labels: Tensor | None = None) -> None:
        generator = torch.Generator().manual_seed(1)

        def normal(*shape: int) -> Tensor:
            return torch.randn(shape, generator=generator, dtype=torch.float64)

        self.net = net.double()
        self.start = [p.detach() + 0.3 * normal(*p.shape) for p in net.parameters()]
        self.target = [p + 0.1 * normal(*p.shape) for p in self.start]
        self.images, self.lr = normal(COUNT, 3, 8, 8), torch.tensor(RATE, dtype=torch.float64)
        self.labels = torch.arange(COUNT) % CLASSES if labels is None else labels
        self.rows = [torch.randperm(COUNT, generator=generator)[:BATCH] for _ in range(3)]

    def adjoint(self, augmentations: list[Any] | None = None, **options: Any) -> Gradient:
        steps = [Step(*item) for item in zip(self.rows, *([augmentations] if augmentations else []), strict=True)]
        return adjoint(self.net, self.start, self.target, self.images, self.labels, self.lr, steps, **options)

    def unroll(self, loss: Callable[[Tensor, Tensor], Tensor], augmentations: list[Any] | None = None) -> list[Tensor]:
        """Returns the loss and the gradients by images, lr and soft labels of a plain unrolled loop."""
        names = [name for name, _ in self.net.named_parameters()]
        inputs = [self.images.clone().requires_grad_(), self.lr.clone().requires_grad_()]
        labels = self.labels.clone()
        if labels.is_floating_point():
            inputs.append(labels.requires_grad_())
        theta = [p.clone().requires_grad_() for p in self.start]
        for i, rows in enumerate(self.rows):
            x = inputs[0][rows]
            x = augmentations[i](x) if augmentations else x
            logits = torch.func.functional_call(self.net, dict(zip(names, theta, strict=True)), (x,))
            grads = torch.autograd.grad(loss(logits, labels[rows]), theta, create_graph=True)
            theta = [p - inputs[1] * g for p, g in zip(theta, grads, strict=True)]
        end, target, start = (torch.cat([p.flatten() for p in parts]) for parts in (theta, self.target, self.start))
        distance, expert = (end - target).square().sum(), (target - start).square().sum()
        return [(distance / expert).detach(), *torch.autograd.grad(distance / expert, inputs)]


def assert_equal(found: Gradient, expected: list[Tensor], tolerance: float = 1e-9) -> None:
    ours = [found.loss, found.images, found.lr] + ([] if found.labels is None else [found.labels])
    assert len(ours) == len(expected)
    for a, b in zip(ours, expected, strict=True):
        assert b.norm() > 0
        assert float((a - b).norm() / b.norm()) < tolerance


def soft(probabilities: bool) -> Tensor:
    logits = torch.randn(COUNT, CLASSES, generator=torch.Generator().manual_seed(2), dtype=torch.float64)
    labels = logits.softmax(1) if probabilities else logits
    if probabilities:
        labels[0] = torch.eye(CLASSES)[1]  # zeros, whose logarithm is infinite
    return labels


def focal(logits: Tensor, labels: Tensor) -> Tensor:
    chosen = logits.log_softmax(1).gather(1, labels[:, None])
    return -((1 - chosen.exp()) ** 2 * chosen).sum() / 3


def squared(logits: Tensor, labels: Tensor) -> Tensor:
    return (logits.tanh() - labels).square().mean()


def linear(logits: Tensor, labels: Tensor) -> Tensor:
    return -logits.gather(1, labels[:, None]).mean()


def of_logits(logits: Tensor, labels: Tensor) -> Tensor:
    return F.cross_entropy(logits, labels.softmax(1))


LOSSES = {
    "classes": (None, F.cross_entropy, {}),
    "logits": (soft(False), of_logits, {}),
    "probabilities": (soft(True), F.cross_entropy, {"probabilities": True}),
    "focal": (None, focal, {"loss": focal}),
    "squared": (soft(False), squared, {"loss": squared}),
    "linear": (
        None,
        lambda z, y: z.gather(1, y[:, None]).mean(),
        {"loss": lambda z, y: z.gather(1, y[:, None]).mean()},
    ),
}


@pytest.mark.parametrize("make", [ForeignConvNet, MLP])
@pytest.mark.parametrize("name", LOSSES)
def test_every_loss_has_the_gradient_of_the_unroll(make, name):
    labels, loss, options = LOSSES[name]
    p = Problem(make(), labels)
    assert step_backends.eager(FlatNet(p.net)).name == ("formulas" if make is ForeignConvNet else "autograd")
    assert_equal(p.adjoint(**options), p.unroll(loss))


def noisy(x: Tensor) -> Tensor:
    """Draws from the global generator, as DSA's published code does."""
    scale = 1 + torch.rand(len(x), 1, 1, 1, dtype=x.dtype)
    return torch.roll(x * scale, int(torch.randint(4, ())), 2)


def test_a_random_augmentation_is_drawn_once_for_each_step():
    torch.manual_seed(5)
    p = Problem(ForeignConvNet())
    augmentations = [repeatable(noisy) for _ in p.rows]
    state = torch.get_rng_state()
    found = p.adjoint(augmentations)
    assert torch.equal(torch.get_rng_state(), state)
    assert_equal(found, p.unroll(F.cross_entropy, augmentations))
    first, second = (augmentation(p.images) for augmentation in augmentations[:2])
    assert torch.equal(first, augmentations[0](p.images))
    assert not torch.equal(first, second)


def test_vectors_and_numbers_are_accepted_as_well():
    p = Problem(ForeignConvNet())
    expected = p.adjoint()
    net = FlatNet(p.net)
    start, target = (torch.cat([part.flatten() for part in parts]) for parts in (p.start, p.target))
    steps = [Step(rows) for rows in p.rows]
    found = adjoint(net, start, target, p.images.requires_grad_(), p.labels, RATE, steps)
    assert torch.equal(found.images, expected.images)
    assert not found.images.requires_grad
    tesla = p.adjoint(exact=False)
    assert float((tesla.images - found.images).norm()) > 0


STEP: Any = Step  # a type checker would refuse wrong arguments
BAD_ARGUMENTS: dict[str, tuple[dict[str, Any], str]] = {
    "short start": ({"start": torch.zeros(3)}, r"start: float32 \[3\]: must be a float vector of the network's 474"),
    "start of another network": (
        {"start": [torch.zeros(5, 2, 3, 3)] * 10},
        r"start: 10 tensors: .*features\.0\.weight has \[5, 2, 3, 3\], not \[5, 3, 3, 3\]",
    ),
    "missing tensors": ({"start": [torch.zeros(5, 3, 3, 3)]}, "start: 1 tensors: must be the network's 10 parameters"),
    "target equal to start": ({"target": None}, "target: equal to start: .* use a later epoch"),
    "integer images": ({"images": torch.zeros(COUNT, 3, 8, 8, dtype=torch.uint8)}, r"images: uint8 .* must be float"),
    "too few labels": ({"labels": torch.zeros(2, dtype=torch.int64)}, r"labels: int64 \[2\]: .*each of the 6 images"),
    "no steps": ({"steps": []}, "steps: none: must hold at least one Step"),
    "rows without a Step": ({"steps": [torch.arange(3)]}, r"steps\[0\]: Tensor: must be a Step"),
    "rows as a list": ({"steps": [STEP([0, 1])]}, r"steps\[0\]\.rows: list: must be int64 \[B\]"),
    "rows as floats": ({"steps": [Step(torch.ones(2))]}, r"steps\[0\]\.rows: float32 \[2\]: must be int64"),
    "rows out of range": ({"steps": [Step(torch.tensor([0, 6]))]}, r"steps: row 6: must be in 0\.\.5"),
    "augmentation by name": ({"steps": [STEP(torch.arange(2), "flip")]}, r"steps\[0\]\.drawn: str: must be a function"),
    "learning rates": ({"lr": torch.ones(3)}, r"lr: float64 \[3\]: must be one number"),
    "logits as probabilities": (
        {"labels": torch.full((COUNT, CLASSES), 3.0), "probabilities": True},
        "labels: row 0 sums to 12: .* leave out probabilities=True if they are logits",
    ),
    "classes as probabilities": ({"probabilities": True}, r"labels: int64 \[6\]: must be float \[M, K\]"),
    "probabilities and a loss": ({"probabilities": True, "loss": focal}, "probabilities: True: .* leave it out"),
    "soft labels of one column": ({"labels": torch.ones(COUNT)}, r"labels: float32 \[6\]: must be int64 \[M\], or"),
}


@pytest.mark.parametrize("name", BAD_ARGUMENTS)
def test_wrong_arguments_are_refused_in_one_line(name):
    changed, message = BAD_ARGUMENTS[name]
    p = Problem(ForeignConvNet())
    values = {"start": p.start, "target": p.target, "images": p.images, "labels": p.labels, "lr": p.lr}
    values["steps"] = [Step(rows) for rows in p.rows]
    values |= {"target": p.start} if changed == {"target": None} else changed
    with pytest.raises(UserError, match=message) as error:
        adjoint(p.net, **values)
    assert "\n" not in str(error.value)


def test_batch_norm_is_refused_with_its_name():
    p = Problem(ForeignConvNet(norm=nn.BatchNorm2d))
    with pytest.raises(UserError, match=r"network: ForeignConvNet: features\.1 \(BatchNorm2d\) has running statistics"):
        p.adjoint()
