"""Grad-CAM against maps computed by hand, and its picture."""

from __future__ import annotations

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from PIL import Image
from torch import nn

from tadperf.config import NetConfig
from tadperf.data.normalise import Normaliser
from tadperf.nets.architectures import Residual, build
from tadperf.report.drawing import MARGIN
from tadperf.report.gradcam import CAPTION, CELL, GAP, HEAD, HEAT, grad_cam, heat_colours, overlay, save_gradcam

pytestmark = pytest.mark.usefixtures("one_thread")
NAMES = ("convnet", "resnet10", "resnet18", "alexnet", "vgg11", "densenet121")


def linear(kernels: list[float], weights: list[list[float]]) -> nn.Module:
    """y_c = sum_k v_ck mean(w_k x): feature maps are multiples of the image."""
    conv, last = nn.Conv2d(1, len(kernels), 1, bias=False), nn.Linear(len(kernels), len(weights), bias=False)
    conv.weight.data = torch.tensor(kernels).view(-1, 1, 1, 1)
    last.weight.data = torch.tensor(weights)
    return nn.Sequential(conv, nn.AdaptiveAvgPool2d(1), nn.Flatten(), last)


def test_a_linear_network_with_a_known_map():
    """alpha_k = v_ck / (H W): the map is ReLU(x sum_k v_ck w_k / (H W)), here of factors 5, -5 and 0."""
    net = linear([1.0, -2.0], [[1.0, -2.0], [-1.0, 2.0], [2.0, 1.0]])
    x = torch.randn(6, 1, 5, 5, generator=torch.Generator().manual_seed(0))
    classes = torch.tensor([0, 0, 1, 1, 2, 2])
    result = grad_cam(net, x, classes)
    raw = (torch.tensor([5.0, 5, -5, -5, 0, 0])[:, None, None] * x[:, 0]).relu()
    highest = raw.flatten(1).amax(1)[:, None, None]
    torch.testing.assert_close(result.maps, torch.where(highest > 0, raw / highest, 0.0))
    torch.testing.assert_close(result.probability, net(x).softmax(1))
    assert result.maps[4:].eq(0).all()


@pytest.mark.parametrize("name", NAMES)
def test_every_network_against_the_formula(name):
    """Compares with hooks on the last feature maps, one image at a time, in float64."""
    net = build(NetConfig.model_validate({"name": name, "width": 8}), (3, 32, 32), 4, 0)
    net.double().train()
    last = [part for part in net.children() if isinstance(part, (nn.ReLU, Residual))][-1]
    x = torch.randn(3, 3, 32, 32, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    classes = torch.tensor([3, 0, 2])
    result = grad_cam(net, x, classes)
    assert net.training
    assert not any(p.grad is not None for p in net.parameters())
    maps: list[torch.Tensor] = []

    def store(module: nn.Module, inputs: object, output: torch.Tensor) -> None:
        maps.append(output)

    handle = last.register_forward_hook(store)
    for i in range(3):
        y = net(x[i : i + 1])[0, classes[i]]
        (slope,) = torch.autograd.grad(y, maps[-1])
        heat = torch.zeros(maps[-1].shape[2:], dtype=torch.float64)
        for k in range(slope.shape[1]):
            heat += slope[0, k].mean() * maps[-1][0, k].detach()
        heat = F.interpolate(heat.clamp(min=0)[None, None].float(), (32, 32), mode="bilinear")[0, 0]
        torch.testing.assert_close(result.maps[i], heat / heat.max() if heat.max() > 0 else heat, rtol=1e-4, atol=1e-5)
    handle.remove()


def test_a_map_does_not_depend_on_other_images_of_the_batch():
    net = build(NetConfig.model_validate({"width": 8, "depth": 2}), (1, 8, 8), 10, 0).eval()
    x, classes = torch.randn(5, 1, 8, 8), torch.tensor([1, 2, 3, 4, 5])
    together = grad_cam(net, x, classes).maps
    alone = torch.cat([grad_cam(net, x[i : i + 1], classes[i : i + 1]).maps for i in range(5)])
    torch.testing.assert_close(together, alone, rtol=1e-4, atol=1e-5)
    with torch.no_grad():  # as during an evaluation
        assert torch.equal(grad_cam(net, x, classes).maps, together)


def test_a_network_without_feature_maps_is_refused():
    for net in (nn.Linear(2, 2), nn.Sequential(nn.Flatten(), nn.Linear(4, 2)), nn.Sequential(nn.Conv2d(1, 1, 1))):
        with pytest.raises(ValueError, match=f"net: {type(net).__name__}: must be a Sequential that ends in pools"):
            grad_cam(net, torch.zeros(1, 1, 2, 2), torch.tensor([0]))


def test_colours_run_from_dark_to_bright():
    values = heat_colours(np.linspace(0, 1, 101))
    assert (values[0].round().tolist(), values[-1].round().tolist()) == (list(HEAT[0]), list(HEAT[-1]))
    assert (np.diff(values @ [0.299, 0.587, 0.114]) > 0).all()


@pytest.mark.parametrize("channels", [1, 3])
def test_every_overlay_is_drawn_below_its_image(tmp_path, channels):
    net = build(NetConfig.model_validate({"width": 4, "depth": 1}), (channels, 8, 8), 3, 0).eval()
    normaliser = Normaliser(torch.zeros(channels), torch.ones(channels))
    generator = torch.Generator().manual_seed(0)
    rows = {
        name: (
            torch.randint(0, 256, (count, channels, 8, 8), dtype=torch.uint8, generator=generator),
            torch.arange(count) % 3,
        )
        for name, count in (("real", 12), ("refined", 2))
    }
    save_gradcam(tmp_path / "g.png", net, normaliser, rows, ("ant", "bee", "cat"))
    drawn = np.asarray(Image.open(tmp_path / "g.png"))
    scale, step = CELL // 8, 2 * (CELL + GAP) + CAPTION
    for row, (pixels, classes) in enumerate(rows.values()):
        mixed = overlay(pixels, grad_cam(net, normaliser(pixels), classes).maps)
        y = MARGIN + HEAD + row * step
        for i in range(min(len(pixels), 10)):
            plain = pixels[i].permute(1, 2, 0).expand(-1, -1, 3).numpy().repeat(scale, 0).repeat(scale, 1)
            (x,) = (x for x in range(drawn.shape[1] - CELL) if np.array_equal(drawn[y : y + CELL, x : x + CELL], plain))
            below = drawn[y + CELL + GAP : y + 2 * CELL + GAP, x : x + CELL]
            assert np.abs(below.astype(int) - mixed[i].repeat(scale, 0).repeat(scale, 1)).max() <= 1
    assert drawn.shape[1] < 12 * (CELL + GAP)  # ten of the twelve
