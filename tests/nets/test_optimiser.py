"""The rules of SGD, Muon and GSAM, in their forms for a CPU and for CUDA."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F

from tadperf.config import NetConfig
from tadperf.nets import optimiser
from tadperf.nets.architectures import build
from tadperf.nets.flat import FlatNet
from tadperf.nets.training import Recipe, accuracy, fit

pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.mark.parametrize("step", [optimiser.sgd_step, optimiser.fused_sgd_step], ids=["CPU", "CUDA"])
@pytest.mark.parametrize(("momentum", "decay"), [(0.0, 0.0), (0.9, 0.0), (0.9, 5e-4), (0.0, 0.1)])
def test_sgd_equals_that_of_pytorch(momentum, decay, step):
    generator = torch.Generator().manual_seed(1)
    ours = torch.randn(3, 4, generator=generator), torch.randn(5, generator=generator)
    theirs = [p.clone() for p in ours]
    reference = torch.optim.SGD(theirs, 0.1, momentum, weight_decay=decay)
    velocity = tuple(map(torch.zeros_like, ours))
    for _ in range(4):
        gradients = tuple(torch.randn(p.shape, generator=generator) for p in ours)
        for p, g in zip(theirs, gradients, strict=True):
            p.grad = g.clone()
        reference.step()
        step(ours, velocity, gradients, 0.1, momentum, decay)
        for a, b in zip(ours, theirs, strict=True):
            torch.testing.assert_close(a, b, rtol=1e-6, atol=1e-7)


def test_the_fused_step_takes_a_rate_on_the_device_and_gradients_of_other_strides():
    """The gradient of a convolution of one input channel may come with strides that the fused operator refuses."""
    weight = torch.randn(4, 1, 3, 3, generator=torch.Generator().manual_seed(0))
    gradient = torch.arange(36.0).view(4, 3, 3, 1).permute(0, 3, 1, 2)
    assert gradient.stride() != weight.stride()
    expected, velocity = weight - 0.5 * gradient, (torch.zeros_like(weight),)
    optimiser.fused_sgd_step((weight,), velocity, (gradient,), torch.tensor(0.5), 0.9, 0.0)
    torch.testing.assert_close(weight, expected)
    assert torch.equal(velocity[0], gradient)


@pytest.mark.parametrize("compute", [optimiser.gsam_gradient, optimiser.gsam_gradient_foreach], ids=["CPU", "CUDA"])
@pytest.mark.parametrize("alpha", [0.0, 0.3, 2.0])
def test_gsam_gradient_equals_its_definition(alpha, compute):
    """Compares with the formula, in float64 with the parameters as one vector."""
    images, labels = torch.randn(6, 1, 8, 8, generator=torch.Generator().manual_seed(0)), torch.arange(6) % 3
    module = build(NetConfig(depth=1, width=4), (1, 8, 8), 3, 0).double()
    parameters = tuple(module.parameters())
    before = [p.detach().clone() for p in parameters]
    ours = compute(
        lambda: torch.autograd.grad(F.cross_entropy(module(images.double()), labels), parameters),
        parameters,
        0.5,
        alpha,
    )
    assert all(torch.equal(p, b) for p, b in zip(parameters, before, strict=True))
    net = FlatNet(module)
    theta = net.flatten()

    def gradient(at: torch.Tensor) -> torch.Tensor:
        at = at.clone().requires_grad_()
        return torch.autograd.grad(F.cross_entropy(net(at, images.double()), labels), at)[0]

    here = gradient(theta)
    above = gradient(theta + 0.5 * theta**2 * here / (theta * here).norm())
    along = above / above.norm()
    truth = above - alpha * (here - (here @ along) * along)
    torch.testing.assert_close(torch.cat([g.flatten() for g in ours]), truth, rtol=1e-9, atol=1e-12)
    assert (truth - here).norm() > 1e-3 * here.norm()


def test_muon_equals_that_of_pytorch_for_matrices_and_kernels_and_sgd_for_the_rest():
    """The hidden matrix and the kernel, as a matrix [A, C H W], take Muon; biases and the classifier take SGD."""
    generator = torch.Generator().manual_seed(1)
    shapes = [(6, 2, 3, 3), (6,), (4, 8), (4,), (3, 4), (3,)]  # a kernel, a tall and wide matrix, the classifier
    ours = tuple(torch.randn(shape, generator=generator) for shape in shapes)
    theirs = [p.clone().flatten(1) if p.ndim > 1 else p.clone() for p in ours]
    muon = torch.optim.Muon([theirs[0], theirs[2]], 0.05, weight_decay=0.02, momentum=0.9)
    sgd = torch.optim.SGD([theirs[1], *theirs[3:]], 0.05, momentum=0.9, weight_decay=0.02)
    velocity = tuple(map(torch.zeros_like, ours))
    for _ in range(4):
        gradients = tuple(torch.randn(p.shape, generator=generator) for p in ours)
        for p, g in zip(theirs, gradients, strict=True):
            p.grad = g.clone().view(p.shape)
        muon.step()
        sgd.step()
        optimiser.muon_step(ours, velocity, gradients, 0.05, 0.9, 0.02)
        for a, b in zip(ours, theirs, strict=True):
            torch.testing.assert_close(a.view(b.shape), b, rtol=1e-6, atol=1e-7)


@pytest.mark.parametrize("shape", [(5, 3), (3, 5), (4, 4)])
def test_one_step_of_muon_by_hand_in_float64(shape):
    """The Newton-Schulz steps map each singular value by one polynomial and keep the singular vectors."""
    matrix = torch.randn(shape, generator=torch.Generator().manual_seed(2), dtype=torch.float64)
    u, s, vh = torch.linalg.svd(matrix, full_matrices=False)
    s = s / s.norm()
    for _ in range(5):
        s = 3.4445 * s - 4.7750 * s**3 + 2.0315 * s**5
    assert ((s > 0.6) & (s < 1.3)).all()
    torch.testing.assert_close(optimiser.orthogonalise(matrix, torch.float64), (u * s) @ vh, rtol=1e-9, atol=1e-12)
    rough = optimiser.orthogonalise(matrix)
    assert float((rough.double() - (u * s) @ vh).abs().max()) < 0.05  # bfloat16
    weight, head = torch.zeros(shape), torch.zeros(2, 2)
    velocity = torch.zeros(shape), torch.zeros(2, 2)
    optimiser.muon_step((weight, head), velocity, (matrix.float(), torch.ones(2, 2)), 0.1, 0.5, 0.0)
    expected = -0.1 * max(1, shape[0] / shape[1]) ** 0.5 * (u * s) @ vh  # the direction of the first step is g
    assert float((weight - expected).abs().max()) < 0.01
    torch.testing.assert_close(head, torch.full((2, 2), -0.1))


def test_a_student_learns_with_muon():
    images = torch.randn(30, 1, 8, 8, generator=torch.Generator().manual_seed(0))
    labels = torch.arange(30) % 3
    recipe = Recipe(60, 30, 0.1, 0.9, 5e-4, "none", optimizer="muon")
    nets = [build(NetConfig(depth=1, width=4), (1, 8, 8), 3, 0) for _ in range(3)]
    for net, chosen in zip(nets, (recipe, recipe, recipe._replace(optimizer="sgd")), strict=True):
        fit(net, images, labels, chosen, 0)
    one, again, sgd = (FlatNet(net).flatten() for net in nets)
    assert torch.equal(one, again)
    assert not torch.allclose(one, sgd)
    assert accuracy(nets[0], images, labels) > 0.9
