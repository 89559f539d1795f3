"""The networks: shapes, parameter counts, seeds, the flat form and the fused form."""

from __future__ import annotations

from typing import get_args

import pytest
import torch

from tadperf.config import NetConfig
from tadperf.config.schema import Network
from tadperf.errors import UserError
from tadperf.nets.architectures import build, norm_layer
from tadperf.nets.flat import FlatNet
from tadperf.nets.fused import fused_forward

pytestmark = pytest.mark.usefixtures("one_thread")


NAMES = get_args(Network)


def config(name: str = "convnet", **values: object) -> NetConfig:
    return NetConfig.model_validate({"name": name, **values})


@pytest.mark.parametrize("channels", [1, 3])
@pytest.mark.parametrize("size", [8, 28, 32, 64])
@pytest.mark.parametrize("name", NAMES)
def test_every_network_accepts_every_image_shape(name, size, channels):
    with torch.no_grad():
        net = build(config(name, width=16), (channels, size, size), 7, 0)
        x = torch.randn(2, channels, size, size)
        logits = net(x)
        assert logits.shape == (2, 7)
        assert logits.isfinite().all()
        assert (logits[0] - logits[1]).abs().max() > 1e-4  # the image reaches the logits
        assert not torch.equal(net(x.flip(1 if channels == 3 else 3)), logits)


# Counted by hand: weights and biases of the convolutions, scale and shift of the norms, and the linear layer.
@pytest.mark.parametrize(
    ("shape", "classes", "count"),
    [
        ((3, 32, 32), 10, 320_010),  # CIFAR-10; MTT's and FTD's code give the same number
        ((3, 32, 32), 100, 320_010 + 90 * (2048 + 1)),
        ((3, 64, 64), 200, 320_010 + 190 * (2048 + 1) + 128 * 128 * 9 + 3 * 128),  # a fourth block
        ((1, 28, 28), 10, 320_010 - 2 * 9 * 128),
    ],
)
def test_the_convnet_has_the_known_number_of_parameters(shape, classes, count):
    assert FlatNet(build(config(), shape, classes, 0)).num_parameters == count


def test_the_config_sets_depth_and_width():
    net = build(config(depth=2, width=5), (3, 32, 32), 10, 0)
    convolutions = [m for m in net.modules() if isinstance(m, torch.nn.Conv2d)]
    assert [(c.in_channels, c.out_channels) for c in convolutions] == [(3, 5), (5, 5)]
    deep = build(config(depth=5, width=8), (1, 8, 8), 10, 0)  # after 1 x 1 the map keeps its size
    assert deep(torch.randn(2, 1, 8, 8)).isfinite().all()


# For CIFAR-10 and batch norm. ResNet-18, VGG-11 and DenseNet-121: as in the usual public code for CIFAR. ResNet-10,
# counted from ResNet-18: less one basic block of 64, 128, 256 and 512 channels each. AlexNet: counted below.
def block(channels: int) -> int:
    """Returns the parameters of a basic block without a projection: two 3 x 3 convolutions and two norms."""
    return 2 * 9 * channels**2 + 4 * channels


def alexnet_count() -> int:
    """Returns weights and biases of the five convolutions and of the linear layer on 192 maps of 4 x 4."""
    planes, kernels = (3, 128, 192, 256, 192, 192), (5, 5, 3, 3, 3)
    convolutions = (k * k * a + 1 for k, a in zip(kernels, planes, strict=False))
    return sum(size * b for size, b in zip(convolutions, planes[1:], strict=True)) + 10 * (192 * 16 + 1)


@pytest.mark.parametrize(
    ("name", "count"),
    [
        ("resnet18", 11_173_962),
        ("resnet10", 11_173_962 - sum(map(block, (64, 128, 256, 512)))),
        ("vgg11", 9_231_114),
        ("densenet121", 6_956_298),
        ("alexnet", alexnet_count()),
    ],
)
def test_networks_have_the_known_number_of_parameters(name, count):
    module = build(config(name, norm="batch"), (3, 32, 32), 10, 0)
    assert sum(p.numel() for p in module.parameters()) == count
    instance = build(config(name, norm="instance"), (3, 32, 32), 10, 0)
    assert sum(p.numel() for p in instance.parameters()) == count


def test_densenet121_has_121_layers():
    """120 convolutions and one linear layer, without counting norms and pools."""
    module = build(config("densenet121"), (3, 32, 32), 10, 0)
    layers = [m for m in module.modules() if isinstance(m, (torch.nn.Conv2d, torch.nn.Linear))]
    assert len(layers) == 121
    assert [m.in_features for m in layers if isinstance(m, torch.nn.Linear)] == [1024]


@pytest.mark.parametrize("name", [name for name in NAMES if name.endswith("bn")])
def test_names_that_end_with_bn_have_batch_norm(name):
    module = build(config(name), (3, 8, 8), 4, 1)
    plain = build(config(name.removesuffix("bn"), norm="batch"), (3, 8, 8), 4, 1)
    norms = [type(m) for m in module.modules() if isinstance(m, (torch.nn.BatchNorm2d, torch.nn.GroupNorm))]
    assert set(norms) == {torch.nn.BatchNorm2d}
    assert all(torch.equal(a, b) for a, b in zip(module.parameters(), plain.parameters(), strict=True))
    with pytest.raises(UserError, match="has running statistics"):
        FlatNet(module)


@pytest.mark.parametrize("norm", ["instance", "batch", "group", "layer", "none"])
def test_norms_equal_those_of_pytorch(norm):
    x = 3 * torch.randn(4, 8, 6, 6) + 2
    truth = {
        "instance": torch.nn.InstanceNorm2d(8),
        "batch": torch.nn.BatchNorm2d(8),
        "group": torch.nn.GroupNorm(4, 8),
        "layer": torch.nn.LayerNorm([8, 6, 6]),
        "none": torch.nn.Identity(),
    }[norm]
    torch.testing.assert_close(norm_layer(norm, 8, 6)(x), truth(x), rtol=1e-5, atol=1e-5)


def test_instance_norm_of_one_pixel_is_not_zero():
    x = torch.randn(3, 8, 1, 1)
    y = norm_layer("instance", 8, 1)(x)
    torch.testing.assert_close(y.squeeze(), torch.nn.functional.layer_norm(x.squeeze(), [8]))
    assert y.std() > 0.9


def test_weights_depend_on_the_seed_alone():
    torch.manual_seed(123)
    before = torch.get_rng_state()
    one = FlatNet(build(config(width=8), (3, 8, 8), 4, 5)).flatten()
    assert torch.equal(torch.get_rng_state(), before)
    torch.randn(100)
    assert torch.equal(FlatNet(build(config(width=8), (3, 8, 8), 4, 5)).flatten(), one)
    assert not torch.equal(FlatNet(build(config(width=8), (3, 8, 8), 4, 6)).flatten(), one)


@pytest.mark.parametrize("name", [name for name in NAMES if not name.endswith("bn")])
def test_the_flat_network_equals_the_module_bit_for_bit(name):
    module = build(config(name, width=8), (3, 8, 8), 4, 1)
    flat, x = FlatNet(module), torch.randn(3, 3, 8, 8)
    theta = flat.flatten()
    assert theta.shape == (flat.num_parameters,)
    with torch.no_grad():
        assert torch.equal(flat(theta, x), module(x))
        other = build(config(name, width=8), (3, 8, 8), 4, 2)
        assert torch.equal(flat(FlatNet(other).flatten(), x), other(x))  # the weights come from the vector
    assert torch.equal(flat.flatten(), theta)
    views = flat.views(theta)
    assert torch.equal(torch.cat([v.flatten() for v in views.values()]), theta)
    for key, parameter in module.named_parameters():
        assert torch.equal(views[key], parameter)
        assert views[key].untyped_storage().data_ptr() == theta.untyped_storage().data_ptr()  # a view
    theta.zero_()
    assert any(p.any() for p in module.parameters())  # flatten() returned a copy


def test_running_statistics_are_refused():
    with pytest.raises(UserError, match="has running statistics"):
        FlatNet(build(config(norm="batch"), (3, 8, 8), 4, 1))


@pytest.mark.parametrize("channels", [1, 3])
@pytest.mark.parametrize(
    ("name", "norm", "size"),
    [
        ("convnet", "instance", 8),
        ("convnet", "instance", 28),
        ("convnet", "instance", 6),
        ("convnet", "batch", 8),
        ("convnet", "group", 8),
        ("convnet", "none", 8),
        ("vgg11", "instance", 8),
        ("resnet18", "instance", 8),
        ("resnet10", "batch", 8),
        ("densenet121", "batch", 8),
        ("alexnet", "instance", 8),
    ],
)
def test_the_fused_form_equals_the_network(name, norm, size, channels):
    """Compares logits and gradients with the network in float64. The error may be 4 times that of plain float32."""
    net = config(name, width=7, norm=norm, **({"depth": 2} if name == "convnet" else {}))
    x = torch.randn(5, channels, size, size, generator=torch.Generator().manual_seed(1))
    labels = torch.arange(5)

    def gradients(module: torch.nn.Module, predict, x: torch.Tensor) -> list[torch.Tensor]:
        logits = predict(x)
        loss = torch.nn.functional.cross_entropy(logits, labels)
        return [
            logits,
            *torch.autograd.grad(loss, list(module.parameters()), allow_unused=True, materialize_grads=True),
        ]

    module = build(net, (channels, size, size), 5, 0)
    for parameter in module.parameters():  # scales, shifts and biases that are not 1 or 0
        parameter.data += 0.1 * torch.randn(parameter.shape, generator=torch.Generator().manual_seed(2))
    fused = gradients(module, fused_forward(module), x)
    float32 = gradients(module, module, x)
    module = module.double()
    float64 = gradients(module, module, x.double())
    for value, single, truth in zip(
        *([v.detach() for v in values] for values in (fused, float32, float64)), strict=True
    ):
        scale = float(truth.abs().max()) + 1e-3
        assert float((value - truth).abs().max()) <= 4 * float((single - truth).abs().max()) + 2e-5 * scale


def test_the_fused_form_refuses_a_second_derivative():
    from tadperf.kernels import native

    if not native.available():
        pytest.skip("the native operators are not built, so nothing is fused")
    module = build(config(depth=1, width=4), (1, 8, 8), 3, 0)
    loss = fused_forward(module)(torch.randn(2, 1, 8, 8)).square().sum()
    with pytest.raises(RuntimeError, match="no second derivative"):
        torch.autograd.grad(loss, list(module.parameters()), create_graph=True, allow_unused=True)
