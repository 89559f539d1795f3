"""`layer_chain` reads foreign networks by their structure, and refuses all that it cannot see."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from tadperf.matching.convnet_second_order import convnet_form
from tadperf.matching.layer_chain import layer_chain


class ConvNet(nn.Module):
    """Blocks in `features`, then one linear layer. `run` replaces the usual forward."""

    def __init__(self, run: Callable[..., Tensor] | None = None) -> None:
        super().__init__()
        block = [nn.Conv2d(3, 4, 3, padding=1), nn.GroupNorm(4, 4), nn.ReLU(inplace=True), nn.AvgPool2d(2, 2)]
        self.features, self.classifier = nn.Sequential(*block), nn.Linear(64, 2)
        self.scale = nn.Identity()
        self.run = run

    def forward(self, x: Tensor) -> Tensor:
        if self.run is not None:
            return self.run(self, x)
        x = self.features(x)
        return self.classifier(x.view(x.size(0), -1))


FLATTENINGS: dict[str, Callable[[Tensor], Tensor]] = {
    "view by size": lambda x: x.view(x.size(0), -1),
    "view by all sizes": lambda x: x.view(x.size()[0], -1),
    "view by shape": lambda x: x.view(x.shape[0], -1),
    "reshape": lambda x: x.reshape(x.shape[0], -1),
    "flatten": lambda x: x.flatten(1),
    "function": lambda x: torch.flatten(x, 1),
    "keyword": lambda x: torch.flatten(x, start_dim=1),
}


@pytest.mark.parametrize("name", FLATTENINGS)
def test_the_usual_ways_to_flatten_are_known(name):
    net = ConvNet(lambda net, x: net.classifier(FLATTENINGS[name](net.features(x))))
    chain = layer_chain(net)
    assert chain is not None
    types = [nn.Conv2d, nn.GroupNorm, nn.ReLU, nn.AvgPool2d, nn.Flatten, nn.Linear]
    assert [type(item.layer) for item in chain] == types
    assert [item.name for item in chain[:4]] == [f"features.{i}" for i in range(4)]
    form = convnet_form(net)
    assert form is not None
    assert (form.blocks[0].conv, form.blocks[0].norm, form.classifier) == ("features.0", "features.1", "classifier")


def without_gradients(net: ConvNet, x: Tensor) -> Tensor:
    with torch.no_grad():
        x = net.features(x)
    return net.classifier(x.flatten(1))


def in_autocast(net: ConvNet, x: Tensor) -> Tensor:
    with torch.autocast("cpu", torch.bfloat16):
        x = net.features(x)
    return net.classifier(x.flatten(1))


def by_data(net: ConvNet, x: Tensor) -> Tensor:
    return net.classifier(net.features(x if x.sum() > 0 else -x).flatten(1))


UNKNOWN: dict[str, Callable[[ConvNet, Tensor], Tensor]] = {
    "scaled logits": lambda net, x: 2 * net.classifier(net.features(x).flatten(1)),
    "scaled images": lambda net, x: net.classifier(net.features(x / 255).flatten(1)),
    "residual": lambda net, x: net.classifier(net.features(x).flatten(1)) + x.mean(),
    "features alone": lambda net, x: net.features(x).flatten(1),
    "detached": lambda net, x: net.classifier(net.features(x).detach().flatten(1)),
    "without gradients": without_gradients,
    "autocast": in_autocast,
    "depends on the data": by_data,
    "parameter in use": lambda net, x: net.classifier(net.features(x).flatten(1)) + net.classifier.bias,
    "two layers in parallel": lambda net, x: net.classifier(net.features(x).flatten(1)) * net.scale(x).mean(),
    "blocks twice": lambda net, x: net.classifier(net.features(net.features(x)[:, :3]).flatten(1)),
    "view of another batch": lambda net, x: net.classifier(net.features(x).view(x.size(0), -1)),
    "view by its last side": lambda net, x: net.classifier(net.features(x).view(x.size(-1), -1)),
    "flattened twice": lambda net, x: net.classifier(net.features(x).flatten(1).flatten(0)),
    "some images": lambda net, x: net.classifier(net.features(x[0:2]).flatten(1)),
    "dropout": lambda net, x: net.classifier(F.dropout(net.features(x), 0.5).flatten(1)),
    "fails": lambda net, x: net.get_submodule("missing")(x),
}


@pytest.mark.parametrize("name", UNKNOWN)
def test_other_networks_are_no_convnet(name):
    assert convnet_form(ConvNet()) is not None
    assert convnet_form(ConvNet(UNKNOWN[name])) is None


def doubled(module: nn.Module, inputs: Any, output: Any) -> Any:
    return 2 * output


def test_hooks_parameters_and_calls_that_the_graph_does_not_show_are_refused():
    hooked = ConvNet()
    hooked.register_forward_hook(doubled)
    assert layer_chain(hooked) is None
    extra = ConvNet()
    extra.temperature = nn.Parameter(torch.ones(()))
    assert convnet_form(extra) is None

    class Called(ConvNet):
        def __call__(self, x: Tensor) -> Tensor:
            return 2 * super().__call__(x)

    assert convnet_form(Called()) is None

    class TwoInputs(ConvNet):
        def forward(self, x: Tensor, scale: float = 1.0) -> Tensor:
            return super().forward(x)

    assert convnet_form(TwoInputs()) is None
    with torch.autocast("cpu", torch.bfloat16):
        assert convnet_form(ConvNet()) is None
    with torch.no_grad():
        assert convnet_form(ConvNet()) is not None
